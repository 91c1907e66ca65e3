"""Image decoding, every encoding against a conversion written out by hand here."""

import io
import subprocess
import sys

import numpy as np
import pytest

from vla_perception.images import decode as images
from vla_perception.images.decode import ENCODINGS, ImageDecodeError, compressed_to_rgb, image_to_rgb

cv2 = pytest.importorskip("cv2")
from camera_images import Compressed, RawImage  # noqa: E402

HEIGHT, WIDTH = 24, 32


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def smooth(height=HEIGHT, width=WIDTH):
    """uint8 [height, width, 3] with gentle gradients, other in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    x, y = x / width, y / height
    return np.stack([40 + 150 * x + 40 * y, 220 - 90 * x - 80 * y, 60 + 120 * y + 30 * x], axis=2).astype(np.uint8)


def message(pixels, encoding, *, padding=0, big_endian=False, last_padding=True):
    """A RawImage of interleaved samples [h, w] or [h, w, c], with `padding` bytes of garbage after each row."""
    height, width = pixels.shape[:2]
    stored = pixels.astype(pixels.dtype.newbyteorder(">" if big_endian else "<"))
    rows = np.frombuffer(stored.tobytes(), np.uint8).reshape(height, -1)
    rows = np.concatenate([rows, noise(height, padding, seed=9)], axis=1)
    data = rows.tobytes()
    if padding and not last_padding:
        data = data[:-padding]
    return RawImage(height, width, encoding, data, rows.shape[1] if padding else 0, int(big_endian))


def by_257(samples):
    """16 to 8 bits, full range to full range."""
    return np.floor(samples.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)


def bt601(y, u, v):
    """float64 RGB [.., 3] of limited-range BT.601, unclipped constants of the standard."""
    y, u, v = (np.asarray(plane, np.float64) for plane in (y, u, v))
    luma = 255 / 219 * (y - 16)
    red = luma + 255 / 224 * 1.402 * (v - 128)
    green = luma - 255 / 224 * (0.344136 * (u - 128) + 0.714136 * (v - 128))
    blue = luma + 255 / 224 * 1.772 * (u - 128)
    return np.clip(np.stack([red, green, blue], axis=-1), 0, 255)


def assert_close(got, expected, tolerance):
    assert got.dtype == np.uint8 and got.shape == expected.shape
    assert np.abs(got.astype(np.float64) - expected).max() <= tolerance


padded = pytest.mark.parametrize("padding", [0, 7, 40])


# Interleaved 8-bit pixels.


@padded
@pytest.mark.parametrize(
    "encoding, channels, order",
    [
        ("rgb8", 3, [0, 1, 2]),
        ("bgr8", 3, [2, 1, 0]),
        ("8UC3", 3, [2, 1, 0]),
        ("rgba8", 4, [0, 1, 2]),
        ("bgra8", 4, [2, 1, 0]),
        ("8UC4", 4, [2, 1, 0]),
    ],
)
def test_eight_bit_color(encoding, channels, order, padding):
    pixels = noise(HEIGHT, WIDTH, channels)
    assert_close(image_to_rgb(message(pixels, encoding, padding=padding)), pixels[:, :, order], 0)


@padded
@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_mono(encoding, padding):
    pixels = noise(HEIGHT, WIDTH)
    expected = np.stack([pixels] * 3, axis=2)
    assert_close(image_to_rgb(message(pixels, encoding, padding=padding)), expected, 0)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "8UC3"])
def test_eight_bit_pixels_are_views(encoding):
    shape = (HEIGHT, WIDTH) if encoding == "mono8" else (HEIGHT, WIDTH, 4 if "a" in encoding else 3)
    source = message(noise(*shape), encoding, padding=3)
    source.data = bytearray(source.data)
    assert np.shares_memory(image_to_rgb(source), np.frombuffer(source.data, np.uint8))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, list, lambda b: np.frombuffer(b, np.uint8)])
def test_data_may_be_any_sequence_of_bytes(wrap):
    pixels = noise(4, 5, 3)
    source = message(pixels, "rgb8")
    source.data = wrap(source.data)
    assert_close(image_to_rgb(source), pixels, 0)


def test_last_row_may_lack_its_padding():
    pixels = noise(HEIGHT, WIDTH, 3)
    assert_close(image_to_rgb(message(pixels, "rgb8", padding=8, last_padding=False)), pixels, 0)


def test_one_pixel():
    assert image_to_rgb(RawImage(1, 1, "bgr8", b"\x01\x02\x03", 3)).tolist() == [[[3, 2, 1]]]


# 16 bits.


@padded
@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(
    "encoding, channels, order",
    [
        ("mono16", 1, [0, 0, 0]),
        ("rgb16", 3, [0, 1, 2]),
        ("bgr16", 3, [2, 1, 0]),
        ("16UC3", 3, [2, 1, 0]),
        ("rgba16", 4, [0, 1, 2]),
        ("bgra16", 4, [2, 1, 0]),
        ("16UC4", 4, [2, 1, 0]),
    ],
)
def test_sixteen_bit(encoding, channels, order, padding, big_endian):
    pixels = noise(HEIGHT, WIDTH, channels, dtype=np.uint16)
    got = image_to_rgb(message(pixels, encoding, padding=padding, big_endian=big_endian))
    assert_close(got, by_257(pixels[:, :, order]), 0)


def test_every_sixteen_bit_value_is_rounded_to_the_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert_close(image_to_rgb(message(values, "mono16"))[:, :, 0], by_257(values), 0)


# Bayer.


def mosaic(image, pattern):
    """[h, w] of [h, w, 3]: of each pixel the one channel that the color filter `pattern` lets through."""
    result = np.empty(image.shape[:2], image.dtype)
    for index, letter in enumerate(pattern):
        row, column = divmod(index, 2)
        result[row::2, column::2] = image[row::2, column::2, "rgb".index(letter)]
    return result


PATTERNS = ["rggb", "bggr", "gbrg", "grbg"]


@padded
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bayer_flat_color_is_exact(pattern, padding):
    flat = np.full((HEIGHT, WIDTH, 3), (200, 90, 30), np.uint8)
    assert_close(image_to_rgb(message(mosaic(flat, pattern), f"bayer_{pattern}8", padding=padding)), flat, 0)


def bilinear_demosaic(raw, pattern):
    """float64 [h, w, 3]: every missing sample the mean of its nearest neighbours (inner pixels only are right)."""
    kernel = {"g": [[0, 1, 0], [1, 4, 1], [0, 1, 0]]}
    kernel["r"] = kernel["b"] = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    raw = raw.astype(np.float64)
    planes = []
    for letter in "rgb":
        mask = np.zeros_like(raw)
        for index in (i for i, filtered in enumerate(pattern) if filtered == letter):
            mask[index // 2 :: 2, index % 2 :: 2] = 1
        total = np.zeros_like(raw)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                total += kernel[letter][dy + 1][dx + 1] / 4 * np.roll(raw * mask, (dy, dx), axis=(0, 1))
        planes.append(total)
    return np.stack(planes, axis=2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bayer_is_bilinear(pattern):
    raw = noise(HEIGHT, WIDTH)
    got = image_to_rgb(message(raw, f"bayer_{pattern}8"))
    assert_close(got[1:-1, 1:-1], bilinear_demosaic(raw, pattern)[1:-1, 1:-1], 0.51)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bayer_sixteen_bit(pattern, big_endian):
    raw = noise(HEIGHT, WIDTH, dtype=np.uint16)
    got = image_to_rgb(message(raw, f"bayer_{pattern}16", padding=6, big_endian=big_endian))
    expected = bilinear_demosaic(raw, pattern)[1:-1, 1:-1] * 255 / 65535
    assert_close(got[1:-1, 1:-1], expected, 0.51)


def test_bayer_of_a_few_pixels_is_refused():
    with pytest.raises(ImageDecodeError, match="too small"):
        image_to_rgb(message(noise(2, 2), "bayer_rggb8"))


# YUV.


def chroma_planes(height, width, divide_y, divide_x):
    """Y [h, w] and U, V at their own resolution, and U, V at the image's resolution. Noise within the legal range."""
    y = np.clip(noise(height, width, seed=1), 16, 235)
    u, v = (np.clip(noise(height // divide_y, width // divide_x, seed=s), 16, 240) for s in (2, 3))
    full = [plane.repeat(divide_y, axis=0).repeat(divide_x, axis=1) for plane in (u, v)]
    return y, u, v, bt601(y, *full)


@padded
@pytest.mark.parametrize("encoding", ["uyvy", "yuv422", "yuyv", "yuv422_yuy2"])
def test_packed_422(encoding, padding):
    y, u, v, expected = chroma_planes(HEIGHT, WIDTH, 1, 2)
    chroma = np.stack([u, v], axis=2).reshape(HEIGHT, WIDTH)
    luma_first = encoding in ("yuyv", "yuv422_yuy2")
    pixels = np.stack([y, chroma] if luma_first else [chroma, y], axis=2)
    assert_close(image_to_rgb(message(pixels, encoding, padding=padding)), expected, 2)


def pad_rows(plane, step):
    rows = plane.reshape(len(plane), -1)
    return np.concatenate([rows, noise(len(rows), step - rows.shape[1], seed=7)], axis=1).tobytes()


@pytest.mark.parametrize("padding", [0, 8, 40])
@pytest.mark.parametrize(
    "encoding, divide_y, divide_x",
    [("nv12", 2, 2), ("nv21", 2, 2), ("nv16", 1, 2), ("nv24", 1, 1), ("i420", 2, 2), ("yuv420", 2, 2)],
)
def test_planar(encoding, divide_y, divide_x, padding):
    y, u, v, expected = chroma_planes(HEIGHT, WIDTH, divide_y, divide_x)
    step = WIDTH + padding
    if encoding in ("i420", "yuv420"):
        data = pad_rows(y, step) + pad_rows(u, step // 2) + pad_rows(v, step // 2)
    else:
        pair = np.stack([v, u] if encoding == "nv21" else [u, v], axis=2)
        data = pad_rows(y, step) + pad_rows(pair, step * 2 // divide_x)
    got = image_to_rgb(RawImage(HEIGHT, WIDTH, encoding, data, step if padding else 0))
    assert_close(got, expected, 2)
    with pytest.raises(ImageDecodeError, match="truncated"):
        image_to_rgb(RawImage(HEIGHT, WIDTH, encoding, data[: -2 * padding - 1], step if padding else 0))


@pytest.mark.parametrize("encoding", ["yuyv", "nv12", "nv16", "i420"])
def test_odd_sizes_of_shared_chroma_are_refused(encoding):
    with pytest.raises(ImageDecodeError, match="even width"):
        image_to_rgb(RawImage(4, 5, encoding, bytes(100)))


# Bad input.


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_truncated_data_is_refused(encoding):
    for data in (b"", b"\0", bytes(HEIGHT * WIDTH - 1)):
        with pytest.raises(ImageDecodeError, match="truncated"):
            image_to_rgb(RawImage(HEIGHT, WIDTH, encoding, data))


@pytest.mark.parametrize("height, width", [(0, 4), (4, 0), (0, 0)])
def test_empty_sizes_are_refused(height, width):
    with pytest.raises(ImageDecodeError, match="empty"):
        image_to_rgb(RawImage(height, width, "rgb8", bytes(48), 12))


@pytest.mark.parametrize(
    "step, why", [(95, "step is 95"), (1, "step is 1"), (97, "truncated"), (2**32 - 1, "truncated")]
)
def test_step_that_does_not_fit_is_refused(step, why):
    with pytest.raises(ImageDecodeError, match=why):
        image_to_rgb(RawImage(HEIGHT, WIDTH, "rgb8", bytes(HEIGHT * WIDTH * 3), step))


def test_step_beyond_the_data_is_refused_for_one_row_too():
    with pytest.raises(ImageDecodeError, match="truncated"):
        image_to_rgb(RawImage(1, 4, "rgb8", bytes(12), 4_000_000))


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1", "64FC1", "32SC1", "8UC2", "8SC3", "16SC1"])
def test_measurements_are_refused_with_advice(encoding):
    with pytest.raises(ImageDecodeError, match="color topic"):
        image_to_rgb(RawImage(4, 4, encoding, bytes(256)))


@pytest.mark.parametrize("encoding", ["", "rgb9", "RGB8"])
def test_unknown_encodings_are_refused_with_the_known_ones(encoding):
    with pytest.raises(ImageDecodeError, match="Check the camera driver|rgb8, rgba8"):
        image_to_rgb(RawImage(4, 4, encoding, bytes(256)))


# cv_bridge.


@pytest.mark.parametrize("encoding", sorted(images.CV_BRIDGE_ENCODINGS))
def test_opencv_agrees_with_cv_bridge(encoding):
    convert = images._cv_bridge()
    if convert is None:
        pytest.skip("no cv_bridge that works with this NumPy (it comes with a ROS 2 distribution, not from PyPI)")
    dtype = np.uint16 if encoding.endswith("16") else np.uint8
    channels = {"rgb": (3,), "bgr": (3,), "rgba": (4,), "bgra": (4,), "uyvy": (2,), "yuyv": (2,)}
    pixels = noise(HEIGHT, WIDTH, *channels.get(encoding.removesuffix("16"), ()), dtype=dtype)
    converted = convert(pixels, encoding)
    if converted is None:
        pytest.skip(f"this cv_bridge knows no {encoding}")
    assert_close(converted, images.opencv_to_rgb(pixels, encoding), 1)


FAKE_MODULE = """
import numpy as np
def cvtColor2(pixels, source, target):
    assert target == "rgb8"
    if source == "mono16":
        return np.full((*pixels.shape, 3), 77, np.uint8)
    return (pixels[:, :, ::-1] // 257).astype(np.uint8)
"""


@pytest.fixture
def fake_cv_bridge(tmp_path, monkeypatch):
    """A package of cv_bridge's shape. Returns a function that gives its compiled part some contents."""
    boost = tmp_path / "cv_bridge" / "boost"
    boost.mkdir(parents=True)
    (tmp_path / "cv_bridge" / "__init__.py").write_text("")
    (boost / "__init__.py").write_text("")
    (boost / "cv_bridge_boost.py").write_text(FAKE_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def contents(data):
        (boost / "cv_bridge_boost.so.1").unlink(missing_ok=True)
        (boost / "cv_bridge_boost.cpython-00.so").write_bytes(data)

    images._cv_bridge.cache_clear()
    yield contents
    images._cv_bridge.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "cv_bridge"]:
        del sys.modules[name]


@pytest.mark.skipif(images.cv_bridge_is_loadable(), reason="a real cv_bridge is installed")
def test_a_cv_bridge_built_for_numpy_1_is_not_imported_under_numpy_2(fake_cv_bridge, monkeypatch):
    fake_cv_bridge(b"..numpy.core._multiarray_umath..")
    monkeypatch.setattr(np, "__version__", "2.1.0")
    assert images._cv_bridge() is None
    assert "cv_bridge" not in sys.modules
    monkeypatch.setattr(np, "__version__", "1.26.4")
    assert images.cv_bridge_is_loadable()
    fake_cv_bridge(b"..numpy._core._multiarray_umath..")
    monkeypatch.setattr(np, "__version__", "2.1.0")
    assert images.cv_bridge_is_loadable()


@pytest.mark.skipif(images.cv_bridge_is_loadable(), reason="a real cv_bridge is installed")
def test_cv_bridge_does_the_conversion_where_it_works(fake_cv_bridge):
    fake_cv_bridge(b"..numpy._core._multiarray_umath..")
    assert (image_to_rgb(message(noise(4, 4, dtype=np.uint16), "mono16")) == 77).all()


def test_without_opencv_eight_bit_color_still_works():
    code = (
        "import sys; sys.modules['cv2'] = sys.modules['cv_bridge'] = None\n"
        "from types import SimpleNamespace as M\n"
        "from vla_perception.images.decode import image_to_rgb\n"
        "image = dict(height=2, width=2, step=0, is_bigendian=0)\n"
        "assert image_to_rgb(M(encoding='bgr8', data=bytes(12), **image)).shape == (2, 2, 3)\n"
        "try: image_to_rgb(M(encoding='mono16', data=bytes(8), **image))\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "opencv-python-headless" in done.stdout


def test_after_the_warm_up_no_image_has_to_load_anything():
    code = (
        "import sys, io, PIL.Image\n"
        "from types import SimpleNamespace as M\n"
        "from vla_perception.images import decode as images\n"
        "jpeg = io.BytesIO(); PIL.Image.new('RGB', (4, 4)).save(jpeg, 'jpeg')\n"
        "images.warm_up()\n"
        "before = set(sys.modules)\n"
        "images.compressed_to_rgb(M(format='jpeg', data=jpeg.getvalue()))\n"
        "for encoding in images.ENCODINGS:\n"
        "    images.image_to_rgb(M(encoding=encoding, height=4, width=4, step=0, is_bigendian=0, data=bytes(256)))\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Compressed images.


def encoded(extension, image, *options):
    """Bytes of an RGB(A) or grey image."""
    if image.ndim == 3:
        image = image[:, :, [2, 1, 0, 3][: image.shape[2]]]
    return cv2.imencode(extension, image, list(options))[1].tobytes()


def pillow_rgb(stream):
    """An independent decoder."""
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(stream)).convert("RGB"))


@pytest.mark.parametrize("kind", ["jpeg", "jpg", "rgb8; jpeg compressed bgr8", "bgr8; jpeg compressed bgr8", ""])
def test_jpeg(kind):
    image = smooth(60, 80)
    stream = encoded(".jpg", image, cv2.IMWRITE_JPEG_QUALITY, 98)
    got = compressed_to_rgb(Compressed(kind, stream))
    assert_close(got, image.astype(float), 6)
    assert_close(got, pillow_rgb(stream).astype(float), 2)


def test_grey_jpeg():
    image = smooth()[:, :, 0]
    got = compressed_to_rgb(Compressed("mono8; jpeg compressed mono8", encoded(".jpg", image)))
    assert_close(got, np.stack([image] * 3, axis=2).astype(float), 6)


def test_progressive_jpeg():
    image = smooth(60, 80)
    stream = encoded(".jpg", image, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert_close(compressed_to_rgb(Compressed("jpeg", stream)), image.astype(float), 8)


def test_exif_orientation_is_left_to_the_reader():
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    stream = io.BytesIO()
    image.fromarray(smooth(40, 64)).save(stream, "JPEG", exif=exif)
    assert compressed_to_rgb(Compressed("jpeg", stream.getvalue())).shape == (40, 64, 3)


@pytest.mark.parametrize("channels", [3, 4])
def test_png_is_exact_and_drops_alpha(channels):
    image = noise(HEIGHT, WIDTH, channels)
    got = compressed_to_rgb(Compressed("rgb8; png compressed bgr8", encoded(".png", image)))
    assert_close(got, image[:, :, :3], 0)


def test_grey_and_palette_png():
    grey = noise(HEIGHT, WIDTH)
    assert_close(compressed_to_rgb(Compressed("png", encoded(".png", grey))), np.stack([grey] * 3, axis=2), 0)
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.fromarray(smooth()).quantize(16).save(stream, "PNG")
    assert_close(compressed_to_rgb(Compressed("png", stream.getvalue())), pillow_rgb(stream.getvalue()), 0)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH, 4)])
def test_sixteen_bit_png(shape):
    image = noise(*shape, dtype=np.uint16)
    expected = by_257(image)
    expected = np.stack([expected] * 3, axis=2) if expected.ndim == 2 else expected[:, :, :3]
    assert_close(compressed_to_rgb(Compressed("mono16; png compressed mono16", encoded(".png", image))), expected, 0)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.99, -1, -2])
def test_truncated_streams_are_refused(extension, keep):
    stream = encoded(extension, noise(120, 160, 3))
    cut = stream[: int(len(stream) * keep) if keep > 0 else keep]
    with pytest.raises(ImageDecodeError):
        compressed_to_rgb(Compressed("jpeg", cut))


def test_truncated_jpeg_with_a_thumbnail_is_refused():
    whole, thumbnail = encoded(".jpg", smooth(60, 80)), encoded(".jpg", smooth(8, 8))
    header = b"Exif\0\0" + thumbnail
    stream = whole[:2] + b"\xff\xe1" + (len(header) + 2).to_bytes(2, "big") + header + whole[2:]
    assert compressed_to_rgb(Compressed("jpeg", stream)).shape == (60, 80, 3)
    with pytest.raises(ImageDecodeError, match="truncated"):
        compressed_to_rgb(Compressed("jpeg", stream[:-100]))


def test_bytes_after_the_end_marker_do_no_harm():
    stream = encoded(".jpg", smooth(60, 80))
    assert compressed_to_rgb(Compressed("jpeg", stream + bytes(13))).shape == (60, 80, 3)


def test_corrupt_streams_are_refused():
    png = bytearray(encoded(".png", noise(60, 80, 3)))
    png[len(png) // 2] ^= 0xFF
    with pytest.raises(ImageDecodeError, match="checksum"):
        compressed_to_rgb(Compressed("png", bytes(png)))
    jpeg = bytearray(encoded(".jpg", noise(60, 80, 3)))
    jpeg[20:160] = noise(140).tobytes()
    with pytest.raises(ImageDecodeError):
        compressed_to_rgb(Compressed("jpeg", bytes(jpeg)))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_never_raise_anything_else(seed):
    rng = np.random.default_rng(seed)
    stream = bytearray(encoded(".jpg" if seed % 2 else ".png", noise(40, 40, 3)))
    for position in rng.integers(0, len(stream), 1 + seed):
        stream[position] = rng.integers(256)
    try:
        image = compressed_to_rgb(Compressed("jpeg", bytes(stream)))
        assert image.dtype == np.uint8 and image.ndim == 3
    except ImageDecodeError:
        pass


@pytest.mark.parametrize(
    "kind, data, why",
    [
        ("16UC1; compressedDepth png", b"x" * 40, "color topic"),
        ("32FC1; compressedDepth rvl", b"x" * 40, "color topic"),
        ("16UC1; png compressed ", b"x" * 40, "color topic"),
        ("jpeg", b"", "empty"),
        ("jpeg", b"\xff\xd8", "corrupt"),
        ("h264", b"\0\0\0\1gabcdef", "neither JPEG nor PNG"),
        ("safetensors; vla_tokens/1", b"x" * 40, "neither JPEG nor PNG"),
    ],
)
def test_what_is_no_image_is_refused(kind, data, why):
    with pytest.raises(ImageDecodeError, match=why):
        compressed_to_rgb(Compressed(kind, data))


@pytest.mark.ros
def test_ros_messages():
    sensor_msgs = pytest.importorskip("sensor_msgs.msg")
    image = noise(HEIGHT, WIDTH, 3)
    raw = sensor_msgs.Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=WIDTH * 3, is_bigendian=0)
    raw.data.frombytes(image.tobytes())
    assert_close(image_to_rgb(raw), image, 0)
    compressed = sensor_msgs.CompressedImage(format="rgb8; png compressed bgr8")
    compressed.data.frombytes(encoded(".png", image))
    assert_close(compressed_to_rgb(compressed), image, 0)
    with pytest.raises(ImageDecodeError, match="empty"):
        compressed_to_rgb(sensor_msgs.CompressedImage(format="jpeg"))
