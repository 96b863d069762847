"""What pyproject.toml asks for."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tinyserve.cli import _parser, main

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PLATFORMS = [
    ("linux", "x86_64", "onnxruntime-gpu"),
    ("linux", "aarch64", "onnxruntime"),
    ("win32", "AMD64", "onnxruntime-gpu"),
    ("win32", "ARM64", "onnxruntime"),
    ("darwin", "arm64", "onnxruntime"),
    ("darwin", "x86_64", "onnxruntime"),
]


def installed(requirements: list[str], system: str, machine: str) -> set[str]:
    environment = {"sys_platform": system, "platform_machine": machine}
    parsed = map(Requirement, requirements)
    return {r.name for r in parsed if r.marker is None or r.marker.evaluate(environment)}


@pytest.mark.parametrize(("system", "machine", "expected"), PLATFORMS)
def test_exactly_one_onnx_runtime_on_any_platform(system, machine, expected):
    every_extra = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    names = installed(PROJECT["dependencies"] + every_extra, system, machine)
    assert {name for name in names if name.startswith("onnxruntime")} == {expected}


def test_the_base_installation_is_light():
    names = installed(PROJECT["dependencies"], "linux", "x86_64")
    assert names == {"numpy", "pillow", "simplejpeg", "tqdm", "onnxruntime-gpu"}


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tinyserve {PROJECT['version']}\n"


@pytest.mark.slow
def test_type_checkers_see_the_types_of_the_installed_package(tmp_path):
    code = "from tinyserve import Classifier, Clasifier, __version__; Classifier(3)"
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert 'Argument 1 to "Classifier" has incompatible type "int"' in found.stdout
    assert 'Module "tinyserve" has no attribute "Clasifier"' in found.stdout
    assert "__version__" not in found.stdout


def test_the_shipped_models_are_small_enough_to_be_cloned():
    files = list((ROOT / "exported").iterdir())
    assert {path.name.partition(".")[0] for path in files} == {
        "baseline",
        "alexnet",
        "inception",
        "resnet20",
    }
    assert {path.suffix for path in files} == {".onnx"}
    assert sum(path.stat().st_size for path in files) <= 64 * 2**20


def test_the_container_runs_a_command_that_there_is():
    text = (ROOT / "Dockerfile").read_text()
    entrypoint, command = (
        json.loads(re.search(rf"^{word} (\[.*\])$", text, re.M)[1])
        for word in ("ENTRYPOINT", "CMD")
    )
    arguments = _parser().parse_args([*entrypoint[1:], *command])
    assert (entrypoint[0], arguments.host, arguments.model) == (
        "tinyserve",
        "0.0.0.0",
        ["resnet20"],
    )
    assert re.search(r"^USER [1-9]\d+$", text, re.M)
    assert f":{arguments.port}/v2/health/ready" in text
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in sources.split())
