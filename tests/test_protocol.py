"""Requests and answers of the Open Inference Protocol, as bytes."""

import base64
import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyserve.errors import RequestError
from tinyserve.modelfile import Label
from tinyserve.server.protocol import InferRequest, answer, json_length, parse

PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
FILES = [b"\xff\xd8 no UTF-8", b"", b"third"]
MOST = 8
LABELS = (Label("n1", "cat"), Label("n2", "dog: a friend"), Label(None, "ωμέγα"))
ROWS = np.array([[0.25, 0.75, 0.0], [1e-7, 0.1, 0.9]], np.float32)


def document(**tensor):
    return {"inputs": [tensor]}


def as_json(value):
    body = json.dumps(value).encode()
    return parse(body, len(body), MOST)


def with_binary(value, binary):
    head = json.dumps(value).encode()
    return parse(head + binary, len(head), MOST)


def images(**changes):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [2, 4, 4, 3]}
    return document(**{**tensor, **changes})


def files(**changes):
    return document(**{"name": "image_bytes", "datatype": "BYTES", "shape": [3], **changes})


def binary_files(elements):
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


@pytest.mark.parametrize("data", [PIXELS.tolist(), PIXELS.ravel().tolist()])
def test_pixels_in_json_flat_and_nested(data):
    request = as_json(images(data=data))
    assert request.images.dtype == np.uint8
    np.testing.assert_array_equal(request.images, PIXELS)


def test_nested_pixels_have_the_shape_that_is_said():
    (one,) = as_json(images(data=PIXELS[0].tolist(), shape=[1, 4, 4, 3])).images
    np.testing.assert_array_equal(one, PIXELS[0])
    for data in (PIXELS.transpose(0, 3, 1, 2), PIXELS.reshape(2, 48), PIXELS.reshape(1, 8, 4, 3)):
        with pytest.raises(RequestError, match=r"data of shape \[.*\], not \[2, 4, 4, 3\]"):
            as_json(images(data=data.tolist()))


def test_pixels_in_binary():
    request = with_binary(images(parameters={"binary_data_size": PIXELS.size}), PIXELS.tobytes())
    np.testing.assert_array_equal(request.images, PIXELS)


def test_files_in_json_are_base64():
    assert as_json(files(data=[base64.b64encode(f).decode() for f in FILES])).images == FILES


def test_files_in_binary_have_their_lengths_in_front():
    data = binary_files(FILES)
    assert with_binary(files(parameters={"binary_data_size": len(data)}), data).images == FILES


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8))
@settings(deadline=None)
def test_any_files_arrive_as_they_were(elements):
    data = binary_files(elements)
    value = files(shape=[len(elements)], parameters={"binary_data_size": len(data)})
    assert with_binary(value, data).images == elements


def outputs(**parameters):
    return {"outputs": [{"name": "probabilities", "parameters": parameters}]}


@pytest.mark.parametrize(
    ("more", "classes", "binary"),
    [
        ({}, 0, False),
        ({"outputs": []}, 0, False),
        (outputs(), 0, False),
        (outputs(binary_data=True), 0, True),
        (outputs(classification=3), 3, False),
        (outputs(classification=3, binary_data=True), 3, True),
        ({"parameters": {"binary_data_output": True}}, 0, True),
        ({"parameters": {"binary_data_output": True}, **outputs(binary_data=False)}, 0, False),
        ({"parameters": {"priority": 1, "unknown": "x"}}, 0, False),
        ({"parameters": None, "outputs": None}, 0, False),
        ({"outputs": [{"name": "probabilities", "parameters": None}]}, 0, False),
    ],
)
def test_what_is_wanted(more, classes, binary):
    request = as_json({**images(data=PIXELS.tolist()), **more})
    assert (request.classes, request.binary) == (classes, binary)


def test_an_id_comes_back():
    assert as_json({**images(data=PIXELS.tolist()), "id": "mine"}).id == "mine"


NUMBERS = PIXELS.tolist()
BAD = {
    "no JSON": b"no JSON",
    "nothing": b"",
    "no UTF-8": b"\xff\xfe",
    "an array": b"[]",
    "no inputs": b"{}",
    "inputs of nothing": {"inputs": []},
    "two inputs": {"inputs": images(data=NUMBERS)["inputs"] * 2},
    "an unknown input": images(name="pixels", data=NUMBERS),
    "no data": images(),
    "a wrong datatype": images(datatype="FP32", data=NUMBERS),
    "too few dimensions": images(shape=[96], data=NUMBERS),
    "a negative dimension": images(shape=[-2, 4, 4, -3], data=NUMBERS),
    "no images": images(shape=[0, 4, 4, 3], data=[]),
    "another number of values": images(shape=[3, 4, 4, 3], data=NUMBERS),
    "a shape beyond memory": images(shape=[10**30, 10**30, 4, 3], data=NUMBERS),
    "fractions": images(data=[0.5] * 96),
    "strings": images(data=["1"] * 96),
    "truth values": images(data=[True] * 96),
    "nothing in between": images(data=[None] * 96),
    "numbers that are too large": images(data=[256] * 96),
    "negative numbers": images(data=[-1] * 96),
    "numbers beyond any": images(data=[10**30] * 96),
    "ragged lists": images(data=[[1, 2], [3]]),
    "files that are no base64": files(data=["no base64!"] * 3),
    "files that are numbers": files(data=[1, 2, 3]),
    "files of another datatype": files(datatype="UINT8", data=["AA=="] * 3),
    "another number of files": files(data=["AA=="] * 2),
    "no files": files(shape=[0], data=[]),
    "an unknown output": {**images(data=NUMBERS), "outputs": [{"name": "logits"}]},
    "two outputs": {**images(data=NUMBERS), "outputs": [{"name": "probabilities"}] * 2},
    "less than no classes": {**images(data=NUMBERS), **outputs(classification=-1)},
    "half a class": {**images(data=NUMBERS), **outputs(classification=0.5)},
    "a binary that is none": {**images(data=NUMBERS), **outputs(binary_data="yes")},
    "a size without bytes": images(parameters={"binary_data_size": 96}),
    "a size that is none": images(parameters={"binary_data_size": "96"}),
    "data twice": images(data=NUMBERS, parameters={"binary_data_size": 0}),
    "depth": b'{"inputs": ' + b"[" * 100_000,
    "depth in data": b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1,1,1,1], '
    b'"data": ' + b"[" * 150 + b"1" + b"]" * 150 + b"}]}",
}  # fmt: skip


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_meant_is_refused_in_one_line(value):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(RequestError) as refused:
        parse(body, len(body), MOST)
    assert refused.value.status == 400
    assert str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("size", "data"),
    [
        (96, bytes(95)),
        (96, bytes(97)),
        (0, bytes(96)),
        (None, bytes(96)),
    ],
)
def test_binary_data_must_be_as_long_as_is_said(size, data):
    parameters = {} if size is None else {"binary_data_size": size}
    with pytest.raises(RequestError):
        with_binary(images(parameters=parameters), data)


