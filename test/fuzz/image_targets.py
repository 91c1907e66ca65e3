"""Images: raw and compressed messages, and files."""

from __future__ import annotations

import array
import io
import struct

import camera_images as images
import numpy as np
from engine import Target
from mutations import change_png

from vla_perception.images.decode import ENCODINGS, ImageDecodeError, check_message_size, decode_image
from vla_perception.sources import image_files

#: Pixels of an image; the node's parameter max_image_pixels in small.
_MAX_PIXELS = 1 << 17
_HEADER = struct.Struct("<BBHHI")
_NAMES = (*ENCODINGS, "", "16UC1", "depth", "jpeg")
#: Of a compressed message, by its first byte.
_FORMATS = (
    "jpeg",
    "png",
    "rgb8; jpeg compressed bgr8",
    "bayer_rggb8; png compressed ",
    "16UC1; compressedDepth png",
    "",
)


def _check(image: np.ndarray) -> None:
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    assert 0 < image.shape[0] * image.shape[1] <= _MAX_PIXELS, image.shape
    image.sum()  # reads every pixel: strides that lead out of the message would end the process


def raw(data: bytes) -> None:
    header = data[: _HEADER.size].ljust(_HEADER.size, b"\0")
    name, big_endian, height, width, step = _HEADER.unpack(header)
    pixels = array.array("B", data[_HEADER.size :])
    message = images.RawImage(height, width, _NAMES[name % len(_NAMES)], pixels, step, big_endian)
    check_message_size(message, _MAX_PIXELS)
    _check(decode_image(message, _MAX_PIXELS))


def raw_seeds() -> list[bytes]:
    generator = np.random.default_rng(0)
    seeds = []
    for index, name in enumerate(_NAMES):
        wide = 2 if name.endswith("16") or name.startswith("16") else 1
        step = 8 * wide * (4 if "a" in name or name.endswith("4") else 3)
        for given in (0, step + 8):
            payload = generator.integers(0, 256, 3 * 6 * (step + 8), np.uint8).tobytes()
            seeds.append(_HEADER.pack(index, index & 1, 6, 8, given) + payload)
    return seeds


def compressed(data: bytes) -> None:
    kind = _FORMATS[data[0] % len(_FORMATS)] if data else ""
    message = images.Compressed(kind, array.array("B", data[1:]))
    check_message_size(message, _MAX_PIXELS)
    _check(decode_image(message, _MAX_PIXELS))


def _streams() -> list[bytes]:
    """Whole JPEG and PNG streams of all kinds, by OpenCV and Pillow."""
    import cv2

    picture = images.photograph(32, 40)
    flags = [{}, {"progressive": 1}, {"rst_interval": 2}, {"progressive": 1, "rst_interval": 2}, {"optimize": 1}]
    streams = [images.jpeg(picture, quality=60, **options) for options in flags]
    streams += [images.jpeg(picture, sampling_factor=factor) for factor in images.SAMPLING.values()]
    streams += [images.jpeg(picture[:, :, 0]), images.without(images.jpeg(picture), images.DHT)]
    streams += [images.jpeg(picture)[:-2] + b"\x12\x34\x56" + images.EOI]
    streams.append(images.pillow(np.dstack([picture, picture[:, :, 0]]), "CMYK"))
    for values in (picture, picture[:, :, 0], picture.astype(np.uint16) * 257, np.dstack([picture, picture[:, :, 0]])):
        streams.append(cv2.imencode(".png", values)[1].tobytes())
    streams.append(_saved("PNG", "P"))
    return streams


def compressed_seeds() -> list[bytes]:
    return [bytes([kind]) + stream for stream in _streams() for kind in (0, 3)]


def _saved(kind: str, mode: str = "RGB", **options) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(images.photograph(32, 40)))
    picture.convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def file(data: bytes) -> None:
    _check(image_files.decode(data, "image", _MAX_PIXELS))


def file_seeds() -> list[bytes]:
    others = [_saved(kind, mode) for kind in ("BMP", "GIF", "PPM", "TIFF", "WEBP") for mode in ("RGB", "L")]
    others += [_saved("TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "packbits")]
    others += [_saved("WEBP", lossless=True), _saved("BMP", "1"), _saved("BMP", "P"), _saved("TIFF", "1")]
    return others + _streams()


TARGETS = [
    Target("image_raw", raw, raw_seeds, (ImageDecodeError,), max_bytes=4096),
    Target("image_compressed", compressed, compressed_seeds, (ImageDecodeError,), (change_png,), max_bytes=8192),
    Target("image_file", file, file_seeds, (ValueError,), (change_png,), max_bytes=8192),
]
