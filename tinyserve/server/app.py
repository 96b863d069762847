"""The routes: the Open Inference Protocol, ``/classify`` for people, and what operators ask for."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tinyserve import images
from tinyserve.engine import default_threads
from tinyserve.errors import BusyError, ImageError, RequestError, TinyserveError
from tinyserve.server import Settings, protocol, schema
from tinyserve.server.body import Bodies, files_of, while_connected
from tinyserve.server.metrics import Metrics
from tinyserve.server.models import Model, Models
from tinyserve.server.protocol import Pixels

T = TypeVar("T")

_QUICK_BYTES = 64 * 2**10
"""JSON of up to this length is read on the event loop; it takes about a millisecond."""
_QUICK_ROWS = 16

_PICTURE_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # curl's
_DOCUMENT_TYPES = ("application/json", *_PICTURE_TYPES)


class Service:
    """What the routes share: models, limits, and threads to decode in."""

    ready = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.models = Models(settings, self.metrics)
        self.bodies = Bodies(settings.limits)
        self._pool = ThreadPoolExecutor(default_threads(), thread_name_prefix="decode")

    async def work(self) -> None:
        """Warm up, be ready, and look for new model files until cancelled."""
        await self.models.start()
        self.ready = True
        await self.models.watch()

    async def stop(self) -> None:
        await self.models.stop()
        self._pool.shutdown()

    async def off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that takes too long for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def decode(self, files: Sequence[bytes], size: int) -> list[Pixels | ImageError]:
        """The pixels of each file, uint8 ``[size, size, 3]``, or why there are none."""
        with self.metrics.stage("decode"):
            return await asyncio.gather(*(self.off_loop(_load, file, size) for file in files))

    def check_count(self, count: int) -> None:
        """Raise :class:`RequestError` for more images than the queue ever holds; status 413."""
        most = self.settings.max_queue
        if count > most:
            raise RequestError(413, f"{count} images, more than {most} at once")


def _load(file: bytes, size: int) -> Pixels | ImageError:
    try:
        return images.load(file, size=size)
    except ImageError as error:
        return error


def build_app(service: Service, *, with_keys: bool = False) -> FastAPI:
    """The application. A page for browsers can be mounted on what this returns."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.stop()

    app = FastAPI(
        title="tinyserve",
        version=version(),
        description="Small image classifiers, over the Open Inference Protocol V2 and for people.",
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_health(app, service)
    _add_models(app, service)
    _add_inference(app, service)
    _add_classify(app, service)

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


def version() -> str:
    try:
        return metadata.version("tinyserve")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0"


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/v2", tags=["server"], summary="Name, version, extensions")
    async def server() -> schema.Server:
        return schema.Server(
            name="tinyserve", version=version(), extensions=list(protocol.EXTENSIONS)
        )

    @app.get("/v2/health/live", tags=["server"], summary="Whether the server runs")
    async def live() -> schema.Live:
        return schema.Live(live=True)

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
                query = schema.IndexQuery.model_validate_json(body or b"{}")
            except ValidationError as error:
                raise RequestError(400, error.errors()[0]["msg"]) from error
        if query.ready and not service.ready:
            return []
        state: Literal["READY", "UNAVAILABLE"] = "READY" if service.ready else "UNAVAILABLE"
        return [
            schema.IndexEntry(name=name, version=protocol.VERSION, state=state, reason="")
            for name in models.names
        ]


def _add_inference(app: FastAPI, service: Service) -> None:
    route: dict[str, Any] = {
        "tags": ["inference"],
        "response_class": Response,
        "responses": schema.INFER_ANSWERS,
        "openapi_extra": schema.body("InferDocument", binary=True),
    }

    @app.post("/v2/models/{model}/infer", summary="Probabilities of images", **route)
    async def infer(request: Request, model: str) -> Response:
        service.models.check(model)
        _content_type(request, _DOCUMENT_TYPES)
        async with service.bodies.read(request) as body, while_connected(request):
            wanted = await parse(body, request.headers.get(protocol.JSON_LENGTH_HEADER))
            name, live = service.models.get(model)
            request.state.model, request.state.images = name, len(wanted.images)
            rows = await compute(live, wanted)
        with service.metrics.stage("encode"):
            arguments = (wanted, name, live.classifier.card.labels, rows)
            if len(rows) > _QUICK_ROWS:
                content, headers = await service.off_loop(protocol.answer, *arguments)
            else:
                content, headers = protocol.answer(*arguments)
        return Response(content, headers=headers)

    @app.post("/v2/models/{model}/versions/{version}/infer", summary="By one version", **route)
    async def infer_version(request: Request, model: str, version: str) -> Response:
        service.models.check(model, version)
        return await infer(request, model)

    async def parse(body: bytes, json_length: str | None) -> protocol.InferRequest:
        length = protocol.json_length(body, json_length)
        if length > service.settings.limits.json_bytes:
            raise RequestError(
                413, f"JSON longer than {service.settings.limits.json_bytes:,} bytes"
            )
        if length > _QUICK_BYTES:
            return await service.off_loop(protocol.parse, body, length)
        return protocol.parse(body, length)

    async def compute(live: Model, wanted: protocol.InferRequest) -> Any:
        service.check_count(len(wanted.images))
        with live.batcher.place(len(wanted.images)) as submit:
            if isinstance(wanted.images, np.ndarray):
                protocol.check_shape(wanted.images, live.classifier.card)
                pixels = wanted.images
            else:
                decoded = await service.decode(wanted.images, live.classifier.card.image_size)
                pictures = []
                for place, image in enumerate(decoded):
                    if isinstance(image, ImageError):
                        raise RequestError(422, f"{protocol.FILES_NAME}[{place}]: {image}")
                    pictures.append(image)
                pixels = np.stack(pictures)
            with service.metrics.stage("compute"):
                return await submit(pixels)


def _add_classify(app: FastAPI, service: Service) -> None:
    @app.post(
        "/classify",
        tags=["inference"],
        summary="The likeliest classes of pictures",
        response_class=Response,
        responses=schema.CLASSIFY_ANSWERS,
        openapi_extra=schema.PICTURES,
    )
    async def classify(
        request: Request,
        k: Annotated[int, Query(ge=1, description="How many classes")] = 5,
        model: Annotated[str | None, Query(description="The first one by default")] = None,
    ) -> Response:
        kind = _content_type(request, (*_PICTURE_TYPES, "image/", "multipart/form-data"))
        async with service.bodies.read(request) as body, while_connected(request):
            if kind == "multipart/form-data":
                files = await files_of(request, body, service.settings.max_queue)
            else:
                files = [("", body)]
            name, live = service.models.get(model)
            request.state.model, request.state.images = name, len(files)
            found = await top([data for _, data in files], live, k)
        if kind != "multipart/form-data":
            (only,) = found
            if isinstance(only, ImageError):
                raise only
            return JSONResponse({"model": name, "predictions": only})
        results = [
            {"file": file, "error": str(answer)}
            if isinstance(answer, ImageError)
            else {"file": file, "predictions": answer}
            for (file, _), answer in zip(files, found, strict=True)
        ]
        if all("error" in result for result in results):
            error = {"error": "no file is a usable picture", "results": results}
            return JSONResponse(error, 422)
        return JSONResponse({"model": name, "results": results})

    async def top(
        files: Sequence[bytes], live: Model, k: int
    ) -> list[list[dict[str, Any]] | ImageError]:
        service.check_count(len(files))
        classifier = live.classifier
        with live.batcher.place(len(files)) as submit:
            decoded = await service.decode(files, classifier.card.image_size)
            good = [image for image in decoded if not isinstance(image, ImageError)]
            with service.metrics.stage("compute"):
                rows = iter(await submit(np.stack(good)) if good else ())
        return [
            image
            if isinstance(image, ImageError)
            else [dataclasses.asdict(prediction) for prediction in classifier.top(next(rows), k)]
            for image in decoded
        ]


def _content_type(request: Request, known: Sequence[str]) -> str:
    """What a request says that its body is; status 415 where that is nothing known."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in known and not ("image/" in known and kind.startswith("image/")):
        names = ", ".join(filter(None, known))
        raise RequestError(415, f"content-type {kind!r} (known: {names})")
    return kind


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, words: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": words}, status, headers)

    @app.exception_handler(TinyserveError)
    async def ours(_: Request, error: TinyserveError) -> JSONResponse:
        if isinstance(error, BusyError):
            return answer(503, str(error), {"Retry-After": str(error.retry_after)})
        if isinstance(error, RequestError):
            return answer(error.status, str(error))
        return answer(422 if isinstance(error, ImageError) else 500, str(error))

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