@pytest.mark.parametrize("data", [b"\x01\x00", b"\xff\xff\xff\xff", b"\x05\x00\x00\x00abc"])
def test_files_that_are_cut_off(data):
    with pytest.raises(RequestError, match="cut off"):
        with_binary(files(shape=[1], parameters={"binary_data_size": len(data)}), data)


def test_a_body_of_empty_files_does_not_become_a_list_of_millions():
    binary = bytes(4 * 2_000_000)
    tracemalloc.start()
    with pytest.raises(RequestError, match="more than 8 images") as refused:
        with_binary(files(shape=[1], parameters={"binary_data_size": len(binary)}), binary)
    assert refused.value.status == 413
    assert tracemalloc.get_traced_memory()[1] < 3 * len(binary)
    tracemalloc.stop()


def test_one_long_string_among_the_pixels_takes_no_more_room_than_itself():
    data = ["x" * 100_000, *[""] * 20_000]
    tracemalloc.start()
    with pytest.raises(RequestError, match="whole numbers"):
        as_json(images(data=data))
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20  # 7.5 GiB as an array of strings
    tracemalloc.stop()


@pytest.mark.parametrize("header", ["-1", "5", "1e1", "", "٣", "9" * 30, "x"])
def test_a_document_that_cannot_be_so_long(header):
    with pytest.raises(RequestError):
        json_length(b"1234", header)


def test_without_the_header_all_is_the_document():
    assert json_length(b"1234", None) == 4
    assert json_length(b"1234", "0") == 0


@given(st.binary(max_size=200), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_do_more_than_be_refused(body, length):
    with pytest.raises(RequestError):
        parse(body, min(length, len(body)), MOST)


VALUES = st.sampled_from([None, True, 0, 1, -1, 255, 1e300, 10**30, "", "x", [], [1], [[0]], {}])
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["images", "image_bytes"]) | VALUES,
        "datatype": st.sampled_from(["UINT8", "BYTES"]) | VALUES,
        "shape": st.lists(st.integers(0, 3), max_size=5) | VALUES,
        "parameters": st.dictionaries(st.just("binary_data_size"), VALUES) | VALUES,
        "data": VALUES,
    },
)


@given(st.lists(TENSORS, max_size=2), st.binary(max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_document_does_more_than_be_refused(tensors, binary):
    try:
        request = with_binary({"inputs": tensors}, binary)
    except RequestError as error:
        assert error.status == 400
    else:
        assert len(request.images) > 0


def wanted(classes=0, binary=False):
    return InferRequest("mine", PIXELS, classes, binary)


def test_probabilities_in_json_lose_nothing():
    body, headers = answer(wanted(), "net", LABELS, ROWS)
    value = json.loads(body)
    assert headers == {"Content-Type": "application/json"}
    assert (value["model_name"], value["model_version"], value["id"]) == ("net", "1", "mine")
    (output,) = value["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == (
        "probabilities",
        "FP32",
        [2, 3],
    )
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(2, 3), ROWS)


def test_probabilities_in_binary_follow_the_document():
    body, headers = answer(wanted(binary=True), "net", LABELS, ROWS)
    length = int(headers["Inference-Header-Content-Length"])
    (output,) = json.loads(body[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": ROWS.nbytes}
    assert "data" not in output
    np.testing.assert_array_equal(np.frombuffer(body[length:], "<f4").reshape(2, 3), ROWS)


def test_classes_are_strings_best_first():
    body, _ = answer(wanted(classes=2), "net", LABELS, ROWS)
    (output,) = json.loads(body)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == [
        "0.75000000:1:dog: a friend",
        "0.25000000:0:cat",
        "0.89999998:2:ωμέγα",
        "0.10000000:1:dog: a friend",
    ]


def test_more_classes_than_there_are_give_all():
    (output,) = json.loads(answer(wanted(classes=99), "net", LABELS, ROWS)[0])["outputs"]
    assert output["shape"] == [2, 3]


def test_classes_in_binary_have_their_lengths_in_front():
    body, headers = answer(wanted(classes=1, binary=True), "net", LABELS, ROWS)
    rest = body[int(headers["Inference-Header-Content-Length"]) :]
    first = b"0.75000000:1:dog: a friend"
    assert rest.startswith(struct.pack("<I", len(first)) + first)
    assert rest.endswith("0.89999998:2:ωμέγα".encode())
