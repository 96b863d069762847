"""The demo page on the server's own address, over the very models that it serves."""

import asyncio
from collections.abc import Container

from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import Match, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyserve.classifier import Classifier
from tinyserve.server.body import Bodies
from tinyserve.server.service import Service

_UPLOAD = "/gradio_api/upload"


def add_page(app: FastAPI, service: Service) -> None:
    """Put the page at ``/``, behind all routes that there are.

    Raises :class:`~tinyserve.errors.UsageError` where Gradio is not installed, or nothing can be
    uploaded to.
    """
    from tinyserve.demo import build_page, loader, options

    models = service.models
    load_other = loader(service.settings.device)

    def load(name: str) -> Classifier:
        # Asked for anew each time: a file that is replaced takes over here, too.
        return models.classifiers.get(name) or load_other(name)

    async def mount_page() -> None:
        page = build_page(models.names, load)

        import gradio

        gradio.mount_gradio_app(app, page, "/", **options())
        # Until then Gradio takes any path that a client names for the page's own, and copies the
        # file to the uploads; only launch() says so by itself.
        page.has_launched = True

    # Where no event loop runs, Gradio makes one for each of its locks and closes none of them.
    asyncio.run(mount_page())
    mount = app.routes.pop()
    assert isinstance(mount, Mount)
    taken = {_beginning(route.path) for route in app.routes if isinstance(route, Route)}
    limited = _Limited(mount.app, service.bodies)
    app.routes.append(_Page(_UntilTheEnd(limited, service.ended), taken))


def _beginning(path: str) -> str:
    """What stands between the first slash and the second."""
    return path[1:].partition("/")[0]


class _Page(Mount):
    """``app`` for all paths but those that begin as the ones ``taken``: what the application does
    not have there, it says as it does without a page."""

    def __init__(self, app: ASGIApp, taken: Container[str]) -> None:
        super().__init__("/", app)
        self._taken = taken

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if _beginning(scope["path"]) in self._taken:
            return Match.NONE, {}
        return super().matches(scope)


class _Limited:
    """An application whose requests keep to the server's limits, but for uploads, which Gradio
    writes to files and has a limit of its own for."""

    def __init__(self, app: ASGIApp, bodies: Bodies) -> None:
        self._app = app
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        bare = scope["type"] != "http" or scope["method"] in ("GET", "HEAD")
        if bare or scope["path"] == _UPLOAD:
            await self._app(scope, receive, send)
            return
        async with self._bodies.read(Request(scope, receive)) as body:
            unread = [body]

            async def read() -> Message:
                if unread:
                    return {"type": "http.request", "body": unread.pop()}
                return await receive()

            await self._app(scope, read, send)


class _UntilTheEnd:
    """An application whose streams end with the server.

    An open page listens to one for as long as it is open, for which the server would wait.
    """

    def __init__(self, app: ASGIApp, ended: asyncio.Event) -> None:
        self._app = app
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_end() -> Message:
            message = asyncio.ensure_future(receive())
            end = asyncio.create_task(self._ended.wait())
            try:
                await asyncio.wait({message, end}, return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                end.cancel()

        listens = scope["type"] == "http" and scope["method"] == "GET"
        await self._app(scope, receive_or_end if listens else receive, send)
