"""What the package is made of: public names, and what importing it brings."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyserve
from tinyserve import errors
from tinyserve.cli import _COMMANDS, _parser
from tinyserve.cli.terminal import SOME_FAILED

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_public_names():
    names = ["Classifier", "Prediction", "Result", "TinyserveError", "find_inputs"]
    assert tinyserve.__all__ == names
    assert all(hasattr(tinyserve, name) for name in tinyserve.__all__)


def test_every_module_imports_without_torch_training_and_gradio():
    modules = [m.name for m in pkgutil.walk_packages(tinyserve.__path__, "tinyserve.")]
    assert {"tinyserve.cli", "tinyserve.demo.page", "tinyserve.server"} <= set(modules)
    forbidden = ["torch", "torchvision", "training", "onnx", "matplotlib", "gradio", "openvino"]
    serving = [name for name in modules if name.startswith("tinyserve.server.")]
    others = [name for name in modules if name not in serving]
    for imported, missing in ((others, [*forbidden, "fastapi", "uvicorn"]), (serving, forbidden)):
        code = (
            "import sys, importlib\n"
            f"for name in {missing}: sys.modules[name] = None  # importing it raises ImportError\n"
            f"for name in {imported}: importlib.import_module(name)\n"
        )
        result = run(code)
        assert result.returncode == 0, result.stderr


def test_importing_tinyserve_brings_neither_torch_nor_gradio():
    result = run("import sys, tinyserve; print(*sys.modules)")
    names = result.stdout.split()
    assert "onnxruntime" in names
    assert not {"torch", "gradio", "onnx", "openvino", "training"} & set(names)


@pytest.mark.parametrize(
    ("module", "missing"),
    [("training.fit", "torch"), ("training.export", "torch"), ("training.report", "matplotlib")],
)
def test_training_without_what_it_needs_says_so_in_one_line(tmp_path, module, missing):
    # Python imports this before anything else; importing what is None fails.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert missing in line and line.endswith("training needs: pip install -e '.[training]'")


def test_one_picture_is_classified_without_what_only_others_need(samples):
    """Most of a cold start is imports."""
    picture = str(samples / "goldfish" / "val_68.JPEG")
    result = run(
        "import sys; from tinyserve.cli import main\n"
        f"main(['classify', {picture!r}, '--device', 'cpu'])\n"
        "print(*sys.modules)"
    )
    row, modules = result.stdout.splitlines()
    assert "goldfish" in row
    names = set(modules.split())
    assert "tinyserve.cli.classify" in names
    others = {f"tinyserve.cli.{module}" for module in _COMMANDS.values()}
    assert names & others == {"tinyserve.cli.classify"}
    assert not {"PIL", "tarfile", "zipfile", "urllib.request", "tinyserve.server"} & names


def test_the_help_names_every_exit_code():
    *_, epilog = _parser().format_help().partition("Exit codes: ")
    errors_on_purpose = [e for e in vars(errors).values() if isinstance(e, type)]
    expected = {0, SOME_FAILED, *(error.exit_code for error in errors_on_purpose)}
    assert {int(code) for code in re.findall(r"\d", epilog)} == expected


def test_the_parser_of_one_command_is_the_one_among_all():
    def commands(parser):
        (action,) = (a for a in parser._actions if a.dest == "==SUPPRESS==" or a.choices)
        return action.choices

    everything = commands(_parser())
    assert list(everything) == list(_COMMANDS)
    for name, parser in everything.items():
        assert commands(_parser(name))[name].format_help() == parser.format_help()
