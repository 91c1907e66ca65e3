"""JPEG and PNG: what real cameras send is decoded to OpenCV's pixels, what is damaged or too large is refused."""

import io
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from vla_perception.images import decode as images
from vla_perception.images.decode import compressed_to_rgb, image_to_rgb
from vla_perception.images.streams import ImageDecodeError

cv2 = pytest.importorskip("cv2")
simplejpeg = pytest.importorskip("simplejpeg")
from camera_images import (  # noqa: E402
    BOMBS,
    EOI,
    ODDITIES,
    SAMPLING,
    SOF0,
    SOF2,
    SOS,
    Compressed,
    RawImage,
    chunk,
    jpeg,
    photograph,
    png,
    with_size,
)


def coded(stream):
    """Where the coded data begins."""
    at = stream.index(bytes((0xFF, SOS)))
    return at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")


def decode(stream):
    return compressed_to_rgb(Compressed("jpeg", stream))


def opencv(stream):
    image = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_UNCHANGED)
    return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image[:, :, ::-1]


@pytest.mark.parametrize("size", [(240, 320), (239, 317), (8, 8), (1, 1), (1, 317)])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("progressive", [0, 1])
def test_the_pixels_are_opencvs_and_pillows(size, sampling, progressive):
    image = photograph(240, 320)[: size[0], : size[1]]
    stream = jpeg(image, sampling_factor=SAMPLING[sampling], progressive=progressive)
    assert np.array_equal(decode(stream), opencv(stream))
    image = pytest.importorskip("PIL.Image")
    assert np.array_equal(decode(stream), np.asarray(image.open(io.BytesIO(stream))))


@pytest.mark.parametrize("name", ODDITIES)
def test_oddities_of_real_cameras_are_decoded(name):
    stream = ODDITIES[name]()
    assert np.array_equal(decode(stream), opencv(stream))


@pytest.mark.parametrize("interval", [1, 7, 20, 40])
@pytest.mark.parametrize("sampling", ["420", "422", "444"])
@pytest.mark.parametrize("seed", range(3))
def test_stray_bytes_before_restart_markers_are_left_out(interval, sampling, seed):
    """Logitech's C270 and C910: "Corrupt JPEG data: 4 extraneous bytes before marker 0xd6", and the image is whole."""
    rng = np.random.default_rng(seed)
    whole = jpeg(photograph(118, 158), rst_interval=interval, sampling_factor=SAMPLING[sampling])
    stream = bytearray(whole)
    ends = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7\xd9]", whole) if match.start() > coded(whole)]
    for end in sorted(rng.choice(ends, min(len(ends), 1 + 20 * seed), replace=False), reverse=True):
        stream[end:end] = rng.integers(0, 255, rng.integers(1, 10), dtype=np.uint8).tobytes()
    assert np.array_equal(decode(bytes(stream)), opencv(whole))


def damaged(stream, kind, rng):
    begin, end = coded(stream), len(stream) - 2
    if kind == "an end too early":
        return stream[: rng.integers(begin + 1, end - 100)] + EOI
    if kind == "an end one byte too early":
        return stream[: end - 3] + EOI
    if kind == "zeros to the end":
        at = rng.integers(begin, end - 1000)
        return stream[:at] + bytes(end - at) + EOI
    if kind == "zeros in the middle":
        length = rng.integers(100, 3000)
        at = rng.integers(begin, end - length)
        return stream[:at] + bytes(length) + stream[at + length :]
    if kind == "no end":
        return stream[:end]
    if kind == "zeros for the end":
        return stream[:end] + bytes(2)
    length = (end - begin) // 3
    at = rng.integers(begin, end - length)
    hole = {"a third lost": b"", "a third other bytes": rng.integers(0, 255, length, dtype=np.uint8).tobytes()}[kind]
    return stream[:at] + hole + stream[at + length :]


