"""JPEG and PNG streams as arrays: refused unless they are whole, and bounded before anything is decoded.

OpenCV and Pillow fill what a damaged JPEG lacks with grey and say nothing. simplejpeg reports libjpeg's warnings, and
gives the same pixels in the same time (test_streams.py compares all three).
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from vla_perception.options import MAX_IMAGE_PIXELS
from vla_perception.printable import error_text

MAX_PIXELS = MAX_IMAGE_PIXELS
#: Pixels of a side: what JPEG can hold. What goes through images row by row is bounded by this.
MAX_SIDE = 65_500
#: Progressive JPEGs have 10 scans or so; each one costs a pass over the whole image.
MAX_SCANS = 32
#: Segments of a JPEG, and parts of a PNG beside one for each `_CHUNK_BYTES`: each costs a step here and in the libraries.
_MAX_SEGMENTS = 4096
_CHUNK_BYTES = 1024
#: Bytes between the end of the data and the next marker that are taken for a camera's oddity. Logitech's C270 and C910
#: leave up to 9; more are what a hole leaves.
MAX_STRAY_BYTES = 16
#: Parts between restart markers that are looked at one by one.
_MAX_RESTARTS = 1024
#: Pixels of an image that stray bytes are looked for in, which takes several times as long as to decode it.
_MAX_REPAIRED = 1 << 23
#: Bytes of header that are copied for them.
_MAX_HEADERS = 1 << 25
_END = b"\xff\xd9"
#: What is left where a part of a frame never arrived. To libjpeg zeros are data like any other: most often blocks in which
#: every coefficient is −1. Only where they stand for "no more coefficients" or "16 zeros" may they come in a row.
_HOLE = bytes(32)
_LONG_ZEROS = (0x00, 0xF0)
#: Within a scan: any marker but those of restarts. 0xFF 0x00 is data, and of several 0xFF the last one counts.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_FILL = re.compile(rb"\xff*")


class ImageDecodeError(ValueError):
    """A camera message that cannot become an RGB image. The text says why and what to change."""

    def __init__(self, text: str) -> None:
        super().__init__(error_text(text))  # it quotes what a message says of itself


def check_size(width: int, height: int, max_pixels: int) -> None:
    """ImageDecodeError if an image has no pixels, or more than it may have."""
    if height <= 0 or width <= 0:
        raise ImageDecodeError(f"empty image: {width} x {height} pixels. Check the camera driver's settings")
    if width * height > max_pixels:
        raise ImageDecodeError(
            f"an image of {width} x {height} pixels is larger than max_image_pixels allows ({max_pixels})"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageDecodeError(f"an image of {width} x {height} pixels: no side may be longer than {MAX_SIDE}")


def decode(stream: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """[height, width] grey, or [height, width, 3] RGB (alpha is dropped), uint8 or uint16; None if neither JPEG nor PNG.

    EXIF orientation is not applied, as with cv_bridge, so that pixels agree with camera_info.

    Raises:
        ImageDecodeError: it is larger than allowed, truncated or corrupt.
        ImportError: a library is missing; says which.
    """
    if stream.startswith(b"\xff\xd8"):
        return decode_jpeg(stream, max_pixels)
    if stream.startswith(b"\x89PNG\r\n\x1a\n"):
        return _decode_png(stream, max_pixels)
    return None


# JPEG


@dataclass(frozen=True)
class _JpegHeader:
    """What stands before a JPEG's first scan. frame, scan: where the markers SOFn and SOS begin."""

    frame: int
    scan: int
    width: int
    height: int
    components: int
    sequential: bool  # all components in one scan, which is not a progressive one: what cameras send
    mcu: tuple[int, int]  # width and height in pixels of what an interleaved scan codes together
    restart_interval: int  # in such units; 0: no restart markers
    #: By table of coefficients, what a code of zeros stands for: 16 * (zeros before it) + (its bits).
    zeros: dict[int, int]


