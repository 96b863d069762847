import dataclasses
import itertools
import os
import pickle
import shutil
import threading
import unicodedata

import numpy as np
import pytest

from tinyserve import Classifier
from tinyserve.classifier import _batches, _key, _label_keys, _label_names, _Pace, _ranks, likeliest
from tinyserve.dataset import Input, find_inputs
from tinyserve.errors import BusyError, ImageError, ModelFileError, RequestError, UsageError
from tinyserve.members import Member
from tinyserve.modelfile import Label, find_model


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier("inception", device="cpu")


def test_one_image_gives_the_likeliest_classes_best_first(classifier, samples):
    predictions = classifier.classify(samples / "goldfish" / "val_68.JPEG", k=7)
    probabilities = [prediction.probability for prediction in predictions]
    assert len(predictions) == 7
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1 + 1e-6
    labels = classifier.card.labels
    assert all(
        (p.wnid, p.name) == (labels[p.index].wnid, labels[p.index].name) for p in predictions
    )


def test_bytes_and_path_give_the_same_answer(classifier, samples):
    path = samples / "teapot" / "val_568.JPEG"
    assert classifier.classify(path) == classifier.classify(path.read_bytes())


def test_an_unusable_image_raises(classifier, tmp_path):
    with pytest.raises(ImageError):
        classifier.classify(tmp_path / "missing.jpg")


def test_asking_for_more_classes_than_there_are_gives_all(classifier, samples):
    assert len(classifier.classify(samples / "teapot" / "val_568.JPEG", k=1000)) == 200


def test_of_equally_likely_classes_the_first_comes_first():
    labels = [Label(wnid=None, name=name) for name in "abcd"]
    rows = np.array([[0, 0.5, 0, 0.5], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]], np.float32)
    before = rows.copy()
    names = ["".join(p.name for p in row) for row in likeliest(rows, labels, 3)]
    assert names == ["bda", "abc", "dcb"]
    assert np.array_equal(rows, before)
    assert likeliest(rows[:0], labels, 3) == []


@pytest.mark.parametrize("batch_size", [1, 7, 32, 64])
def test_many_come_in_order_whatever_the_batch(classifier, samples, batch_size):
    inputs = list(find_inputs([str(samples)]))
    results = list(classifier.classify_many(inputs, batch_size=batch_size))
    assert [result.path for result in results] == [item.path for item in inputs]
    for result in results:
        alone = classifier.classify(result.path)
        assert result.predictions[0].index == alone[0].index
        assert result.predictions[0].probability == pytest.approx(alone[0].probability, abs=1e-5)


def test_many_are_paths_of_any_kind_but_no_single_one(classifier, samples):
    path = samples / "goldfish" / "val_68.JPEG"
    (found,) = classifier.classify_many([path])
    assert (found.path, found.error) == (str(path), None)
    for one in (path, str(path), path.read_bytes()):
        with pytest.raises(TypeError, match="classify takes one"):
            list(classifier.classify_many(one))
    for no_path in (7, path.read_bytes()):
        with pytest.raises(TypeError):
            list(classifier.classify_many([no_path]))


def test_a_model_is_named_by_its_path_too(classifier):
    path = find_model("inception")
    assert Classifier(path, device="cpu").card == classifier.card
    with pytest.raises(UsageError, match="is of int8, not fp16"):
        Classifier(path, precision="fp16", device="cpu")


def test_an_empty_file_is_no_model(tmp_path):
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ModelFileError, match="is empty"):
        Classifier(tmp_path / "empty.onnx")


def test_bad_images_leave_their_neighbours_alone(classifier, samples, tmp_path):
    good = [item.path for item in find_inputs([str(samples)])][:5]
    text, empty = tmp_path / "text.jpg", tmp_path / "empty.jpg"
    text.write_text("no picture")
    empty.touch()
    mixed = [good[0], str(text), good[1], good[2], str(empty), good[3], "missing.jpg", good[4]]
    clean = {r.path: r.predictions for r in classifier.classify_many(good)}
    results = list(classifier.classify_many(mixed, batch_size=3))
    assert [result.path for result in results] == mixed
    assert [result.error is None for result in results] == [path in good for path in mixed]
    for result in results:
        if result.error is None:
            best, expected = result.predictions[0], clean[result.path][0]
            assert best.index == expected.index
            assert best.probability == pytest.approx(expected.probability, abs=1e-5)
        else:
            assert result.predictions == ()