@pytest.mark.parametrize(
    "options", [{}, {"rst_interval": 4}, {"rst_interval": 20}, {"progressive": 1}, {"quality": 30}]
)
@pytest.mark.parametrize(
    "kind",
    [
        "an end too early",
        "an end one byte too early",
        "zeros to the end",
        "no end",
        "zeros for the end",
        "a third lost",
        "a third other bytes",
        "zeros in the middle",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_jpeg_with_a_hole_is_refused(options, kind, seed):
    stream = jpeg(photograph(seed=seed), **options)
    with pytest.raises(ImageDecodeError, match="corrupt or truncated"):
        decode(damaged(stream, kind, np.random.default_rng(seed)))


@pytest.mark.parametrize("sampling", ["420", "422", "444"])
@pytest.mark.parametrize("options", [{}, {"optimize": 1}, {"progressive": 1}, {"rst_interval": 7}, {"quality": 1}])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_images_of_nothing_have_no_holes(sampling, options, level):
    """Their data may well be zeros."""
    flat = np.full((240, 320, 3), level, np.uint8)
    half = flat.copy()
    half[:120] = photograph()[:120]
    for image in (flat, half, flat[:, :, 0], half[:, :, 0]):
        factor = {"sampling_factor": SAMPLING[sampling]} if image.ndim == 3 else {}
        stream = jpeg(image, **factor, **options)
        assert np.array_equal(decode(stream), opencv(stream))


@pytest.mark.parametrize("lost", [1, 8, 9, 16])
def test_lost_restart_intervals_are_refused(lost):
    """Eight of them leave the markers' numbers in order."""
    stream = jpeg(rst_interval=5)
    borders = [m.start() for m in re.finditer(rb"\xff[\xd0-\xd7]", stream) if m.start() > coded(stream)]
    with pytest.raises(ImageDecodeError, match="corrupt or truncated"):
        decode(stream[: borders[10]] + stream[borders[10 + lost] :])
    # And where stray bytes would else have been taken.
    with pytest.raises(ImageDecodeError, match="corrupt or truncated"):
        decode(stream[: borders[10]] + stream[borders[10 + lost] : borders[40]] + b"\x12" * 9 + stream[borders[40] :])


@pytest.mark.parametrize("seed", range(60))
def test_damaged_headers_and_data_raise_nothing_else(seed):
    rng = np.random.default_rng(seed)
    kind = [{}, {"rst_interval": 4}, {"progressive": 1, "rst_interval": 2}][seed % 3]
    stream = bytearray(jpeg(photograph(40, 48), **kind))
    for position in rng.integers(2, len(stream) if seed % 2 else 700, 1 + seed // 4):
        stream[position] = rng.integers(256)
    if seed % 5 == 0:
        del stream[rng.integers(2, len(stream)) :]
    try:
        image = decode(bytes(stream))
        assert image.dtype == np.uint8 and image.ndim == 3
    except ImageDecodeError:
        pass


def segments(stream):
    """What stands before the first scan, and the scans, each with the tables before it."""
    starts = [match.start() for match in re.finditer(b"\xff\xda", stream)]
    begins = [starts[0]]
    for before, start in zip(starts, starts[1:]):
        tables = stream.find(b"\xff\xc4", before, start)
        begins.append(tables if tables >= 0 else start)
    return stream[: begins[0]], [stream[a:b] for a, b in zip(begins, [*begins[1:], len(stream) - 2])]


def a_scan_for_each_color(image):
    """A baseline JPEG that is not interleaved, as some encoders write it: (header, scans)."""
    planes = [jpeg(np.ascontiguousarray(plane)) for plane in cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2YCrCb))]
    head, _ = segments(planes[0])
    at = head.index(bytes((0xFF, SOF0)))
    ids = b"".join(bytes((number, 0x11, 0)) for number in (1, 3, 2))
    frame = b"\xff\xc0\0\x11" + head[at + 4 : at + 9] + b"\x03" + ids
    scans = [
        b"\xff\xda\0\x08\x01" + bytes((number, 0, 0, 63, 0)) + plane[coded(plane) : -2]
        for number, plane in zip((1, 3, 2), planes)
    ]
    return head[:at] + frame + head[at + 13 :], scans


@pytest.mark.parametrize("kept", range(1, 10))
def test_a_progressive_jpeg_that_lacks_its_last_scans_is_refused(kept):
    """It has an end, and libjpeg has nothing against it."""
    head, scans = segments(jpeg(progressive=1))
    assert len(scans) == 10 and simplejpeg.decode_jpeg(head + b"".join(scans[:kept]) + EOI) is not None
    with pytest.raises(ImageDecodeError, match=f"it ends after {kept} scans"):
        decode(head + b"".join(scans[:kept]) + EOI)


@pytest.mark.parametrize("lost", range(10))
def test_a_progressive_jpeg_without_one_scan_is_refused(lost):
    head, scans = segments(jpeg(progressive=1))
    with pytest.raises(ImageDecodeError, match="corrupt or truncated"):
        decode(head + b"".join(scans[:lost] + scans[lost + 1 :]) + EOI)


def test_colors_in_scans_of_their_own():
    head, scans = a_scan_for_each_color(photograph())
    whole = head + b"".join(scans) + EOI
    assert np.array_equal(decode(whole), opencv(whole))
    for lost in range(3):
        with pytest.raises(ImageDecodeError, match="it ends after 2 scans"):
            decode(head + b"".join(scans[:lost] + scans[lost + 1 :]) + EOI)
        middle = len(scans[lost]) // 2
        holed = [*scans]
        holed[lost] = scans[lost][:middle] + bytes(64) + scans[lost][middle + 64 :]
        with pytest.raises(ImageDecodeError, match="a run of zeros|Corrupt JPEG data"):
            decode(head + b"".join(holed) + EOI)


@pytest.mark.parametrize("marker", [0xC3, 0xC5, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCF])
def test_kinds_of_jpeg_that_no_camera_sends_are_refused(marker):
    """To an arithmetic decoder any bytes are data, so that a hole cannot be seen."""
    stream = jpeg()
    at = stream.index(bytes((0xFF, SOF0)))
    with pytest.raises(ImageDecodeError, match=f"SOF{marker - 0xC0}"):
        decode(stream[: at + 1] + bytes((marker,)) + stream[at + 2 :])


@pytest.mark.parametrize("options", [{}, {"progressive": 1}, {"rst_interval": 4}])
def test_what_follows_the_end_is_not_counted_as_scans(options):
    """A motion photo has a video there."""
    stream = jpeg(**options)
    video = np.random.default_rng(0).integers(0, 256, 4_000_000, dtype=np.uint8).tobytes() + b"\xff\xda" * 40
    assert np.array_equal(decode(stream + video), decode(stream))


@pytest.mark.parametrize("segment", [b"\xff\xe5\0\x02", b"\xff\xd0", b"\xff\x01", b"\xff\xfe\0\x03x"])
def test_headers_and_scans_of_many_segments_are_refused(segment):
    stream = jpeg(progressive=1)
    at = stream.index(bytes((0xFF, SOF2)))
    assert np.array_equal(decode(stream[:at] + segment * 1000 + stream[at:]), decode(stream))
    with pytest.raises(ImageDecodeError, match="no image in its"):
        decode(stream[:at] + segment * 5000 + stream[at:])


def test_fill_bytes_before_a_marker_are_one_step():
    stream = jpeg()
    assert np.array_equal(decode(stream[:2] + b"\xff" * 5_000_000 + stream[2:]), decode(stream))


# Bounds.


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("width, height", [(32000, 32000), (65500, 65500), (8001, 8000), (65500, 978)])
def test_images_beyond_the_bound_are_refused_unread(kind, width, height):
    message = BOMBS[kind](width, height)
    read = image_to_rgb if isinstance(message, RawImage) else decode
    with pytest.raises(ImageDecodeError, match=f"{width} x {height} pixels is larger than max_image_pixels"):
        read(message)


@pytest.mark.parametrize("kind", ["png", "raw mono8", "raw rgb8"])
@pytest.mark.parametrize("width, height", [(1, 65501), (65501, 1), (60_000_000, 1)])
def test_sides_beyond_what_jpeg_can_hold_are_refused(kind, width, height):
    message = BOMBS[kind](width, height)
    with pytest.raises(ImageDecodeError, match="no side may be longer than 65500"):
        (image_to_rgb if isinstance(message, RawImage) else decode)(message)


def test_the_bound_is_the_callers():
    image = photograph(60, 80)[:, :, ::-1]
    raw = RawImage(60, 80, "rgb8", image.tobytes())
    files = [Compressed("jpeg", jpeg(image)), Compressed("png", cv2.imencode(".png", image)[1].tobytes())]
    assert image_to_rgb(raw, 4800).shape == compressed_to_rgb(files[0], 4800).shape == (60, 80, 3)
    for read, message in ((image_to_rgb, raw), (compressed_to_rgb, files[0]), (compressed_to_rgb, files[1])):
        with pytest.raises(ImageDecodeError, match=r"larger than max_image_pixels allows \(4799\)"):
            read(message, 4799)


def test_messages_are_measured_before_they_are_kept():
    """Eight of each camera may wait for the other cameras' frames."""
    images.check_message_size(RawImage(60, 80, "rgba16", bytes(60 * 80 * 8), 0), 4800)
    images.check_message_size(Compressed("png", bytes(60 * 80 * 8 + 1000)), 4800)
    for width, height in ((81, 60), (65_501, 0), (0, 60), (65_501, 1)):
        with pytest.raises(ImageDecodeError):
            images.check_message_size(RawImage(height, width, "rgba16", b"", 0), 4800)
    for message in (RawImage(60, 80, "mono8", bytes(200_000), 0), Compressed("jpeg", bytes(200_000))):
        with pytest.raises(ImageDecodeError, match="a message of 200000 bytes"):
            images.check_message_size(message, 4800)


@pytest.mark.parametrize("scans", [33, 600])
def test_a_jpeg_of_too_many_scans_is_refused(scans):
    stream = with_size(jpeg(photograph(16, 16), progressive=1), 4000, 4000)
    scan = stream[stream.index(bytes((0xFF, SOS))) : -2]
    with pytest.raises(ImageDecodeError, match="more than 32 scans"):
        decode(stream[:-2] + scan * -(-scans // scan.count(bytes((0xFF, SOS)))) + EOI)


def test_refusing_a_bomb_takes_no_memory():
    """In a process that has little left: the image would be 3 GB."""
    code = (
        "import resource, sys\n"
        "from types import SimpleNamespace as M\n"
        "from vla_perception.images import decode as images\n"
        "images.warm_up()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))\n"
        "for line in sys.stdin:\n"
        "    try: images.compressed_to_rgb(M(format='x', data=bytes.fromhex(line)))\n"
        "    except images.ImageDecodeError as error: assert 'max_image_pixels' in str(error), error\n"
        "    else: raise SystemExit('taken')\n"
    )
    bombs = [BOMBS[kind](32000, 32000).hex() for kind in BOMBS if not kind.startswith("raw")]
    done = subprocess.run([sys.executable, "-c", code], input="\n".join(bombs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sixteen_bits_are_narrowed_in_pieces():
    levels = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(images.narrow(levels), (levels.astype(int) + 128) // 257)
    for shape in ((3000, 200), (1, 700_000), (700_000, 1), (400, 500, 3), (2, 70_000, 4)):
        samples = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
        expected = np.floor(samples.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)
        assert np.array_equal(images.narrow(samples), expected)


def test_a_png_that_lacks_data_is_refused():
    """All checksums right, and yet not enough in it."""
    rows = b"".join(b"\0" + row.tobytes() for row in photograph(60, 80))
    assert decode(png(80, 60, rows=rows)).shape == (60, 80, 3)
    for short in (rows[:-1], rows[: len(rows) // 2], b""):
        with pytest.raises(ImageDecodeError):
            decode(png(80, 60, rows=short))
    for cut in (8, 12, 20, 33, 40):
        with pytest.raises(ImageDecodeError):
            decode(png(80, 60, rows=rows)[:cut])


@pytest.mark.parametrize("part", [chunk(b"tEXt", b"k\0v"), chunk(b"prIv", b""), chunk(b"IDAT", b"")])
def test_a_png_of_many_parts_is_refused(part):
    rows = b"".join(b"\0" + row.tobytes() for row in photograph(60, 80))
    stream = png(80, 60, rows=rows)
    assert np.array_equal(decode(stream[:33] + part * 500 + stream[33:]), decode(stream))
    with pytest.raises(ImageDecodeError, match="in too many parts"):
        decode(stream[:33] + part * 6000 + stream[33:])


@pytest.mark.parametrize("place", ["the whole image", "a part of it", "none"])
def test_an_animated_png_is_refused(place):
    """OpenCV shows the first frame, which may be a part of the image, and the standard the image."""
    rows = b"".join(b"\0" + row.tobytes() for row in photograph(60, 80))
    stream = png(80, 60, rows=rows)
    size = {"the whole image": (80, 60, 0, 0), "a part of it": (8, 8, 5, 5)}.get(place)
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, *size, 1, 10, 0, 0)) if size else b""
    with pytest.raises(ImageDecodeError, match="animation"):
        decode(stream[:33] + chunk(b"acTL", struct.pack(">II", 1, 0)) + frame + stream[33:])


DEPTH_FORMATS = (
    "16UC1; compressedDepth",
    "16uc1; compresseddepth png",
    "32FC1; CompressedDepth rvl",
    "16uc1; png compressed",
    "16UC1,png",
    "png; 16UC1",
    "64FC1; png compressed",
    "16SC1; png compressed ",
    "32SC1; png",
    "depth16; png",
    "depth; png compressed",
    " 16UC1 png compressed",
    "png depth",
    "rvl",
)


@pytest.mark.parametrize("form", DEPTH_FORMATS)
def test_formats_that_name_depth_are_refused(form):
    stream = cv2.imencode(".png", mosaic("rggb", np.uint16))[1].tobytes()
    with pytest.raises(ImageDecodeError, match="depth or measurement image"):
        compressed_to_rgb(Compressed(form, stream))


@pytest.mark.parametrize(
    "form", ["mono16; png compressed ", "mono16; png compressed 16UC1", "8UC1; png compressed ", "png", ""]
)
def test_formats_of_grey_images(form):
    samples = mosaic("rggb", np.uint16)
    got = compressed_to_rgb(Compressed(form, cv2.imencode(".png", samples)[1].tobytes()))
    assert np.array_equal(got[:, :, 0], images.narrow(samples))


# Bayer mosaics.


def mosaic(pattern, dtype=np.uint8, height=48, width=64):
    image = photograph(height, width)[:, :, ::-1].astype(dtype) * (257 if dtype == np.uint16 else 1)
    samples = np.empty((height, width), dtype)
    for index, channel in enumerate(pattern):
        rows, columns = slice(index // 2, None, 2), slice(index % 2, None, 2)
        samples[rows, columns] = image[rows, columns, "rgb".index(channel)]
    return samples


def from_raw(samples, pattern):
    height, width = samples.shape
    return image_to_rgb(RawImage(height, width, f"bayer_{pattern}{8 * samples.itemsize}", samples.tobytes()))


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("form", ["; png compressed ", "; png compressed bayer", ";png", "", " ; PNG compressed"])
def test_a_compressed_mosaic_gets_the_colors_of_the_raw_one(pattern, dtype, form):
    samples = mosaic(pattern, dtype)
    stream = cv2.imencode(".png", samples)[1].tobytes()
    got = compressed_to_rgb(Compressed(f"bayer_{pattern}{8 * samples.itemsize}{form}", stream))
    assert np.array_equal(got, from_raw(samples, pattern))


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_mosaic_as_jpeg_is_one_of_8_bits(pattern, bits):
    stream = jpeg(mosaic(pattern), quality=90)
    got = compressed_to_rgb(Compressed(f"bayer_{pattern}{bits}; jpeg compressed ", stream))
    assert np.array_equal(got, from_raw(opencv(stream)[:, :, 0], pattern))
    grey_in_color = cv2.imencode(".png", np.repeat(mosaic(pattern)[:, :, None], 3, axis=2))[1].tobytes()
    got = compressed_to_rgb(Compressed(f"bayer_{pattern}{bits}; png compressed bgr8", grey_in_color))
    assert np.array_equal(got, from_raw(mosaic(pattern), pattern))


def test_what_the_camera_has_debayered_stays_as_it_is():
    stream = jpeg()
    assert np.array_equal(compressed_to_rgb(Compressed("bayer_rggb8; jpeg compressed bgr8", stream)), opencv(stream))


@pytest.mark.parametrize(
    "kind",
    [
        "bayer; png compressed",
        "png compressed bayer",
        "bayer_xxxx8; jpeg compressed ",
        "BayerRG8; png compressed",
        "rggb8; png compressed",
        "RGGB; png",
        "png; grbg",
    ],
)
def test_a_mosaic_of_an_unknown_pattern_is_refused(kind):
    stream = cv2.imencode(".png", mosaic("rggb"))[1].tobytes()
    with pytest.raises(ImageDecodeError, match="does not say which"):
        compressed_to_rgb(Compressed(kind, stream))


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\0", "\u202e", "\x9b31m"])
def test_what_a_message_says_of_itself_is_printable_in_errors(text):
    for read, message in (
        (image_to_rgb, RawImage(4, 4, text, bytes(16))),
        (image_to_rgb, RawImage(4, 4, f"32FC1{text}", bytes(64))),
        (compressed_to_rgb, Compressed(text, b"neither")),
        (compressed_to_rgb, Compressed(f"bayer{text}", cv2.imencode(".png", mosaic("rggb"))[1].tobytes())),
    ):
        with pytest.raises(ImageDecodeError) as caught:
            read(message)
        assert str(caught.value).isprintable()


def test_without_simplejpeg_a_jpeg_says_what_to_install():
    code = (
        "import sys; sys.modules['simplejpeg'] = None\n"
        "from vla_perception.images import decode as images\nfrom vla_perception.images import streams\n"
        "for call in (images.warm_up, lambda: streams.decode(b'\\xff\\xd8')):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("JPEG images need simplejpeg: pip install simplejpeg") == 2
