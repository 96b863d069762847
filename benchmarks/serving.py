"""``tinyserve serve`` against the model alone, and against LitServe with the same file.

::

    python benchmarks/serving.py resnet20 inception                  # 1, 8, 64, 256 connections
    python benchmarks/serving.py inception --connections 64 --pixels # raw pixels, nothing to decode
    python benchmarks/serving.py inception --litserve VENV/bin/python     # the same session
    python benchmarks/serving.py inception --litserve VENV/bin/python --device auto
    python benchmarks/serving.py inception --overload 2000           # more than the queue holds

Every connection sends its next request when it has its answer. The server runs in a process of its
own, the clients in this one, and the model alone, in full batches from memory, in turns with both:
only ratios of one run mean something, since all of them share the cores. Where others use the
cores, too, look at CPU time: what the model alone needs for an image, over what the server needs.
"""

import argparse
import asyncio
import json
import math
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from tinyserve import images
from tinyserve.classifier import Classifier
from tinyserve.cli.arguments import model_name
from tinyserve.dataset import walk_images
from tinyserve.devices import device_name

ROOT = Path(__file__).resolve().parent.parent
BATCH = 32
QUEUE = 256


class Connection(asyncio.Protocol):
    """One client: its requests one after the other until it is told to stop, a latency for each."""

    def __init__(self, requests: list[bytes], load: "Load") -> None:
        self.requests = requests
        self.load = load
        self.count = 0
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        if self.load.stopping:
            self.transport.close()
            return
        self.count += 1
        self.began = time.perf_counter()
        self.transport.write(self.requests[self.count % len(self.requests)])

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
        if length is None or len(body) < int(length[1]):
            return
        self.received = b""
        status = int(head[9:12])
        self.load.statuses[status] += 1
        if status == 200:
            self.load.sent.append(self.began)
            self.load.latencies.append(time.perf_counter() - self.began)
            self.send()
        else:
            wait = re.search(rb"retry-after: (\d+)", head, re.IGNORECASE)
            asyncio.get_running_loop().call_later(int(wait[1]) if wait else 1, self.send)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if not self.load.stopping:
            self.load.statuses["lost"] += 1
        self.load.open -= 1


class Load:
    """What some connections got, all open for some seconds, or until one has an answer."""

    def __init__(self) -> None:
        self.sent: list[float] = []
        self.latencies: list[float] = []
        self.statuses: Counter[int | str] = Counter()
        self.stopping = False
        self.open = 0

    async def run(self, port: int, requests: list[bytes], connections: int, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self.open = connections
        for number in range(connections):
            mine = requests[number % len(requests) :] + requests[: number % len(requests)]
            await loop.create_connection(
                lambda mine=mine: Connection(mine, self), "127.0.0.1", port
            )
        self.sent.clear()
        self.latencies.clear()
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        # A busy machine: without an answer no ratios.
        while self.open and not self.latencies and not self.refused:
            await asyncio.sleep(0.05)
        self.per_second = len(self.latencies) / (time.perf_counter() - began)
        self.stopping = True
        while self.open:
            await asyncio.sleep(0.05)

    @property
    def refused(self) -> list[int | str]:
        """The statuses that no later try will change."""
        return [status for status in self.statuses if status not in (200, 503, "lost")]

    def milliseconds(self, quantile: float, after: float = 0) -> float:
        """A quantile of the latencies, of requests sent so many seconds after the first."""
        start = min(self.sent) + after
        both = zip(self.sent, self.latencies, strict=True)
        chosen = [late for sent, late in both if sent >= start]
        return 1000 * float(np.quantile(chosen, quantile)) if chosen else math.nan


def measure(port: int, requests: list[bytes], connections: int, seconds: float) -> Load:
    load = Load()
    asyncio.run(load.run(port, requests, connections, seconds))
    return load


def post(path: str, body: bytes, kind: str, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}"]
    lines += [f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def infer_requests(model: str, files: list[bytes], size: int, *, pixels: bool) -> list[bytes]:
    """Requests of one picture each, in the protocol's binary form, and their answers, too."""
    requests = []
    for data in files:
        if pixels:
            tensor = {"name": "images", "datatype": "UINT8", "shape": [1, size, size, 3]}
            body = images.load(data, size=size).tobytes()
        else:
            tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [1]}
            body = len(data).to_bytes(4, "little") + data
        tensor["parameters"] = {"binary_data_size": len(body)}
        document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
        head = json.dumps(document).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        path = f"/v2/models/{model_name(model)}/infer"
        requests.append(post(path, head + body, "application/octet-stream", **headers))
    return requests


def form_requests(files: list[bytes]) -> list[bytes]:
    """The same pictures as LitServe takes them: as a file in a form."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    bodies = (head + data + b"\r\n--x--\r\n" for data in files)
    return [post("/predict", body, "multipart/form-data; boundary=x") for body in bodies]


@contextmanager
def server(command: list[str], ready: str, requests: list[bytes]) -> Iterator[tuple[int, int]]:
    """A server in a process of its own that answers: its process id and port."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile("w+") as errors, ExitStack() as stack:
        try:
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,
                )
            )
        except OSError as error:
            raise SystemExit(f"{command[0]} does not run: {error.strerror}") from error
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if re.search(ready, line)), None)
            port = 0 if line is None else int(line.rstrip().rpartition(":")[2])
            if not port or not answers(process, port, requests):
                errors.seek(0)
                *_, said = ["", *errors.read().strip().splitlines()]
                raise SystemExit(f"{' '.join(command)} does not start: {said}")
            yield process.pid, port
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves processes behind


