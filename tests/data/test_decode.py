"""Every odd image file is built here, and its pixels are compared with what the format says they are."""

import io
import os
import pickle
import random
import stat
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenlearner.data.decode import FORMATS, DamagedImage, _upright_rgb, decode_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encoded(image: Image.Image, format_name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def grey(content: bytes) -> np.ndarray:
    """The one channel of a decoded grey picture, after checking that all three are it."""
    pixels = np.asarray(decode_image(content)).astype(int)
    np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, axis=2))
    return pixels[..., 0]


def reason(source) -> str:
    with pytest.raises(DamagedImage) as caught:
        decode_image(source)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    return caught.value.reason


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int, bits: int = 8, colour: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def grey_tiff(row: bytes, width: int, bits: int, photometric: int = 1, order: str = "<") -> bytes:
    """One row of uncompressed unsigned grey; photometric 0 means that white is zero."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row), 339: 1}
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    row += b"\0" * (len(row) % 2)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(row))
    return head + row + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0"


# ---- what is stored is what comes out


def test_cmyk_jpeg_keeps_its_colours():
    inks = Image.new("CMYK", (32, 16), (0, 255, 255, 0))  # no cyan: red
    inks.paste((255, 0, 255, 0), (16, 0, 32, 16))  # no magenta: green
    pixels = np.asarray(decode_image(encoded(inks, "JPEG", quality=95))).astype(int)
    assert np.abs(pixels[:, :8] - RED).max() <= 6
    assert np.abs(pixels[:, -8:] - GREEN).max() <= 6


RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16)


@pytest.mark.parametrize(
    ("mode", "content"),
    [
        ("I;16", encoded(Image.fromarray(RAMP.reshape(16, 16)), "PNG")),
        ("I;16", encoded(Image.fromarray(RAMP.reshape(16, 16)), "TIFF")),
        ("I;16", encoded(Image.fromarray(RAMP.reshape(16, 16)), "TIFF", compression="tiff_lzw")),
        ("I;16B", grey_tiff(RAMP.astype(">u2").tobytes(), 256, 16, order=">")),
        ("I", encoded(Image.fromarray(RAMP.reshape(16, 16).astype(np.int32)), "TIFF")),
        ("I", b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes()),
        ("F", encoded(Image.fromarray(RAMP.reshape(16, 16).astype(np.float32)), "TIFF")),
        ("F", encoded(Image.fromarray(RAMP.reshape(16, 16) / np.float32(65535)), "TIFF")),
    ],
)
def test_deep_grey_is_scaled_not_clipped(mode, content):
    assert Image.open(io.BytesIO(content)).mode == mode
    np.testing.assert_array_equal(grey(content).ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("dtype", "stored", "expected"),
    [
        (np.float32, [0, 0.5, 1], [0, 128, 255]),
        (np.float32, [0, 2, 200], [0, 2, 200]),
        (np.float32, [-0.1, 0, 0.1], [0, 128, 255]),
        (np.float32, [0, 50_000, 100_000], [0, 128, 255]),
        (np.float32, [np.nan, np.inf, 1, 0], [0, 255, 255, 0]),
        (np.float32, [-3e38, 0, 3e38], [0, 128, 255]),
        (np.float32, [7e4, 7e4, 7e4], [0, 0, 0]),
        (np.int32, [-1000, 0, 1000], [0, 128, 255]),
        (np.int32, [0, 2**30, 2**31 - 1], [0, 128, 255]),
    ],
)
def test_grey_without_a_stated_range(dtype, stored, expected):
    content = encoded(Image.fromarray(np.array([stored], dtype)), "TIFF")
    np.testing.assert_array_equal(grey(content), [expected])


def test_a_float_image_without_a_number_is_damaged():
    assert "finite" in reason(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))


def test_tiff_grey_where_white_is_zero_or_12_bits_deep():
    row = np.array([0, 257, 65535], "<u2").tobytes()
    np.testing.assert_array_equal(grey(grey_tiff(row, 3, 16, photometric=0)), [[255, 254, 0]])
    packed = bytes([0xFF, 0xF0, 0x00])  # two 12-bit values: 4095, 0
    np.testing.assert_array_equal(grey(grey_tiff(packed, 2, 12)), [[255, 0]])


def test_plain_modes():
    one_bit = Image.fromarray(np.array([[0, 255, 255, 0]], np.uint8)).convert("1")
    np.testing.assert_array_equal(grey(encoded(one_bit, "PNG")), [[0, 255, 255, 0]])
    np.testing.assert_array_equal(grey(encoded(one_bit, "TIFF", compression="group4")), [[0, 255, 255, 0]])
    np.testing.assert_array_equal(grey(encoded(Image.new("L", (1, 1), 77), "PNG")), [[77]])
    assert decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).getpixel((0, 0)) == (1, 2, 3)
    assert decode_image(encoded(Image.new("P", (2, 1), 1), "PNG")).size == (2, 1)


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_is_read(format_name):
    if format_name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format_name}")
    picture = decode_image(encoded(Image.new("RGB", (32, 16), (200, 100, 50)), format_name))
    assert (picture.mode, picture.size) == ("RGB", (32, 16))
    assert np.abs(np.asarray(picture).astype(int) - (200, 100, 50)).max() <= 4


def palette_image() -> Image.Image:
    """Left red (entry 0), right green (entry 1)."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    return image


