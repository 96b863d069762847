"""One server on one socket, from its start to its end."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from tinyserve.devices import device_name
from tinyserve.errors import UsageError, os_reason
from tinyserve.server import Settings
from tinyserve.server.access import Access, read_keys
from tinyserve.server.app import Shortcut, build_app
from tinyserve.server.connection import protocol
from tinyserve.server.page import add_page
from tinyserve.server.service import Service

logger = logging.getLogger("tinyserve")

_BACKLOG = 2048
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


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
            http=protocol(limits, service.metrics),
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
        asyncio.get_running_loop().set_exception_handler(_Refusals())
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


class _Refusals:
    """Says once a second that no connection can be accepted, where asyncio says it a thousand times
    and with a traceback; what else goes wrong in the loop is said as ever."""

    def __init__(self) -> None:
        self._said = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
            loop.default_exception_handler(context)
        elif loop.time() - self._said >= 1:
            self._said = loop.time()
            logger.error("no more connections can be accepted: %s", os_reason(error))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(
            address,
            family=family,
            backlog=_BACKLOG,
            # "::" is every address, as it is to other servers.
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
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
