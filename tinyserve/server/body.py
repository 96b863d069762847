"""Bodies of requests, within limits."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from tinyserve.errors import BusyError, RequestError
from tinyserve.server import Limits

GONE = "tinyserve.gone"
"""In the scope of a request: a future that is done when its connection is lost, one for all of its
requests; to wait for the message of that would take a task for each."""

_PIECE = 256 * 2**10


class Bodies:
    """Reads bodies, and knows how many bytes of them all requests hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as held until the ``with`` ends.

        What is inside is cancelled when the client goes away, and ClientDisconnect is raised.
        Raises :class:`RequestError`: 408 for one that comes too slowly, 413 for one that is too
        long, by its header or by counting, 415 for one that is compressed; and :class:`BusyError`
        where all that is held would become too much.
        """
        encoding = request.headers.get("content-encoding", "").strip()
        if encoding.lower() not in ("", "identity"):
            raise RequestError(415, f"content-encoding {encoding!r}: send it as it is")
        if int(request.headers.get("content-length", 0)) > self._limits.body_bytes:
            raise self._too_long()
        chunks: list[bytes] = []
        length = 0
        try:
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    async for chunk in request.stream():
                        chunks.append(chunk)
                        length += len(chunk)
                        self._held += len(chunk)
                        self._check(length)
            except TimeoutError as error:
                raise RequestError(408, "the body comes too slowly") from error
            body = b"".join(chunks)
            chunks.clear()
            with _while_connected(request):
                yield body
        finally:
            self._held -= length

    def _check(self, length: int) -> None:
        if length > self._limits.body_bytes:
            raise self._too_long()
        if self._held > self._limits.all_bodies_bytes:
            raise BusyError("too many bytes are on their way", retry_after=1)

    def _too_long(self) -> RequestError:
        return RequestError(413, f"longer than {self._limits.body_bytes:,} bytes")


async def files_of(request: Request, body: bytes, most: int) -> list[tuple[str, bytes]]:
    """The files in a body of multipart/form-data, with their names.

    Raises :class:`RequestError`: 400 for other bodies and forms, 413 for more than ``most`` files.
    """

    async def chunks() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PIECE):
            yield body[start : start + _PIECE]
            await asyncio.sleep(0)  # the parser holds the event loop for milliseconds each time
        if not parser.whole:
            raise RequestError(400, "the form is cut off")

    parser = _Form(request.headers, chunks(), max_files=most, max_fields=0)
    parser.spool_max_size = len(body) + 1  # in memory, where the body is already
    try:
        form = await parser.parse()
    except UnicodeError as error:
        raise RequestError(400, "the form's charset cannot be read") from error
    except MultiPartException as error:
        if error.message.startswith("Too many fields"):
            words = "a part of the form is no file (with curl: -F file=@cat.jpg)"
            raise RequestError(400, words) from error
        status = 413 if error.message.startswith("Too many files") else 400
        raise RequestError(status, error.message) from error
    try:
        # Nothing else is in it, but the types do not say so.
        parts = [(name, part) for name, part in form.multi_items() if isinstance(part, UploadFile)]
        files = [(_utf8(part.filename or name), await part.read()) for name, part in parts]
    finally:
        await form.close()
    if not files:
        raise RequestError(400, "no file in the form")
    return files


class _Form(MultiPartParser):
    whole = False
    """Whether the boundary that ends a form has come."""

    def on_end(self) -> None:
        self.whole = True


def _utf8(name: str) -> str:
    """A name as it can be sent back: some charsets have characters that UTF-8 has not."""
    return name.encode(errors="replace").decode()


@contextmanager
def _while_connected(request: Request) -> Iterator[None]:
    """Cancels what is inside when the client goes away, and raises ClientDisconnect instead."""
    task = asyncio.current_task()
    gone: asyncio.Future[None] | None = request.scope.get(GONE)
    assert task is not None
    if gone is None:  # of a server that is not ours
        yield
        return
    if gone.done():
        raise ClientDisconnect
    inside = True

    def leave(_: asyncio.Future[None]) -> None:
        if inside:  # a callback that was due already cannot be removed
            task.cancel()

    gone.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if gone.done() and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        inside = False
        gone.remove_done_callback(leave)