def decode_jpeg(stream: bytes, max_pixels: int = MAX_PIXELS, order: str = "RGB") -> np.ndarray:
    """uint8 [height, width] of a grey JPEG, [height, width, 3] of any other, RGB or BGR. See `decode`.

    A stream without Huffman tables (MJPEG of USB cameras) has the standard's. What libjpeg only warns of is refused
    (a hole in the data, a missing end), but for a few stray bytes between the data and the marker that ends it.
    """
    simplejpeg = import_simplejpeg()
    header = _read_jpeg_header(stream)
    check_size(header.width, header.height, max_pixels)
    # An upper bound: what is coded has no such bytes, but what follows the end may.
    if not header.sequential or stream.count(b"\xff\xda", header.scan) > MAX_SCANS:
        _check_scans(stream, header)
    kind = "GRAY" if header.components == 1 else order
    try:
        pixels = simplejpeg.decode_jpeg(stream, kind)
    except ValueError as error:
        try:
            stream = _without_stray_bytes(stream, header, error)
            pixels = simplejpeg.decode_jpeg(stream, kind)
        except ValueError:
            raise ImageDecodeError(f"JPEG image is corrupt or truncated: {error}") from error
    if header.sequential and header.zeros.get(stream[header.scan + 6] & 15) not in _LONG_ZEROS:
        hole = stream.find(_HOLE, header.scan)
        if hole >= 0 and stream.find(_END, header.scan) > hole:
            raise ImageDecodeError("JPEG image is corrupt or truncated: a run of zeros where its data should be")
    return pixels[:, :, 0] if header.components == 1 else pixels


def import_simplejpeg():
    try:
        import simplejpeg
    except ImportError as error:
        raise ImportError("JPEG images need simplejpeg: pip install simplejpeg") from error
    return simplejpeg


def _read_jpeg_header(stream: bytes) -> _JpegHeader:
    """Reads segment by segment as libjpeg does, so that the first SOFn is the one that counts."""
    position, frame, restart_interval = 2, 0, 0
    zeros = {0: 0x01, 1: 0x00}  # by table, in the standard's
    for _ in range(_MAX_SEGMENTS):
        if stream[position : position + 1] != b"\xff":
            break
        position = _FILL.match(stream, position).end() - 1  # type: ignore[union-attr]
        if position + 4 > len(stream):
            break
        marker = stream[position + 1]
        length = int.from_bytes(stream[position + 2 : position + 4], "big")
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            position += 2
            continue
        if marker < 0xC0 or length < 2 or position + 2 + length > len(stream):
            break
        if marker == 0xDA:
            if not frame or length < 6:
                break
            return _jpeg_header(stream, frame, position, restart_interval, zeros)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables, reserved, arithmetic conditioning
            if frame or length < 8 or length < 8 + 3 * stream[position + 9]:
                break
            if marker > 0xC2:  # in arithmetic coding damage cannot be told from data
                raise ImageDecodeError(
                    f"JPEG image of a kind that is not read (SOF{marker - 0xC0}: lossless, hierarchical or arithmetic "
                    "coding). Let the camera send baseline or progressive JPEG"
                )
            frame = position
        elif marker == 0xC4:
            zeros |= _codes_of_zeros(stream[position + 4 : position + 2 + length])
        elif marker == 0xDD and length == 4:
            restart_interval = int.from_bytes(stream[position + 4 : position + 6], "big")
        position += 2 + length
    raise ImageDecodeError(f"JPEG image is corrupt or truncated: no image in its {len(stream)} bytes")


def _codes_of_zeros(tables: bytes) -> dict[int, int]:
    """Number of each Huffman table for coefficients in a DHT segment → what its first code, of zeros, stands for."""
    found, position = {}, 0
    while position + 17 < len(tables):
        kind, count = tables[position], sum(tables[position + 1 : position + 17])
        if kind >> 4 == 1:
            found[kind & 15] = tables[position + 17]
        position += 17 + count
    return found


