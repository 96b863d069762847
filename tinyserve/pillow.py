"""Pillow's part of :mod:`tinyserve.images`: every format but the plainest JPEGs, and resampling.

A module of its own, as Pillow takes a while to import, which a single JPEG of a model's own size
need not wait for.
"""

import io
import struct
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,  # noqa: F401  (each makes its format known to Pillow, in Image.OPEN)
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from tinyserve.errors import ImageError, first_line

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")

# Pillow warns of what it finds odd in a file and reads nevertheless, in the midst of the rows.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Tags of EXIF and TIFF
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 0x0102
_PHOTOMETRIC = 0x0106
_WHITE_IS_ZERO = 0

_EXIF = ("exif", "Raw profile type exif")
_XMP = ("xmp", "XML:com.adobe.xmp")
"""Under which Pillow keeps what a file says of itself."""

_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I"})


def decode(
    data: bytes, room_for: Callable[[int, int], AbstractContextManager[None]]
) -> tuple[NDArray[np.uint8], int]:
    """The pixels of an image file as they are stored, and their EXIF orientation; see
    :func:`tinyserve.images.decode`.

    ``room_for`` is asked for a height and a width while an image of these is decoded.
    """
    try:
        with _open(data) as image, room_for(image.height, image.width):
            for name in _XMP:  # by which a TIFF would be turned while it is loaded
                image.info.pop(name, None)
            image.load()
            return np.array(_to_rgb(image)), _orientation(lambda: _exif(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise ImageError(f"damaged image: {first_line(error)}") from error


def _open(data: bytes) -> ImageFile:
    """As ``Image.open`` does, but without its limit, which warns the whole process of what
    ``room_for`` refuses here."""
    for format_ in FORMATS:
        opened, accepts = Image.OPEN[format_]
        if accepts is None or accepts(data[:16]) is not True:
            continue
        try:
            return opened(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # it is of another format
            pass
    raise ImageError("not an image, or a format that is not supported")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        return Image.fromarray(_high_bytes(image)).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels are not supported")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_bytes(image: Image.Image) -> NDArray[np.uint8]:
    """Greys of more than 8 bits, in 8."""
    values = np.asarray(image)
    bits, white_is_zero = 16, False
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]
        white_is_zero = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if bits > 16:
        raise ImageError(f"greys of {bits} bits are not supported")
    if values.dtype.itemsize > 2:  # "I", which may hold more than 16 bits
        values = values.clip(0, 65_535)
    transparent = values == image.info.get("transparency")
    greys: NDArray[np.uint8] = (values >> (bits - 8)).astype(np.uint8)
    if white_is_zero:
        greys = 255 - greys
    return np.where(transparent, np.uint8(255), greys)


def _exif(image: ImageFile) -> Image.Exif:
    """What EXIF says, and nobody else: ``getexif`` may add an orientation that XMP has. A TIFF,
    which Pillow turns, says nothing any more."""
    bare = Image.new("1", (1, 1))
    bare.info = {name: image.info[name] for name in _EXIF if name in image.info}
    return bare.getexif()


def _orientation(exif: Callable[[], Image.Exif]) -> int:
    """1 to 8 by EXIF data; 1 where they cannot be read, which harms no pixel."""
    try:
        return int(exif().get(_ORIENTATION, 1))
    except Exception:  # as in decode()
        return 1


def orientation(data: bytes) -> int:
    """1 to 8, of EXIF data as they are in a JPEG; 1 where they cannot be read."""

    def exif() -> Image.Exif:
        read = Image.Exif()
        read.load(data)
        return read

    return _orientation(exif)


def resample_square(
    image: NDArray[np.uint8], left: float, top: float, side: float, size: int
) -> NDArray[np.uint8]:
    """A square of an image, bilinear and antialiased: uint8 ``(size, size, 3)``."""
    square = Image.fromarray(image).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    return np.array(square)