def tinyserve(model: str, device: str, queue: int = QUEUE) -> list[str]:
    command = [sys.executable, "-m", "tinyserve.cli", "serve", "-m", model, "--port", "0"]
    return [*command, "--device", device, "--max-batch-size", str(BATCH), "--max-queue", str(queue)]


def resources(pid: int) -> tuple[float, int, int]:
    """Resident MiB, open files and threads of a process that has had time to close them."""
    time.sleep(1)
    status = Path(f"/proc/{pid}/status").read_text()
    resident, threads = (
        int(re.search(rf"{name}:\s+(\d+)", status)[1])  # type: ignore[index]
        for name in ("VmRSS", "Threads")
    )
    return resident / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads


def cpu_seconds(pid: int) -> float:
    """Of a process and its children, so far."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return seconds + sum(cpu_seconds(int(child)) for child in children)


def alone(classifier: Classifier, pixels: np.ndarray, seconds: float) -> tuple[float, float]:
    """Images a second of the model in batches from memory, and the CPU seconds of each."""
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        classifier.engine.run(pixels)
        count += len(pixels)
    return count / (time.perf_counter() - began), (time.process_time() - cpu) / count


def one_alone(classifier: Classifier, pixels: np.ndarray, seconds: float) -> float:
    """Median milliseconds of one image."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        classifier.engine.run(pixels[:1])
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def answers(process: subprocess.Popen[str], port: int, requests: list[bytes]) -> bool:
    """Wait until a server has answered; False where it ends before."""
    while process.poll() is None:
        with suppress(ConnectionError):  # it does not listen yet
            load = measure(port, requests, 1, 0.5)
            if load.refused:
                raise SystemExit(f"the server answers {load.refused[0]}: {' '.join(process.args)}")
            if load.latencies:
                return True
        time.sleep(0.1)
    return False


def compare(model: str, files: list[bytes], arguments: argparse.Namespace) -> None:
    classifier = Classifier(model, device=arguments.device)
    size = classifier.card.image_size
    pixels = np.stack([images.load(data, size=size) for data in files][:BATCH])
    requests = infer_requests(model, files, size, pixels=arguments.pixels)
    print(f"{model} ({classifier.card.precision}) on {device_name(classifier.engine.provider)}")
    with server(tinyserve(model, arguments.device), r"^http://", requests) as (pid, port):
        measure(port, requests, max(arguments.connections), 1)  # buffers grow once
        before = resources(pid)
        for connections in arguments.connections:
            shares, cpu_shares, loads, bare = [], [], [], []
            for _ in range(arguments.rounds):
                limit, cpu = alone(classifier, pixels, arguments.seconds)
                used = cpu_seconds(pid)
                load = measure(port, requests, connections, arguments.seconds)
                used = (cpu_seconds(pid) - used) / load.statuses[200]
                cpu_shares.append(cpu / used)
                if connections == 1:
                    bare.append(one_alone(classifier, pixels, arguments.seconds))
                shares.append(load.per_second / limit)
                loads.append(load)
            p50, p99 = (statistics.median(x.milliseconds(q) for x in loads) for q in (0.5, 0.99))
            added = (
                f", {p50 - statistics.median(bare):+.1f} ms over the model alone" if bare else ""
            )
            statuses = sum((load.statuses for load in loads), Counter())
            print(
                f"{connections:5} connections: {statistics.median(shares):.2f} of the model alone, "
                f"{statistics.median(cpu_shares):.2f} by CPU time; "
                f"p50 {p50:.1f} ms, p99 {p99:.1f} ms{added}; {dict(statuses)}"
            )
        print("{:+.1f} MiB, {:+} files, {:+} threads".format(*np.subtract(resources(pid), before)))


