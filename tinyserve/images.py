"""Any image file to the pixels that a model sees.

The one decode path: training, the export gate and serving all read images through here.

An image is a uint8 array ``(height, width, 3)``, RGB, 0 to 255, C-contiguous. The resize rule,
which is also written into every model file, is :data:`RESIZE_RULE`.
"""

import contextlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from tinyserve.errors import ImageError, os_reason

if TYPE_CHECKING:
    from PIL import Image

RESIZE_RULE = (
    "decode to RGB, apply EXIF orientation, "
    "shorter side to size (bilinear, antialiased), centre crop"
)

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"}
)

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: a quarter of a gibibyte as RGB, Pillow's own
default limit for what may be a decompression bomb. Decoding one takes several times that."""

MAX_BYTES = 3 * MAX_PIXELS
"""Larger files are refused before they are read: no image of :data:`MAX_PIXELS` pixels needs it."""

# To open a pipe would wait for its writer otherwise. Windows has the other flag.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_SCAN = b"\xff\xda"
_EXIF_MAGIC = b"Exif\x00\x00"
_JPEG_FILL = re.compile(rb"\xff+(?=\xff)")
"""Of which there may be any number in front of a segment."""
_MOST_SEGMENTS = 1000
"""To look through for EXIF data, which come among the first; the longest profile has 255."""

_SPARE = 4
"""Large JPEGs are decoded at half of their size or less, in eighths, as long as that leaves so many
times the side that is wanted: the averaging that shrinks them hides the difference. More than half
takes longer than the whole."""

_LARGE = 4_000_000  # pixels
_QUICK_BYTES = 16 * 2**10
_QUICK_BLOCKS = 256
"""Of 8 x 8 pixels, in which JPEGs are decoded."""
_QUICK_SCANS = 12
"""A progressive JPEG goes over its blocks once a scan, and usually has ten of them."""


class _Room:
    """Pixels of large images that are decoded at a time; more of them wait for their turn.

    A small file may be a gigabyte while it is decoded, and in each of as many threads as there are
    cores.
    """

    def __init__(self, pixels: int) -> None:
        self._left = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


_ROOM = _Room(2 * MAX_PIXELS)
_SMALL_ENOUGH = contextlib.nullcontext()


def is_image_name(name: str) -> bool:
    """Whether a file of this name or path, by its suffix, is an image of a supported format.

    ``._cat.jpg`` is none: so macOS calls what it notes beside ``cat.jpg`` in zip archives and on
    other systems' disks.
    """
    suffix = os.path.splitext(name)[1].lower()
    return suffix in SUFFIXES and not os.path.basename(name).startswith("._")


Source = str | os.PathLike[str] | bytes | bytearray | memoryview
"""A path, or the bytes of an image file."""


def load(source: Source, *, size: int) -> NDArray[np.uint8]:
    """The pixels a model of this input size sees: uint8 ``(size, size, 3)``, RGB.

    ``source`` is a path or the bytes of an image file. Raises :class:`ImageError` for anything that
    is no complete image of a supported format.
    """
    data = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else read(source)
    return resize(decode(data, at_least=_SPARE * size), size)


def load_quickly(data: bytes, *, size: int) -> NDArray[np.uint8] | None:
    """As :func:`load`, where that takes some ten microseconds: for most small JPEGs; else None."""
    if len(data) > _QUICK_BYTES or not data.startswith(_JPEG_MAGIC):
        return None
    if data.count(_JPEG_SCAN) > _QUICK_SCANS or _EXIF_MAGIC in data:
        return None
    try:
        return resize(_decode_jpeg(data, _SPARE * size, _QUICK_BLOCKS), size)
    except ValueError:
        return None


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; :class:`ImageError` where it cannot be read or is larger than
    :data:`MAX_BYTES`."""
    try:
        # Not open(), which asks the system for twice as much about a file. Anything in memory is a
        # path to os.open(), too.
        descriptor = os.open(os.fspath(path), _READ)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(
                    f"cannot read: {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a file'}"
                )
            if status.st_size > MAX_BYTES:
                raise ImageError(too_large(status.st_size))
            data = os.read(descriptor, status.st_size)
            while len(data) < status.st_size and (more := os.read(descriptor, status.st_size)):
                data += more  # some file systems give a piece at a time
            return data
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ImageError(f"cannot read: {os_reason(error)}") from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"cannot read: {error}") from error


