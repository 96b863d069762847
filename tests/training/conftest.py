"""Small trees of real JPEG files, and one real run, for the tests of the training package."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tinyserve.modelfile import Label, Training
from training import checkpoint
from training.models import ARCHS

ROOT = Path(__file__).resolve().parents[2]

COLOURS = {"amber": (200, 140, 30), "jade": (40, 160, 90), "violet": (120, 60, 180)}
"""Three classes that a network learns in a few steps."""

TIMES = {"images_per_second", "seconds"}
"""What differs between two runs that are the same."""

# One thread, so that sums are in the same order in every process of a test.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def write_picture(
    path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (64, 64)
) -> Path:
    """A JPEG of one hue under coarse noise, which survives the compression."""
    width, height = size
    coarse = np.random.default_rng(seed).normal(0, 40, (height // 4, width // 4, 3))
    noise = np.kron(coarse, np.ones((4, 4, 1)))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", quality=90)
    return path


def write_class_folders(
    root: Path, *, train: int, val: int, size: tuple[int, int] = (64, 64)
) -> Path:
    """``train`` and ``val`` pictures of each class, in class folders."""
    for split, count in (("train", train), ("val", val)):
        for number, (name, colour) in enumerate(COLOURS.items()):
            for i in range(count):
                seed = 1000 * number + i + (500 if split == "val" else 0)
                write_picture(root / split / name / f"{i}.jpg", colour, seed, size)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On networks this small, threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Path]:
    return write_picture


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two training pictures and one validation picture of each class, free to be changed."""
    return write_class_folders(tmp_path / "photos", train=2, val=1)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Five pictures in each of three class folders, in no folder train/, free to be changed."""
    root = tmp_path / "bare"
    for number, (name, colour) in enumerate(COLOURS.items()):
        for i in range(5):
            write_picture(root / name / f"{i}.jpg", colour, 1000 * number + i)
    return root


@pytest.fixture
def tiny_shaped(tmp_path: Path) -> Path:
    """A tree in the shape of Tiny ImageNet with three classes, free to be changed."""
    root = tmp_path / "tiny-imagenet-200"
    # Neither wnids.txt nor words.txt is sorted in the real one either.
    colours = dict(zip(("n03", "n01", "n02"), COLOURS.values(), strict=True))
    for wnid, colour in colours.items():
        for i in range(2):
            write_picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", colour, i)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in colours))
    (root / "words.txt").write_text("n02\tjade, nephrite\nn09\tnothing\nn03\tamber\n")
    shown = {"val_10.JPEG": "n01", "val_2.JPEG": "n03", "val_0.JPEG": "n02"}
    for i, (name, wnid) in enumerate(shown.items()):
        write_picture(root / "val" / "images" / name, colours[wnid], 100 + i)
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"{name}\t{wnid}\t0\t0\t62\t62\n" for name, wnid in shown.items())
    )
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 training and 18 validation pictures, larger than what is stored; do not change them.

    Four validation pictures are in the wrong folder, so that no network is right every time.
    """
    root = write_class_folders(
        tmp_path_factory.mktemp("data") / "photos", train=9, val=6, size=(96, 80)
    )
    for i in range(4):
        write_picture(root / "val" / "amber" / f"{i}.jpg", COLOURS["jade"], 2000 + i, (80, 96))
    return root


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python -m MODULE ARGUMENTS``, for real, from the root of the repository."""

    def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def start_module() -> Callable[..., subprocess.Popen[str]]:
    """As ``run_module``, but returns while the program runs; its stderr is a pipe."""

    def start(module: str, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


_ON_A_FULL_DISK = """
import os, resource, sys
largest, *arguments = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), int(largest)))
os.execv(sys.executable, [sys.executable, "-m", *arguments])
"""


@pytest.fixture(scope="session")
def run_on_a_full_disk() -> Callable[..., subprocess.CompletedProcess[str]]:
    """As ``run_module``, where no file can grow beyond so many bytes."""

    def run(largest: int, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _ON_A_FULL_DISK, str(largest), module, *map(str, arguments)],
            cwd=ROOT,
            # Python would leave its own files cut short.
            env={**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def fit_arguments(photos: Path) -> list[str]:
    """Four short epochs of a network with dropout, on random crops of growing size."""
    return (
        f"--arch inception --recipe cpu --epochs 4 --batch-size 4 --lr 0.05 --data {photos} "
        "--device cpu --precision fp32 --seed 7"
    ).split()


@pytest.fixture(scope="session")
def finished(
    run_module: Callable[..., subprocess.CompletedProcess[str]],
    fit_arguments: list[str],
    photos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """An uninterrupted run of ``fit_arguments``: its folder, data, stdout and stderr."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = run_module("training.fit", *fit_arguments, "--out", folder)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(folder=folder, data=photos, stdout=result.stdout, stderr=result.stderr)


@pytest.fixture
def small_weights() -> checkpoint.Weights:
    """An untrained network of three classes, small enough to be written and exported at once."""
    return _small_weights()


@pytest.fixture(scope="session")
def unchanged_weights() -> checkpoint.Weights:
    """The same, for fixtures that last."""
    return _small_weights()


def _small_weights() -> checkpoint.Weights:
    torch.manual_seed(0)
    labels = tuple(Label(None, name) for name in COLOURS)
    network = ARCHS["baseline"](len(labels), image_size=12, batch_norm=True)
    return checkpoint.Weights(
        arch="baseline",
        batch_norm=True,
        labels=labels,
        image_size=16,
        crop=12,
        network_size=12,
        mean=torch.rand(16, 16, 3) * 255,
        std=torch.tensor([50.0, 60, 70]),
        state=checkpoint.final_state(network),
        training=Training(
            dataset="photos",
            dataset_fingerprint="0" * 64,
            train_images=27,
            recipe="modern",
            epochs=1,
            seed=0,
            precision="fp32",
            commit=None,
            val_images=18,
            val_top1=0.5,
            val_top5=1.0,
        ),
    )


@pytest.fixture
def small_run(small_weights: checkpoint.Weights, photos: Path, tmp_path: Path) -> Path:
    """The folder of a finished run with ``small_weights``."""
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.save_weights(folder, small_weights)
    (folder / "config.json").write_text(json.dumps({"data": str(photos)}))
    return folder


# What is looked at after a run


@pytest.fixture(scope="session")
def history() -> Callable[[Path], list[dict[str, str]]]:
    """The rows of a run's ``history.csv``."""

    def read(folder: Path) -> list[dict[str, str]]:
        with (folder / "history.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def untimed_history(
    history: Callable[[Path], list[dict[str, str]]],
) -> Callable[[Path], list[dict[str, str]]]:
    """The same without the columns that no two runs have in common."""

    def read(folder: Path) -> list[dict[str, str]]:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in history(folder)]

    return read


@pytest.fixture(scope="session")
def assert_identical() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    """That two state dicts are the same to the bit."""

    def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert found.keys() == expected.keys()
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert differing == []

    return check


@pytest.fixture
def check_one_line(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """That training.fit said one line on stderr, notes aside, with some words in it."""

    def check(words: str) -> None:
        said = capsys.readouterr().err.splitlines()
        said = [line for line in said if not line.startswith("note: ")]
        assert len(said) == 1, said
        assert said[0].startswith("training.fit: ")
        assert words in said[0]

    return check
