import io
import os
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from tinyserve import images, pillow
from tinyserve.errors import ImageError


def encode(image: Image.Image, format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def close_to(found: np.ndarray, expected: Image.Image, tolerance: float) -> bool:
    wanted = np.asarray(expected.convert("RGB"), dtype=float)
    return found.shape == wanted.shape and np.abs(found - wanted).mean() <= tolerance


def test_a_sample_decodes_to_the_pixels_pillow_gives(samples):
    paths = sorted(samples.rglob("*.JPEG"))
    assert len(paths) == 40
    for path in paths:
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(images.load(path, size=64), expected)


def test_lossless_formats_keep_every_pixel(picture):
    for format_, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        decoded = images.decode(encode(picture, format_, **options))
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, np.asarray(picture)), format_


def test_greyscale_is_repeated_over_the_channels(picture):
    grey = picture.convert("L")
    for data in (encode(grey, "PNG"), encode(grey, "JPEG", quality=95)):
        decoded = images.decode(data)
        assert decoded.shape == (64, 96, 3)
        assert (decoded == decoded[..., :1]).all()
        assert close_to(decoded, grey, 1)


def test_sixteen_bit_png_keeps_the_high_byte():
    values = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    decoded = images.decode(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(decoded[..., 0], (values >> 8).astype(np.uint8))


def test_cmyk_jpeg_is_converted(picture):
    decoded = images.decode(encode(picture.convert("CMYK"), "JPEG", quality=95))
    assert close_to(decoded, picture, 4)


def test_transparency_is_laid_over_white(picture):
    picture.putalpha(0)
    assert (images.decode(encode(picture, "PNG")) == 255).all()


def test_transparent_palette_is_laid_over_white(picture):
    palette = picture.quantize(16)
    palette.info["transparency"] = palette.getpixel((0, 0))
    decoded = images.decode(encode(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert (decoded[0, 0] == 255).all()
    assert not (decoded == 255).all()


def test_animated_gif_gives_its_first_frame(picture):
    black = Image.new("RGB", picture.size)
    data = encode(picture, "GIF", save_all=True, append_images=[black, black])
    assert close_to(images.decode(data), picture, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, orientation):
    # What a camera held that way writes: the upright picture, turned by the inverse.
    turned = {
        1: picture,
        2: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: picture.transpose(Image.Transpose.ROTATE_180),
        4: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: picture.transpose(Image.Transpose.TRANSPOSE),
        6: picture.transpose(Image.Transpose.ROTATE_90),
        7: picture.transpose(Image.Transpose.TRANSVERSE),
        8: picture.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = images.decode(encode(turned, "JPEG", quality=95, exif=exif))
    assert close_to(decoded, picture, 2)


def test_resize_of_the_right_size_changes_nothing(samples):
    image = images.decode((samples / "goldfish" / "val_68.JPEG").read_bytes())
    assert images.resize(image, 64) is image


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (301, 64), (50, 40)])
def test_resize_takes_the_centre_of_the_shorter_side(width, height):
    # Red left and top, blue right and bottom of a green centre square.
    image = np.zeros((height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image[:top, :, 0] = image[:, :left, 0] = 255
    image[top + side :, :, 2] = image[:, left + side :, 2] = 255
    image[top : top + side, left : left + side] = (0, 255, 0)
    resized = images.resize(image, 64)
    assert resized.shape == (64, 64, 3)
    assert (resized[2:-2, 2:-2] == (0, 255, 0)).all()


def test_resize_is_antialiased():
    checkerboard = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    resized = images.resize(np.stack([checkerboard] * 3, axis=2), 64)
    assert np.abs(resized.astype(int) - 127.5).max() < 4


def test_large_images_wait_for_room():
    room = images._Room(10)
    inside, most = [], []

    def decode(pixels):
        with room.taken(pixels):
            inside.append(pixels)
            most.append(sum(inside))
            time.sleep(0.01)
            inside.remove(pixels)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(decode, [10, 6, 4, 4, 6, 3, 3, 3, 10]))
    assert len(most) == 9
    assert 6 < max(most) <= 10


def test_a_large_image_has_the_room_and_gives_it_back(monkeypatch):
    room = images._Room(images._LARGE + 1_000_000)
    monkeypatch.setattr(images, "_ROOM", room)
    left = []
    to_rgb = pillow._to_rgb

    def watched(image):
        left.append(room._left)
        return to_rgb(image)

    monkeypatch.setattr(pillow, "_to_rgb", watched)
    images.load(encode(Image.new("L", (2_100, 2_000)), "PNG"), size=64)
    damaged = encode(Image.new("L", (2_100, 2_000)), "PNG")[:-100]
    with pytest.raises(ImageError):
        images.load(damaged, size=64)
    images.load(encode(Image.new("L", (100, 100)), "PNG"), size=64)
    assert left == [images._LARGE + 1_000_000 - 4_200_000, images._LARGE + 1_000_000]
    assert room._left == images._LARGE + 1_000_000


BAD = {
    "empty": (b"", "empty file"),
    "text": (b"this is no picture\n" * 20, "not an image"),
    "float tiff": (encode(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_bytes_are_refused_in_one_line(case):
    data, words = BAD[case]
    with pytest.raises(ImageError, match=words) as caught:
        images.load(data, size=64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("side", "words"), [(30_000, "too large"), (10_000, "too large"), (100, "damaged")]
)
def test_bombs_and_pictures_cut_short_are_refused(png_of_size, side, words):
    with pytest.raises(ImageError, match=words):
        images.load(png_of_size(side, side), size=64)


def test_large_pictures_that_are_refused_are_the_hosts_to_open(png_of_size, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_of_size(10_000, 10_000))
    program = f"""if True:
        from PIL import Image
        from tinyserve import errors, images, pillow
        try:
            images.load({str(path)!r}, size=64)
        except errors.ImageError as error:
            print(error)
        import sys
        sys.stderr.write("of the host: ")
        print(Image.open({str(path)!r}).size)
    """
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == ("too large: 10000 x 10000, more than 89,478,485 pixels\n(10000, 10000)\n")
    said, *_ = run.stderr.splitlines()
    assert said.startswith("of the host: ") and "DecompressionBombWarning" in said


@pytest.mark.parametrize("keep", [3, 20, 300, 1000])
def test_truncated_jpeg_is_refused_wherever_it_is_cut(photo, keep):
    data = photo.read_bytes()
    assert len(data) > 1100
    with pytest.raises(ImageError):
        images.load(data[:keep], size=64)


def with_size_in_header(data: bytes, height: int, width: int) -> bytes:
    """A JPEG that claims to be of another size."""
    start = data.index(b"\xff\xc0") + 5  # frame header: length, precision, height, width
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def test_bomb_in_a_jpeg_header_is_refused_before_decoding(photo):
    with pytest.raises(ImageError, match="too large"):
        images.decode(with_size_in_header(photo.read_bytes(), 60_000, 60_000))


def test_small_jpegs_alone_are_decoded_quickly(samples):
    small = (samples / "goldfish" / "val_68.JPEG").read_bytes()
    for size in (24, 64, 96):
        found = images.load_quickly(small, size=size)
        assert found is not None
        assert (found == images.load(small, size=size)).all()
    others = [
        with_size_in_header(small, 9_000, 9_000),
        with_size_in_header(small, 1, 16_384),
        small[:2] + b"\xff\xda\x00\x02" * 13 + small[2:],
        small + bytes(16_384),
        small[:10],
        encode(Image.open(io.BytesIO(small)), "PNG"),
    ]
    assert [images.load_quickly(data, size=64) for data in others] == [None] * len(others)


def test_missing_file_and_folder_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match="cannot read: No such file"):
        images.load(tmp_path / "nothing.jpg", size=64)
    with pytest.raises(ImageError, match="cannot read: a folder"):
        images.load(tmp_path, size=64)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_as_pillow_turns_it(picture, format_, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, format_, quality=95, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    decoded = images.decode(data)
    assert np.array_equal(decoded, expected)
    assert decoded.flags.c_contiguous


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("orientation", [None, 6])
@pytest.mark.parametrize("format_", ["JPEG", "CMYK JPEG", "MPO", "PNG", "WEBP", "TIFF"])
def test_xmp_does_not_turn_what_exif_leaves_as_it_is(picture, format_, orientation):
    """All decoders agree: Pillow would read XMP where EXIF has no orientation."""
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    if orientation is not None:
        exif[0x0112] = orientation
    options: dict = {"exif": exif, "xmp": XMP}
    if format_ == "CMYK JPEG":
        picture = picture.convert("CMYK")
    elif format_ == "MPO":
        options |= {"save_all": True, "append_images": [picture]}
    elif format_ == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    elif format_ == "TIFF":
        exif[0x02BC] = XMP
    data = encode(picture, format_.split()[-1], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.getexif()[0x0112] == 6
    assert images.decode(data).shape == ((64, 96, 3) if orientation is None else (96, 64, 3))


def test_exif_of_old_png_files_turns_them(picture):
    """As ImageMagick wrote it before PNG had a place for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    info = PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n")
    assert images.decode(encode(picture, "PNG", pnginfo=info)).shape == (96, 64, 3)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_orientation_is_found_behind_long_profiles(picture, before):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture, "JPEG", exif=exif)
    profile = b"\xff\xe2" + struct.pack(">H", 65_535) + bytes(65_533)
    assert images.decode(data[:2] + before * profile + data[2:]).shape == (96, 64, 3)
    # Bytes that fill up are allowed in front of a segment.
    assert images.decode(data[:2] + before * (profile + b"\xff") + data[2:]).shape == (96, 64, 3)


def test_padding_before_the_picture_is_not_looked_through_byte_by_byte(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture, "JPEG", exif=exif)
    for padding, shape in (
        (2**24 * b"\xff", (96, 64, 3)),
        (2**22 * b"\xff\xfe\0\2", (64, 96, 3)),  # of so many segments the last is not reached
    ):
        steps = 0

        def count(*_):
            nonlocal steps
            steps += 1

        padded = data[:2] + padding + data[2:]
        sys.setprofile(count)
        try:
            decoded = images.decode(padded)
        finally:
            sys.setprofile(None)
        assert decoded.shape == shape
        assert steps < 20_000


@pytest.mark.parametrize("exif", [bytes(20), b"garbage", b"Exif\0\0MM"])
@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_exif_data_that_are_none_harm_no_picture(picture, format_, exif):
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = encode(picture, format_, exif=exif, **options)
    assert np.array_equal(images.decode(data), np.asarray(picture))


def test_an_odd_tag_beside_the_orientation_is_not_minded(picture):
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2)
    exif += struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif += struct.pack(">HHI4s", 0x0128, 2, 4, b"odd\0")  # text where a number is due
    exif += struct.pack(">I", 0)
    decoded = images.decode(encode(picture, "PNG", exif=exif))
    assert np.array_equal(decoded, np.rot90(np.asarray(picture), -1))


def tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A greyscale TIFF; the values of 12 bits must be equal in pairs."""
    height, width = values.shape
    if bits == 12:
        rows = values.astype(int)[:, ::2]
        packed = np.stack([rows >> 4, (rows & 15) << 4 | rows >> 8, rows & 255], axis=-1)
        content = packed.astype(np.uint8).tobytes()
    else:
        content = values.astype(f"<u{bits // 8}").tobytes()
    tags = [
        *((256, width), (257, height), (258, bits), (259, 1), (262, photometric)),
        *((273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, height), (279, len(content)), (339, 1)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + content


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_greys_of_many_bits_in_tiff(bits, white_is_zero):
    high = np.repeat(np.arange(0, 256, 2), 2)[None].repeat(3, axis=0)
    decoded = images.decode(tiff(high << (bits - 8), bits, 0 if white_is_zero else 1))
    assert np.array_equal(decoded[..., 0], 255 - high if white_is_zero else high)


def test_greys_of_32_bits_are_refused():
    with pytest.raises(ImageError, match="greys of 32 bits are not supported"):
        images.decode(tiff(np.full((4, 4), 2**31), 32, 1))


def test_a_transparent_grey_of_16_bits_is_white():
    values = np.array([[4660, 9320]], np.uint16)
    data = encode(Image.fromarray(values), "PNG", transparency=4660)
    assert images.decode(data)[..., 0].tolist() == [[255, 9320 >> 8]]


@pytest.mark.parametrize(
    ("side", "shown"), [(500, 500), (510, 510), (512, 256), (700, 263), (2048, 256)]
)
def test_jpegs_are_decoded_at_half_of_their_size_or_less_or_whole(picture, side, shown):
    data = encode(picture.resize((side, side)), "JPEG")
    assert images.decode(data, at_least=256).shape == (shown, shown, 3)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_is_in_memory_is_no_path(photo, kind):
    content = photo.read_bytes()
    assert np.array_equal(images.load(kind(content), size=64), images.load(photo, size=64))


@pytest.mark.parametrize("source", [np.zeros((4, 4, 3), np.uint8), 1, None])
def test_what_is_neither_path_nor_bytes_is_a_type_error(source):
    with pytest.raises(TypeError):
        images.load(source, size=64)


def test_a_large_jpeg_decoded_small_is_hardly_another_picture(samples):
    with Image.open(samples / "goldfish" / "val_68.JPEG") as sample:
        large = sample.resize((2000, 1500), Image.Resampling.BICUBIC)
    data = encode(large, "JPEG", quality=90)
    assert images.decode(data, at_least=256).shape == (375, 500, 3)
    assert images.decode(data).shape == (1500, 2000, 3)
    small, whole = images.load(data, size=64), images.resize(images.decode(data), 64)
    difference = np.abs(small.astype(int) - whole)
    assert 0 < difference.max() <= 3
    assert difference.mean() < 0.5


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", "nul\0.jpg"):
        with pytest.raises(ImageError, match="cannot read"):
            images.read(path)


def test_a_file_that_comes_in_pieces_is_read_whole(photo, monkeypatch):
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 100)))
    assert images.read(photo) == photo.read_bytes()
