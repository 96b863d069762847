"""A model file in ONNX Runtime: on CPUs, and on NVIDIA GPUs through CUDA or TensorRT."""

# Without this, types of an ONNX Runtime that has lost its files could not be named, and nothing
# would be left to say so.
from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyserve.bound_batches import BoundBatches
from tinyserve.devices import CPU, CUDA, TENSORRT, sums_bytes_exactly
from tinyserve.errors import DeviceError
from tinyserve.modelfile import (
    INPUT_NAME,
    METADATA_KEY,
    OUTPUT_NAME,
    ModelCard,
    Port,
    read_document,
)

# The default is to search exhaustively for the fastest convolutions, again for every new size of a
# batch, and to transpose images to a layout that tensor cores do not like.
_CUDA = {"cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "1"}


def execution_providers(device: str, precision: str = "fp32") -> list[tuple[str, dict[str, str]]]:
    """Execution providers of ONNX Runtime and their options, the preferred one first.

    ``device`` is ``cuda`` or ``tensorrt``, for anything else it is the CPU; ``precision`` is that
    of the file to run.
    """
    if device not in ("cuda", "tensorrt"):
        return [(CPU, {})]
    # TF32 cuts the factors of float32 products to ten bits, which is coarser than what the gate
    # allows a file to differ. Without it, though, ONNX Runtime keeps convolutions of any type off
    # the tensor cores, those in half precision, too.
    cuda = (CUDA, {**_CUDA, "use_tf32": "1" if precision == "fp16" else "0"})
    # What TensorRT cannot run is left to CUDA.
    return [(TENSORRT, {}), cuda] if device == "tensorrt" else [cuda]


_ERRORS_ONLY = 3  # a severity; ONNX Runtime's warnings are about details nobody can act on
_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


class OnnxRuntimeSession:
    """On the :func:`execution_providers` of a device and no others, or :class:`DeviceError` is
    raised; unless ``strict`` is False, then the CPU does what they cannot.

    As many as ``streams`` calls of :meth:`run` share ``threads`` CPU threads.
    """

    runtime = f"ONNX Runtime {getattr(ort, '__version__', '?')}"

    def __init__(
        self, path: Path, device: str, *, threads: int, streams: int = 1, strict: bool = True
    ) -> None:
        each = max(1, threads // streams)
        options = session_options(each, seven_bits=True)
        # What is in the file has to be known before it is opened to run on a GPU.
        card = None if device == "cpu" else read_unprepared(path)
        providers = execution_providers(device, card.precision if card else "fp32")
        if not strict:
            providers += execution_providers("cpu")
        elif device != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if device == "cuda":
            # Weights and biases of 8-bit files become float32 once, while loading: CUDA has no
            # kernel for 32-bit biases, which would be left to the CPU.
            options.add_session_config_entry("session.disable_quant_qdq", "1")

        def open_session() -> ort.InferenceSession:
            # Its own fallback would print to stdout, and say nothing of what was wrong.
            return ort.InferenceSession(path, options, providers=providers, enable_fallback=False)

        self._session = open_session()
        self.provider: str = self._session.get_providers()[0]
        if strict and self.provider != providers[0][0]:
            raise DeviceError(f"device {device} cannot run: ONNX Runtime chose {self.provider}")
        self.card = card or _card(path, self._session)
        if device == "cpu" and self.card.training is None and not sums_bytes_exactly():
            # Weights of our own export have 7 bits, and are not looked through, which takes longer
            # than all else at the start; those of others may have 8.
            options = session_options(each)
            self._session = open_session()
        self._batches: BoundBatches | None = None
        if self.provider == CUDA:
            sessions = chain([self._session], iter(open_session, None))
            self._batches = BoundBatches(sessions, "cuda", self.card)

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities; see :meth:`tinyserve.engine.Engine.run`."""
        if self._batches is not None:
            return self._batches.run(images)
        (probabilities,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})
        return np.asarray(probabilities)


def session_options(threads: int, *, seven_bits: bool = False) -> ort.SessionOptions:
    """How models are run on the CPU, with so many threads.

    ``seven_bits`` says that weights of 8 bits use no more than 7 of them.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    # Threads that wait by spinning take the cores from whatever else runs: another model, decoding,
    # another process. On two cores the 8-bit models are a third slower with it, even alone.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not seven_bits and not sums_bytes_exactly():
        # Products of 8 bits are added up in 16, which overflow, unless ONNX Runtime makes unsigned
        # weights of signed ones, which is slower. It does so where they have more than 7 bits; to
        # look for these takes a tenth of a second or two.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def read_unprepared(path: Path) -> ModelCard:
    """The card of a file that is not going to run."""
    options = session_options(threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _card(path, ort.InferenceSession(path, options, providers=[CPU]))


def _card(path: Path, session: ort.InferenceSession) -> ModelCard:
    document = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return read_document(
        path, document, _ports(session.get_inputs()), _ports(session.get_outputs())
    )


def _ports(ports: list[ort.NodeArg]) -> list[Port]:
    return [(port.name, _TYPES.get(port.type, port.type), tuple(port.shape)) for port in ports]
