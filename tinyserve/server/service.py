"""What the routes share: models, limits, and threads to decode in."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tinyserve import images
from tinyserve import pillow as _pillow  # noqa: F401  (or the first odd image would wait for it)
from tinyserve.devices import default_threads
from tinyserve.errors import ImageError, RequestError
from tinyserve.server import Settings
from tinyserve.server.body import Bodies
from tinyserve.server.metrics import Metrics
from tinyserve.server.models import Models
from tinyserve.server.protocol import Pixels

T = TypeVar("T")

_QUICK_JSON_BYTES = 64 * 2**10
"""JSON of up to this length is read on the event loop; it takes about a millisecond."""
_QUICK_FILES = 4
"""So many small files are decoded on the event loop, where that takes less than to ask a thread."""


class Service:
    """One server's, without its routes. Loads the models, and raises what that raises."""

    leaving = False
    """Whether connections are closed after their next answer, for the server will end."""
    _warm = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.models = Models(settings, self.metrics)
        self.bodies = Bodies(settings.limits)
        self.ended = asyncio.Event()
        """Set when no more requests are taken."""
        self._pool = ThreadPoolExecutor(default_threads(), thread_name_prefix="decode")

    @property
    def ready(self) -> bool:
        return self._warm and not self.leaving

    async def work(self) -> None:
        """Warm up, be ready, and look for new model files until cancelled."""
        await self.models.start()
        self._warm = True
        await self.models.watch()

    async def stop(self) -> None:
        await self.models.stop()
        self._pool.shutdown()

    async def off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that takes too long for the event loop."""
        job = [function, *arguments]
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, _do, job)
        finally:
            # The pool keeps what was cancelled until its turn comes, which may be long after the
            # body that it is part of has ceased to count as held.
            job.clear()

    async def parse_json(self, length: int, function: Callable[..., T], *arguments: Any) -> T:
        """What a function makes of a document of this length; status 413 where it is too long."""
        most = self.settings.limits.json_bytes
        if length > most:
            raise RequestError(413, f"JSON longer than {most:,} bytes")
        if length > _QUICK_JSON_BYTES:
            return await self.off_loop(function, *arguments)
        return function(*arguments)

    async def decode(self, files: Sequence[bytes], size: int) -> list[Pixels | ImageError]:
        """The pixels of each file, uint8 ``[size, size, 3]``, or why there are none."""
        with self.metrics.stage("decode"):
            found: list[Pixels | None] = [None] * len(files)
            if len(files) <= _QUICK_FILES:
                found = [images.load_quickly(file, size=size) for file in files]
            slow = (file for file, image in zip(files, found, strict=True) if image is None)
            others = iter(await asyncio.gather(*(self.off_loop(_load, f, size) for f in slow)))
            return [next(others) if image is None else image for image in found]

    def check_room(self, model: str | None) -> None:
        """Raise what asking a model for one image now would raise, before its body is read."""
        with self.models.get(model)[1].batcher.place(1):
            pass

    def check_count(self, count: int) -> None:
        """Raise :class:`RequestError` for more images than the queue ever holds; status 413."""
        most = self.settings.max_queue
        if count > most:
            raise RequestError(413, f"{count} images, more than {most} at once")


def _do(job: list[Any]) -> Any:
    """Call a function with its arguments, unless they have been taken away."""
    taken = job.copy()  # in one step: they may be taken away at any time
    if not taken:
        return None
    function, *arguments = taken
    return function(*arguments)


def _load(file: bytes, size: int) -> Pixels | ImageError:
    try:
        return images.load(file, size=size)
    except ImageError as error:
        return error
