import pytest

from tinyserve.cli import main
from tinyserve.engine import Engine, read_card
from tinyserve.modelfile import Label, find_model
from tinyserve.triton import config, label_line

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
text_format = pytest.importorskip("google.protobuf.text_format")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    assert main(["triton", str(folder), "-m", "inception", "-m", "resnet20"]) == 0
    return folder


def test_the_repository_has_the_files_that_triton_wants(repository):
    files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*.*"))
    assert files == [
        f"{model}/{name}"
        for model in ("inception", "resnet20")
        for name in ("1/model.onnx", "config.pbtxt", "labels.txt")
    ]


@pytest.mark.parametrize("model", ["inception", "resnet20"])
def test_the_config_parses_as_tritons_own_message(repository, model):
    parsed = text_format.Parse(
        (repository / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    card = read_card(find_model(model))
    assert parsed.name == model
    assert parsed.backend == "onnxruntime"
    assert parsed.max_batch_size == 64
    (taken,), (given,) = parsed.input, parsed.output
    assert (taken.name, list(taken.dims)) == ("images", [64, 64, 3])
    assert taken.data_type == model_config_pb2.TYPE_UINT8
    assert (given.name, list(given.dims)) == ("probabilities", [len(card.labels)])
    assert given.data_type == model_config_pb2.TYPE_FP32
    assert given.label_filename == "labels.txt"
    assert parsed.HasField("dynamic_batching")
    assert [group.count for group in parsed.instance_group] == [1]
    lines = (repository / model / "labels.txt").read_text().splitlines()
    assert lines == [label_line(label) for label in card.labels]


def test_any_name_of_a_model_is_quoted():
    name = 'a "b" \\ c'
    document = config(name, read_card(find_model("inception")))
    assert text_format.Parse(document, model_config_pb2.ModelConfig()).name == name


def test_the_model_in_it_is_the_model(repository):
    copy = repository / "inception" / "1" / "model.onnx"
    assert copy.read_bytes() == find_model("inception").read_bytes()
    Engine(copy, device="cpu")


def test_what_is_there_is_not_overwritten(repository, capsys):
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    assert main(["triton", str(repository), "-m", "resnet20"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is there already" in line
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_where_one_is_there_already_none_is_written(tmp_path, capsys):
    (tmp_path / "resnet20").mkdir()
    assert main(["triton", str(tmp_path), "-m", "inception", "-m", "resnet20"]) == 2
    assert f"{tmp_path / 'resnet20'} is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["resnet20"]


def test_a_repository_that_cannot_be_written_is_exit_code_1(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["triton", str(tmp_path / "file" / "models"), "-m", "inception"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    target = tmp_path / "file" / "models" / "inception"
    assert line == f"tinyserve: cannot write {target}: Not a directory"


def test_a_file_that_was_changed_is_not_handed_on(tmp_path, capsys):
    content = bytearray(find_model("inception").read_bytes())
    middle = len(content) // 3
    content[middle : middle + 100] = bytes(100)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(content)
    assert main(["triton", str(tmp_path / "models"), "-m", str(changed)]) == 4
    assert "its graph was changed" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_of_two_models_of_one_name_none_is_lost(tmp_path, capsys):
    model = str(find_model("inception"))
    assert main(["triton", str(tmp_path / "models"), "-m", f"{model},{model}"]) == 2
    assert "two models of one name" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_an_unknown_model_writes_nothing(tmp_path, capsys):
    assert main(["triton", str(tmp_path / "models"), "-m", "inception,vgg"]) == 1
    assert "vgg" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_names_are_one_line_each():
    assert label_line(Label("n01", "gold\nfish")) == "n01 gold fish"
    assert label_line(Label(None, "cat")) == "cat"
