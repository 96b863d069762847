"""The routes: the Open Inference Protocol, ``/classify`` for people, and what operators ask for."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import tinyserve
from tinyserve.errors import BusyError, ImageError, RequestError, TinyserveError
from tinyserve.server import protocol, schema
from tinyserve.server.inference import INFER, add_classify, add_infer
from tinyserve.server.service import Service

logger = logging.getLogger("tinyserve")

_Handler = Callable[[Request, Exception], Awaitable[Response]]


def build_app(service: Service, *, with_keys: bool = False) -> FastAPI:
    """The application. A page for browsers can be mounted on what this returns.

    It answers while ``service.work()`` runs, for which whoever serves it sees.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.stop()

    app = FastAPI(
        title="tinyserve",
        version=tinyserve.__version__,
        description="Small image classifiers, over the Open Inference Protocol V2 and for people.",
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # behind a proxy, to an address of http://
        lifespan=lifespan,
    )
    # A request is compared with one after the other: the busiest first.
    add_infer(app, service)
    add_classify(app, service)
    _add_models(app, service)
    _add_health(app, service)

    @app.get(
        "/metrics",
        tags=["operation"],
        summary="Numbers, for Prometheus",
        response_class=Response,
        responses=schema.METRICS,
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(schema.page(app.openapi()))

    app.openapi = lambda: schema.openapi(app, with_keys=with_keys)  # type: ignore[method-assign]
    _add_errors(app)
    return app


class Shortcut:
    """``app``, as an ASGI application in which the busiest route answers without its layers.

    Those see every request and route it; for a small model they cost as much as the answer. The
    route, and what becomes of its errors, are the application's own.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        routes = (route for route in app.routes if isinstance(route, APIRoute))
        self._route = next(route for route in routes if route.path == INFER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = None
        if scope["type"] == "http" and scope["method"] == "POST":
            found = self._route.path_regex.match(scope["path"])
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        request = Request(scope, receive)
        try:
            response = await self._route.endpoint(request, **found.groupdict())
        except Exception as error:
            handlers = self._app.exception_handlers
            kind = next(kind for kind in type(error).__mro__ if kind in handlers)
            response = await cast(_Handler, handlers[kind])(request, error)
            if kind is Exception:
                logger.error("%s failed", scope["path"], exc_info=error)
        await response(scope, receive, send)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/v2", tags=["server"], summary="Name, version, extensions")
    async def server() -> schema.Server:
        return schema.Server(
            name="tinyserve", version=tinyserve.__version__, extensions=list(protocol.EXTENSIONS)
        )

    # Monitors like to ask without wanting to read.
    @app.head("/v2/health/live", include_in_schema=False)
    @app.get("/v2/health/live", tags=["server"], summary="Whether the server runs")
    async def live() -> schema.Live:
        return schema.Live(live=True)

    @app.head("/v2/health/ready", include_in_schema=False)
    @app.get(
        "/v2/health/ready",
        tags=["server"],
        summary="Whether all models answer",
        responses={503: {"model": schema.Ready, "description": "Not yet, or no longer"}},
    )
    async def ready(response: Response) -> schema.Ready:
        if not service.ready:
            response.status_code = 503
        devices = {name: service.models.describe(name)["device"] for name in service.models.names}
        return schema.Ready(ready=service.ready, devices=devices)


def _add_models(app: FastAPI, service: Service) -> None:
    models = service.models
    known: dict[str, Any] = {"tags": ["models"], "responses": schema.errors(404)}
    ready: dict[str, Any] = {
        "tags": ["models"],
        "responses": {**schema.errors(404), 503: {"model": schema.ModelReady}},
    }

    @app.get("/v2/models/{model}", summary="Inputs, outputs, device", **known)
    async def describe(model: str) -> schema.Metadata:
        models.check(model)
        card = models.classifiers[model].card
        return schema.Metadata(**protocol.metadata(model, card, models.describe(model)))

    @app.get("/v2/models/{model}/ready", summary="Whether it answers", **ready)
    async def model_ready(response: Response, model: str) -> schema.ModelReady:
        models.check(model)
        if not service.ready:
            response.status_code = 503
        return schema.ModelReady(name=model, ready=service.ready)

    @app.get("/v2/models/{model}/versions/{version}", summary="Of one version", **known)
    async def describe_version(model: str, version: str) -> schema.Metadata:
        models.check(model, version)
        return await describe(model)

    @app.get("/v2/models/{model}/versions/{version}/ready", summary="Of one version", **ready)
    async def version_ready(response: Response, model: str, version: str) -> schema.ModelReady:
        models.check(model, version)
        return await model_ready(response, model)

    @app.post(
        "/v2/repository/index",
        tags=["models"],
        summary="All models",
        responses=schema.errors(400, 408, 413, 415, 503),
        openapi_extra=schema.body("IndexQuery", required=False),
    )
    async def index(request: Request) -> list[schema.IndexEntry]:
        async with service.bodies.read(request) as body:
            try:
                query = await service.parse_json(
                    len(body), schema.IndexQuery.model_validate_json, body or b"{}"
                )
            except ValidationError as error:
                raise RequestError(400, error.errors()[0]["msg"]) from error
        if query.ready and not service.ready:
            return []
        state: Literal["READY", "UNAVAILABLE"] = "READY" if service.ready else "UNAVAILABLE"
        return [
            schema.IndexEntry(name=name, version=protocol.VERSION, state=state, reason="")
            for name in models.names
        ]


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, words: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": words}, status, headers)

    @app.exception_handler(TinyserveError)
    async def ours(_: Request, error: TinyserveError) -> JSONResponse:
        if isinstance(error, BusyError):
            return answer(503, str(error), {"Retry-After": str(error.retry_after)})
        if isinstance(error, RequestError):
            close = {"Connection": "close"} if error.status == 408 else None
            return answer(error.status, str(error), close)
        if isinstance(error, ImageError):
            return answer(422, str(error))
        logger.error("%s", error)
        return answer(500, str(error))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        words = f"nothing at {request.url.path}; /docs lists what there is"
        return answer(
            error.status_code,
            words if error.status_code == 404 else error.detail,
            dict(error.headers or {}),
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(400, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; the log says so, as nginx does

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        return answer(500, "the server failed; its log says why")
