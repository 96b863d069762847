"""What README.md says is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinyserve.cli import _COMMANDS
from tinyserve.engine import read_card
from tinyserve.modelfile import Training, installed_models

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def epochs(training: Training) -> str:
    """All that went into the weights, such as "4 + 7" where a run started from another's."""
    before = f"{epochs(training.initial)} + " if training.initial else ""
    return f"{before}{training.epochs}"


def test_the_table_of_models_is_what_the_files_say():
    rows = re.findall(
        r"^\| `([\w.]+)` \| ([\d.]+) M \| ([\d.]+) \| ([\d.]+) \| ([\d +]+) \|", README, re.M
    )
    written = {name: values for name, *values in rows}
    expected = {}
    for name, path in installed_models().items():
        card = read_card(path)
        expected[name] = [
            f"{card.parameters / 1e6:.2f}",
            *(f"{100 * share:.2f}" for share in card.accuracy),
            epochs(card.training),
        ]
    assert written == expected


def test_the_python_example_runs():
    example, *_ = re.findall(r"```python\n(.*?)```", README, re.S)  # the others need a server
    run = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 5


@pytest.mark.parametrize(("document", "entries"), [("README.md", 8), ("CONTRIBUTING.md", 50)])
def test_the_file_tree_names_files_that_exist(document, entries):
    tree = (ROOT / document).read_text().split("## Where things are")[1].split("```")[1]
    names = re.findall(r"^(  )?([\w/.]+(?: \w+\.\w+)*)  ", tree, re.M)
    folder = ROOT
    assert len(names) >= entries
    for indent, entry in names:
        for name in entry.split():
            path = (folder if indent else ROOT) / name
            assert path.exists(), name
        if not indent and entry.endswith("/"):
            folder = ROOT / entry


def test_the_file_tree_has_every_module():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in ("tinyserve", "training"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name in tree or path.name == "__init__.py", path.name


def test_every_command_is_in_the_readme():
    for command in _COMMANDS:
        assert f"tinyserve {command}" in README


def test_two_commands_are_all_a_fresh_machine_needs():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv ")]
    assert len(commands) == 2
    assert "tinyserve classify samples/" in commands[0]
    assert "pytest" in commands[1]


@pytest.mark.parametrize("module", ["training.fit", "training.export", "training.report"])
def test_help_of_the_training_commands_is_there(module):
    pytest.importorskip("torch")
    run = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0
    assert f"python -m {module}" in run.stdout
