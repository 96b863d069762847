"""Classifiers that others exported, under our command line."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from tinyserve import adopt as adopting
from tinyserve import images
from tinyserve.adopt import made_up_images, read_labels
from tinyserve.classifier import Classifier
from tinyserve.cli import main
from tinyserve.engine import Engine, read_card
from tinyserve.modelfile import Label

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLAGS = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]


def export(network, path: Path, size: int, *, batch: str | int = "batch") -> Path:
    """As their own users would, NCHW floats in."""
    shapes = {0: torch.export.Dim("batch")} if batch == "batch" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.randn(2 if batch == "batch" else batch, 3, size, size),),
            path,
            input_names=["images"],  # our own input's name, to be sure that it does no harm
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return path


@pytest.fixture(scope="module", params=["torchvision resnet18", "timm mobilenetv3"])
def theirs(request, tmp_path_factory) -> tuple[Path, int]:
    """A network of others with random weights, and its number of classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    if request.param.startswith("torchvision"):
        torchvision = pytest.importorskip("torchvision")
        return export(torchvision.models.resnet18(num_classes=12), folder / "resnet18.onnx", 64), 12
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv3_small_050", num_classes=7)
    return export(network, folder / "mobilenet.onnx", 64), 7


def write_labels(path: Path, count: int) -> Path:
    path.write_text("".join(f"n{number:08} thing {number}\n" for number in range(count)))
    return path


def adopt(source: Path, output: Path, labels: Path, *more: str, size: int = 64) -> int:
    arguments = ["adopt", str(source), "--labels", str(labels), "--size", str(size), *FLAGS]
    return main([*arguments, "-o", str(output), *more])


@pytest.mark.slow
def test_an_adopted_classifier_answers_as_its_own_users_get_it(theirs, samples, tmp_path, capsys):
    source, classes = theirs
    output = tmp_path / "adopted.onnx"
    assert adopt(source, output, write_labels(tmp_path / "labels.txt", classes)) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adopted.onnx", "labels.txt"]

    picture = next((samples / "goldfish").iterdir())
    pixels = images.load(picture, size=64) / 255
    planes = ((pixels - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)
    (logits,) = ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(
        None, {"images": planes}
    )
    expected = np.exp(logits[0] - logits[0].max())
    expected /= expected.sum()

    found = Classifier(str(output), device="cpu").classify(picture, k=classes)
    assert [prediction.index for prediction in found] == np.argsort(-expected).tolist()
    assert [p.probability for p in found] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert found[0].name == f"thing {found[0].index}"
    assert found[0].wnid == f"n{found[0].index:08}"

    card = read_card(output)
    assert (card.architecture, card.precision) == (source.stem, "fp32")
    assert (card.image_size, len(card.labels), card.golden.count) == (64, classes, 8)
    assert card.training is None
    for command in (["verify", str(output)], ["info", str(output)], ["labels", str(output)]):
        assert main(command) == 0
    assert main(["classify", str(samples), "-m", str(output), "--device", "cpu"]) == 0


class Tiny(torch.nn.Module):
    """Means of the channels, as logits or as probabilities."""

    def __init__(self, *, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(self, x):
        x = x.mean(dim=(2, 3))
        return x.softmax(dim=1) if self.softmax else x


@pytest.fixture
def labels(tmp_path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("red\ngreen\nblue\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [True, False])
def test_softmax_is_added_only_where_it_is_missing(labels, tmp_path, softmax):
    source = export(Tiny(softmax=softmax), tmp_path / "tiny.onnx", 32)
    output = tmp_path / "out.onnx"
    assert adopt(source, output, labels, size=32) == 0
    classifier = Classifier(str(output), device="cpu")
    pictures = made_up_images(3, 32)
    means = ((pictures / 255 - MEAN) / STD).mean(axis=(1, 2))
    expected = np.exp(means) / np.exp(means).sum(axis=1, keepdims=True)
    assert np.allclose(classifier.engine.run(pictures), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [True, False])
def test_answers_in_half_precision_are_taken(labels, tmp_path, softmax):
    class Half(Tiny):
        def forward(self, x):
            return super().forward(x).half()

    source = export(Half(softmax=softmax), tmp_path / "half.onnx", 32)
    output = tmp_path / "out.onnx"
    assert adopt(source, output, labels, size=32) == 0
    rows = Classifier(str(output), device="cpu").engine.run(made_up_images(3, 32))
    assert rows.dtype == np.float32
    assert np.allclose(rows.sum(axis=1), 1, atol=1e-3)


def save(
    path: Path,
    *last: tuple[str, list[str], str],
    classes: int = 3,
    batch: str | int = "n",
    given: str | int = 3,
    ir_version: int = 8,
    inside: dict[str, int] | None = None,
) -> Path:
    """A network by ONNX's own means that ends in the nodes ``last``: type, inputs, output.

    ``batch``, ``given`` and ``inside`` are what it says of its shapes.
    """
    make, floats = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    numbers = np.random.default_rng(0).normal(size=(3, classes)).astype(np.float32)
    weights = onnx.numpy_helper.from_array(numbers, "weights")
    takes = [make("x", floats, [batch, 3, 32, 32])]
    if ir_version < 4:
        takes.append(make("weights", floats, weights.dims))
    nodes = [
        ("GlobalAveragePool", ["x"], "pooled"),
        ("Flatten", ["pooled"], "flat"),
        ("MatMul", ["flat", "weights"], "logits" if last else "y"),
        *last,
    ]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, inputs, [output]) for kind, inputs, output in nodes],
        "network",
        takes,
        [make("y", floats, ["n", given])],
        [weights],
        value_info=[make(name, floats, ["n", size]) for name, size in (inside or {}).items()],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=ir_version), path)
    return path


