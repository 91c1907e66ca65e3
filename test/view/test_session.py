"""A page's messages in and frames out, without a socket; values against NumPy's."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fake_feed import FakeFeed, random_tokens, snapshot_of

pytest.importorskip("simplejpeg")

from vla_perception.view.analysis import JOINED, TOKENS, Palette
from vla_perception.view.session import MAX_MESSAGE, Session
from vla_perception.view.wire import unpack


def floats(blobs, number):
    return np.frombuffer(blobs[number], "<f4").reshape(2, 48)


class Page:
    """A session, with the answers unpacked."""

    def __init__(self):
        self.feed = FakeFeed()
        self.session = Session(self.feed, Palette(), 5.0)
        self.session.select("/tokens")

    def show(self, tokens, before=None):
        return unpack(self.session.frame(snapshot_of(tokens, before=before)))

    def say(self, **message):
        answers = self.session.receive(json.dumps(message))
        return unpack(answers[-1]) if answers else None


def expected_similarity(tokens, space, view, patches):
    vectors = tokens.data if space == TOKENS else tokens.features[..., tokens.encoder_channels(space)]
    vectors = vectors.astype(np.float64)
    reference = vectors[view, patches].mean(axis=0)
    return vectors @ reference / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(reference)


def test_a_frame_has_images_colors_and_norms():
    page, tokens = Page(), random_tokens(7)
    header, blobs = page.show(tokens)
    assert (header["type"], header["sequence"], header["grid"]) == ("frame", 7, [6, 8])
    assert [view["camera"] for view in header["views"]] == ["front", "wrist"]
    assert all(blobs[view["image"]][:2] == b"\xff\xd8" and view["image_late_ms"] == 0 for view in header["views"])
    assert [layer["space"] for layer in header["layers"]] == ["dinov2", "siglip", TOKENS]
    for layer in header["layers"]:
        assert len(blobs[layer["colors"]]) == 2 * 48 * 3
    assert np.allclose(floats(blobs, header["layers"][2]["norms"]), np.linalg.norm(tokens.data, axis=-1))
    assert all(offset % 4 == 0 for offset, _ in header["blobs"])


@pytest.mark.parametrize(
    "box, patches", [([45, 25, 45, 25], [10]), ([0, 0, 40, 40], [0, 1, 8, 9]), ([100, 100, 90, 90], [5 * 8 + 5])]
)
def test_touch_gives_cosine_similarity_in_every_view_and_space(box, patches):
    page, tokens = Page(), random_tokens(3)
    page.show(tokens)
    page.say(type="mode", mode="similarity")
    header, blobs = page.say(type="touch", camera="wrist", box=box, hold=True)
    assert header["type"] == "layers" and header["pin"]["patches"] == patches
    for layer in header["layers"]:
        expected = expected_similarity(tokens, layer["space"], 1, patches)
        assert np.allclose(floats(blobs, layer["similarity"]), expected, atol=1e-6)


def test_spaces_that_are_hidden_are_not_computed():
    page = Page()
    header, _ = page.show(random_tokens(1))
    assert header["spaces"] == ["dinov2", "siglip", JOINED, TOKENS]
    header, blobs = page.say(type="hide", spaces=["dinov2", TOKENS])
    assert [layer["space"] for layer in header["layers"]] == ["siglip", JOINED] and len(blobs) == 4
    assert page.say(type="hide", spaces=header["spaces"])[0]["layers"] == []


def test_a_pin_holds_its_vector_until_the_model_changes():
    page, first, second = Page(), random_tokens(1), random_tokens(2)
    page.say(type="mode", mode="similarity")
    page.show(first)
    page.say(type="touch", camera="front", box=[45, 25, 45, 25], hold=True)
    header, blobs = page.show(second)
    reference, vectors = first.data[0, 10], second.data
    expected = vectors @ reference / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(reference)
    assert np.allclose(floats(blobs, header["layers"][2]["similarity"]), expected, atol=1e-6)
    assert header["pin"]["sequence"] == 1
    other = replace(random_tokens(3), fingerprint="cd" * 32)
    header, blobs = page.show(other)
    assert np.allclose(
        floats(blobs, header["layers"][2]["similarity"]), expected_similarity(other, TOKENS, 0, [10]), atol=1e-6
    )
    assert page.say(type="untouch")[0]["pin"] is None


def test_a_space_that_is_chosen_later_is_compared_to_what_was_pinned():
    page, first, second = Page(), random_tokens(1), random_tokens(2)
    page.say(type="mode", mode="similarity")
    page.say(type="hide", spaces=[TOKENS])
    page.show(first)
    assert page.session.touched is None
    page.say(type="touch", camera="front", box=[45, 25, 45, 25], hold=True)
    page.show(second)
    header, blobs = page.say(type="hide", spaces=[])
    reference, vectors = first.data[0, 10], second.data
    expected = vectors @ reference / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(reference)
    assert np.allclose(floats(blobs, header["layers"][-1]["similarity"]), expected, atol=1e-6)
    assert page.session.touched.tokens is first and page.session.shown.tokens is second
    page.say(type="untouch")
    assert page.session.touched is None


def test_under_the_pointer_it_is_what_lies_there_now():
    page, second = Page(), random_tokens(2)
    page.say(type="mode", mode="similarity")
    page.show(random_tokens(1))
    page.say(type="touch", camera="front", box=[45, 25, 45, 25], hold=False)
    header, blobs = page.show(second)
    assert np.allclose(
        floats(blobs, header["layers"][2]["similarity"]), expected_similarity(second, TOKENS, 0, [10]), atol=1e-6
    )


def test_a_paused_page_keeps_what_it_shows():
    page = Page()
    assert page.session.next_frame() is None, "there is no message yet"
    page.feed.publish(random_tokens(1))
    assert unpack(page.session.next_frame())[0]["sequence"] == 1
    assert page.session.next_frame() is None, "it is shown already"
    page.say(type="pause", paused=True)
    page.feed.publish(random_tokens(2))
    assert page.session.next_frame() is None
    assert page.say(type="mode", mode="norm")[0]["sequence"] == 1
    page.say(type="pause", paused=False)
    assert unpack(page.session.next_frame())[0]["sequence"] == 2


def test_change_is_to_the_message_before_whatever_was_shown():
    page, shown, before, now = Page(), random_tokens(1), random_tokens(2), random_tokens(3)
    page.say(type="mode", mode="change")
    assert page.show(shown)[0]["layers"][0]["change"] is None
    header, blobs = page.show(now, before=before)
    products = (now.data * before.data).sum(axis=-1)
    expected = 1 - products / np.linalg.norm(now.data, axis=-1) / np.linalg.norm(before.data, axis=-1)
    assert np.allclose(floats(blobs, header["layers"][2]["change"]), expected, atol=1e-5)


def test_a_cls_message_has_images_and_no_layers():
    data = np.ones((2, 1, 16), np.float32)
    header, _ = Page().show(random_tokens(features=False, data=data, token_strategy="cls", grid=(1, 1)))
    assert header["grid"] is None and header["layers"] == [] and len(header["views"]) == 2


def test_invalid_views_may_hold_anything():
    tokens = random_tokens(1)
    data = tokens.data.copy()
    data[1] = np.nan
    tokens = replace(tokens, data=data, views=(tokens.views[0], replace(tokens.views[1], valid=False)))
    page = Page()
    for mode in ("colors", "similarity", "norm", "change", "image"):
        page.say(type="mode", mode=mode)
        page.show(tokens, before=tokens)
        header, _ = page.say(type="touch", camera="wrist", box=[45, 25, 45, 25], hold=True)
        assert header["views" if header["type"] == "frame" else "layers"]


def test_tokens_are_wanted_only_by_a_page_that_is_seen():
    page = Page()
    assert page.feed.readers == ["/tokens"]
    page.say(type="visible", visible=False)
    assert page.feed.readers == []
    page.say(type="visible", visible=False)
    page.say(type="select", topic="/other")
    assert page.feed.readers == []
    page.say(type="visible", visible=True)
    assert page.feed.readers == ["/other"]
    page.say(type="select", topic="/tokens")
    assert page.feed.readers == ["/tokens"]
    page.session.select("")
    assert page.feed.readers == []


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "x",
        '{"type": "no such"}',
        '{"type": "touch"}',
        '{"type": "touch", "camera": "front", "box": [1, 2, 3], "hold": true}',
        '{"type": "touch", "camera": 5, "box": [1, 2, 3, 4], "hold": true}',
        '{"type": "touch", "camera": "front", "box": [1, 2, 3, NaN], "hold": true}',
        '{"type": "mode", "mode": "__class__"}',
        '{"type": "hz", "hz": "fast"}',
        '{"type": "hz", "hz": 1' + "0" * 400 + "}",
        "[" * 5000,
        '{"type": "hide", "spaces": "siglip"}',
        '{"type": "hide", "spaces": [["siglip"]]}',
        '{"type": "seek", "index": 1}',
        '{"type": "select", "topic": "' + "x" * 2000 + '"}',
        '{"type": "' + "x" * MAX_MESSAGE + '"}',
    ],
)
def test_garbage_is_an_error_and_changes_nothing(text):
    page = Page()
    page.show(random_tokens(1))
    with pytest.raises(ValueError):
        page.session.receive(text)
    assert (page.session.topic, page.session.mode, page.session.hz) == ("/tokens", "colors", 5.0)
