"""Uvicorn's side of a connection, for a world with slow clients and endless headers."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tinyserve.server import Limits, log
from tinyserve.server.body import GONE
from tinyserve.server.metrics import Metrics

_MOST_PIPELINED = 64
"""Requests that wait for the answers to those before them."""


def protocol(limits: Limits, metrics: Metrics) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol, with limits of time and of bytes; it puts :data:`GONE` into scopes."""

    class Protocol(HttpToolsProtocol):
        _in_message = False
        """Whether a request has begun to come and has not come whole."""
        _progress = False
        """Whether what was read last brought a part of a body or the end of a request."""
        _other_bytes = 0
        """Read since then: of a head, of what a chunked body has between or behind its chunks."""

        def connection_made(self, transport: Any) -> None:
            self._gone = self.loop.create_future()
            self._head = _Timer(self.loop, limits.head_seconds, self._abort)
            self._unread = _Timer(self.loop, limits.answer_seconds, self._abort_if_unread)
            self._together = _Together(transport, self.loop)
            super().connection_made(cast(asyncio.Transport, self._together))
            self._head.start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head.stop()
            self._unread.stop()
            self._gone.set_result(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._progress = False
            self._parse(data)
            self._other_bytes = 0 if self._progress else self._other_bytes + len(data)
            if self._other_bytes > limits.head_bytes:
                self.transport.abort()
            if self._answering():
                self._head.stop()
            elif self._in_message:  # a head, or what is left of a body after an early answer
                self._wait_for_the_rest()
            else:
                self._wait_for_a_request()

        def _parse(self, data: bytes) -> None:
            self._data = data
            super().data_received(data)
            self._data = b""  # an idle connection is to hold nothing

        def on_message_begin(self) -> None:
            self._in_message = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            if self._offers_upgrade():
                return
            if len(self.pipeline) >= _MOST_PIPELINED:
                raise ConnectionError("too many requests at once")  # to the parser, which stops
            cast(dict[str, Any], self.scope)[GONE] = self._gone
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._progress = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            if self._offers_upgrade():
                return
            self._progress, self._in_message = True, False
            super().on_message_complete()
            if not self.pipeline:
                # A long body paused it. Whether the client is still there is only seen by reading.
                self.flow.resume_reading()

        def _offers_upgrade(self) -> bool:
            """As Java's clients offer HTTP/2; to the parser, what follows would be no HTTP/1.1."""
            return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

        def _unsupported_upgrade_warning(self) -> None:
            """Called by Uvicorn while it handles the parser's exception: the offer is ignored, as
            HTTP allows, and the request read again without it."""
            if not self._offers_upgrade():
                return
            stop = cast(httptools.HttpParserUpgrade, sys.exc_info()[1])
            version = self.parser.get_http_version().encode()
            head = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)
            for name, value in self.headers:
                if name != b"upgrade":
                    head += b"%s: %s\r\n" % (name, value)
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as Uvicorn
            self._parse(head + b"\r\n" + self._data[stop.args[0] :])

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._in_message and not self._answering():
                self._wait_for_the_rest()
            self._together.flush()
            self._unread.stop()
            if self.transport.get_write_buffer_size():
                self._unread.start()

        def send_400_response(self, msg: str) -> None:
            """What was no HTTP has no scope, with which others are logged and counted."""
            metrics.refused(400)
            log.request({"status": 400, "client": self.client[0] if self.client else None})
            super().send_400_response(msg)

        def _answering(self) -> bool:
            """Whether the request whose head came last has no answer yet: it has its own time for
            what is left of its body, also where it was sent before the answer to another."""
            return self.cycle is not None and not self.cycle.response_complete

        def _wait_for_the_rest(self) -> None:
            if not self.transport.is_closing():
                self._head.start()

        def _wait_for_a_request(self) -> None:
            """As Uvicorn does after an answer, which may have been before the request's end."""
            self._head.stop()
            if self.timeout_keep_alive_task is None and not self.transport.is_closing():
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

        def _abort(self) -> None:
            self.transport.abort()

        def _abort_if_unread(self) -> None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()

    return Protocol


class _Timer:
    """Calls a function after some seconds, unless it is stopped before."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, then: Callable[[], None]
    ) -> None:
        self._loop, self._seconds, self._then = loop, seconds, then
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From now on; one that runs already goes on."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._then)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class _Together:
    """A transport that sends in one piece what is written in one turn of the event loop: head and
    body of an answer, which Uvicorn writes one after the other."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)

    def flush(self) -> None:
        if self._pieces:
            self._transport.write(b"".join(self._pieces))
            self._pieces.clear()

    def close(self) -> None:
        self.flush()
        self._transport.close()