def test_a_batch_of_nothing_but_bad_images(classifier):
    results = list(classifier.classify_many(["a.jpg", "b.jpg"], batch_size=2))
    assert [result.predictions for result in results] == [(), ()]


def test_an_endless_stream_is_read_only_as_far_as_needed(classifier, samples):
    path = str(samples / "teapot" / "val_568.JPEG")
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield path

    results = classifier.classify_many(endless(), batch_size=4)
    for _ in range(10):
        next(results)
    results.close()
    assert taken <= 10 + 4 * 4


def test_what_goes_wrong_with_the_inputs_comes_after_the_results_before(classifier, samples):
    def inputs():
        yield from sorted(samples.glob("*/*.JPEG"))[:5]
        raise LookupError("the list broke off")

    results = classifier.classify_many(inputs(), batch_size=2)
    assert all(result.predictions for result in itertools.islice(results, 5))
    with pytest.raises(LookupError, match="broke off"):
        next(results)


def test_less_than_one_of_anything_is_refused_at_once(classifier, samples):
    image = next(samples.glob("*/*.JPEG"))
    for k in (0, -1):
        with pytest.raises(UsageError, match=f"k must be at least 1, not {k}"):
            classifier.classify(image, k=k)
        with pytest.raises(UsageError, match=f"k must be at least 1, not {k}"):
            classifier.classify_many([], k=k)
        with pytest.raises(UsageError, match=f"batch_size must be at least 1, not {k}"):
            classifier.classify_many([], batch_size=k)


def test_images_that_are_in_memory_already_end_a_batch_early():
    def inputs(in_memory):
        for number in range(10):
            member = Member(str(number), None, bytes, in_memory)
            yield Input(f"a.tar/{number}", None, member)

    assert [len(batch) for batch in _batches(inputs(0), _Pace(4), 25)] == [4, 4, 2]
    assert [len(batch) for batch in _batches(inputs(10), _Pace(4), 25)] == [3, 3, 3, 1]


def test_batches_grow_while_they_are_quick_unless_their_size_was_given():
    pace = _Pace(None)
    for images, seconds in ((16, 0.01), (16, 0.01), (5, 0.01), (32, 1.0), (32, 0.01), (64, 0.01)):
        pace.took(images, seconds)
    assert pace.batch_size == 128
    pace.took(128, 0.01)
    assert pace.batch_size == 128
    given = _Pace(3)
    given.took(3, 0.01)
    assert given.batch_size == 3


def test_labels_match_by_wnid_and_by_name_but_never_by_position(classifier, samples):
    path = str(samples / "goldfish" / "val_68.JPEG")
    labels = ["n01443537", "goldfish", "Goldfish", "n99999999", "0", None]
    results = list(classifier.classify_many([Input(path, label) for label in labels]))
    names = [result.label.name if result.label else None for result in results]
    assert names == ["goldfish", "goldfish", "goldfish", None, None, None]
    correct = results[0].predictions[0].name == "goldfish"
    assert [result.correct for result in results] == [correct] * 3 + [None] * 3


def test_a_failed_input_with_a_label_counts_as_wrong(classifier):
    (result,) = classifier.classify_many([Input("missing.jpg", "goldfish")])
    assert result.correct is False


def test_separators_in_folder_names_do_not_matter(classifier, samples):
    results = classifier.classify_many(find_inputs([str(samples)]))
    assert all(result.label is not None for result in results)


def test_letters_match_however_they_are_composed():
    labels = [Label(None, unicodedata.normalize(form, "Café")) for form in ("NFC", "NFD")]
    first, second = (_label_keys((label,)) for label in labels)
    assert first == second == {_key(label.name): 0 for label in labels}


