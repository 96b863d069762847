"""Batches of any size, run in a few sizes and in buffers that stay on the device."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyserve.modelfile import INPUT_NAME, OUTPUT_NAME, ModelCard

SIZES = (1, 8, 32, 128, 512)
"""Images of a batch."""

MOST_PIXELS = 512 * 64**2
"""Of a batch: larger images are run fewer at a time, so that they find memory."""

_FEW = 8
"""Images that a GPU is taken to run in hardly more time than one; not measured."""


class BoundBatches:
    """Runs a model on ``device``, in ONNX Runtime's words, such as ``cuda``.

    On a GPU a session plans all its convolutions anew, which takes a tenth of a second or two, when
    a batch is not of the size of the one before. So each of :data:`SIZES` has one of ``sessions``,
    which are of the same file, to itself, and is run once here. Batches are cut into these sizes,
    and the last part is padded. Pixels cross the bus as the bytes that they are. Safe to use from
    several threads: each call has buffers to itself, which the next one takes over.
    """

    def __init__(
        self, sessions: Iterator[ort.InferenceSession], device: str, card: ModelCard
    ) -> None:
        self._device = device
        self._shape = (card.image_size, card.image_size, 3)
        self._classes = len(card.labels)
        most = max(1, MOST_PIXELS // card.image_size**2)
        self._sizes = [size for size in SIZES if size <= most]
        self._sessions = {size: next(sessions) for size in self._sizes}
        self._idle: dict[int, list[_Buffers]] = {size: [] for size in self._sizes}
        for size in self._sizes:
            self._run_padded(np.zeros((size, *self._shape), np.uint8))

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities; see :meth:`tinyserve.engine.Engine.run`."""
        answers = []
        while len(images):
            count = self._at_once(len(images))
            answers.append(self._run_padded(images[:count]))
            images = images[count:]
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def _at_once(self, count: int) -> int:
        """How many of so many images to run next: all, where they are few or fill half of a size,
        or as many as the next smaller size has."""
        place = bisect_left(self._sizes, count)
        if place < len(self._sizes) and (count <= _FEW or 2 * count >= self._sizes[place]):
            return count
        return self._sizes[place - 1]

    def _run_padded(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        size = self._sizes[bisect_left(self._sizes, len(images))]
        try:
            buffers = self._idle[size].pop()
        except IndexError:
            shape = (size, *self._shape)
            buffers = _Buffers(self._sessions[size], self._device, shape, self._classes)
        probabilities = buffers.run(images)
        self._idle[size].append(buffers)
        return probabilities


class _Buffers:
    """Input and output of one batch at a time, bound to the session once."""

    def __init__(
        self, session: ort.InferenceSession, device: str, shape: tuple[int, ...], classes: int
    ) -> None:
        self._session = session
        self._padded = np.zeros(shape, np.uint8)
        self._input = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, device)
        self._output = ort.OrtValue.ortvalue_from_shape_and_type(
            (shape[0], classes), np.float32, device
        )
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(INPUT_NAME, self._input)
        self._binding.bind_ortvalue_output(OUTPUT_NAME, self._output)

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(images)
        if count < len(self._padded):
            # What an earlier batch left behind them is computed, too, and disturbs nothing.
            self._padded[:count] = images
            images = self._padded
        self._input.update_inplace(np.ascontiguousarray(images))
        self._session.run_with_iobinding(self._binding)
        return np.array(self._output.numpy()[:count])
