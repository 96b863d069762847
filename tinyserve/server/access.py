"""Around every request: its id, who may ask, a log line, and the numbers of it."""

import codecs
import hmac
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyserve.errors import UsageError, os_reason
from tinyserve.server import log
from tinyserve.server.metrics import OTHER
from tinyserve.server.service import Service

HEALTH = frozenset({"/v2/health/live", "/v2/health/ready"})

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Access:
    """The ASGI application ``app``, for those who have a key where there are ``keys``."""

    def __init__(self, app: ASGIApp, service: Service, keys: Sequence[bytes] = ()) -> None:
        self._app = app
        self._service = service
        self._metrics = service.metrics
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        headers = Headers(scope=scope)
        wanted_id = headers.get("x-request-id", "")
        # A name and no secret, for which the system need not be asked.
        request_id = (
            wanted_id if _SANE_ID.fullmatch(wanted_id) else f"{random.getrandbits(128):032x}"
        )
        status = 500

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", request_id.encode())]
                if self._service.leaving:
                    added.append((b"connection", b"close"))
                message["headers"] = [*message["headers"], *added]
            await send(message)

        app = self._app if self._may(scope["path"], headers) else _unauthorised
        try:
            await app(scope, receive, send_marked)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", OTHER)
            self._metrics.answered(route, status, seconds)
            self._log(scope, request_id, status, seconds)

    def _may(self, path: str, headers: Headers) -> bool:
        if not self._keys or path in HEALTH:
            return True
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.encode("latin-1").strip()  # as text, "à" in UTF-8 ends with a space
        # All are compared, each in constant time: how long it takes says nothing of a key.
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return kind.lower() == "bearer" and any(found)

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        fields = {
            "status": status,
            "method": scope["method"],
            "path": scope["path"],
            "ms": round(1000 * seconds, 2),
            "id": request_id,
            "client": scope["client"][0] if scope["client"] else None,
            # What the route found out:
            "model": scope["state"].get("model"),
            "images": scope["state"].get("images"),
        }
        log.request(fields)


def read_keys(path: Path) -> list[bytes]:
    """The keys in a file, one a line. Raises :class:`UsageError` where there is none."""
    try:
        # Windows' editors put a mark before the first.
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {os_reason(error)}") from error
    keys = [key for line in content.splitlines() if (key := line.strip())]
    if not keys:
        raise UsageError(f"{path} holds no key")
    return keys


_unauthorised = JSONResponse(
    {"error": "a key is needed: Authorization: Bearer KEY"},
    401,
    {"WWW-Authenticate": "Bearer"},
)
