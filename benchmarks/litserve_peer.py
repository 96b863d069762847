"""The peer of ``benchmarks/serving.py``: the same file behind LitServe, with its own batching.

Runs in a Python of its own that has litserve, python-multipart and the requirements of tinyserve.
The pictures are decoded and the model is run by the very functions that ``tinyserve serve`` uses,
or, with ``--usual``, as most would: with Pillow, and an ONNX Runtime session as it comes.
"""

import argparse
import socket
from typing import Any

import litserve
import numpy as np
import onnxruntime
from litserve import LitAPI, LitServer
from PIL import Image

from tinyserve import images
from tinyserve.engine import Engine


class Peer(LitAPI):
    def __init__(self, path: str, device: str, batch_size: int) -> None:
        # The shortest wait for company that LitServe takes: one that finds the device idle.
        super().__init__(max_batch_size=batch_size, batch_timeout=0.001)
        self.path, self.device_wanted = path, device

    def setup(self, device: str) -> None:  # noqa: ARG002
        self.engine = Engine(self.path, device=self.device_wanted)

    def decode_request(self, request: litserve.server.Request) -> np.ndarray:
        return images.load(request["file"].file.read(), size=self.engine.card.image_size)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        return self.engine.run(pixels)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, list[float]]:
        return {"probabilities": output.tolist()}


class UsualPeer(Peer):
    def setup(self, device: str) -> None:  # noqa: ARG002
        provider = "CPU" if self.device_wanted == "cpu" else "CUDA"
        self.session = onnxruntime.InferenceSession(
            self.path, providers=[f"{provider}ExecutionProvider"]
        )
        self.input = self.session.get_inputs()[0]

    def decode_request(self, request: litserve.server.Request) -> np.ndarray:
        picture: Any = Image.open(request["file"].file).convert("RGB")
        if picture.size != (self.input.shape[2], self.input.shape[1]):
            picture = picture.resize((self.input.shape[2], self.input.shape[1]))
        return np.asarray(picture)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = self.session.run(None, {self.input.name: pixels})[0]
        return probabilities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--usual", action="store_true")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    print(f"listening on 127.0.0.1:{port}", flush=True)
    peer = UsualPeer if arguments.usual else Peer
    server = LitServer(
        peer(arguments.model, arguments.device, arguments.batch_size),
        accelerator="cuda" if arguments.device == "cuda" else "cpu",
        workers_per_device=1,
    )
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