HALF = 128 / 255
RGB_TRANSPARENT = png(
    png_header(2, 1, colour=2), (b"tRNS", struct.pack(">3H", *RED)), (b"IDAT", zlib.compress(bytes([0, *RED, *GREEN])))
)
GREY_16_TRANSPARENT = png(
    png_header(2, 1, bits=16),
    (b"tRNS", struct.pack(">H", 300)),
    (b"IDAT", zlib.compress(struct.pack(">BHH", 0, 300, 0))),
)


@pytest.mark.parametrize(
    ("content", "left", "right"),
    [
        pytest.param(encoded(palette_image(), "PNG", transparency=0), WHITE, GREEN, id="palette index"),
        pytest.param(encoded(palette_image(), "GIF", transparency=0), WHITE, GREEN, id="gif"),
        pytest.param(encoded(palette_image(), "PNG", transparency=b"\xff\x00"), RED, WHITE, id="palette alphas"),
        pytest.param(RGB_TRANSPARENT, WHITE, GREEN, id="rgb key colour"),
        pytest.param(GREY_16_TRANSPARENT, WHITE, (0, 0, 0), id="16-bit key grey"),
        pytest.param(
            encoded(Image.fromarray(np.array([[[*RED, 0], [*GREEN, 255]]], np.uint8)), "PNG"), WHITE, GREEN, id="rgba"
        ),
        pytest.param(
            encoded(Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8)), "PNG"), WHITE, (9, 9, 9), id="la"
        ),
        pytest.param(encoded(Image.new("1", (2, 1)), "PNG", transparency=0), WHITE, WHITE, id="one bit"),
    ],
)
def test_clear_pixels_turn_white(content, left, right):
    picture = decode_image(content)
    assert (picture.getpixel((0, 0)), picture.getpixel((1, 0))) == (left, right)


def test_half_clear_pixels_are_half_white():
    content = encoded(Image.new("RGBA", (1, 1), (200, 100, 0, 128)), "PNG")
    expected = np.array([200, 100, 0]) * HALF + 255 * (1 - HALF)
    assert np.abs(np.array(decode_image(content).getpixel((0, 0))) - expected).max() <= 1


def test_premultiplied_alpha_is_not_multiplied_twice():
    straight = encoded(Image.new("RGBA", (1, 1), (64, 32, 0, 128)), "TIFF")
    extra_samples = struct.pack("<HHIHH", 338, 3, 1, 2, 0)  # 2: straight alpha, 1: premultiplied
    assert straight.count(extra_samples) == 1
    content = straight.replace(extra_samples, struct.pack("<HHIHH", 338, 3, 1, 1, 0))
    expected = np.array([64, 32, 0]) + 255 * (1 - HALF)
    assert np.abs(np.array(decode_image(content).getpixel((0, 0))) - expected).max() <= 1
    rgba = Image.new("RGBa", (1, 1), (64, 32, 0, 128))
    assert np.abs(np.array(_upright_rgb(rgba).getpixel((0, 0))) - expected).max() <= 1
    grey_alpha = Image.new("LA", (1, 1), (128, 128)).convert("La")
    assert np.abs(np.array(_upright_rgb(grey_alpha).getpixel((0, 0))) - (128 * HALF + 255 * (1 - HALF))).max() <= 1
    palette = Image.new("PA", (1, 1))
    assert _upright_rgb(palette).getpixel((0, 0)) == WHITE


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    for format_name, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = encoded(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(content)).n_frames == 2
        assert decode_image(content).getpixel((4, 4)) == RED


