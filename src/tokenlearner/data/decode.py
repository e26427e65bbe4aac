"""One image file to one RGB picture, or one sentence saying why not.

Pictures found on disk are 16-bit, transparent, sideways, cut off, or no picture at all. ``convert("RGB")`` gets the
first three wrong without a word (grey clipped to white, hidden colours brought out), and for the rest plugins raise
whatever they ran into. Here every picture comes out upright, 8-bit and on white; every failure is a ``DamagedImage``.

Two departures from plain ``Image.open``: only the formats below are tried (others would run Ghostscript or take a text
file for a picture), and the plugin is called directly, because ``Image.open`` warns about large pictures before the
caller can compare the size with a limit of its own.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from tokenlearner.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# EXIF 2.3, tag 0x0112: what undoes each orientation (1 is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedImage(InputError):  # noqa: N818 (the public name)
    """A file that can't be decoded. ``path`` is the file, ``reason`` says why in words."""

    def __init__(self, path: str, reason: str | None = None) -> None:
        if reason is None:
            # DataLoader raises a worker's exception again as type(traceback text); the sentence is on its last line.
            path, _, reason = path.rstrip().rpartition(f"{type(self).__name__}: ")[2].partition(": ")
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        # File names need not be valid UTF-8, and printing one that isn't would raise a second error.
        return f"{self.path}: {self.reason}".encode(errors="backslashreplace").decode()


class _RefusedError(Exception):
    """Why a file is no picture; ``decode_image`` adds which file."""


def decode_image(source: str | Path | bytes | BinaryIO, *, max_pixels: int = 178_956_970) -> Image.Image:
    """The picture in ``source`` as RGB, 8 bits a channel, upright, transparency composited over white.

    The first frame of an animation. ``bytes`` are a file's content; a stream is read from its beginning and left open.
    16-bit grey is scaled by 255/65535, wider grey as ``_grey_range`` says. The picture carries no metadata, so nothing
    downstream can turn it a second time.

    Raises ``DamagedImage`` for whatever can't be decoded, and for more than ``max_pixels`` pixels (width · height, by
    default Pillow's own limit, above which Pillow refuses TIFF and WebP whatever is asked here) before any of them is
    decoded. Of paths only regular files are opened: a named pipe would wait for ever.
    """
    if isinstance(source, bytes):
        name = "<bytes>"
    else:
        name = str(source if isinstance(source, str | Path) else getattr(source, "name", "<stream>"))
    try:
        with _opened(source) as file:
            return _decode(file, max_pixels)
    except Exception as error:  # plugins raise SyntaxError, struct.error, IndexError, zlib.error, MemoryError, …
        raise DamagedImage(name, _in_words(error)) from error


@contextmanager
def _opened(source: str | Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, str | Path):
        mode = os.stat(source).st_mode  # noqa: PTH116 (Path("") would be the current folder)
        if stat.S_ISDIR(mode):
            raise _RefusedError("a folder, where an image file was expected")
        if not stat.S_ISREG(mode):
            raise _RefusedError("a pipe, socket or device, where an image file was expected")
        with Path(source).open("rb") as file:
            yield file
    else:
        yield source if source.seekable() else io.BytesIO(source.read())


def _decode(file: BinaryIO, max_pixels: int) -> Image.Image:
    file.seek(0)
    head = file.read(4096)  # the plugins want 16 bytes; a camera's EXIF block begins not much later
    if not head:
        raise _RefusedError("the file is empty")
    Image.init()
    for name in FORMATS:
        if name not in Image.OPEN:  # AVIF before Pillow 11.3
            continue
        factory, accept = Image.OPEN[name]
        verdict = accept(head[:16]) if accept else False
        if isinstance(verdict, str):  # right format, but this Pillow was built without its library
            raise _RefusedError(verdict)
        if verdict:
            file.seek(0)
            try:
                with _quiet(name, head), factory(file, "") as image:
                    _check_size(image.size, max_pixels)
                    return _upright_rgb(image)
            except _RefusedError:
                raise
            except Exception as error:
                raise _RefusedError(f"can't be decoded as {name}: {_in_words(error)}") from error
    raise _RefusedError(f"not an image of a known format ({', '.join(FORMATS)})")


@contextmanager
def _quiet(format_name: str, head: bytes) -> Iterator[None]:
    """Silences Pillow where its plugins warn, of sizes and of tags: the result says what comes of the file.

    Elsewhere the filters are left alone, because any change to them makes warnings already shown come up again.
    """
    if format_name in ("GIF", "TIFF") or b"Exif\0" in head:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    else:
        yield


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _RefusedError(f"claims {width} × {height} pixels, more than the {max_pixels:,} allowed")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _turn(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey_to_8_bit(image)
    if image.mode == "La":  # Pillow converts premultiplied grey to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(clear, mask=clear)
    else:
        rgb = image.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info.clear()
    return rgb


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What puts the picture upright. ``ImageOps.exif_transpose`` would rewrite every tag and fail on any odd one."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata is no reason to lose a sound picture
        return None


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    stored = np.asarray(image)
    low, high = _grey_range(image, stored)
    values = np.nan_to_num(stored.astype(np.float32), copy=False, nan=low, posinf=high, neginf=low)
    with np.errstate(over="ignore"):  # beyond float32 is beyond white
        values -= low
        values *= 255 / (high - low)
    np.rint(values.clip(0, 255, out=values), out=values)
    if _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0:  # white is 0; Pillow inverts up to 8 bits only
        np.subtract(255, values, out=values)
    transparent = image.info.get("transparency")  # a grey level of 16-bit PNG, which Pillow ignores
    if transparent is not None:
        values[stored == transparent] = 255
    return Image.fromarray(values.astype(np.uint8))


def _grey_range(image: Image.Image, stored: np.ndarray) -> tuple[float, float]:
    """Which stored values are black and white.

    16-bit grey says so by its bits. Float and 32-bit images don't: black is 0 and white the first of 1 (float only),
    255 (float only) and 65535 that no pixel exceeds; with negative or larger values, the picture's least and greatest.
    """
    if image.mode.startswith("I;16"):
        bits = _tag(image, TiffImagePlugin.BITSPERSAMPLE, (16,))[0]  # 12 in some microscopes' files
        return 0.0, float(2**bits - 1)
    finite = stored[np.isfinite(stored)]
    if not finite.size:
        raise _RefusedError("no pixel has a finite value")
    low, high = float(finite.min()), float(finite.max())
    for white in (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,):
        if low >= 0 and high <= white:
            return 0.0, white
    return (low, high) if high - low > 1e-30 else (low, low + max(1.0, abs(low)))  # one value only: black


def _tag(image: Image.Image, number: int, otherwise: Any) -> Any:
    return image.tag_v2.get(number, otherwise) if isinstance(image, TiffImagePlugin.TiffImageFile) else otherwise


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
