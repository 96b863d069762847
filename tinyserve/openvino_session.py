"""A model file in OpenVINO's own runtime, which runs 8-bit models faster on CPUs than ONNX Runtime.

``pip install 'tinyserve[openvino]'`` installs it beside ONNX Runtime; ONNX Runtime's own OpenVINO
provider comes in a package that would have to take the place of the one that brings CUDA.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from tinyserve.devices import OPENVINO, import_openvino
from tinyserve.modelfile import METADATA_KEY, Port, read_document


class OpenVinoSession:
    """The answers of ONNX Runtime's CPU provider, but for rounding.

    What is not in 8 bits is computed in single precision, but in files of ``fp16``: that is in the
    half precision of the CPU, where it has one, on most that do bfloat16.

    ``streams`` calls of :meth:`run` proceed at once and share ``threads`` CPU threads; more wait.
    """

    provider = OPENVINO

    def __init__(self, path: Path, *, threads: int, streams: int) -> None:
        openvino = import_openvino()
        self.runtime = f"OpenVINO {openvino.__version__}"
        # Left to itself, OpenVINO tries every format on what is no ONNX, and they complain aloud.
        frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        model = frontend.convert(frontend.load(str(path)))
        key = ["framework", METADATA_KEY]
        document = model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None
        self.card = read_document(path, document, _ports(model.inputs), _ports(model.outputs))
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": max(threads, streams),
            "NUM_STREAMS": streams,
            # Pinned threads share the first cores with the pinned threads of other processes.
            "ENABLE_CPU_PINNING": False,
        }
        # On an AMD EPYC the rest of 8-bit files was no faster in bfloat16, and further off.
        if self.card.precision != "fp16":
            options["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self._requests: SimpleQueue[Any] = SimpleQueue()
        # One more than run at once: it is there when another ends, before Python hears of that.
        for _ in range(streams + 1):
            self._requests.put(compiled.create_infer_request())
        self._count, self._alone = streams + 1, streams == 1
        self._lost = False
        _SESSIONS.add(self)

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities; see :meth:`tinyserve.engine.Engine.run`."""
        if self._lost:
            raise RuntimeError("its threads are not in this forked process; load the model here")
        request = self._requests.get()
        try:
            (probabilities,) = request.infer([images], share_inputs=True).values()
        finally:
            self._requests.put(request)
        return np.asarray(probabilities)

    def after_fork(self) -> None:
        """In the new process, where the threads are missing that streams beside the first have, and
        any that were at work: to wait for them would last for ever."""
        self._lost = not self._alone or self._requests.qsize() < self._count


_SESSIONS: "WeakSet[OpenVinoSession]" = WeakSet()


def _after_fork() -> None:
    for session in list(_SESSIONS):
        session.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _ports(ports: Iterable[Any]) -> list[Port]:
    return [
        (
            port.any_name,
            port.element_type.to_dtype().name,
            tuple(d.get_length() if d.is_static else "batch" for d in port.partial_shape),
        )
        for port in ports
    ]