def read_from(file: IO[bytes]) -> bytes:
    """The rest of a stream whose length nobody vouches for; :class:`ImageError` where it is more
    than :data:`MAX_BYTES`."""
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"too large: more than {MAX_BYTES:,} bytes")
    return data


def too_large(size: int) -> str:
    """What is said of a file of more than :data:`MAX_BYTES`."""
    return f"too large: {size:,} bytes, more than {MAX_BYTES:,}"


def decode(data: bytes, *, at_least: int | None = None) -> NDArray[np.uint8]:
    """The pixels of an image file, upright: uint8 ``(height, width, 3)``, RGB.

    JPEG, PNG, GIF (first frame), WebP, BMP and TIFF. Greys are repeated over the three channels,
    16-bit values keep their high byte, CMYK is converted, and transparency is laid over white.
    With ``at_least``, a JPEG may come back at half of its size or less, but both sides have as many
    pixels.

    Raises :class:`ImageError` for empty, truncated or damaged data, other formats, and images of
    more than :data:`MAX_PIXELS` pixels.
    """
    if not data:
        raise ImageError("empty file (0 bytes)")
    # simplejpeg decodes the same pixels several times faster, but knows neither EXIF nor CMYK and
    # refuses some harmless oddities; everything it does not take goes to Pillow, which has the
    # last word on what is damaged.
    if data.startswith(_JPEG_MAGIC):
        try:
            return _decode_jpeg(data, at_least or 0)
        except ValueError:
            pass
    from tinyserve import pillow

    pixels, orientation = pillow.decode(data, _room_for)
    return _upright(pixels, orientation)


def thumbnail(data: bytes, side: int) -> "Image.Image":
    """The image in a file, RGB, shrunk where its longer side has more than ``side`` pixels.

    Raises :class:`~tinyserve.errors.ImageError` as :func:`decode` does.
    """
    from PIL import Image

    picture = Image.fromarray(decode(data, at_least=side))
    picture.thumbnail((side, side))
    return picture


def resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shorter side to ``size`` with antialiasing, then the centre: uint8 ``(size, size, 3)``.

    An image that is ``size`` x ``size`` already comes back untouched.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    from tinyserve import pillow

    # The centre square, resampled in one step: what lies outside it is never computed.
    side = min(height, width)
    return pillow.resample_square(image, (width - side) / 2, (height - side) / 2, side, size)


def _decode_jpeg(data: bytes, at_least: int, most_blocks: int | None = None) -> NDArray[np.uint8]:
    """ValueError for what Pillow has to decide, and for more than ``most_blocks``."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    if colorspace not in ("YCbCr", "Gray", "RGB"):
        raise ValueError(colorspace)
    if most_blocks is not None and -(-height // 8) * -(-width // 8) > most_blocks:
        raise ValueError("large")
    turn = 1
    if exif := _exif(data):
        from tinyserve import pillow

        turn = pillow.orientation(exif)
    small = min(height, width) > at_least > 0
    with _room_for(height, width):
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=at_least if small else 0,
            min_width=at_least if small else 0,
            min_factor=2 if small else 1,
        )
    return _upright(pixels, turn)


def _exif(data: bytes) -> bytes | None:
    """The EXIF data among a JPEG's first segments; what comes before them, such as a profile, may
    be long."""
    place = 2
    for _ in range(_MOST_SEGMENTS):
        if fill := _JPEG_FILL.match(data, place):
            place = fill.end()
        if data[place : place + 1] != b"\xff" or data.startswith(_JPEG_SCAN, place):
            return None
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data.startswith(_EXIF_MAGIC, place + 4):
            return data[place + 4 : end]
        place = end
    return None


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


_UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""How to turn an image by its EXIF orientation; at others it is upright."""


def _room_for(height: int, width: int) -> contextlib.AbstractContextManager[None]:
    pixels = height * width
    if pixels > MAX_PIXELS:
        raise ImageError(f"too large: {width} x {height}, more than {MAX_PIXELS:,} pixels")
    return _ROOM.taken(pixels) if pixels > _LARGE else _SMALL_ENOUGH
