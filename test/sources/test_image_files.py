"""Files of images: every format whole or not at all, and bounded before it is decoded."""

import io
import os
import struct

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("simplejpeg")
from camera_images import BOMBS, ODDITIES, photograph  # noqa: E402

from vla_perception.sources import image_files  # noqa: E402

IMAGE = photograph(120, 160)


def saved(image, format, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format, **options)
    return stream.getvalue()


WHOLE = {
    "JPEG": lambda: saved(IMAGE, "JPEG"),
    "progressive JPEG": lambda: saved(IMAGE, "JPEG", progressive=True),
    "MPO": lambda: saved(IMAGE, "MPO", save_all=True, append_images=[Image.fromarray(IMAGE)]),
    "PNG": lambda: saved(IMAGE, "PNG"),
    "grey PNG of 16 bits": lambda: saved(IMAGE[:, :, 0].astype(np.uint16) * 257, "PNG"),
    "BMP": lambda: saved(IMAGE, "BMP"),
    "GIF": lambda: saved(IMAGE[:, :, 0], "GIF"),
    "PPM": lambda: saved(IMAGE, "PPM"),
    "TIFF": lambda: saved(IMAGE, "TIFF"),
    "TIFF, deflate": lambda: saved(IMAGE, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, LZW": lambda: saved(IMAGE, "TIFF", compression="tiff_lzw"),
    "WebP": lambda: saved(IMAGE, "WEBP"),
    "WebP, lossless": lambda: saved(IMAGE, "WEBP", lossless=True),
}


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "image"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_are_read_as_pillow_reads_them(file, kind):
    path = file(WHOLE[kind]())
    image_files.check(path)
    got = image_files.read(path)
    with Image.open(path) as image:
        grey = np.asarray(image) // 257 if image.mode.startswith("I") else None
        expected = np.asarray(image.convert("RGB")) if grey is None else np.stack([grey] * 3, axis=2)
    assert got.dtype == np.uint8 and np.array_equal(got, expected)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("keep", [0.4, 0.7, 0.95, 0.0, -1])
def test_truncated_files_are_refused_or_whole_all_the_same(file, kind, keep):
    data = WHOLE[kind]()
    whole = image_files.read(file(data))
    path = file(data[: int(len(data) * keep) if keep >= 0 else keep])
    try:
        got = image_files.read(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert np.array_equal(got, whole)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("keep", [0.4, 0.7, 0.95])
def test_a_jpeg_with_a_hole_is_refused(file, keep, progressive):
    data = saved(IMAGE, "JPEG", progressive=progressive)
    with pytest.raises(ValueError, match="corrupt or truncated"):
        image_files.read(file(data[: int(len(data) * keep)] + b"\xff\xd9"))


@pytest.mark.parametrize("name", ODDITIES)
def test_oddities_of_cameras_are_read(file, name):
    data = ODDITIES[name]()
    assert image_files.read(file(data)).shape == (240, 320, 3)


@pytest.mark.parametrize("kind", WHOLE)
def test_the_bound_holds_for_every_format(file, kind):
    path = file(WHOLE[kind]())
    assert image_files.read(path, 120 * 160).shape == (120, 160, 3)
    for refuse in (image_files.check, image_files.read):
        with pytest.raises(ValueError, match=r"160 x 120 pixels is larger than max_image_pixels allows \(19199\)"):
            refuse(path, 120 * 160 - 1)


def sized(format, width, height):
    """A header that claims that, and little else."""
    if format == "BMP":
        return (
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(9)
        )
    if format == "PPM":
        return b"P6\n%d %d\n255\n" % (width, height) + bytes(9)
    if format == "GIF":
        header = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
        return header + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2\x44\1\0;"
    tags = ((256, 4, width), (257, 4, height), (258, 3, 8), (262, 3, 1), (273, 4, 8), (278, 4, height), (279, 4, 9))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("format", ["BMP", "PPM", "GIF", "TIFF"])
@pytest.mark.parametrize("size", [(32000, 32000), (65000, 65000), (10_000, 9_000)])
def test_headers_that_claim_too_much_are_refused_unread(file, format, size):
    path = file(sized(format, *size))
    for refuse in (image_files.check, image_files.read):
        with pytest.raises(ValueError, match=f"{path}.*(larger than max_image_pixels|exceeds limit)"):
            refuse(path)


@pytest.mark.parametrize("kind", [kind for kind in BOMBS if not kind.startswith("raw")])
def test_jpeg_and_png_bombs_are_refused_unread(file, kind):
    with pytest.raises(ValueError, match="larger than max_image_pixels|exceeds limit"):
        image_files.check(file(BOMBS[kind](32000, 32000)))


@pytest.mark.parametrize("format", ["ICO", "TGA", "PCX", "SGI", "EPS", "PDF", "ICNS", "DDS", "JPEG2000"])
def test_other_formats_are_refused(file, format):
    """Pillow knows them; some start other programs."""
    try:
        data = saved(IMAGE, format)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow does not write {format}: {error}")
    with pytest.raises(ValueError, match="is not an image"):
        image_files.check(file(data))


@pytest.mark.parametrize("kind", [b"P3", b"P4", b"P5", b"P6"])
def test_a_ppm_of_one_long_comment_is_refused_at_once(file, kind):
    """Pillow reads it byte by byte, for minutes."""
    with pytest.raises(ValueError, match="its header has no end"):
        image_files.check(file(kind + b" #" + b"x" * 200_000_000))


@pytest.mark.parametrize("comment", [b"", b"# by a camera\n", b"# a\n# b\n" * 100])
def test_comments_of_a_ppm_are_read_over(file, comment):
    path = file(b"P6\n" + comment + b"%d %d\n" % IMAGE.shape[1::-1] + comment + b"255\n" + IMAGE.tobytes())
    assert np.array_equal(image_files.read(path), IMAGE)
    bits = file(b"P4\n" + comment + b"8 2\n" + bytes((0xFF, 0)))
    assert image_files.read(bits)[:, 0, 0].tolist() == [0, 255]


def test_a_tiff_of_jpeg_compression_is_refused(file):
    """Pillow fills a hole in it with grey."""
    try:
        data = saved(IMAGE, "TIFF", compression="jpeg")
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    with pytest.raises(ValueError, match="save it as JPEG or PNG"):
        image_files.read(file(data))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="is not a file"):
            image_files.check(image_files.Path(path))
    with pytest.raises(FileNotFoundError):
        image_files.check(tmp_path / "absent")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_raise_nothing_else(file, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(list(WHOLE.values())[seed % len(WHOLE)]())
    for position in rng.integers(0, len(data) if seed % 2 else min(len(data), 200), 1 + seed // 8):
        data[position] = rng.integers(256)
    try:
        assert image_files.read(file(bytes(data))).dtype == np.uint8
    except ValueError:
        pass
