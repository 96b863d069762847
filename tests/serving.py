"""A real server for the tests: in this process, on a free port, until the end of a block."""

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx

from tinyserve.server import Settings
from tinyserve.server.run import Listener

SECONDS = 60  # for anything that must happen at some time


class Running:
    """A server with an HTTP client of it."""

    def __init__(self, listener: Listener, client: httpx.Client) -> None:
        self.listener = listener
        self.host, self.port = listener.host, listener.port
        self.get = client.get
        self.post = client.post
        self.request = client.request

    def metric(self, name: str, **labels: str) -> float:
        """A number of ``/metrics``; 0 where it is not there."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def until(condition, what: str = "it does not happen") -> None:
    """Wait for a condition to become true."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@contextlib.contextmanager
def running(*models: str, ready: bool = True, **settings) -> Iterator[Running]:
    models = models or ("inception",)
    listener = Listener(Settings(models=models, port=0, device="cpu", **settings))
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{listener.port}", timeout=SECONDS, trust_env=False
        ) as client:
            server = Running(listener, client)
            if ready:
                until(lambda: server.get("/v2/health/ready").status_code == 200)
            yield server
    finally:
        listener.stop()
        thread.join(timeout=SECONDS)
        assert not thread.is_alive(), "the server does not end"
