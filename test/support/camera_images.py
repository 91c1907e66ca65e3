"""Images as messages and as streams: what cameras send, whole and odd; and files that claim to be large."""

import io
import struct
import zlib
from dataclasses import dataclass, field

import cv2
import numpy as np
import pytest

SOF0, SOF2, DHT, DQT, SOS, APP0 = 0xC0, 0xC2, 0xC4, 0xDB, 0xDA, 0xE0
EOI = b"\xff\xd9"


@dataclass
class RawImage:
    """The fields of sensor_msgs/Image that decoding reads."""

    height: int
    width: int
    encoding: str
    data: object
    step: int = 0
    is_bigendian: int = 0


@dataclass
class Compressed:
    format: str
    data: object = field(default=b"")


def photograph(height=240, width=320, seed=0):
    """uint8 BGR with detail everywhere."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height)) // 2 + rng.integers(0, 128, (height, width, 3), dtype=np.uint8)


def jpeg(image=None, **options):
    image = photograph() if image is None else image
    flags = [value for name, of in options.items() for value in (getattr(cv2, f"IMWRITE_JPEG_{name.upper()}"), of)]
    return cv2.imencode(".jpg", image, flags)[1].tobytes()


def pillow(image, mode=None, **options):
    pil = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    pil.frombytes(mode or "RGB", image.shape[1::-1], image.tobytes()).save(stream, "JPEG", **options)
    return stream.getvalue()


def without(stream, *markers):
    """The stream without those segments of its header."""
    kept, position = stream[:2], 2
    while stream[position + 1] != SOS:
        length = 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        kept += stream[position : position + length] if stream[position + 1] not in markers else b""
        position += length
    return kept + stream[position:]


def with_size(stream, width, height):
    at = max(stream.find(bytes((0xFF, marker))) for marker in (SOF0, SOF2))
    return stream[: at + 5] + struct.pack(">HH", height, width) + stream[at + 9 :]


SAMPLING = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in ("411", "420", "422", "440", "444")}
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0"

ODDITIES = {
    "no Huffman tables, as USB cameras send MJPEG": lambda: without(jpeg(), DHT),
    "MJPEG of a file: AVI1, 4:2:2, no tables": lambda: (
        b"\xff\xd8\xff\xe0\x00\x10AVI1" + bytes(10) + without(jpeg(sampling_factor=SAMPLING["422"]), DHT, APP0)[2:]
    ),
    "restart markers": lambda: jpeg(rst_interval=3),
    "restart markers, progressive": lambda: jpeg(rst_interval=3, progressive=1),
    "grey": lambda: jpeg(photograph()[:, :, 0]),
    "grey, restart markers": lambda: jpeg(photograph()[:, :, 0], rst_interval=5),
    "CMYK": lambda: pillow(np.dstack([photograph(), photograph()[:, :, 0]]), "CMYK"),
    "YCCK": lambda: pillow(np.dstack([photograph(), photograph()[:, :, 0]]), "CMYK").replace(
        ADOBE + b"\0", ADOBE + b"\2"
    ),
    "RGB": lambda: pillow(photograph(), keep_rgb=True),
    "Adobe's marker, YCbCr": lambda: b"\xff\xd8" + ADOBE + b"\1" + without(jpeg(), APP0)[2:],
    "Adobe's marker, RGB": lambda: b"\xff\xd8" + ADOBE + b"\0" + without(jpeg(), APP0)[2:],
    "neither JFIF nor Adobe": lambda: without(jpeg(), APP0),
    "optimised tables": lambda: jpeg(optimize=1),
    "fill bytes before a marker": lambda: jpeg()[:2] + b"\xff\xff" + jpeg()[2:],
    "fill bytes before the end": lambda: jpeg()[:-2] + b"\xff\xff" + EOI,
    "zeros after the end": lambda: jpeg() + bytes(4000),
    "noise after the end": lambda: jpeg() + photograph().tobytes(),
    "the next frame after the end": lambda: jpeg() + jpeg(),
    "a few stray bytes before the end": lambda: jpeg()[:-2] + b"\x12\x34\x56" + EOI,
    "more of them": lambda: jpeg()[:-2] + bytes(range(1, 15)) + EOI,
    "zeros before the end": lambda: jpeg()[:-2] + bytes(1000) + EOI,
    "a comment with scan markers": lambda: jpeg()[:2] + b"\xff\xfe\x01\x02" + b"\xff\xda" * 128 + jpeg()[2:],
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, color=2, rows=b"\0"):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BOMBS = {
    "jpeg": lambda w, h: with_size(jpeg(photograph(16, 16)), w, h),
    "progressive jpeg": lambda w, h: with_size(jpeg(photograph(16, 16), progressive=1), w, h),
    "grey jpeg": lambda w, h: with_size(jpeg(photograph(16, 16)[:, :, 0]), w, h),
    "jpeg with a thumbnail": lambda w, h: (
        lambda stream: stream[:2] + b"\xff\xe1\x10\x00" + jpeg(photograph(8, 8)).ljust(4094, b"\0") + stream[2:]
    )(BOMBS["jpeg"](w, h)),
    "png": png,
    "png of 16 bits": lambda w, h: png(w, h, 16, 6),
    "grey png": lambda w, h: png(w, h, 1, 0),
    "raw mono8": lambda w, h: RawImage(h, w, "mono8", bytes(16), 0),
    "raw rgb8": lambda w, h: RawImage(h, w, "rgb8", bytes(16), 3 * w),
    "raw bayer": lambda w, h: RawImage(h, w, "bayer_rggb16", bytes(16), 0),
    "raw nv12": lambda w, h: RawImage(h, w, "nv12", bytes(16), 0),
}
