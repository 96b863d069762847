"""The Open Inference Protocol V2 over REST: what requests say, and how answers are written.

Documents are JSON; tensors are in them, or, with the binary tensor extension, follow them in the
same body: uint8 and float32 as they lie in memory, an element of BYTES with its length in front
(uint32, little-endian).
"""

import base64
import binascii
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tinyserve.classifier import likeliest
from tinyserve.errors import RequestError
from tinyserve.modelfile import INPUT_NAME, OUTPUT_NAME, Label, ModelCard

VERSION = "1"
"""The one version of every model, as in a repository that ``tinyserve triton`` writes."""
FILES_NAME = "image_bytes"
"""The input that takes image files, in place of pixels."""
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "classification")

Pixels = NDArray[np.uint8]
Headers = dict[str, str]


def _or_empty(kind: type) -> BeforeValidator:
    """What is optional may be null, as clients write it whose language has types."""
    return BeforeValidator(lambda given: kind() if given is None else given)


Parameters = Annotated[dict[str, Any], _or_empty(dict)]


class Document(BaseModel):
    """What clients send: of the very types that are asked for, none is converted."""

    model_config = ConfigDict(strict=True)


class InputTensor(Document):
    name: str = Field(examples=[INPUT_NAME, FILES_NAME])
    datatype: str = Field(examples=["UINT8", "BYTES"])
    shape: list[int] = Field(examples=[[1]])
    parameters: Parameters = Field(
        default_factory=dict, description="binary_data_size: its bytes after the document"
    )
    data: list[Any] | None = Field(
        default=None, description="numbers, flat or nested, or image files in base64"
    )


class OutputWanted(Document):
    name: str = Field(examples=[OUTPUT_NAME])
    parameters: Parameters = Field(
        default_factory=dict,
        description="binary_data: after the document; classification: so many classes, as strings",
    )


class InferDocument(Document):
    id: str | None = None
    parameters: Parameters = Field(
        default_factory=dict, description="binary_data_output: binary_data of all outputs"
    )
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: Annotated[list[OutputWanted], Field(max_length=1), _or_empty(list)] = Field(
        default_factory=list
    )


class OutputTensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class InferAnswer(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What somebody wants to know. ``images`` are pixels, uint8 ``[n, H, W, 3]``, or the bytes of
    ``n`` image files; of ``classes`` likeliest classes where that is not 0, or all probabilities;
    ``binary`` or in JSON."""

    id: str | None
    images: Pixels | list[bytes]
    classes: int
    binary: bool


def json_length(body: bytes, header: str | None) -> int:
    """How much of a body is the document, by the header :data:`JSON_LENGTH_HEADER`; status 400."""
    if header is None:
        return len(body)
    plain = header.isascii() and header.isdecimal() and len(header) < 20
    if not plain or int(header) > len(body):
        raise _bad(f"{JSON_LENGTH_HEADER} is no length of a part of the body")
    return int(header)


def parse(body: bytes, length: int, most: int) -> InferRequest:
    """The request in a body that begins with a document of this length.

    Raises :class:`RequestError`: 400 for what is no such request, 413 for more than ``most`` files.
    """
    try:
        document = InferDocument.model_validate_json(body[:length])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _bad(f"{place}: {first['msg']}" if place else first["msg"]) from error
    (tensor,) = document.inputs
    binary = _binary(tensor, memoryview(body)[length:])
    if tensor.name == INPUT_NAME:
        images: Pixels | list[bytes] = _pixels(tensor, binary)
    elif tensor.name == FILES_NAME:
        images = _files(tensor, binary, most)
    else:
        raise _bad(f"unknown input {tensor.name!r} (known: {INPUT_NAME}, {FILES_NAME})")
    return InferRequest(document.id, images, *_wanted(document))


def check_shape(images: Pixels, card: ModelCard) -> None:
    """Raise :class:`RequestError`, status 400, unless a model takes such images."""
    size = card.image_size
    if images.shape[1:] != (size, size, 3):
        raise _bad(f"{INPUT_NAME}: shape {list(images.shape)}, not [n, {size}, {size}, 3]")


def answer(
    request: InferRequest,
    model: str,
    labels: Sequence[Label],
    probabilities: NDArray[np.float32],
) -> tuple[bytes, Headers]:
    """Body and headers of the answer to a request; ``probabilities``: ``[n, classes]``."""
    output: dict[str, Any] = {"name": OUTPUT_NAME}
    document: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": [output]}
    if request.id is not None:
        document["id"] = request.id
    binary = b""
    if request.classes:
        texts = [
            [f"{best.probability:.8f}:{best.index}:{best.name}" for best in row]
            for row in likeliest(probabilities, labels, request.classes)
        ]
        output |= {"datatype": "BYTES", "shape": [len(texts), len(texts[0])]}
        flat = [text for row in texts for text in row]
        if request.binary:
            binary = b"".join(_with_length(text.encode()) for text in flat)
        else:
            output["data"] = flat
    else:
        output |= {"datatype": "FP32", "shape": list(probabilities.shape)}
        if request.binary:
            binary = probabilities.astype("<f4", copy=False).tobytes()
        else:
            output["data"] = probabilities.ravel().tolist()
    if not request.binary:
        return json.dumps(document).encode(), {"Content-Type": "application/json"}
    output["parameters"] = {"binary_data_size": len(binary)}
    head = json.dumps(document).encode()
    headers = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(head))}
    return head + binary, headers


def metadata(name: str, card: ModelCard, parameters: dict[str, Any]) -> dict[str, Any]:
    """The metadata document of a model."""
    size = card.image_size
    return {
        "name": name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": INPUT_NAME, "datatype": "UINT8", "shape": [-1, size, size, 3]},
            {"name": FILES_NAME, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [{"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, len(card.labels)]}],
        "parameters": parameters,
    }


def _binary(tensor: InputTensor, rest: memoryview) -> memoryview | None:
    """The bytes of a tensor that follow the document; None where it is in the document."""
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if len(rest):
            raise _bad(f"{len(rest)} bytes after the document belong to no input")
        if tensor.data is None:
            raise _bad(f"{tensor.name}: no data")
        return None
    if tensor.data is not None:
        raise _bad(f"{tensor.name}: data and binary_data_size exclude each other")
    if type(size) is not int or size != len(rest):
        raise _bad(f"{tensor.name}: binary_data_size is {size!r}, but {len(rest)} bytes follow")
    return rest


def _pixels(tensor: InputTensor, binary: memoryview | None) -> Pixels:
    if tensor.datatype != "UINT8":
        raise _bad(f"{INPUT_NAME}: datatype {tensor.datatype!r}, not UINT8")
    shape = tensor.shape
    if len(shape) != 4 or min(shape) < 1:
        raise _bad(f"{INPUT_NAME}: shape {shape}, not [n, height, width, 3]")
    values = _numbers(tensor.data) if binary is None else np.frombuffer(binary, np.uint8)
    if math.prod(shape) != values.size:
        raise _bad(f"{INPUT_NAME}: {values.size} values for shape {shape}")
    # Nested as they should be, or flat; of one image, with or without the list around it.
    nested = (tuple(shape), tuple(shape[1:])) if shape[0] == 1 else (tuple(shape),)
    if values.ndim > 1 and values.shape not in nested:
        raise _bad(f"{INPUT_NAME}: data of shape {list(values.shape)}, not {shape}")
    return values.reshape(shape)


def _numbers(data: list[Any] | None) -> Pixels:
    try:
        # As objects: of strings, NumPy would make an array in which each is as long as the longest.
        given = np.array(data, dtype=object)
    except ValueError as error:
        raise _bad(f"{INPUT_NAME}: data is no array of numbers") from error
    whole = _bad(f"{INPUT_NAME}: data must be whole numbers from 0 to 255")
    if set(map(type, given.ravel())) != {int}:
        raise whole
    try:
        values = given.astype(np.int64)
    except OverflowError as error:
        raise whole from error
    if values.min() < 0 or values.max() > 255:
        raise whole
    return values.astype(np.uint8)


def _files(tensor: InputTensor, binary: memoryview | None, most: int) -> list[bytes]:
    if tensor.datatype != "BYTES":
        raise _bad(f"{FILES_NAME}: datatype {tensor.datatype!r}, not BYTES")
    if binary is not None:
        files = _split(binary, most)
    else:
        files = [_from_base64(text) for text in tensor.data or []]
    if tensor.shape != [len(files)] or not files:
        raise _bad(f"{FILES_NAME}: {len(files)} elements for shape {tensor.shape}")
    return files


def _split(binary: memoryview, most: int) -> list[bytes]:
    files: list[bytes] = []
    place = 0
    while place < len(binary):
        if len(files) == most:  # before a body of empty ones becomes a list of millions
            raise RequestError(413, f"more than {most} images at once")
        start = place + 4
        if start > len(binary):
            raise _bad(f"{FILES_NAME}: cut off inside a length")
        place = start + struct.unpack_from("<I", binary, place)[0]
        if place > len(binary):
            raise _bad(f"{FILES_NAME}: element {len(files)} is cut off")
        files.append(bytes(binary[start:place]))
    return files


def _from_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise _bad(f"{FILES_NAME}: data must be image files in base64") from error


def _with_length(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _wanted(document: InferDocument) -> tuple[int, bool]:
    """How many classes, 0 for all probabilities, and whether in binary."""
    binary: Any = document.parameters.get("binary_data_output", False)
    classes: Any = 0
    for output in document.outputs:
        if output.name != OUTPUT_NAME:
            raise _bad(f"unknown output {output.name!r} (known: {OUTPUT_NAME})")
        classes = output.parameters.get("classification", 0)
        binary = output.parameters.get("binary_data", binary)
    if type(classes) is not int or classes < 0:
        raise _bad("classification must be a whole number from 0")
    if type(binary) is not bool:
        raise _bad("binary_data must be true or false")
    return classes, binary


def _bad(message: str) -> RequestError:
    return RequestError(400, message)
