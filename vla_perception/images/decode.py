"""Camera messages as RGB arrays: sensor_msgs Image and CompressedImage -> uint8 [height, width, 3].

What the bytes mean is settled here (layout, padding, byte order); color arithmetic is left to cv_bridge where a
working one is installed and to OpenCV otherwise. 8-bit color and mono need neither: they are views of the
message's own memory. Any object with the message's fields will do, a generated ROS class is not needed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from vla_perception.images import streams
from vla_perception.images.streams import MAX_PIXELS, ImageDecodeError, check_size

__all__ = [
    "ENCODINGS",
    "MAX_PIXELS",
    "ImageDecodeError",
    "check_message_size",
    "compressed_to_rgb",
    "decode_image",
    "image_to_rgb",
    "narrow",
    "warm_up",
]

# Encodings of interleaved pixels: name -> (bytes per sample, samples per pixel). The generic OpenCV types come in
# OpenCV's channel order, blue first, as everything in ROS that turns them into color assumes.
_RGB_ORDER = {"rgb8": 3, "rgba8": 4}
_BGR_ORDER = {"bgr8": 3, "bgra8": 4, "8UC3": 3, "8UC4": 4}
_MONO = ("mono8", "8UC1")
_SIXTEEN_BIT = {"mono16": 1, "rgb16": 3, "bgr16": 3, "rgba16": 4, "bgra16": 4, "16UC3": 3, "16UC4": 4}
_BAYER = tuple(f"bayer_{pattern}{bits}" for pattern in ("rggb", "bggr", "gbrg", "grbg") for bits in (8, 16))
_YUV_422 = {"uyvy": "uyvy", "yuv422": "uyvy", "yuyv": "yuyv", "yuv422_yuy2": "yuyv"}
_YUV_PLANAR = ("nv12", "nv21", "nv16", "nv24", "i420", "yuv420")

ENCODINGS = (*_RGB_ORDER, *_BGR_ORDER, *_MONO, *_SIXTEEN_BIT, *_BAYER, *_YUV_422, *_YUV_PLANAR)
"""Every `encoding` that image_to_rgb accepts."""

#: Bytes of a pixel: of rgba16, and of a PNG of it.
_MOST_BYTES = 8

#: A compressed image's format, in lower case, that names a depth image or labels; what begins with a color's name does not.
_DEPTH = re.compile(
    r"compresseddepth|^\s*(?!mono|rgb|bgr|bayer)(.*\b)?(depth|rvl\b|(8s|16[us]|32[sf]|64f)c1\b)", re.DOTALL
)
_MOSAIC = re.compile("bayer|rggb|bggr|gbrg|grbg")
_DEPTH_ADVICE = (
    "is a depth or measurement image without a meaning in color. Point the camera at its color topic; "
    "a grey image belongs under the encoding mono8 or mono16"
)


def check_message_size(msg, max_pixels: int) -> None:
    """ImageDecodeError for an Image or CompressedImage that is not worth keeping until its turn: too many pixels or bytes."""
    if hasattr(msg, "encoding"):
        check_size(int(msg.width), int(msg.height), max_pixels)
    if len(msg.data) > _MOST_BYTES * max_pixels + 65536:
        raise ImageDecodeError(f"a message of {len(msg.data)} bytes is more than an image of max_image_pixels takes")


def decode_image(msg, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [height, width, 3] RGB of a sensor_msgs Image or CompressedImage of at most `max_pixels`.

    See `image_to_rgb` and `compressed_to_rgb`. Raises ImageDecodeError.
    """
    return image_to_rgb(msg, max_pixels) if hasattr(msg, "encoding") else compressed_to_rgb(msg, max_pixels)


