"""On the CPU, which takes the same calls: what differs on a GPU is the name of the device."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tinyserve.bound_batches import SIZES, BoundBatches
from tinyserve.classifier import find_model
from tinyserve.devices import CPU
from tinyserve.engine import read_card
from tinyserve.modelfile import INPUT_NAME, OUTPUT_NAME


@pytest.fixture(scope="module")
def session():
    return ort.InferenceSession(find_model("baseline"), providers=[CPU])


@pytest.fixture(scope="module")
def batches(session):
    return BoundBatches(repeat(session), "cpu", read_card(find_model("baseline")))


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def plain(session, images: np.ndarray) -> np.ndarray:
    return session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 40, SIZES[-1], SIZES[-1] + 1, 600])
def test_batches_of_every_size_are_answered_in_order(session, batches, count):
    images = pictures(count)
    found = batches.run(images)
    assert found.shape == (count, 200)
    assert found.dtype == np.float32
    assert np.abs(found - plain(session, images)).max() < 1e-6


@pytest.mark.parametrize("count", [30, 32])
def test_images_may_lie_anywhere_in_memory(session, batches, count):
    mirrored = pictures(count)[:, :, ::-1]
    assert not mirrored.flags.c_contiguous
    found = batches.run(mirrored)
    assert np.abs(found - plain(session, np.ascontiguousarray(mirrored))).max() < 1e-6


@pytest.fixture
def runs(monkeypatch):
    """Session and size of every run."""
    seen = []
    original = ort.InferenceSession.run_with_iobinding

    def watch(self, binding, *arguments):
        original(self, binding, *arguments)
        seen.append((self, binding.get_outputs()[0].shape()[0]))

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", watch)
    return seen


def test_few_sizes_are_run_each_in_a_session_of_its_own(runs):
    path = find_model("baseline")
    sessions = [ort.InferenceSession(path, providers=[CPU]) for _ in SIZES]
    batches = BoundBatches(iter(sessions), "cpu", read_card(path))
    assert runs == list(zip(sessions, SIZES, strict=True))  # warmed up
    own = dict(zip(SIZES, sessions, strict=True))
    for count, expected in {
        1: [1],
        2: [8],
        9: [8, 1],
        15: [8, 8],
        16: [32],
        32: [32],
        63: [32, 32],
        100: [128],
        550: [512, 32, 8],
        600: [512, 128],
    }.items():
        runs.clear()
        batches.run(pictures(count))
        assert runs == [(own[size], size) for size in expected]


def test_large_images_are_run_fewer_at_a_time(runs):
    """On the mean colour of images of 512 x 512."""
    images = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["n", 512, 512, 3])
    colours = helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["n", 3])
    nodes = [
        helper.make_node("Cast", [INPUT_NAME], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "sides"], [OUTPUT_NAME], keepdims=0),
    ]
    sides = helper.make_tensor("sides", TensorProto.INT64, [2], [1, 2])
    graph = helper.make_graph(nodes, "mean", [images], [colours], [sides])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=[CPU])
    card = read_card(find_model("baseline"))
    card = dataclasses.replace(card, image_size=512, labels=card.labels[:3])
    batches = BoundBatches(repeat(session), "cpu", card)
    assert [size for _, size in runs] == [1, 8]
    found = batches.run(np.full((9, 512, 512, 3), 7, np.uint8))
    assert found.tolist() == [[7, 7, 7]] * 9


def test_an_answer_stays_when_its_buffers_are_used_again(session, batches):
    first = pictures(8, seed=1)
    answer = batches.run(first)
    batches.run(pictures(8, seed=2))
    assert np.abs(answer - plain(session, first)).max() < 1e-6


def test_threads_do_not_share_buffers(session, batches):
    work = [pictures(1 + number % 9, seed=number) for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(batches.run, work))
    for images, found in zip(work, answers, strict=True):
        assert np.abs(found - plain(session, images)).max() < 1e-6
