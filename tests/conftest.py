"""Real pictures and real models for the tests."""

import os
import shutil
import signal
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# The shipped models and no others, wherever the tests are started from.
os.environ["TINYSERVE_MODELS"] = os.environ.get("TINYSERVE_TEST_MODELS", str(ROOT / "exported"))
os.environ.pop("TINYSERVE_DEVICE", None)

# What a shell starts in the background ignores Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache folder in place of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def samples() -> Path:
    """The repository's sample pictures: 40 JPEGs of 64 x 64 in class folders."""
    return ROOT / "samples"


@pytest.fixture
def picture() -> Image.Image:
    """A 96 x 64 RGB picture with smooth colour gradients, so that resizing hardly changes it."""
    rows, columns = np.mgrid[0:64, 0:96]
    pixels = np.stack([rows * 4, columns * 2, 255 - rows * 2], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def photo(samples: Path, tmp_path: Path) -> Path:
    """A copy of one real JPEG, free to be damaged."""
    target = tmp_path / "photo.jpg"
    shutil.copy(samples / "goldfish" / "val_68.JPEG", target)
    return target


@pytest.fixture(scope="session")
def png_of_size() -> Callable[[int, int], bytes]:
    """Makes a PNG whose header claims any size, followed by hardly any pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    def make(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = zlib.compress(bytes(10_000))
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + chunks

    return make


@pytest.fixture(scope="session")
def nvidia_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes an NVIDIA driver that says whatever it is told to, and does nothing; the folder."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")

    def make(init: int, gpus: int) -> Path:
        folder = tmp_path_factory.mktemp("driver")
        source = folder / "driver.c"
        source.write_text(
            f"int cuInit(unsigned flags) {{ return {init}; }}\n"
            f"int cuDeviceGetCount(int *count) {{ *count = {gpus}; return 0; }}\n"
        )
        library = folder / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_imagenet() -> Path:
    """The full data set, for the tests that want all of its validation split."""
    path = os.environ.get("TINY_IMAGENET")
    if not path:
        pytest.skip("TINY_IMAGENET is not set to the folder of Tiny ImageNet")
    return Path(path)
