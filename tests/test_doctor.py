"""What doctor says of machines in good and in bad health."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from tinyserve import doctor as doctor_module
from tinyserve.classifier import Classifier
from tinyserve.devices import cuda_problem, device_name, openvino_problem
from tinyserve.modelfile import find_model


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder with one small model."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(find_model("inception", ("int8",)), folder)
    return folder


def doctor(models: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tinyserve.cli", "doctor", *arguments],
        env={**os.environ, "TINYSERVE_MODELS": str(models), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def checks(run: subprocess.CompletedProcess) -> dict[str, tuple[str, str]]:
    """What was found, by name: the status and the words."""
    return {c["name"]: (c["status"], c["found"]) for c in json.loads(run.stdout)["checks"]}


def on_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), *sys.path])


def test_a_machine_in_good_health(models):
    run = doctor(models, "--json")
    assert run.returncode == 0, run.stdout
    assert run.stderr == ""
    document, found = json.loads(run.stdout), checks(run)
    assert list(found) == [
        "ONNX Runtime",
        "CUDA",
        "OpenVINO",
        "CPU",
        "TensorRT",
        "inception.int8",
    ]
    assert found["ONNX Runtime"][1].startswith("onnxruntime")
    assert found["CPU"][0] == "ok"
    for name, problem in (("CUDA", cuda_problem()), ("OpenVINO", openvino_problem())):
        status, words = found[name]
        assert status == "ok" if problem is None else (status, words) == ("absent", problem)
    provider = Classifier("inception").engine.provider
    assert document["default_device"] == device_name(provider)
    assert found["inception.int8"][1].startswith(
        f"passes its self-test on {document['default_device']}: a probability is off by "
    )


def test_the_same_in_words(models):
    run = doctor(models)
    assert run.returncode == 0
    head, *rows, last = run.stdout.splitlines()
    assert head.startswith("tinyserve ")
    assert {row.split()[0] for row in rows} <= {"ok", "-"}
    assert last.startswith("models run on ")


def test_a_damaged_model_is_exit_code_4(models):
    whole = (models / "inception.int8.onnx").read_bytes()
    (models / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    run = doctor(models, "--json")
    assert run.returncode == 4
    status, words = checks(run)["cut"]
    assert status == "problem"
    assert "no ONNX model, or damaged" in words
    assert checks(run)["inception.int8"][0] == "ok"


def test_no_models_are_a_problem(tmp_path):
    run = doctor(tmp_path, "--json")
    assert run.returncode == 4
    assert checks(run)["models"] == ("problem", f"none in {tmp_path}")


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA works here")
def test_a_device_that_is_asked_for_and_does_not_run_is_exit_code_5(models):
    run = doctor(models, "--json", TINYSERVE_DEVICE="cuda")
    assert run.returncode == 5
    assert checks(run)["CUDA"] == ("problem", cuda_problem())
    assert json.loads(run.stdout)["default_device"] is None
    assert "\nPROBLEM  CUDA " in doctor(models, TINYSERVE_DEVICE="cuda").stdout


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA works here")
def test_a_gpu_that_auto_cannot_use_is_exit_code_5(models, nvidia_driver):
    run = doctor(models, "--json", LD_LIBRARY_PATH=str(nvidia_driver(init=0, gpus=1)))
    assert run.returncode == 5
    assert checks(run)["CUDA"][0] == "problem"
    assert json.loads(run.stdout)["default_device"] in ("OpenVINO", "CPU")


def test_an_error_without_words_is_named(monkeypatch):
    def without_memory(_: str) -> None:
        raise MemoryError

    monkeypatch.setattr(doctor_module, "execution_providers", without_memory)
    assert doctor_module._session_problem("cpu") == "it cannot run a model: MemoryError"


def install_onnx_runtime(folder: Path, project: str) -> None:
    """What says so, without its files."""
    record = folder / f"{project.replace('-', '_')}-9.9.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 9.9\n")
    (record / "top_level.txt").write_text("onnxruntime\n")


def test_two_builds_of_onnx_runtime_and_how_to_mend_it(models, tmp_path):
    """Installed together, as by a package that asks for the one while the other is there."""
    for project in ("onnxruntime", "onnxruntime-gpu"):
        install_onnx_runtime(tmp_path, project)
    (tmp_path / "onnxruntime").symlink_to(Path(onnxruntime.__file__).parent)
    run = doctor(models, "--json", PYTHONPATH=on_path(tmp_path))
    assert run.returncode == 5
    status, words = checks(run)["ONNX Runtime"]
    assert status == "problem"
    assert words == (
        "onnxruntime 9.9 and onnxruntime-gpu 9.9 overwrite each other: pip uninstall -y "
        "onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
    )


def test_another_build_further_down_the_path_is_no_problem(models, tmp_path):
    install_onnx_runtime(tmp_path, "onnxruntime-other")
    run = doctor(models, "--json", PYTHONPATH=on_path(tmp_path))
    status, words = checks(run)["ONNX Runtime"]
    assert status == "ok"
    assert "9.9" not in words


def test_what_is_left_of_onnx_runtime_after_one_of_two_is_uninstalled(models, tmp_path):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    run = doctor(models, "--json", PYTHONPATH=on_path(tmp_path))
    assert run.returncode == 5, run.stderr
    status, words = checks(run)["ONNX Runtime"]
    assert status == "problem"
    assert "pip install --force-reinstall --no-deps onnxruntime" in words
    assert json.loads(run.stdout)["default_device"] is None
