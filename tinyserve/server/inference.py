"""The routes that compute: ``infer`` of the protocol, and ``/classify``."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray

from tinyserve.classifier import likeliest
from tinyserve.errors import ImageError, RequestError
from tinyserve.modelfile import Label
from tinyserve.output import prediction_document
from tinyserve.server import protocol, schema
from tinyserve.server.body import files_of
from tinyserve.server.models import Model
from tinyserve.server.service import Service

INFER = "/v2/models/{model}/infer"

_QUICK_ROWS = 16

_PICTURE_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # curl's
_DOCUMENT_TYPES = ("application/json", *_PICTURE_TYPES)


def add_infer(app: FastAPI, service: Service) -> None:
    """Add ``infer`` of every model, with and without a version."""

    route: dict[str, Any] = {
        "tags": ["inference"],
        "response_class": Response,
        "responses": schema.INFER_ANSWERS,
        "openapi_extra": schema.body("InferDocument", binary=True),
    }

    @app.post(INFER, summary="Probabilities of images", **route)
    async def infer(request: Request, model: str) -> Response:
        _content_type(request, _DOCUMENT_TYPES)
        service.check_room(model)
        async with service.bodies.read(request) as body:
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
        most = service.settings.max_queue
        return await service.parse_json(length, protocol.parse, body, length, most)

    async def compute(live: Model, wanted: protocol.InferRequest) -> NDArray[np.float32]:
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


def add_classify(app: FastAPI, service: Service) -> None:
    """Add ``/classify``."""

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
        service.check_room(model)
        async with service.bodies.read(request) as body:
            if kind == "multipart/form-data":
                files = await files_of(request, body, service.settings.max_queue)
            else:
                files = [("", body)]
            name, live = service.models.get(model)
            request.state.model, request.state.images = name, len(files)
            decoded, rows = await compute([data for _, data in files], live)
        names = [name for name, _ in files] if kind == "multipart/form-data" else None
        arguments = (name, names, decoded, rows, live.classifier.card.labels, k)
        if len(files) > _QUICK_ROWS:
            return await service.off_loop(_likeliest_of_each, *arguments)
        return _likeliest_of_each(*arguments)

    async def compute(
        files: Sequence[bytes], live: Model
    ) -> tuple[list[protocol.Pixels | ImageError], NDArray[np.float32]]:
        service.check_count(len(files))
        card = live.classifier.card
        with live.batcher.place(len(files)) as submit:
            decoded = await service.decode(files, card.image_size)
            good = [image for image in decoded if not isinstance(image, ImageError)]
            if not good:
                return decoded, np.empty((0, len(card.labels)), np.float32)
            with service.metrics.stage("compute"):
                return decoded, await submit(np.stack(good))


def _likeliest_of_each(
    model: str,
    names: Sequence[str] | None,
    decoded: Sequence[protocol.Pixels | ImageError],
    rows: NDArray[np.float32],
    labels: Sequence[Label],
    k: int,
) -> Response:
    """What is said of files with ``names``, or of a single picture; ``rows`` are of the good ones.

    Raises the :class:`ImageError` of a picture that is none.
    """
    of_rows = iter(likeliest(rows, labels, k))
    found = [
        image if isinstance(image, ImageError) else [*map(prediction_document, next(of_rows))]
        for image in decoded
    ]
    if names is None:
        (only,) = found
        if isinstance(only, ImageError):
            raise only
        return JSONResponse({"model": model, "predictions": only})
    results = [
        {"file": name, "error": str(answer)}
        if isinstance(answer, ImageError)
        else {"file": name, "predictions": answer}
        for name, answer in zip(names, found, strict=True)
    ]
    if all("error" in result for result in results):
        error = {"error": "no file is a usable picture", "results": results}
        return JSONResponse(error, 422)
    return JSONResponse({"model": model, "results": results})


def _content_type(request: Request, known: Sequence[str]) -> str:
    """What a request says that its body is; status 415 where that is nothing known."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in known and not ("image/" in known and kind.startswith("image/")):
        names = ", ".join(filter(None, known))
        raise RequestError(415, f"content-type {kind!r} (known: {names})")
    return kind
