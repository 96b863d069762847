"""What the package is made of: public names, and what importing it brings."""

import pkgutil
import subprocess
import sys

import tinyserve
from tinyserve.cli import _COMMANDS, _parser


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_public_names():
    assert tinyserve.__all__ == ["Classifier", "Prediction", "Result", "TinyserveError"]
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


def test_the_parser_of_one_command_is_the_one_among_all():
    def commands(parser):
        (action,) = (a for a in parser._actions if a.dest == "==SUPPRESS==" or a.choices)
        return action.choices

    everything = commands(_parser())
    assert list(everything) == list(_COMMANDS)
    for name, parser in everything.items():
        assert commands(_parser(name))[name].format_help() == parser.format_help()
