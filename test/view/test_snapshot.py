"""Which image belongs to which view, and how it goes to the browser."""

import io
from dataclasses import replace

import numpy as np
import pytest
from fake_feed import random_tokens

pytest.importorskip("simplejpeg")
pytest.importorskip("PIL")

from PIL import Image

from vla_perception.view import snapshot
from vla_perception.view.snapshot import ImageHistory, LazyImage, PageImage, encode_rgb, stream_kind

FRONT, WRIST = "/robot/front/image_raw", "/robot/wrist/image_raw/compressed"


def views(**stamps):
    tokens = random_tokens(cameras=tuple(stamps), features=False)
    return [replace(view, stamp_ns=stamps[view.camera]) for view in tokens.views]


def test_images_are_found_by_name_and_stamp():
    history = ImageHistory()
    for stamp in (100, 200, 300):
        history.add(FRONT, stamp * 10**9, b"front%d" % stamp)
        history.add(WRIST, stamp * 10**9 + 10**7, b"wrist%d" % stamp)
    found = history.match(views(wrist=200 * 10**9, front=300 * 10**9), [FRONT, WRIST])
    assert found == [(WRIST, 200 * 10**9 + 10**7, b"wrist200"), (FRONT, 300 * 10**9, b"front300")]
    assert history.match(views(front=400 * 10**9), [FRONT, WRIST]) == [None], "too far from every stamp"


def test_a_remapped_camera_is_found_by_its_stamp_alone():
    history = ImageHistory()
    history.add("/camera/color/image_raw", 5, b"other")
    history.add("/realsense", 7, b"this one")
    topics = ["/camera/color/image_raw", "/realsense"]
    assert history.match(views(front=7), topics) == [("/realsense", 7, b"this one")]
    assert history.match(views(front=8), topics) == [None], "near is not enough without a name"


def test_the_history_is_bounded(monkeypatch):
    monkeypatch.setattr(snapshot, "HISTORY_BYTES", 1000)
    history = ImageHistory()
    for stamp in range(500):
        history.add("a", stamp, bytes(100))
    assert [stamp for stamp in range(500) if history.find("a", stamp)[0] == stamp] == list(range(490, 500))
    for stamp in range(500):
        history.add("b", stamp, b"")
    assert history.find("b", 0)[0] == 500 - snapshot.HISTORY


def test_jpegs_of_large_images_are_small():
    rgb = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8)
    image = Image.open(io.BytesIO(encode_rgb(rgb).data))
    assert image.width * image.height <= snapshot.MAX_SHOWN_PIXELS
    assert image.width / image.height == pytest.approx(4 / 3, 0.01)
    smooth = np.zeros((48, 64, 3), np.uint8)
    smooth[..., 0] = 200
    pixels = np.asarray(Image.open(io.BytesIO(encode_rgb(smooth).data)))
    assert pixels.shape == smooth.shape and np.abs(pixels.astype(int) - smooth).max() < 8


def test_only_what_a_browser_shows_rightly_goes_as_it_is():
    png = b"\x89PNG\r\n\x1a\n" + bytes(8) + (640).to_bytes(4, "big") + (480).to_bytes(4, "big") + b"\x08"
    assert stream_kind("jpeg", b"\xff\xd8\xff\xe0") == "image/jpeg"
    assert stream_kind("rgb8; png compressed", png) == "image/png"
    assert stream_kind("bayer_rggb8; png compressed", png) is None
    assert stream_kind("mono16; png compressed", png) is None
    assert stream_kind("jpeg", b"<svg onload=alert(1)>") is None
    huge = png[:16] + (2**31).to_bytes(4, "big") * 2 + png[24:]
    with pytest.raises(ValueError):
        stream_kind("png", huge)


@pytest.mark.parametrize("error", [ValueError("damaged"), OSError("gone"), ImportError("no simplejpeg")])
def test_an_image_that_cannot_be_read_is_none_and_is_read_once(error):
    calls = []

    def broken() -> PageImage:
        calls.append(1)
        raise error

    image = LazyImage(broken, 0)
    assert image.get() is None and image.get() is None and len(calls) == 1
