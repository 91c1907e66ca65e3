"""Image files for the `vla-perception` command: whole ones, of known formats, of bounded size."""

from __future__ import annotations

import io
import re
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla_perception.images import streams
from vla_perception.images.decode import narrow
from vla_perception.images.streams import MAX_PIXELS

if TYPE_CHECKING:
    import PIL.Image

#: Pillow's names of what is read; it knows some fifty more, in which camera images are not kept. JPEG includes MPO.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
#: Bytes of a file.
MAX_BYTES = 1 << 30
_PPM_HEADER = 1 << 14


def check(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """ValueError or OSError if the file's header says that `read` would refuse it. Takes no time."""
    _open(path, _bytes(path), max_pixels).close()


def read(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 RGB [height, width, 3], as OpenVLA opens its images: by Pillow, without EXIF rotation.

    Grey samples v of 16 bits become v / 257, rounded, as in messages.

    Raises:
        ValueError: no image of a known format, larger than allowed, truncated, corrupt, or without a meaning in color.
        OSError: it cannot be read.
    """
    return decode(_bytes(path), path, max_pixels)


def decode(data: bytes, path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`read`, of a file's bytes that lie elsewhere; `path` stands in error messages."""
    with _open(path, data, max_pixels) as image:
        try:
            # Pillow fills what a damaged JPEG lacks with grey, and does without the end of a PNG.
            if image.format in ("JPEG", "MPO"):
                streams.decode_jpeg(data, max_pixels)
            elif image.format == "PNG":
                streams.check_png(data, max_pixels)
            elif image.format == "TIFF" and "jpeg" in str(image.info.get("compression")):
                raise ValueError("damage in a TIFF of JPEG compression cannot be seen; save it as JPEG or PNG")
            if image.mode.startswith("I;16"):  # PIL would cut off at 255
                grey = narrow(np.asarray(image))
                return np.broadcast_to(grey[:, :, None], (*grey.shape, 3))
            return np.asarray(image.convert("RGB"))
        except ImportError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever a file leads them to
            raise ValueError(f"{path} cannot be read: {error}") from error


def _bytes(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:  # a pipe or a device may never end
        raise ValueError(f"{path} is not a file of at most {MAX_BYTES} bytes")
    return path.read_bytes()


def _open(path: Path | str, data: bytes, max_pixels: int) -> PIL.Image.Image:
    """An image of which the header has been read."""
    from PIL import Image, UnidentifiedImageError

    # Pillow reads these byte by byte, comments of any length too.
    words = re.sub(rb"#[^\n]*\n?", b" ", data[:_PPM_HEADER]).split(None, 3) if re.match(rb"P[1-6]\s", data) else None
    if words is not None and len(words) < (3 if words[0] in (b"P1", b"P4") else 4):
        raise ValueError(f"{path} cannot be read: its header has no end within {_PPM_HEADER} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, which are refused below, and of odd headers
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not an image: {', '.join(FORMATS)} are read") from error
        except Exception as error:  # noqa: BLE001 - as in `read`; a DecompressionBombError is not a ValueError
            raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        streams.check_size(*image.size, max_pixels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if image.mode in ("I", "F"):  # PIL would cut off whatever lies outside 0–255
        raise ValueError(f"{path} holds grey values of 32 bits, whose white level is not known; convert it to 8 bits")
    return image
