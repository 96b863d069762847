"""What the routes take and give, as an OpenAPI document and as a page."""

from html import escape
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tinyserve.classifier import Prediction
from tinyserve.server.protocol import Document, InferAnswer, InferDocument

_REFERENCE = "#/components/schemas/{model}"
_FILE = {"type": "string", "format": "binary"}

Responses = dict[int | str, dict[str, Any]]


class Error(BaseModel):
    error: str


class Server(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool
    devices: dict[str, str]


class ModelReady(BaseModel):
    name: str
    ready: bool


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, str]


class IndexQuery(Document):
    ready: bool = False


class IndexEntry(BaseModel):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class OnePicture(BaseModel):
    model: str
    predictions: list[Prediction]


class FileResult(BaseModel):
    """With ``error`` where the file is no usable picture, and ``predictions`` otherwise."""

    file: str
    predictions: list[Prediction] | None = None
    error: str | None = None


class ManyPictures(BaseModel):
    model: str
    results: list[FileResult]


_WORDS = {
    400: "Not as it should be",
    404: "No such model",
    408: "Sent too slowly",
    413: "Too much at once",
    415: "Of a type that is not known",
    422: "No usable picture",
    503: "Busy, or not ready; Retry-After says for how many seconds",
}


def errors(*statuses: int) -> Responses:
    return {status: {"model": Error, "description": _WORDS[status]} for status in statuses}


METRICS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

_TAKING = errors(400, 404, 408, 413, 415, 422, 503)

INFER_ANSWERS: Responses = {
    200: {
        "model": InferAnswer,
        "content": {"application/octet-stream": {"schema": _FILE}},
        "description": "JSON, or JSON followed by binary tensors",
    },
    **_TAKING,
}
CLASSIFY_ANSWERS: Responses = {
    200: {"model": OnePicture | ManyPictures, "description": "By likelihood"},
    **_TAKING,
}
PICTURES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": _FILE, "minItems": 1}},
                    "required": ["file"],
                }
            },
        },
    }
}


def body(model: str, *, required: bool = True, binary: bool = False) -> dict[str, Any]:
    """A JSON document, which binary tensors may follow."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": _REFERENCE.format(model=model)}}
    }
    if binary:
        content["application/octet-stream"] = {"schema": _FILE}
    return {"requestBody": {"required": required, "content": content}}


def openapi(app: FastAPI, *, with_keys: bool) -> dict[str, Any]:
    """The OpenAPI document of an application."""
    if not app.openapi_schema:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        # FastAPI knows only the bodies that it reads itself.
        _, read_by_us = models_json_schema(
            [(InferDocument, "validation"), (IndexQuery, "validation")], ref_template=_REFERENCE
        )
        components = document["components"]
        components["schemas"] |= read_by_us["$defs"]
        # And it lists an answer to invalid parameters that is not ours.
        for operations in document["paths"].values():
            for operation in operations.values():
                if operation["responses"].get("422", {}).get("description") == "Validation Error":
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        if with_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; }}
  body {{ margin: 2rem auto; padding: 0 1rem; }}
  code {{ font-family: ui-monospace, monospace; overflow-wrap: anywhere; }}
  h2 {{ font-size: 1rem; margin: 1.5rem 0 0; }}
  p {{ margin: .25rem 0; }}
</style>
<h1>{title}</h1>
<p>{description} The whole of it, for programs: <a href="openapi.json">openapi.json</a>.</p>
{routes}
</html>
"""


def page(document: dict[str, Any]) -> str:
    """An OpenAPI document as HTML that loads nothing from anywhere."""
    routes = [
        _route(method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    info = document["info"]
    return _PAGE.format(
        title=escape(f"{info['title']} {info['version']}"),
        description=escape(info["description"]),
        routes="\n".join(routes),
    )


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    takes = [parameter["name"] for parameter in operation.get("parameters", ())]
    takes += operation.get("requestBody", {}).get("content", ())
    gives = [
        f"{status} {answer['description']}" for status, answer in operation["responses"].items()
    ]
    lines = [
        f"<h2><code>{method} {escape(path)}</code></h2>",
        f"<p>{escape(operation['summary'])}</p>",
        f"<p>Takes: {escape(', '.join(takes))}</p>" if takes else "",
        f"<p>Gives: {escape('; '.join(gives))}</p>",
    ]
    return "\n".join(filter(None, lines))