def against_litserve(model: str, files: list[bytes], arguments: argparse.Namespace) -> None:
    path = Classifier(model, device=arguments.device).engine.path
    size = Classifier(model, device=arguments.device).card.image_size
    ours = infer_requests(model, files, size, pixels=False)
    theirs = form_requests(files)
    peer = [arguments.litserve, str(ROOT / "benchmarks" / "litserve_peer.py"), str(path)]
    # Without a device named, each is as it comes: here the fastest that is installed.
    peer += ["--device", arguments.device] if arguments.device != "auto" else ["--usual"]
    with (
        server(tinyserve(model, arguments.device), r"^http://", ours) as (our_pid, our_port),
        server(peer, r"^listening on", theirs) as (their_pid, their_port),
    ):
        pids = our_pid, their_pid
        for connections in arguments.connections:
            pairs, cheaper = [], []
            for _ in range(arguments.rounds):
                used = [-cpu_seconds(pid) for pid in pids]
                a = measure(our_port, ours, connections, arguments.seconds)
                b = measure(their_port, theirs, connections, arguments.seconds)
                pairs.append((a, b))
                used = [u + cpu_seconds(pid) for u, pid in zip(used, pids, strict=True)]
                cheaper.append(used[0] / a.statuses[200] / used[1] * b.statuses[200])
            faster = statistics.median(a.per_second / b.per_second for a, b in pairs)
            later = statistics.median(a.milliseconds(0.99) / b.milliseconds(0.99) for a, b in pairs)
            print(
                f"{connections:5} connections: {faster:.2f} times LitServe's throughput, "
                f"{later:.2f} times its p99, {statistics.median(cheaper):.2f} times its CPU time"
            )


def overload(model: str, files: list[bytes], arguments: argparse.Namespace) -> None:
    size = Classifier(model, device=arguments.device).card.image_size
    requests = infer_requests(model, files, size, pixels=arguments.pixels)
    with server(tinyserve(model, arguments.device), r"^http://", requests) as (pid, port):
        before = resources(pid)
        load = measure(port, requests, arguments.overload, arguments.seconds)
        bound = 1000 * QUEUE / load.per_second
        # In the first second all connect, and most are refused.
        p99, later = load.milliseconds(0.99), load.milliseconds(0.99, after=1)
        print(
            f"{arguments.overload} connections, a queue of {QUEUE}: {dict(load.statuses)}; p99 of "
            f"the accepted {p99:.0f} ms, without the first second's {later:.0f} ms; "
            f"queue / throughput {bound:.0f} ms"
        )
        print("{:+.1f} MiB, {:+} files, {:+} threads".format(*np.subtract(resources(pid), before)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--connections", default="1,8,64,256")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--device", default="cpu", help="auto: each as it comes, LitServe with a plain session"
    )
    parser.add_argument("--pixels", action="store_true", help="send pixels instead of JPEG files")
    parser.add_argument(
        "--litserve",
        metavar="PYTHON",
        help="one that has litserve, python-multipart and tinyserve installed",
    )
    parser.add_argument("--overload", type=int, metavar="CONNECTIONS")
    arguments = parser.parse_args()
    arguments.connections = [int(count) for count in arguments.connections.split(",")]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files = [Path(path).read_bytes() for path in walk_images(ROOT / "samples")]
    for model in arguments.models:
        if arguments.overload:
            overload(model, files, arguments)
        elif arguments.litserve:
            against_litserve(model, files, arguments)
        else:
            compare(model, files, arguments)


if __name__ == "__main__":
    main()
