"""The models that are served, and how a file that is replaced takes over."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyserve.batcher import Batcher
from tinyserve.classifier import Classifier, model_file
from tinyserve.devices import device_name
from tinyserve.errors import BusyError, RequestError, UsageError
from tinyserve.server import Settings
from tinyserve.server.metrics import Metrics
from tinyserve.server.protocol import VERSION

logger = logging.getLogger("tinyserve")

_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Model:
    """One loaded file with its queue."""

    classifier: Classifier
    batcher: Batcher


class Models:
    """The models by the names under which they are served, the default one first.

    Loads them: raises :class:`~tinyserve.errors.TinyserveError` for one that cannot be. None
    can be asked before :meth:`start`.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._running: dict[str, Model] = {}
        self._files: dict[str, _File] = {}
        self.classifiers: dict[str, Classifier] = {}
        for model in settings.models:
            name = Path(model).name.removesuffix(".onnx")
            if name in self.classifiers:
                raise UsageError(f"two models of the name {name}")
            # Looked at before it is read, so that no change is missed in between.
            file = self._files[name] = _File(model_file(model, device=settings.device))
            self.classifiers[name] = Classifier(str(file.path), device=settings.device)

    async def start(self) -> None:
        """Warm up, and take requests from now on."""
        for name, classifier in self.classifiers.items():
            await self._take(name, classifier)
            self._metrics.watch_queue(name, self._waiting(name))

    async def stop(self) -> None:
        """Answer what was taken, and end the threads."""
        await asyncio.gather(*(model.batcher.drain() for model in self._running.values()))

    @property
    def names(self) -> list[str]:
        return list(self.classifiers)

    def check(self, name: str, version: str = VERSION) -> None:
        """Raise :class:`RequestError`, status 404, where there is no such model."""
        if name not in self.classifiers:
            known = ", ".join(self.names)
            raise RequestError(404, f"unknown model {name!r} (known: {known})")
        if version != VERSION:
            raise RequestError(404, f"unknown version {version!r} of {name} (known: {VERSION})")

    def get(self, name: str | None = None) -> tuple[str, Model]:
        """A model with its name, the default one without.

        Raises :class:`RequestError`, status 404, where there is none, and :class:`BusyError` before
        the start.

        The model can be replaced in any ``await``, unless a place in its queue is taken before.
        """
        name = self.names[0] if name is None else name
        self.check(name)
        if name not in self._running:
            raise BusyError("not ready yet", retry_after=1)
        return name, self._running[name]

    def describe(self, name: str) -> dict[str, Any]:
        """What really runs, under which name."""
        engine = self.classifiers[name].engine
        return {
            "architecture": engine.card.architecture,
            "precision": engine.card.precision,
            "device": device_name(engine.provider),
            "fingerprint": self.classifiers[name].fingerprint,
            **({"fallback": engine.fallback} if engine.fallback else {}),
        }

    async def watch(self) -> None:
        """Take over files that are replaced, for ever."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            for name in self._changed():
                await self._reload(name)

    def _changed(self) -> Iterable[str]:
        return [name for name, file in self._files.items() if file.changed()]

    async def _reload(self, name: str) -> None:
        path = self._files[name].path
        try:
            classifier = await asyncio.to_thread(
                Classifier, str(path), device=self._settings.device
            )
            old = self._running[name]
            await self._take(name, classifier)
        except Exception as error:  # whatever is in that file, the old one goes on
            self._metrics.reloads.labels(name, "refused").inc()
            logger.error("%s goes on as it was; the new file is refused: %s", name, error)
            return
        self._metrics.reloads.labels(name, "taken").inc()
        logger.info("%s was replaced: now %s", name, classifier.fingerprint)
        await old.batcher.drain()

    async def _take(self, name: str, classifier: Classifier) -> None:
        size, batch = classifier.card.image_size, self._settings.max_batch_size
        for count in {1, batch}:  # memory is allocated and kernels are chosen by size
            await asyncio.to_thread(
                classifier.engine.run, np.zeros((count, size, size, 3), np.uint8)
            )
        self._running[name] = Model(
            classifier,
            Batcher(
                classifier.engine.run,
                max_batch_size=batch,
                max_delay=self._settings.max_delay_ms / 1000,
                max_queue=self._settings.max_queue,
                watch=self._metrics.batch_watch(name),
            ),
        )
        self.classifiers[name] = classifier
        self._metrics.serves(name, classifier)

    def _waiting(self, name: str) -> Callable[[], float]:
        return lambda: self._running[name].batcher.waiting


class _File:
    """A file that may be replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._identity()

    def changed(self) -> bool:
        """Whether there is another file than when this was last asked; while there is none, no."""
        identity = self._identity()
        if identity is None or identity == self._seen:
            return False
        self._seen = identity
        return True

    def _identity(self) -> tuple[int, ...] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        # The last changes with permissions, too: what could not be read may be readable now.
        return status.st_ino, status.st_mtime_ns, status.st_size, status.st_ctime_ns
