"""Batches of any size, run in a few sizes and in buffers that stay on the device."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyserve.modelfile import INPUT_NAME, OUTPUT_NAME, ModelCard

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Images of a batch. A device prepares anew for every size that it has not seen: algorithms are
chosen and memory is laid out, which takes longer than many batches."""


class BoundBatches:
    """Runs a session on ``device``, in ONNX Runtime's words, such as ``cuda``.

    Batches are padded to the next of :data:`SIZES`, longer ones are cut, and all sizes are run once
    here. Pixels cross the bus as the bytes that they are. Safe to use from several threads: each
    call has buffers to itself, which the next one takes over.
    """

    def __init__(self, session: ort.InferenceSession, device: str, card: ModelCard) -> None:
        self._session = session
        self._device = device
        self._shape = (card.image_size, card.image_size, 3)
        self._classes = len(card.labels)
        self._idle: dict[int, list[_Buffers]] = {size: [] for size in SIZES}
        for size in SIZES:
            self.run(np.zeros((size, *self._shape), np.uint8))

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities; see :meth:`tinyserve.engine.Engine.run`."""
        if images.shape[1:] != self._shape or images.dtype != np.uint8:
            raise ValueError(f"images of shape {images.shape} and type {images.dtype}")
        most = SIZES[-1]
        parts = [
            self._run_padded(images[start : start + most]) for start in range(0, len(images), most)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run_padded(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(images)
        size = SIZES[bisect_left(SIZES, count)]
        try:
            buffers = self._idle[size].pop()
        except IndexError:
            buffers = _Buffers(self._session, self._device, (size, *self._shape), self._classes)
        probabilities = buffers.run(images)
        self._idle[size].append(buffers)
        return probabilities


class _Buffers:
    """Input and output of one batch at a time, bound to the session once."""

    def __init__(
        self, session: ort.InferenceSession, device: str, shape: tuple[int, ...], classes: int
    ) -> None:
        self._session = session
        self._host = np.zeros(shape, np.uint8)
        self._input = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, device)
        self._output = ort.OrtValue.ortvalue_from_shape_and_type(
            (shape[0], classes), np.float32, device
        )
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(INPUT_NAME, self._input)
        self._binding.bind_ortvalue_output(OUTPUT_NAME, self._output)

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        # What an earlier batch left behind them is computed, too, and disturbs nothing.
        self._host[: len(images)] = images
        self._input.update_inplace(self._host)
        self._session.run_with_iobinding(self._binding)
        return np.array(self._output.numpy()[: len(images)])