def answers(source: Path, pictures: np.ndarray) -> np.ndarray:
    planes = ((pictures / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": planes})[0]


def reference_answers(source: Path, pictures: np.ndarray) -> np.ndarray:
    """By ONNX's own, slow and literal, implementation."""
    from onnx.reference import ReferenceEvaluator

    planes = ((pictures / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    return ReferenceEvaluator(str(source)).run(None, {"x": planes})[0]


def test_probabilities_in_8_bits_are_taken_as_they_are(labels, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            generator = np.random.default_rng(0)
            self.left = iter([generator.normal(size=(1, 3, 32, 32)) * k for k in (0.1, 9)])

        def get_next(self):
            noise = next(self.left, None)
            return None if noise is None else {"x": noise.astype(np.float32)}

    source, output = tmp_path / "int8.onnx", tmp_path / "out.onnx"
    softmax = save(tmp_path / "fp32.onnx", ("Softmax", ["logits"], "y"))
    quantize_static(softmax, source, Noise(), quant_format=QuantFormat.QDQ)
    pictures = made_up_images(8, 32)
    expected = answers(source, pictures)
    assert np.abs(expected.sum(axis=1) - 1).max() > 1e-3
    assert adopt(source, output, labels, size=32) == 0
    found = Classifier(str(output), device="cpu").engine.run(pictures)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shared", ["nothing", "zero", "constant", "filters", "fused"])
def test_filters_of_8_bits_from_elsewhere_are_taken(labels, tmp_path, shared):
    """More than 7 bits of which are used, and which may share them or their zero points."""
    generator = np.random.default_rng(0)
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    constants = {
        "scale": np.float32(0.03),
        "middle": np.uint8(128),
        "filter_scale": np.float32(0.002),
    }
    nodes, last = [], "x"
    zeros = ["zero 1", "zero 2"] if shared in ("nothing", "filters") else ["zero", "zero"]
    if shared == "constant":
        nodes.append(make("Constant", [], ["zero"], value=tensor(np.asarray(np.int8(0)))))
    else:
        constants |= dict.fromkeys(zeros, np.int8(0))
    for number, zero in enumerate(zeros, start=1):
        filters = "filters" if shared == "filters" else f"filters {number}"
        constants[filters] = generator.normal(0, 70, (3, 3, 3, 3)).clip(-127, 127).astype(np.int8)
        pixels, weights = [f"in {number}", "scale", "middle"], [filters, "filter_scale", zero]
        nodes.append(make("QuantizeLinear", [last, "scale", "middle"], [f"in {number}"]))
        last = f"y {number}"
        if shared == "fused":
            out = ["scale", "middle"]
            nodes += [
                make("QLinearConv", [*pixels, *weights, *out], [f"q {number}"], pads=[1, 1, 1, 1]),
                make("DequantizeLinear", [f"q {number}", *out], [last]),
            ]
        else:
            nodes += [
                make("DequantizeLinear", pixels, [f"x {number}"]),
                make("DequantizeLinear", weights, [f"w {number}"]),
                make("Conv", [f"x {number}", f"w {number}"], [last], pads=[1, 1, 1, 1]),
            ]
    nodes += [make("GlobalAveragePool", [last], ["pooled"]), make("Flatten", ["pooled"], ["y"])]
    value, floats = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        [value("x", floats, ["n", 3, 32, 32])],
        [value("y", floats, ["n", 3])],
        [tensor(np.asarray(number), name) for name, number in constants.items()],
    )
    opset = [onnx.helper.make_opsetid("", 19)]
    source, output = tmp_path / "int8.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), source)
    assert adopt(source, output, labels, size=32) == 0
    pictures = made_up_images(8, 32)
    expected = np.exp(reference_answers(source, pictures))
    expected /= expected.sum(axis=1, keepdims=True)
    classifier = Classifier(str(output), device="cpu")
    assert np.allclose(classifier.engine.run(pictures), expected, atol=1e-2)
    assert classifier.card.parameters == sum(np.size(number) for number in constants.values())


@pytest.mark.parametrize(
    "changes",
    [{"batch": -1}, {"ir_version": 3}, {"inside": {"flat": 7}}],
    ids=["a batch of -1", "weights that are inputs", "untrue shapes inside"],
)
def test_what_runs_is_adopted(labels, tmp_path, changes):
    source, output = save(tmp_path / "odd.onnx", **changes), tmp_path / "out.onnx"
    assert adopt(source, output, labels, size=32) == 0
    pictures = made_up_images(3, 32)
    expected = np.exp(answers(source, pictures))
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.allclose(
        Classifier(str(output), device="cpu").engine.run(pictures), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    ("last", "changes", "words"),
    [
        ([("Sigmoid", ["logits"], "y")], {}, "whose sum is not 1"),
        ([("Sqrt", ["logits"], "y")], {}, "not finite"),
        ([], {"classes": 5, "given": "classes"}, "gives 8 x 5, but there are 3 labels"),
    ],
)
def test_answers_that_are_none_are_refused(labels, tmp_path, capsys, last, changes, words):
    source = save(tmp_path / "odd.onnx", *last, **changes)
    assert adopt(source, tmp_path / "out.onnx", labels, size=32) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(tmp_path.glob("*out.onnx*"))


def test_one_wrong_answer_among_many_is_seen(labels, tmp_path, capsys, monkeypatch):
    run = Engine.run

    def spoiled(self, pictures):
        rows = run(self, pictures).copy()
        rows[7:] = np.nan
        return rows

    monkeypatch.setattr(Engine, "run", spoiled)
    source = save(tmp_path / "good.onnx")
    assert adopt(source, tmp_path / "out.onnx", labels, size=32) == 4
    assert "differs by nan" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out.onnx*"))


def test_what_takes_one_size_of_batch_alone_whatever_it_says_is_refused(tmp_path, capsys):
    source = save(tmp_path / "odd.onnx", ("MatMul", ["logits", "logits"], "y"), classes=8, given=8)
    names = write_labels(tmp_path / "labels.txt", 8)
    assert adopt(source, tmp_path / "out.onnx", names, size=32) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{source} cannot be adopted: CPU failed with 1 image at a time" in line


def test_the_file_that_is_tested_is_called_by_the_name_it_would_have(
    labels, tmp_path, capsys, monkeypatch
):
    def cut_short(path, graph, _card):
        path.write_bytes(graph[:-1])

    monkeypatch.setattr(adopting, "write_model", cut_short)
    source, output = save(tmp_path / "good.onnx"), tmp_path / "out.onnx"
    assert adopt(source, output, labels, size=32) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{source} cannot be adopted: {output} is no ONNX model, or damaged" in line
    assert "candidate" not in line


def test_a_folder_is_not_written_over(labels, tmp_path, capsys):
    source = save(tmp_path / "good.onnx")
    for output in (tmp_path, Path()):
        assert adopt(source, output, labels, size=32) == 2
        assert f"cannot write {output}: it is a folder" in capsys.readouterr().err


def test_neither_the_network_nor_its_labels_are_written_over(labels, tmp_path, capsys):
    source = save(tmp_path / "good.onnx")
    (tmp_path / "link.onnx").symlink_to(source)
    before = source.read_bytes(), labels.read_bytes()
    for output, words in (
        (source, "is the network itself"),
        (tmp_path / "link.onnx", "is the network itself"),
        (labels, "ends in .onnx"),
    ):
        assert adopt(source, output, labels, size=32) == 2
        assert words in capsys.readouterr().err
    assert (source.read_bytes(), labels.read_bytes()) == before


@pytest.mark.parametrize(
    ("option", "numbers", "words"),
    [
        ("--std", "0,1,1", "must be above 0"),
        ("--std", "58.4,57.1,57.4", "pixels from 0 to 1"),
        ("--std", "inf,1,1", "pixels from 0 to 1"),
        ("--mean", "123.7,116.3,103.5", "pixels from 0 to 1"),
        ("--mean", "0,nan,0", "pixels from 0 to 1"),
    ],
)
def test_numbers_that_are_not_of_pixels_are_refused(
    labels, tmp_path, capsys, option, numbers, words
):
    with pytest.raises(SystemExit) as caught:
        adopt(tmp_path / "x.onnx", tmp_path / "out.onnx", labels, option, numbers, size=32)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"labels": "a\nb\n"}, 1, "2 labels"),
        ({"labels": "a\n\nb\n"}, 2, "line 2 is empty"),
        ({"labels": None}, 2, "cannot read labels"),
        ({"size": 48}, 1, "wanted batch x 3 x 48 x 48"),
        ({"batch": 1}, 1, "dynamic batch"),
        ({"source": "text"}, 1, "no ONNX model"),
        ({"source": "missing"}, 1, "no such model file"),
        ({"output": "missing/folder/out.onnx"}, 1, "cannot write"),
    ],
)
def test_what_cannot_be_adopted_is_one_line(labels, tmp_path, capsys, change, code, words):
    source = tmp_path / "tiny.onnx"
    if change.get("source") == "text":
        source.write_text("no model")
    elif change.get("source") != "missing":
        export(Tiny(softmax=False), source, 32, batch=change.get("batch", "batch"))
    if change.get("labels", "") is None:
        labels.unlink()
    elif "labels" in change:
        labels.write_text(change["labels"])
    output = tmp_path / change.get("output", "out.onnx")
    capsys.readouterr()
    assert adopt(source, output, labels, size=change.get("size", 32)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinyserve: ")
    assert words in line
    assert not list(tmp_path.glob("**/*out.onnx*"))


def test_labels_are_names_with_or_without_a_wordnet_id(tmp_path):
    path = tmp_path / "labels.txt"
    lines = "n01443537  goldfish\nn02099601\tgolden retriever\nteddy bear\nnails\n"
    path.write_text(lines, encoding="utf-8-sig")  # as Windows writes it
    assert read_labels(path) == [
        Label("n01443537", "goldfish"),
        Label("n02099601", "golden retriever"),
        Label(None, "teddy bear"),
        Label(None, "nails"),
    ]


def test_made_up_images_are_the_same_everywhere_and_not_flat():
    pictures = made_up_images(4, 40)
    assert (pictures.shape, pictures.dtype) == ((4, 40, 40, 3), np.uint8)
    assert np.array_equal(pictures, made_up_images(4, 40))
    assert pictures.std(axis=(1, 2)).min() > 10
    assert np.abs(np.diff(pictures.astype(int), axis=1)).max() < 40
