"""Many requests, one device: images that wait are computed together.

Knows nothing of HTTP, and nothing of models: :class:`Batcher` calls a function of a batch.
"""

import asyncio
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tinyserve.errors import BusyError

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Submit = Callable[[NDArray[np.uint8]], Awaitable[NDArray[np.float32]]]
Watch = Callable[[int, float, float], None]

_LONGEST_RETRY = 60
"""Seconds after which anybody may try again, however long the queue."""
_MOST_EXPECTED = 8
"""Times ``max_queue``: at most so many of the images that were refused are expected back. Who comes
back too early, and is counted again, cannot keep the others away for long."""
_SMOOTHING = 0.2
"""Weight of the last batch in the speed."""


@dataclass(slots=True, eq=False)
class _Part:
    """What of one request is computed at once: all its images, or as many as a batch holds."""

    images: NDArray[np.uint8]
    answer: asyncio.Future[NDArray[np.float32]]
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Computes the images of many requests in batches, in a thread of its own.

    ``run`` maps uint8 ``[n, ...]`` to float32 ``[n, classes]``, each row by itself; it is never
    called twice at a time. While it runs, what arrives gathers for the next batch, of up to
    ``max_batch_size`` images; when it is idle, an image waits for others at most ``max_delay``
    seconds. At most ``max_queue`` images may be on their way, whether decoded yet or not.

    ``watch`` is told of every batch, in that thread: its images, the seconds for which the first of
    them waited, and the seconds that it ran.

    Belongs to the event loop in which it was made; everything but ``run`` and ``watch`` is called
    there.
    """

    waiting = 0
    """Images for which a place is taken."""

    def __init__(
        self,
        run: Run,
        *,
        max_batch_size: int = 32,
        max_delay: float = 0.0,
        max_queue: int = 256,
        watch: Watch | None = None,
    ) -> None:
        self.max_queue = max_queue
        self._run = run
        self._max_batch_size = max_batch_size
        self._max_delay = max_delay
        self._watch = watch
        self._images_per_second = 0.0
        self._batch_ended = 0.0
        self._expected = 0.0
        self._refused_last = 0.0
        self._loop = asyncio.get_running_loop()
        self._empty = asyncio.Event()
        self._empty.set()
        self._parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @contextmanager
    def place(self, count: int) -> Iterator[Submit]:
        """Room for ``count`` images, at most ``max_queue``, to be taken before they are decoded.

        Inside, the function that it gives takes those images, uint8 ``[count, ...]``, and returns
        their rows, float32 ``[count, classes]``. Whoever is cancelled while waiting for that is
        not computed. Raises :class:`BusyError` where there is no room.
        """
        if self.waiting + count > self.max_queue:
            raise BusyError(
                f"the queue is full ({self.waiting} of {self.max_queue} images)",
                retry_after=self._retry_after(count),
            )
        self.waiting += count
        self._empty.clear()
        try:
            yield self._submit
        finally:
            self.waiting -= count
            if not self.waiting:
                self._empty.set()

    async def drain(self) -> None:
        """Wait until every place is given back, and end the thread."""
        while self.waiting:
            await self._empty.wait()
        self._parts.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _submit(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        size = self._max_batch_size
        parts = [
            _Part(images[start : start + size], self._loop.create_future())
            for start in range(0, len(images), size)
        ]
        for part in parts:
            self._parts.put(part)
        if len(parts) == 1:
            return await parts[0].answer
        try:
            return np.concatenate(await asyncio.gather(*(part.answer for part in parts)))
        finally:  # where one part fails, nobody wants the others
            for part in parts:
                part.answer.cancel()

    def _retry_after(self, count: int) -> int:
        """Seconds after which it will be the turn of ``count`` images that are refused.

        Those that were refused before them come first. Told the same, all would be back at once,
        most of them to be refused again, which takes the time that the answers need.
        """
        speed, now = self._images_per_second, time.monotonic()
        if not speed:
            return 1
        self._expected = max(0.0, self._expected - speed * (now - self._refused_last))
        self._expected = min(self._expected + count, _MOST_EXPECTED * self.max_queue)
        self._refused_last = now
        return min(_LONGEST_RETRY, math.ceil((self.waiting + self._expected) / speed))

    def _work(self) -> None:
        for batch in self._batches():
            answers = self._answers(batch)
            self._loop.call_soon_threadsafe(_deliver, batch, answers)

    def _batches(self) -> Iterator[list[_Part]]:
        """Batches of the parts that are still wanted, until the queue is closed."""
        following = self._next()
        while following is not None:
            batch, size = [following], len(following.images)
            until = following.arrived + self._max_delay
            following = None
            while size < self._max_batch_size:
                try:
                    part = self._next(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if part is None:
                    yield batch
                    return
                if size + len(part.images) > self._max_batch_size:
                    following = part
                    break
                batch.append(part)
                size += len(part.images)
            yield batch
            if following is None or following.answer.cancelled():
                following = self._next()

    def _next(self, timeout: float | None = None) -> _Part | None:
        """The next part that is wanted; None where the queue is closed. Raises queue.Empty."""
        while (part := self._parts.get(timeout=timeout)) is not None and part.answer.cancelled():
            pass
        return part

    def _answers(self, batch: Sequence[_Part]) -> list[NDArray[np.float32] | Exception]:
        """The rows of each part, or what was raised for it."""
        batch_images = [part.images for part in batch]
        began = time.monotonic()
        try:
            rows = self._run(np.concatenate(batch_images) if len(batch) > 1 else batch_images[0])
        except Exception as error:
            if len(batch) == 1:
                return [error]
            # Whoever is to blame, the others get their answers.
            return [answer for part in batch for answer in self._answers([part])]
        ended = time.monotonic()
        self._note_speed(len(rows), ended - max(batch[0].arrived, self._batch_ended))
        self._batch_ended = ended
        if self._watch is not None:
            self._watch(len(rows), began - batch[0].arrived, ended - began)
        ends = np.cumsum([len(images) for images in batch_images])
        return list(np.split(rows, ends[:-1]))

    def _note_speed(self, count: int, seconds: float) -> None:
        """Of images that were there for so long with no batch before them."""
        speed = count / max(seconds, 1e-6)
        if self._images_per_second:
            speed = _SMOOTHING * speed + (1 - _SMOOTHING) * self._images_per_second
        self._images_per_second = speed


def _deliver(batch: Sequence[_Part], answers: Sequence[NDArray[np.float32] | Exception]) -> None:
    for part, answer in zip(batch, answers, strict=True):
        if part.answer.done():  # cancelled meanwhile
            continue
        if isinstance(answer, Exception):
            part.answer.set_exception(answer)
        else:
            part.answer.set_result(answer)