def _jpeg_header(stream: bytes, frame: int, scan: int, restart_interval: int, zeros: dict[int, int]) -> _JpegHeader:
    height, width = (int.from_bytes(stream[frame + at : frame + at + 2], "big") for at in (5, 7))
    components = stream[frame + 9]
    sampling = [stream[frame + 11 + 3 * index] for index in range(components)]
    across, down = (max((value >> shift & 15 for value in sampling), default=1) for shift in (4, 0))
    return _JpegHeader(
        frame,
        scan,
        width,
        height,
        components,
        sequential=stream[frame + 1] in (0xC0, 0xC1) and stream[scan + 4] == components,
        mcu=(8, 8) if components == 1 else (8 * across, 8 * down),
        restart_interval=restart_interval,
        zeros=zeros,
    )


def _check_scans(stream: bytes, header: _JpegHeader) -> None:
    """ImageDecodeError unless a few scans bring all coefficients of all components, to the last bit, without a run of zeros.

    libjpeg takes what comes: without a scan an image lacks a color, or is blurred.
    """
    zeros = dict(header.zeros)
    ids = [stream[header.frame + 10 + 3 * index] for index in range(header.components)]
    lacking = {(component, coefficient) for component in ids for coefficient in range(64)}
    position, scans = header.scan, 0
    for _ in range(_MAX_SEGMENTS):
        marker = stream[position + 1 : position + 2]
        if marker in (b"", b"\xd9"):
            break
        end = position + 2
        if marker not in (b"\x01", b"\xff"):
            end += int.from_bytes(stream[end : end + 2], "big")
        if marker == b"\xc4":
            zeros |= _codes_of_zeros(stream[position + 4 : end])
        if marker == b"\xda":
            scans += 1
            if scans > MAX_SCANS:
                raise ImageDecodeError(
                    f"JPEG image has more than {MAX_SCANS} scans, which would take too long to decode"
                )
            start, end = end, found.start() if (found := _MARKER.search(stream, end)) else len(stream)
            lacking -= _check_scan(stream, position, start, end, zeros)
        position = end
    if lacking and scans:
        raise ImageDecodeError(f"JPEG image is corrupt or truncated: it ends after {scans} scans, which is too early")


def _check_scan(stream: bytes, position: int, start: int, end: int, zeros: dict[int, int]) -> set[tuple[int, int]]:
    """The coefficients that are complete after a scan: its header is at `position`, its data from `start` to `end`."""
    header = stream[position + 4 : start]
    if len(header) < 6 or len(header) < 4 + 2 * header[0]:
        raise ImageDecodeError("JPEG image is corrupt or truncated: the header of a scan is too short")
    first, last, bits = header[1 + 2 * header[0] : 4 + 2 * header[0]]
    # The first bits of coefficients beside the mean: zeros are codes. Further bits of them are stored as they are.
    coded = last > 0 and bits >> 4 == 0
    if coded and zeros.get(header[2] & 15, 0) & 15 and stream.find(_HOLE, start, end) >= 0:
        raise ImageDecodeError("JPEG image is corrupt or truncated: a run of zeros where its data should be")
    components = header[1 : 1 + 2 * header[0] : 2]
    return {(id_, index) for id_ in components for index in range(first, last + 1)} if bits & 15 == 0 else set()