# ---- EXIF


def sideways(orientation: int, format_name: str = "PNG", **options) -> bytes:
    """Stored 4×2, black, with a red top left and a green top right pixel."""
    stored = Image.new("RGB", (4, 2))
    stored.putpixel((0, 0), RED)
    stored.putpixel((3, 0), GREEN)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, format_name, exif=exif, **options)


# EXIF 2.3, 4.6.4: where row 0 and column 0 are in the upright picture, so where the stored corners belong.
@pytest.mark.parametrize(
    ("orientation", "size", "red", "green"),
    [
        (1, (4, 2), (0, 0), (3, 0)),
        (2, (4, 2), (3, 0), (0, 0)),
        (3, (4, 2), (3, 1), (0, 1)),
        (4, (4, 2), (0, 1), (3, 1)),
        (5, (2, 4), (0, 0), (0, 3)),
        (6, (2, 4), (1, 0), (1, 3)),
        (7, (2, 4), (1, 3), (1, 0)),
        (8, (2, 4), (0, 3), (0, 0)),
        (9, (4, 2), (0, 0), (3, 0)),  # not in the standard: left alone
    ],
)
def test_exif_orientation_is_undone(orientation, size, red, green):
    picture = decode_image(sideways(orientation))
    assert picture.size == size
    assert (picture.getpixel(red), picture.getpixel(green)) == (RED, GREEN)
    assert np.asarray(picture).sum() == 2 * 255


@pytest.mark.parametrize(("format_name", "options"), [("TIFF", {}), ("WEBP", {"lossless": True})])
def test_pictures_are_turned_once_only(format_name, options):
    picture = decode_image(sideways(6, format_name, **options))
    assert (picture.size, picture.getpixel((1, 0)), picture.getpixel((1, 3))) == ((2, 4), RED, GREEN)
    assert not picture.info
    assert 0x0112 not in picture.getexif()


def test_jpeg_orientation():
    stored = Image.new("RGB", (64, 32))
    stored.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.asarray(decode_image(encoded(stored, "JPEG", exif=exif, quality=95))).astype(int)
    assert pixels.shape == (64, 32, 3)
    assert np.abs(pixels[2:14, 18:30] - RED).max() < 20  # top right
    assert pixels[:, :14].max() < 20


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_picture(format_name):
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken"
    content = encoded(Image.new("RGB", (16, 8), (0, 0, 200)), format_name, exif=broken)
    assert decode_image(content).size == (16, 8)


# ---- sources


class Unseekable(io.RawIOBase):
    def __init__(self, content: bytes) -> None:
        self.inner = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self.inner.readinto(buffer)


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "GIF", "WEBP"])
def test_paths_bytes_and_streams(tmp_path, format_name):
    content = encoded(Image.new("RGB", (3, 2), RED), format_name)
    path = tmp_path / "picture.jpg"  # the content decides, not the suffix
    path.write_bytes(content)
    stream = io.BytesIO(content)
    stream.seek(5)
    for source in (path, str(path), content, stream, io.BufferedReader(Unseekable(content))):
        assert decode_image(source).size == (3, 2)
    assert not stream.closed


# ---- damaged files


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("format_name", FORMATS)
def test_truncated(format_name, share):
    if format_name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format_name}")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
    content = encoded(noise, format_name)
    assert decode_image(content).size == (48, 48)
    assert len(reason(content[: int(share * len(content))])) > 10


