"""On the CPU, which takes the same calls: what differs on a GPU is the name of the device."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

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
    return BoundBatches(session, "cpu", read_card(find_model("baseline")))


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def plain(session, images: np.ndarray) -> np.ndarray:
    return session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, SIZES[-1], SIZES[-1] + 1, 300])
def test_batches_of_every_size_are_answered_in_order(session, batches, count):
    images = pictures(count)
    found = batches.run(images)
    assert found.shape == (count, 200)
    assert found.dtype == np.float32
    assert np.abs(found - plain(session, images)).max() < 1e-6


def test_only_few_sizes_are_run(session, monkeypatch):
    sizes = []
    original = ort.InferenceSession.run_with_iobinding

    def watch(self, binding, *arguments):
        original(self, binding, *arguments)
        sizes.append(binding.get_outputs()[0].shape()[0])

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", watch)
    batches = BoundBatches(session, "cpu", read_card(find_model("baseline")))
    assert tuple(sizes) == SIZES  # warmed up
    sizes.clear()
    for count in (1, 5, 16, 100, 130):
        batches.run(pictures(count))
    assert sizes == [1, 8, 16, 128, 128, 2]


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


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 1, 1, 3), np.uint8), np.zeros((2, 64, 64, 3), np.float32)],
    ids=["broadcast", "cast"],
)
def test_what_is_no_image_is_not_made_one(batches, images):
    with pytest.raises(ValueError, match="images of shape"):
        batches.run(images)