def _without_stray_bytes(stream: bytes, header: _JpegHeader, error: ValueError) -> bytes:
    """The stream without stray bytes before its restart and end markers; ValueError if there is more to it.

    libjpeg reports only its last warning. So every part between two markers is decoded as a separate small JPEG, whose
    only warning then is what ails that part, and which must decode without one when the stray bytes are cut off.
    """
    warned = re.search("extraneous bytes before marker 0xd[0-79]", str(error))
    if not warned or not header.sequential or header.width * header.height > _MAX_REPAIRED:
        raise error
    start = header.scan + 2 + int.from_bytes(stream[header.scan + 2 : header.scan + 4], "big")
    end = stream.find(_END, start)
    across, down = (-(-size // unit) for size, unit in zip((header.width, header.height), header.mcu))
    units, interval = across * down, header.restart_interval or across * down
    count = -(-units // interval)
    if count == 1:
        return stream[:start] + _without_stray(stream[:start], stream[start:end]) + _END
    markers = [(match.start(), match[0][1]) for match in re.finditer(rb"\xff[\xd0-\xd7]", stream[start:end])]
    # A hole may take whole parts with it.
    in_order = [marker for _, marker in markers] == [0xD0 + index % 8 for index in range(count - 1)]
    wide = interval * header.mcu[0] > MAX_SIDE  # a part becomes one row
    if not in_order or wide or count > _MAX_RESTARTS or count * start > _MAX_HEADERS:
        raise error
    borders = [-2, *(at for at, _ in markers), end - start]
    cleaned = [stream[:start]]
    for index in range(count):
        width = min(interval, units - index * interval) * header.mcu[0]
        size = header.mcu[1].to_bytes(2, "big") + width.to_bytes(2, "big")
        head = stream[: header.frame + 5] + size + stream[header.frame + 9 : start]
        part = _without_stray(head, stream[start + borders[index] + 2 : start + borders[index + 1]])
        last = index == count - 1
        cleaned += [part, _END] if last else [_to_its_end(head, part), bytes((0xFF, 0xD0 + index % 8))]
    return b"".join(cleaned)


def _without_stray(head: bytes, data: bytes) -> bytes:
    """`data`, the coded part of a JPEG that begins with `head`, such that libjpeg finds nothing amiss; or ValueError."""
    decode_jpeg = import_simplejpeg().decode_jpeg
    try:
        decode_jpeg(head + data + _END)
        return data
    except ValueError as error:
        stray = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(error))
        if stray is None:
            raise
        if not any(data[-int(stray[1]) :]):
            # Padding, however long. All of it goes: zeros decode to something, so they could stand for what was lost.
            data = data.rstrip(b"\0")
            data += b"\0" if data.endswith(b"\xff") else b""
        elif int(stray[1]) <= MAX_STRAY_BYTES:
            data = data[: -int(stray[1])]
        else:
            raise
    decode_jpeg(head + data + _END)
    return data


def _to_its_end(head: bytes, data: bytes) -> bytes:
    """The same without what libjpeg read ahead and did not need: it does not warn of that before every marker."""
    for _ in range(MAX_STRAY_BYTES):
        try:
            import_simplejpeg().decode_jpeg(head + data[:-1] + _END)
        except ValueError:
            break
        data = data[:-1]
    return data


# PNG


def _decode_png(stream: bytes, max_pixels: int) -> np.ndarray:
    check_png(stream, max_pixels)
    cv2 = import_opencv()
    try:
        # UNCHANGED: 16-bit samples reach the same rounding as those of raw images.
        image = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageDecodeError(f"OpenCV cannot decode the PNG image: {error}") from error
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise ImageDecodeError(f"PNG image of {len(stream)} bytes is corrupt")
    return image if image.ndim == 2 else image[:, :, 2::-1]


def check_png(stream: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """ImageDecodeError unless every chunk up to the last (IEND) is there with the right checksum, within the bounds."""
    if stream[8:16] != b"\0\0\0\rIHDR" or len(stream) < 33:
        raise ImageDecodeError(f"PNG image is corrupt or truncated: no header in its {len(stream)} bytes")
    width, height = (int.from_bytes(stream[at : at + 4], "big") for at in (16, 20))
    check_size(width, height, max_pixels)
    position = 8
    view = memoryview(stream)
    for _ in range(_MAX_SEGMENTS + len(stream) // _CHUNK_BYTES):
        if position + 12 > len(stream):
            break
        length = int.from_bytes(stream[position : position + 4], "big")
        end = position + 12 + length
        if end > len(stream):
            break
        checksum = zlib.crc32(view[position + 4 : end - 4])
        if checksum != int.from_bytes(stream[end - 4 : end], "big"):
            raise ImageDecodeError(f"PNG image is corrupt: wrong checksum at byte {end - 4}")
        kind = stream[position + 4 : position + 8]
        if kind == b"IEND":
            return
        if kind == b"acTL":  # its frames may be parts of the image: readers differ in what they take for it
            raise ImageDecodeError("PNG image is an animation; a single image is needed")
        position = end
    raise ImageDecodeError(f"PNG image is truncated, or in too many parts: {len(stream)} bytes, and no end chunk")


def import_opencv():
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "such an image needs OpenCV: pip install opencv-python-headless, or apt install python3-opencv"
        ) from error
    return cv2