def test_files_that_are_no_image(tmp_path):
    empty = tmp_path / "empty.jpg"
    empty.touch()
    assert reason(empty) == "the file is empty"
    text = tmp_path / "text.jpg"
    text.write_text("<html>404 Not Found</html>")
    assert reason(text).startswith("not an image of a known format (JPEG, PNG")
    assert "folder" in reason(tmp_path)
    assert reason(tmp_path / "gone.jpg") == "No such file or directory"
    assert reason("") == "No such file or directory"
    assert reason(tmp_path / "nul\0byte.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    assert reason(tmp_path / "self.jpg")
    with pytest.raises(DamagedImage) as caught:
        decode_image(text)
    assert caught.value.path == str(text)


def test_postscript_is_not_run():
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n").startswith("not an image")


@pytest.mark.timeout(10)
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "pipe" in reason(tmp_path / "pipe.jpg")


def test_a_file_we_may_not_read():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies in a folder that only its owner may enter
        Path(folder).chmod(0o755)
        path = Path(folder, "locked.png")
        path.write_bytes(encoded(Image.new("L", (1, 1)), "PNG"))
        path.chmod(0)
        is_root = os.geteuid() == 0  # whom permissions don't stop
        if is_root:
            os.seteuid(65534)
        try:
            assert reason(path) == "Permission denied"
        finally:
            if is_root:
                os.seteuid(0)
        path.chmod(stat.S_IRUSR)
        assert decode_image(path).size == (1, 1)


def test_a_bomb_is_refused_by_its_size():
    bomb = png(png_header(60_000, 60_000, bits=1), (b"IDAT", zlib.compress(bytes(100))))
    assert reason(bomb) == "claims 60000 × 60000 pixels, more than the 178,956,970 allowed"


@pytest.mark.parametrize("format_name", FORMATS)
def test_max_pixels_is_the_limit_and_pillow_keeps_quiet(format_name, monkeypatch):
    if format_name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format_name}")
    content = encoded(Image.new("RGB", (32, 16)), format_name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow warns from 300 on, which here is an error
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(content)).close()
    assert decode_image(content, max_pixels=512).size == (32, 16)
    with pytest.raises(DamagedImage, match="claims 32 × 16 pixels, more than the 511 allowed"):
        decode_image(content, max_pixels=511)


def test_a_gif_frame_larger_than_its_screen_is_checked_too(monkeypatch):
    content = bytearray(encoded(Image.new("L", (32, 16)), "GIF"))
    content[6:10] = struct.pack("<HH", 1, 1)  # the screen; the frame keeps its 32 × 16
    with pytest.raises(DamagedImage, match="32 × 16"):
        decode_image(bytes(content), max_pixels=511)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert decode_image(bytes(content), max_pixels=512).size == (32, 16)


def test_huge_text_chunk():
    text = b"comment\0\0" + zlib.compress(b" " * 50_000_000)
    content = png(png_header(1, 1), (b"zTXt", text), (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b""))
    assert len(content) < 60_000
    assert reason(content).startswith("can't be decoded as PNG: ")


def test_an_image_without_pixels():
    bitmap = bytearray(encoded(Image.new("L", (4, 4)), "BMP"))
    bitmap[18:22] = bytes(4)  # width
    assert reason(bytes(bitmap)).startswith("can't be decoded as BMP: ")


def test_random_damage_gives_a_picture_or_one_sentence():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 17, 3), np.uint8))
    options = {"TIFF": {"compression": "tiff_lzw"}}
    sound = [encoded(noise, name, **options.get(name, {})) for name in FORMATS if name in Image.SAVE]
    dice = random.Random(0)
    pictures, sentences = 0, []
    for trial in range(100 * len(sound)):
        content = bytearray(sound[trial % len(sound)])
        for _ in range(dice.choice([1, 5, 20])):
            content[dice.randrange(len(content))] = dice.randrange(256)
        try:
            picture = decode_image(bytes(content), max_pixels=1_000_000)
        except DamagedImage as damaged:
            sentences.append(str(damaged))
        else:
            assert picture.mode == "RGB"
            assert min(picture.size) > 0
            pictures += 1
    assert pictures > 100
    assert len(sentences) > 100
    assert all(len(sentence) > 20 and "\n" not in sentence for sentence in sentences)


def test_damaged_image_travels_between_processes_and_prints():
    error = DamagedImage("a/b.jpg", "cut off: 3 bytes missing")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.path, again.reason) == (DamagedImage, "a/b.jpg", "cut off: 3 bytes missing")
    assert str(again) == "a/b.jpg: cut off: 3 bytes missing"
    assert str(DamagedImage("\udcff.jpg", "empty")).encode() == b"\\udcff.jpg: empty"