def image_to_rgb(msg, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [height, width, 3] of a sensor_msgs/Image of any encoding in `ENCODINGS` and at most `max_pixels`.

    The result may be a read-only view of `msg.data` with any strides (reversed for bgr8, 0 for mono8); copy it
    before writing to it. `step` 0 means tightly packed. Alpha is dropped. 16-bit samples v become v / 257, rounded.
    YUV is BT.601 with limited range, as V4L2 cameras deliver it and cv_bridge reads it.
    Raises ImageDecodeError.
    """
    encoding, height, width = msg.encoding, int(msg.height), int(msg.width)
    if encoding not in ENCODINGS:
        raise ImageDecodeError(_refusal(encoding))
    check_size(width, height, max_pixels)
    data = _bytes(msg.data)
    step = int(msg.step)

    if encoding in _MONO:
        pixels = _rows(data, height, width, step)
        return np.broadcast_to(pixels[:, :, None], (height, width, 3))
    if encoding in _RGB_ORDER:
        return _pixels(data, height, width, step, np.uint8, _RGB_ORDER[encoding])[:, :, :3]
    if encoding in _BGR_ORDER:
        return _pixels(data, height, width, step, np.uint8, _BGR_ORDER[encoding])[:, :, 2::-1]
    if encoding in _YUV_422:
        _require_even(encoding, width=width)
        pixels = _pixels(data, height, width, step, np.uint8, 2)
        return _to_rgb(pixels, _YUV_422[encoding])
    if encoding in _YUV_PLANAR:
        return _yuv_planes_to_rgb(data, height, width, step, encoding)

    wide = np.dtype(">u2" if msg.is_bigendian else "<u2")
    sample = wide if encoding in _SIXTEEN_BIT or encoding.endswith("16") else np.dtype(np.uint8)
    pixels = _pixels(data, height, width, step, sample, _SIXTEEN_BIT.get(encoding, 1))
    pixels = np.ascontiguousarray(pixels, sample.newbyteorder("="))  # a copy only if padded or swapped
    return _to_rgb(pixels, {"16UC3": "bgr16", "16UC4": "bgra16"}.get(encoding, encoding))


def compressed_to_rgb(msg, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [height, width, 3] of a sensor_msgs/CompressedImage: JPEG or PNG of at most `max_pixels`.

    The stream says itself what it is; `format` (for example "rgb8; jpeg compressed bgr8") only serves to recognise
    what is not an image, and a Bayer mosaic ("bayer_rggb8; png compressed "), which becomes what image_to_rgb makes of
    it. Grey becomes RGB, alpha is dropped, 16-bit samples v become v / 257, rounded. Truncated and corrupt streams are
    refused (streams.py). Raises ImageDecodeError.
    """
    kind = str(msg.format)
    shown = kind if len(kind) <= 100 else f"{kind[:100]}…"
    lower = kind[:1000].lower()
    if _DEPTH.search(lower):
        raise ImageDecodeError(f'a compressed image of format "{shown}" {_DEPTH_ADVICE}')
    data = _bytes(msg.data)
    if data.size == 0:
        raise ImageDecodeError(f'empty compressed image (format "{shown}"). Check the camera driver')
    stream = data.tobytes()
    image = streams.decode(stream, max_pixels)
    if image is None:
        raise ImageDecodeError(
            f'a compressed image of format "{shown}" holds neither JPEG nor PNG (it begins with '
            f"{stream[:8].hex(' ')}). Set the publisher's image_transport to jpeg or png"
        )
    if _MOSAIC.search(lower) and (mosaic := _single_channel(image)) is not None:
        pattern = re.search("bayer_(rggb|bggr|gbrg|grbg)", lower)
        if pattern is None:
            raise ImageDecodeError(
                f'a compressed image of format "{shown}" holds a Bayer mosaic, but the format does not say which: let the '
                'publisher write, for example, "bayer_rggb8; png compressed", or debayer before it compresses'
            )
        return _to_rgb(mosaic, f"{pattern[0]}{8 * mosaic.itemsize}")
    if image.dtype == np.uint16:  # colors in the order in which they lie in memory, which is faster
        image = narrow(image) if image.ndim == 2 else narrow(image[:, :, ::-1])[:, :, ::-1]
    if image.ndim == 2:
        return np.broadcast_to(image[:, :, None], (*image.shape, 3))
    return image


def _single_channel(image: np.ndarray) -> np.ndarray | None:
    """[height, width] of a grey image, also of one with three equal channels; None of one in color."""
    if image.ndim == 2:
        return image
    first = image[:, :, 0]
    equal = all(np.array_equal(first, image[:, :, channel]) for channel in (1, 2))
    return np.ascontiguousarray(first) if equal else None


def warm_up() -> None:
    """Loads what decoding and converting take, so that the first image does not pay for it: hundredths
    of a second, and more where OpenCV still has to be read from a disk.

    Raises ImportError where there is no OpenCV or no simplejpeg. 8-bit color and grey of raw images do without.
    """
    cv2 = streams.import_opencv()
    _to_rgb(np.zeros((2, 2, 2), np.uint8), "yuyv")
    for extension in (".png", ".jpg"):
        streams.decode(cv2.imencode(extension, np.zeros((8, 8, 3), np.uint8))[1].tobytes())


def _refusal(encoding: str) -> str:
    if encoding == "":
        return "the image's encoding is empty. Check the camera driver"
    if encoding[:1].isdigit() or "depth" in encoding.lower():
        return f"an image of encoding {encoding[:100]} {_DEPTH_ADVICE}"
    return f'unknown image encoding "{encoding[:100]}". Known are: {", ".join(ENCODINGS)}'


# Layout: from the message's bytes to arrays of samples.


def _bytes(data) -> np.ndarray:
    """uint8 [n], a view wherever `data` (array.array, bytes, memoryview, NumPy array, list) allows one."""
    try:
        if isinstance(data, (list, tuple)):
            return np.asarray(data, np.uint8)
        if isinstance(data, np.ndarray):
            return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    except (TypeError, ValueError, OverflowError) as error:
        raise ImageDecodeError(f"image data is not a sequence of bytes: {error}") from error


def _rows(data: np.ndarray, height: int, width: int, step: int, offset: int = 0) -> np.ndarray:
    """uint8 [height, width] view: `height` rows of `width` bytes (not pixels), `step` bytes apart, from `offset`."""
    step = step or width
    if step < width:
        raise ImageDecodeError(
            f"step is {step} bytes, but a row takes {width}: the camera driver fills `step`, `width` or `encoding` wrongly"
        )
    # The padding of the last row may be missing.
    needed = offset + (height - 1) * step + width
    if data.size < needed or step > data.size:
        raise ImageDecodeError(
            f"image data is truncated: {data.size} bytes, but {height} rows of step {step} take {needed}"
        )
    return np.ndarray((height, width), np.uint8, data, offset, (step, 1))


def _pixels(data, height, width, step, sample, channels) -> np.ndarray:
    """[height, width, channels] view (for one channel [height, width]) of interleaved samples of dtype `sample`."""
    sample = np.dtype(sample)
    rows = _rows(data, height, width * channels * sample.itemsize, step)
    strides = (rows.strides[0], channels * sample.itemsize, sample.itemsize)
    pixels: np.ndarray = np.ndarray((height, width, channels), sample, data, 0, strides)
    return pixels if channels > 1 else pixels[:, :, 0]


def _require_even(encoding: str, **sizes: int):
    for name, size in sizes.items():
        if size % 2:
            raise ImageDecodeError(f"an image of encoding {encoding} needs an even {name}, got {size}")


def _yuv_planes_to_rgb(data, height, width, step, encoding) -> np.ndarray:
    """A luma plane of rows `step` apart, then chroma in one interleaved plane (nv..) or in two (i420)."""
    step = step or width
    luma = _rows(data, height, width, step)
    after = height * step
    if encoding == "nv24":  # one U, V pair per pixel: rows twice as long
        _rows(data, height, 2 * width, 2 * step, after)
        chroma: np.ndarray = np.ndarray((height, width, 2), np.uint8, data, after, (2 * step, 2, 1))
        # OpenCV has no 4:4:4 conversion: as 4:2:2 with every pixel twice, the arithmetic is the same for all.
        doubled = np.empty((height, width, 2, 2), np.uint8)
        doubled[..., 0] = luma[:, :, None]
        doubled[..., 1] = chroma
        return _to_rgb(doubled.reshape(height, 2 * width, 2), "yuyv")[:, ::2]
    _require_even(encoding, width=width)
    if encoding == "nv16":  # one pair per two pixels of a row
        chroma = _rows(data, height, width, step, after)
        return _to_rgb(np.stack([luma, chroma], axis=2), "yuyv")
    _require_even(encoding, height=height)
    if encoding in ("nv12", "nv21"):
        chroma = _rows(data, height // 2, width, step, after)
        return _to_rgb(np.concatenate([luma, chroma]), encoding)
    _require_even(encoding, step=step)
    planes = [luma.reshape(-1)]
    for plane in range(2):
        offset = after + plane * (height // 2) * (step // 2)
        planes.append(_rows(data, height // 2, width // 2, step // 2, offset).reshape(-1))
    return _to_rgb(np.concatenate(planes).reshape(height * 3 // 2, width), "i420")


# Color: from samples to RGB, by cv_bridge or OpenCV.


def _to_rgb(pixels: np.ndarray, encoding: str) -> np.ndarray:
    if encoding in _BAYER and min(pixels.shape) < 4:
        height, width = pixels.shape
        raise ImageDecodeError(f"a {encoding} image of {width} x {height} pixels is too small to interpolate colors")
    convert = _cv_bridge() if encoding in CV_BRIDGE_ENCODINGS else None
    image = convert(pixels, encoding) if convert else None
    return opencv_to_rgb(pixels, encoding) if image is None else image


def opencv_to_rgb(pixels: np.ndarray, encoding: str) -> np.ndarray:
    """uint8 [height, width, 3] by OpenCV. `pixels`: samples in native byte order, for the planar encodings
    (nv12, nv21, i420) as OpenCV wants them: uint8 [height * 3 / 2, width]."""
    cv2 = streams.import_opencv()
    # OpenCV names a Bayer pattern by the second row's second and third pixel, ROS by the first row's first two.
    code = {
        "mono16": cv2.COLOR_GRAY2RGB,
        "bgr16": cv2.COLOR_BGR2RGB,
        "rgba16": cv2.COLOR_RGBA2RGB,
        "bgra16": cv2.COLOR_BGRA2RGB,
        "bayer_rggb": cv2.COLOR_BayerBG2RGB,
        "bayer_bggr": cv2.COLOR_BayerRG2RGB,
        "bayer_gbrg": cv2.COLOR_BayerGR2RGB,
        "bayer_grbg": cv2.COLOR_BayerGB2RGB,
        "uyvy": cv2.COLOR_YUV2RGB_UYVY,
        "yuyv": cv2.COLOR_YUV2RGB_YUY2,
        "nv12": cv2.COLOR_YUV2RGB_NV12,
        "nv21": cv2.COLOR_YUV2RGB_NV21,
        "i420": cv2.COLOR_YUV2RGB_I420,
        "yuv420": cv2.COLOR_YUV2RGB_I420,
    }
    name = encoding.removesuffix("16").removesuffix("8") if encoding.startswith("bayer") else encoding
    try:
        image = pixels if name == "rgb16" else cv2.cvtColor(pixels, code[name])
    except cv2.error as error:
        raise ImageDecodeError(f"OpenCV cannot convert the {encoding} image: {error}") from error
    return narrow(image) if image.dtype == np.uint16 else image


#: Samples that are converted at a time.
_AT_A_TIME = 1 << 18


def narrow(image: np.ndarray) -> np.ndarray:
    """uint16 -> uint8, full range to full range: v / 257, rounded; never a tie, 257 is odd."""
    narrowed = np.empty(image.shape, np.uint8)
    rows = max(1, _AT_A_TIME // max(1, image[:1].size))
    for top in range(0, len(image), rows):  # the products need 32 bits: not of everything at once
        wide = image[top : top + rows].astype(np.uint32)
        wide *= 255
        wide += 32895
        wide >>= 16
        narrowed[top : top + rows] = wide
    return narrowed


CV_BRIDGE_ENCODINGS = {"mono16", "rgb16", "bgr16", "rgba16", "bgra16", "uyvy", "yuyv", *_BAYER}
"""What cv_bridge converts. It knows no planar YUV, and its oldest versions no yuyv."""


@cache
def _cv_bridge() -> Callable[[np.ndarray, str], np.ndarray | None] | None:
    """cv_bridge as a function of (pixels, encoding) -> RGB, or None where there is none that works.

    The function gives None for what this version of cv_bridge cannot convert.

    Only its color conversion is used: imgmsg_to_cv2 mishandles a `step` that is not a whole number of pixels and, under
    NumPy 2, big-endian data.
    """
    if not cv_bridge_is_loadable():
        return None
    try:
        from cv_bridge.boost.cv_bridge_boost import cvtColor2

        # cv_bridge of every distro knows 4:2:2 by its older names.
        older_names = {"uyvy": "yuv422", "yuyv": "yuv422_yuy2"}

        def convert(pixels: np.ndarray, encoding: str) -> np.ndarray | None:
            try:
                return cvtColor2(np.ascontiguousarray(pixels), older_names.get(encoding, encoding), "rgb8")
            except RuntimeError:
                return None

        sample = np.array([[[0, 257, 65535]]], np.uint16)
        converted = convert(sample, "bgr16")
        works = converted is not None and np.array_equal(converted, [[[255, 1, 0]]])
        return convert if works else None
    except Exception:  # noqa: BLE001 - whatever is wrong with it, OpenCV does the work
        return None


def cv_bridge_is_loadable() -> bool:
    """Whether importing cv_bridge's compiled part is safe, found out without importing it.

    One that was built for NumPy 1 crashes the process under NumPy 2, so its file is searched for the name of the
    module that everything built for NumPy 2 imports. The `cv-bridge` of PyPI (ROS 1) has no compiled part.
    """
    if "cv_bridge.boost.cv_bridge_boost" in sys.modules:
        return True
    try:
        package = importlib.util.find_spec("cv_bridge")
    except (ImportError, ValueError):
        return False
    folders = list(package.submodule_search_locations or []) if package else []
    libraries = [file for folder in folders for file in Path(folder).glob("boost/cv_bridge_boost*.so")]
    if not libraries:
        return False
    if int(np.__version__.split(".")[0]) < 2:
        return True
    return all(b"numpy._core._multiarray_umath" in library.read_bytes() for library in libraries)
