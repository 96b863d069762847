"""What pyproject.toml asks for."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())[
    "project"
]

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
