"""What Prometheus is told."""

import functools
import time
from collections.abc import Callable

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from tinyserve.classifier import Classifier
from tinyserve.devices import device_name

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

OTHER = "other"
"""In place of the route of requests that have none."""


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        requests = Counter(
            "tinyserve_requests",
            "Requests answered; what is no HTTP has no time in tinyserve_request_seconds.",
            ("route", "status"),
            registry=registry,
        )
        request_seconds = Histogram(
            "tinyserve_request_seconds",
            "From a request's headers to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        stage_seconds = Histogram(
            "tinyserve_stage_seconds",
            "Of a request: decode, compute (with waiting), encode (infer); of a batch: queue, run.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        # By their labels, of which there are few; to look for them takes longer than to count.
        self._requests = functools.cache(requests.labels)
        self._request_seconds = functools.cache(request_seconds.labels)
        self._stage_seconds = functools.cache(stage_seconds.labels)
        self.batch_images = Histogram(
            "tinyserve_batch_images",
            "Images computed at once.",
            ("model",),
            buckets=_IMAGES,
            registry=registry,
        )
        self.reloads = Counter(
            "tinyserve_reloads",
            "Model files that were replaced: taken, or refused.",
            ("model", "result"),
            registry=registry,
        )
        self._queue_images = Gauge(
            "tinyserve_queue_images",
            "Images whose requests are not answered yet.",
            ("model",),
            registry=registry,
        )
        self._model = Gauge(
            "tinyserve_model_info",
            "1 for each model that is served.",
            ("model", "architecture", "precision", "device", "fingerprint"),
            registry=registry,
        )

    def stage(self, name: str) -> "_Stage":
        """Times what is done ``with`` it, where that ends well."""
        return _Stage(self._stage_seconds(name))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests(route, status).inc()
        self._request_seconds(route).observe(seconds)

    def refused(self, status: int) -> None:
        """Count what was no request."""
        self._requests(OTHER, status).inc()

    def batch_watch(self, model: str) -> Callable[[int, float, float], None]:
        """What a :class:`~tinyserve.batcher.Batcher` tells of its batches."""
        images = self.batch_images.labels(model)
        queue, run = (self._stage_seconds(stage) for stage in ("queue", "run"))

        def watch(count: int, waited: float, seconds: float) -> None:
            images.observe(count)
            queue.observe(waited)
            run.observe(seconds)

        return watch

    def watch_queue(self, model: str, waiting: Callable[[], float]) -> None:
        self._queue_images.labels(model).set_function(waiting)

    def serves(self, model: str, classifier: Classifier) -> None:
        """From now on a model is this one, and no longer the one before."""
        card = classifier.card
        for labels in [labels for labels in self._models() if labels[0] == model]:
            self._model.remove(*labels)
        device = device_name(classifier.engine.provider)
        self._model.labels(
            model, card.architecture, card.precision, device, classifier.fingerprint
        ).set(1)

    def _models(self) -> list[tuple[str, ...]]:
        return [
            tuple(sample.labels.values()) for m in self._model.collect() for sample in m.samples
        ]

    def text(self) -> bytes:
        """Everything, in the Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


class _Stage:
    def __init__(self, seconds: Histogram) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._seconds.observe(time.perf_counter() - self._began)