def test_a_name_that_two_classes_share_matches_neither():
    keys = _label_keys((Label("n1", "crane"), Label("n2", "crane"), Label("n3", "heron")))
    assert keys == {"n1": 0, "n2": 1, "n3": 2, "heron": 2}


def test_the_nearest_folder_that_is_a_class_labels_an_image(classifier, samples, tmp_path):
    photo = (samples / "goldfish" / "val_68.JPEG").read_bytes()
    places = {
        "goldfish/2020/holiday": "goldfish",
        "goldfish/tabby/2021": "tabby",
        "elsewhere": None,
        "goldfish/images": "goldfish",
    }
    for place in places:
        (tmp_path / "teapot" / "x" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "teapot" / "x" / place / "1.jpg").write_bytes(photo)
    (tmp_path / "teapot" / "1.jpg").write_bytes(photo)

    def found(path, below):
        items = list(find_inputs([path]))
        names = {}
        for item in items:
            index = classifier.class_of(item)
            place = os.path.dirname(item.path).removeprefix(below).strip("/")
            names[place] = None if index is None else classifier.card.labels[index].name
        return names

    root = tmp_path / "teapot" / "x"
    assert found(str(root), str(root)) == places
    archive = shutil.make_archive(str(tmp_path / "a"), "zip", root)
    assert found(archive, archive) == places
    assert found(root.as_uri(), root.as_uri()) == places
    # What lies above the folder that is named is no label.
    named = found(str(tmp_path / "teapot"), str(tmp_path / "teapot"))
    assert (named[""], named["x/elsewhere"]) == ("teapot", "teapot")


def test_names_that_differ_little_are_each_known_by_its_own(classifier, monkeypatch):
    names = ("A", "a", "type-1", "type_1", "Dog")
    labels = tuple(Label(None, name) for name in names)
    monkeypatch.setattr(classifier, "_labels_by_name", _label_names(labels))
    monkeypatch.setattr(classifier, "_labels_by_key", _label_keys(labels))
    assert [classifier.label_index(name) for name in names] == [0, 1, 2, 3, 4]
    assert [classifier.label_index(name) for name in ("type 1", "dog", "cat")] == [None, 4, None]


def test_rank_follows_the_order_of_the_predictions():
    row = np.array([0.1, 0.4, 0.1, 0.4], np.float32)
    rows = np.stack([row] * 5)
    assert list(_ranks(rows, [0, 1, None, 2, 3])) == [2, 0, None, 3, 1]
    assert list(_ranks(rows[:0], [])) == []
    assert np.argsort(-row, kind="stable").tolist() == [1, 3, 0, 2]


def test_threads_may_share_a_classifier(classifier, samples):
    paths = [item.path for item in find_inputs([str(samples)])][:8]
    expected = [classifier.classify(path) for path in paths]
    found = [None] * len(paths)

    def work(index):
        found[index] = classifier.classify(paths[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_confidence_is_a_share_and_the_last_one_counts(classifier, samples):
    (result,) = classifier.classify_many([samples / "goldfish" / "val_68.JPEG"])
    assert result.at_least(1).status == "unknown"
    assert result.at_least(1).at_least(0) == result
    assert result.at_least(1).at_least(None).status == "unknown"
    for wrong in (-0.1, 60, float("nan")):
        with pytest.raises(UsageError, match="a confidence is from 0 to 1"):
            result.at_least(wrong)


@pytest.mark.parametrize("argument", ["threads", "streams"])
@pytest.mark.parametrize("value", [0, 2.5, 2**31])
def test_what_is_no_number_of_threads_is_refused(argument, value):
    with pytest.raises(UsageError, match=f"{argument} must be "):
        Classifier("inception", device="cpu", **{argument: value})


@pytest.mark.parametrize(
    "error", [RequestError(404, "no model"), BusyError("full", retry_after=2), ImageError("empty")]
)
def test_errors_come_out_of_other_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_results_are_immutable(classifier, samples):
    (result,) = classifier.classify_many([str(samples / "teapot" / "val_568.JPEG")])
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.error = "other"
