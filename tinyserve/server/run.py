"""One server on one socket, from its start to its end."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tinyserve.devices import device_name
from tinyserve.errors import UsageError
from tinyserve.server import Limits, Settings
from tinyserve.server.access import Access, read_keys
from tinyserve.server.app import Shortcut, build_app
from tinyserve.server.body import GONE
from tinyserve.server.page import add_page
from tinyserve.server.service import Service

logger = logging.getLogger("tinyserve")

_BACKLOG = 2048


class Listener:
    """A server that is bound to its address and has loaded its models.

    Raises :class:`~tinyserve.errors.TinyserveError` as :func:`tinyserve.server.serve` does.
    """

    def __init__(self, settings: Settings) -> None:
        keys = read_keys(settings.api_key_file) if settings.api_key_file else []
        self._service = Service(settings)
        self._socket = _bind(settings.host, settings.port)
        self.host, self.port = self._socket.getsockname()[:2]
        if not keys and not ipaddress.ip_address(self.host).is_loopback:
            logger.warning(
                "whoever reaches port %d may use this server; --api-key-file asks for a key",
                self.port,
            )
        app = build_app(self._service, with_keys=bool(keys))
        if settings.ui:
            add_page(app, self._service)
        self._server = _Server(self._service, Access(Shortcut(app), self._service, keys))

    def lines(self) -> Iterator[str]:
        """The address, and what runs on which device."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        yield f"http://{host}:{self.port}"
        for name, classifier in self._service.models.classifiers.items():
            engine = classifier.engine
            yield f"{name} ({engine.card.precision}) on {device_name(engine.provider)}"

    def run(self) -> None:
        """Serve until :meth:`stop`, SIGTERM or SIGINT."""
        self._server.run(sockets=[self._socket])
        self._server.check()

    def stop(self) -> None:
        """End as SIGTERM does; may be called from any thread."""
        self._server.leave()


class _Server(uvicorn.Server):
    """Uvicorn, which ends in steps: not ready, then no new connections, then no requests."""

    def __init__(self, service: Service, access: Access) -> None:
        self._service = service
        self._limits = limits = service.settings.limits
        self._leave_at = float("inf")
        self._work: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            access,
            http=_protocol(limits),
            ws="none",
            # uvloop accepts one connection a turn, in which all others are served: in a rush, those
            # that come wait for seconds.
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=limits.end_seconds,
        )
        super().__init__(config)

    def leave(self) -> None:
        self._service.leaving = True
        self._leave_at = min(self._leave_at, time.monotonic() + self._limits.leave_seconds)

    def check(self) -> None:
        """Raise what the models failed with."""
        if self._work is not None and self._work.done() and not self._work.cancelled():
            self._work.result()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if sig == signal.SIGTERM:
            self.leave()
        else:
            self.force_exit = self.should_exit  # asked twice
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._work = asyncio.create_task(self._service.work())

    async def on_tick(self, counter: int) -> bool:
        assert self._work is not None
        if time.monotonic() >= self._leave_at or self._work.done():
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.leaving = True
        self._service.ended.set()
        assert self._work is not None
        self._work.cancel()
        await super().shutdown(sockets)


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


def _protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """Uvicorn's side of a connection, for a world with slow clients and endless headers."""

    class Protocol(HttpToolsProtocol):
        _in_head = True
        _head_bytes = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            self._gone = self.loop.create_future()
            self._together = _Together(transport, self.loop)
            super().connection_made(cast(asyncio.Transport, self._together))
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._gone.set_result(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            else:
                self._start_timer()
            self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
            if self._head_bytes > limits.head_bytes:
                self.transport.abort()

        def on_message_begin(self) -> None:
            self._in_head = True
            super().on_message_begin()
            cast(dict[str, Any], self.scope)[GONE] = self._gone

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._in_head:  # what came of the next request is all so far
                self._start_timer()
            self._together.flush()
            if self.transport.get_write_buffer_size():
                self.loop.call_later(limits.answer_seconds, self._abort_if_unread)

        def _abort_if_unread(self) -> None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()

        def _start_timer(self) -> None:
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(limits.head_seconds, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:  # no name of a host is so long
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host} port {port}: {reason}") from error


def allow_many_connections() -> None:
    """As many open files as this process may have, in place of the shell's careful default."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS says "unlimited", and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
