"""Tokens as a policy reads them: from the topic over DDS, and computed in its own process."""

import gc
import math
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tokenizer import MODEL, make_tokens
from ros_harness import ROOT, RosProcess, free_domain, ros_environment, wait_until

from vla_perception.tokens.encode_service import FINAL
from vla_perception.tokens.subscriber import FingerprintMismatchError, LocalTokenizer, TokenSubscriber, tokenize
from vla_perception.tokens.visual_tokens import FORMAT, TokenFormatError, View, VisualTokens, to_message

OTHER = "cd" * 32


class Source(LocalTokenizer):
    """Sets handed over by the test, without a tokenizer."""

    def __init__(self, **options):
        super().__init__(None, **options)
        self.told = []

    def _log(self, text, error):
        self.told.append(text)

    def put(self, *sequences, **changes):
        for sequence in sequences:
            self._accept(make_tokens(sequence, **changes))


# What holds for every source


def test_newest_and_history_in_order():
    tokens = Source(history=3)
    assert tokens.latest is None and tokens.history == () and tokens.age() == math.inf
    tokens.put(0)
    assert [t.sequence for t in tokens.history] == [0]
    tokens.put(1, 2, 3)
    assert tokens.latest.sequence == 3
    assert [t.sequence for t in tokens.history] == [1, 2, 3]
    assert tokens.received == 4
    with pytest.raises(ValueError, match="at least 1"):
        Source(history=0)


def test_gaps_are_counted_and_told():
    tokens = Source()
    tokens.put(5, 6, 9, 10, 15)
    assert (tokens.lost, tokens.gaps, tokens.restarts) == (6, 2, 0)
    assert "2 sets of visual tokens were lost before sequence 9" in tokens.told[0]


def test_random_weights_are_told_once():
    tokens = Source()
    tokens.put(0, 1, weights="random")
    assert tokens.told == ["the tokens of 'fake' come from random weights: they mean nothing"]


def test_a_restart_is_no_gap_and_history_begins_anew():
    tokens = Source(history=4)
    tokens.put(5, 6, 0, 1)
    assert (tokens.lost, tokens.restarts) == (0, 1)
    assert [t.sequence for t in tokens.history] == [0, 1]
    assert "started anew" in tokens.told[0]
    # Other weights are a restart even if the numbers happen to go on.
    tokens.put(9, fingerprint=OTHER)
    assert (tokens.lost, tokens.restarts) == (0, 2)
    assert [t.sequence for t in tokens.history] == [9]


def test_history_never_stacks_what_does_not_belong_together():
    tokens = Source(history=4)
    tokens.put(0, stamp_ns=10)
    tokens.put(1, stamp_ns=20)
    tokens.put(2, stamp_ns=5)  # a bag that loops
    assert [t.sequence for t in tokens.history] == [2]
    tokens.put(3, cameras=("front", "wrist"))
    assert [t.sequence for t in tokens.history] == [3]


@pytest.mark.parametrize(
    ("history", "stamps", "kept"),
    [
        (4, [0, 33, 100, 67, 133, 167], [67, 100, 133, 167]),
        (8, [0, 33, 100, 133, 66, 167], [0, 33, 66, 100, 133, 167]),
        (3, [0, 33, 66, 100, 10], [33, 66, 100]),  # older than all that is kept
        (1, [0, 66, 33], [66]),
        (4, [100, 133, 166, 50, 83], [50, 83]),  # older than all that came: time was set back
        (4, [*range(0, 1000, 33), 0, 33], [0, 33]),
        (3, [0, 0, 0, 0], [0, 0, 0]),
    ],
)
def test_a_late_set_goes_to_its_place_in_the_history(history, stamps, kept):
    tokens, latest = Source(history=history), []
    for sequence, stamp in enumerate(stamps):
        tokens.put(sequence, stamp_ns=stamp)
        latest.append(tokens.latest.stamp_ns)
    assert [t.stamp_ns for t in tokens.history] == kept
    assert (tokens.received, tokens.lost, tokens.restarts) == (len(stamps), 0, 0)
    assert sum(after < before for before, after in zip(latest, latest[1:])) == (latest[-1] < max(stamps))


def test_no_wait_returns_for_a_late_set():
    tokens = Source()
    tokens.put(0, stamp_ns=0)
    tokens.put(1, stamp_ns=100)
    assert tokens.wait(0.0).stamp_ns == 100
    tokens.put(2, stamp_ns=50)
    with pytest.raises(TimeoutError):
        tokens.wait(0.0)
    tokens.put(3, stamp_ns=150)
    assert tokens.wait(0.0).stamp_ns == 150


def test_wait_returns_each_set_once_and_times_out():
    tokens = Source()
    tokens.put(0, 1)
    assert tokens.wait(0.0).sequence == 1
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="no new visual tokens within 0.2 s"):
        tokens.wait(0.2)
    assert 0.19 < time.monotonic() - begin < 1.0
    threading.Timer(0.1, tokens.put, (2,)).start()
    assert tokens.wait(5.0).sequence == 2


def test_all_threads_that_wait_get_the_set():
    tokens = Source()
    got = []
    threads = [threading.Thread(target=lambda: got.append(tokens.wait(10.0).sequence)) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    tokens.put(7)
    for thread in threads:
        thread.join(10.0)
    assert got == [7] * 5


def test_closing_frees_who_waits():
    tokens = Source()
    threading.Timer(0.1, tokens.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        tokens.wait(10.0)


def test_other_weights_are_refused_and_nothing_old_is_given_instead():
    tokens = Source(expect_fingerprint=MODEL["fingerprint"])
    tokens.put(0)
    tokens.put(1, fingerprint=OTHER)
    for read in (
        lambda: tokens.latest,
        lambda: tokens.history,
        lambda: tokens.wait(0.1),
        lambda: tokens.latest_within(9.0),
    ):
        with pytest.raises(FingerprintMismatchError, match="expected was abababab"):
            read()
    assert (tokens.received, tokens.rejected) == (1, 1)
    assert "cdcdcdcd" in tokens.told[-1]
    tokens.put(2)
    assert tokens.latest.sequence == 2
    with pytest.raises(ValueError, match="at least 8"):
        Source(expect_fingerprint="ab")
    assert Source(expect_fingerprint="ABABABAB")._accept(make_tokens(0))


def test_age_and_freshness():
    tokens = Source()
    now = time.time_ns()
    tokens.put(0, stamp_ns=now - 2_000_000_000)
    assert 2.0 <= tokens.age() < 4.0
    assert tokens.latest_within(5.0).sequence == 0 and tokens.latest_within(1.0) is None
    # The oldest valid image counts; a view without an image has no age.
    views = make_tokens(1, cameras=("front", "wrist"), stamp_ns=now).views
    old = VisualTokens(
        **{
            **make_tokens(1, cameras=("front", "wrist")).__dict__,
            "views": (
                views[0],
                type(views[1])("wrist", "", now - 10**10, 480, 640, views[1].affine, False),
            ),
        }
    )
    assert old.valid == (True, False) and old.stamps_ns == (now, now - 10**10)
    assert old.age(now) == 0.0 and old.select("wrist").age(now) == math.inf
    # Stamps from the future say that clocks differ, which makes every age meaningless.
    tokens.put(2, stamp_ns=time.time_ns() + 60 * 10**9)
    assert tokens.latest_within(1.0) is None and "synchronise the clocks" in tokens.told[-1]


def test_encoder_slices():
    features = np.arange(12 * 9, dtype=np.float32).reshape(1, 12, 9)
    tokens = make_tokens(0, features=features)
    np.testing.assert_array_equal(tokens.encoder("siglip"), features[..., 5:])
    assert np.shares_memory(tokens.encoder("dinov2"), features)
    with pytest.raises(KeyError, match="dinov2, siglip"):
        tokens.encoder("clip")
    with pytest.raises(ValueError, match="publish_features"):
        make_tokens(0).encoder("siglip")
    bare = make_tokens(0, channels=9, projector="none")
    assert bare.encoder("dinov2").shape == (1, 12, 5) and np.shares_memory(bare.encoder("dinov2"), bare.data)


# In-process


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("timm")
    from vla_perception.tokenizer import VisualTokenizer

    return VisualTokenizer.from_preset("tiny-random")


def test_in_process_tokens_are_what_the_node_would_publish(tokenizer):
    import torch

    random = np.random.default_rng(0)
    front, wrist = (random.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2))
    tokens = tokenize(tokenizer, {"front": front, "wrist": wrist}, stamp_ns=5, token_dtype="bfloat16", features=True)
    assert tokens.cameras == ("front", "wrist") and tokens.dtype == "bfloat16" and tokens.stamp_ns == 5
    expected = tokenizer([front, wrist], features=True)
    assert torch.equal(tokens.torch(), expected.tokens.to(torch.bfloat16))
    assert tokens.encoder("siglip").shape == (2, 196, 384)
    read = VisualTokens.from_bytes(tokens.to_bytes())
    assert read.views == tokens.views and read.fingerprint == tokenizer.fingerprint


def test_a_policy_loop_runs_on_local_tokens(tokenizer):
    images = iter(np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8))
    calls = []
    source = LocalTokenizer(tokenizer, lambda: {"front": next(images)}, history=2, callback=calls.append)
    first, second, third = source.wait(1.0), source.wait(1.0), source.request()
    assert [t.sequence for t in (first, second, third)] == [0, 1, 2] == [t.sequence for t in calls]
    assert source.latest is third and source.history == (second, third)
    assert not np.array_equal(first.data, second.data)
    assert source.latest_within(60.0) is third
    with pytest.raises(FingerprintMismatchError):
        LocalTokenizer(tokenizer, expect_fingerprint=OTHER).encode({"front": next(images)})


def test_local_tokens_on_the_page(tokenizer, monkeypatch):
    page = (ROOT / "docs" / "policy.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "LocalTokenizer" in code)
    monkeypatch.setattr("vla_perception.tokenizer.VisualTokenizer.load", lambda _model, **_options: tokenizer)
    camera = SimpleNamespace(read=lambda: np.zeros((48, 64, 3), np.uint8))
    exec(code, namespace := {"camera": camera})
    assert namespace["visual"].cameras == ("front",) and namespace["visual"].shape == (1, 196, 256)


def test_tokens_that_are_no_numbers_are_refused_in_process_too(tokenizer):
    import torch

    class Overflowing:
        affine, seen, metadata = tokenizer.affine, tokenizer.seen, tokenizer.metadata

        def __call__(self, images, features=False, cameras=None):
            return SimpleNamespace(tokens=torch.full((1, 196, 256), 7e4), features=None)

    image = {"front": np.zeros((48, 64, 3), np.uint8)}
    assert tokenize(Overflowing(), image).float32().max() == 7e4
    with pytest.raises(TokenFormatError, match="float16 ends at 65504"):
        tokenize(Overflowing(), image, token_dtype="float16")


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("pool", [1, 3])
def test_places_through_resize_pooling_and_uncovered_pixels(strategy, pool):
    """A pixel and its token against the preprocessing itself: a bright dot is followed to its 14-pixel patch."""
    pytest.importorskip("timm")
    from vla_perception.tokenizer.config import EncoderConfig
    from vla_perception.tokenizer.preprocess import resize, source_to_grid

    # 384 / 14: 27 patches, 6 pixels at the right and the bottom that no token sees.
    config = EncoderConfig("siglip", "x", 384, (0.5,) * 3, (0.5,) * 3, strategy, letterbox_fill=(0, 0, 0))
    height, width = 480, 640
    affine = tuple(value / pool for value in source_to_grid(height, width, config, 14))
    side = 27 // pool
    tokens = make_tokens(0, grid=(side, side), pool=pool)
    view = type(tokens.views[0])("front", "", 0, height, width, affine)
    tokens = VisualTokens(**{**tokens.__dict__, "views": (view,)})
    seen = set()
    random = np.random.default_rng(0)
    for x, y in [(639, 240), (320, 479), (2, 2), *random.integers(0, (width, height), (40, 2))]:
        image = np.zeros((height, width, 3), np.uint8)
        image[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4] = 255
        small = resize(image, config)[..., 0].astype(float)
        token = tokens.token_at(x + 0.5, y + 0.5)
        if small.max() < 100:  # cropped away
            assert token is None or strategy != "resize-naive"
            continue
        row, column = (int(np.average(range(384), weights=small.sum(axis))) for axis in (1, 0))
        near_edge = any(min(value % (14 * pool), -value % (14 * pool)) < 3 for value in (row, column))
        if max(row, column) >= side * 14 * pool + 3:
            assert token is None
            seen.add("uncovered")
        elif not near_edge and token is not None:
            assert divmod(token, side) == (row // (14 * pool), column // (14 * pool))
            corners = np.array(tokens.patch_corners(token))
            assert (corners.min(0) <= (x + 0.5, y + 0.5)).all() and ((x + 0.5, y + 0.5) <= corners.max(0)).all()
            seen.add("covered")
    assert "covered" in seen
    if strategy == "resize-naive" and pool == 1:
        assert "uncovered" in seen


@pytest.mark.parametrize(
    "steps",
    [
        ["rotate180"],
        ["region:100,60,300,400", "rotate180"],
        ["center_crop_pil"],
        ["lanczos3:224", "center_crop_tf:224"],
    ],
)
@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_places_through_everything_that_the_tokenizer_does(tokenizer, steps, strategy):
    """A bright square goes through the tokenizer's own preparation and resizing, to the patch that it ends in."""
    from dataclasses import replace

    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokenizer.network import empty_network

    chosen = VisualTokenizer.from_preset("tiny-random", prepare=steps, token_strategy="cls+patch", pool=2).config
    encoders = tuple(
        replace(encoder, resize_strategy=strategy, letterbox_fill=(0, 0, 0)) for encoder in chosen.encoders
    )
    config = replace(chosen, encoders=encoders)
    whole = VisualTokenizer(config, empty_network(config), weights="random", weights_digest="", compute_dtype="float32")
    height, width, side = 480, 640, config.encoders[0].image_size
    view = View("front", "", 0, height, width, whole.affine(height, width), roi=whole.seen(height, width))
    tokens = make_tokens(0, grid=whole.grid, token_strategy="cls+patch", pool=2, data=np.zeros((1, 50, 6), np.float32))
    tokens = VisualTokens(**{**tokens.__dict__, "views": (view,)})
    seen = set()
    random = np.random.default_rng(0)
    for x, y in [(320, 30), (320, 450), (30, 240), *random.integers((20, 20), (width - 20, height - 20), (40, 2))]:
        image = np.zeros((height, width, 3), np.uint8)
        image[y - 8 : y + 9, x - 8 : x + 9] = 255
        light = whole.preprocess(image)[0][0, 0].numpy()
        light -= light.min()
        token = tokens.token_at(x + 0.5, y + 0.5)
        if light.max() == 0:
            assert token is None
            seen.add("cut")
            continue
        row, column = (float(np.average(np.arange(side) + 0.5, weights=light.sum(axis))) / 28 for axis in (1, 0))
        whole_spot = not any(edge.any() for edge in (light[0], light[-1], light[:, 0], light[:, -1]))
        if not whole_spot:
            continue
        assert token is not None
        if all(0.1 < value % 1 < 0.9 for value in (row, column)):
            assert token == 1 + int(row) * 7 + int(column)
            seen.add("covered")
    assert "covered" in seen
    if steps[0].startswith("region"):
        assert "cut" in seen


def test_reading_needs_neither_torch_nor_ros():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['rclpy'] = None\n"
        "import vla_perception.tokens.subscriber as policy, vla_perception\n"
        "assert not {'timm', 'torchvision', 'cv2', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ros_environment(0), timeout=60)


# Over DDS


def matched(publisher, count=1):
    wait_until(lambda: publisher.get_subscription_count() >= count, 20.0, "a match of publisher and subscriber")


@pytest.mark.ros
def test_plain_loop_another_process_and_its_restart(ros):
    count = 10  # no more than the depth of both queues: none is lost on the way, however busy the machine is
    with TokenSubscriber(ros.node(), history=3) as tokens:
        with ros.fake("--rate", 50, "--count", count, "--skip", 5, 6, "--cameras", "front", "wrist") as fake:
            sequences = []
            while not sequences or sequences[-1] < 11:
                visual = tokens.wait(20.0)
                assert visual.cameras == ("front", "wrist") and visual.valid == (True, True)
                assert (visual.numpy() == visual.sequence).all()
                assert 0.0 <= tokens.age(visual) < 5.0
                sequences.append(visual.sequence)
            assert sequences == sorted(set(sequences))
            assert (tokens.received, tokens.lost, tokens.gaps, tokens.restarts) == (count, 2, 1, 0)
            assert [t.sequence for t in tokens.history] == [9, 10, 11]
            assert not visual.data.flags.writeable
            assert fake.stop() == 0
        with pytest.raises(TimeoutError, match="nobody publishes /tokens"):
            wait_until(lambda: not tokens.publishers(), 20.0, "the publisher gone")
            tokens.wait(0.1)
        # Numbers go on as if 38 had been lost, but they are another process's.
        with ros.fake("--rate", 50, "--count", 2, "--first", 50):
            assert tokens.wait(20.0).sequence >= 50
            wait_until(lambda: tokens.received == count + 2, 20.0, "two sets of the second process")
            assert (tokens.lost, tokens.restarts) == (2, 1)
        with ros.fake("--rate", 50, "--count", 3):
            wait_until(lambda: tokens.received == count + 5, 20.0, "three sets of the third process")
            assert (tokens.lost, tokens.restarts) == (2, 2)


@pytest.mark.ros
def test_the_successor_of_a_killed_publisher_is_no_loss_and_no_second_one(ros, monkeypatch):
    """DDS still lists the killed one: nobody has said that it has gone."""
    told = []
    monkeypatch.setattr(TokenSubscriber, "_log", lambda _self, text, _error: told.append(text))
    with TokenSubscriber(ros.node()) as tokens:
        with ros.fake("--rate", 50) as killed:
            wait_until(lambda: tokens.publishers() == 1, 20.0, "a known publisher")
            received = tokens.received
            wait_until(lambda: tokens.received > received, 20.0, "a set of it")
            killed.process.kill()
            killed.process.wait()
        received = tokens.received
        with ros.fake("--rate", 50, "--count", 2, "--first", received + 1000):
            wait_until(lambda: tokens.latest.sequence > 1000, 20.0, "sets of its successor")
            assert tokens.publishers() == 2  # or this test shows nothing
            assert tokens.restarts == 1 and tokens.lost < 1000
        with ros.fake("--rate", 50, "--count", 5):  # and this one counts from the beginning
            wait_until(lambda: tokens.latest.sequence == 4, 20.0, "sets of the third one")
        assert any("started anew" in text for text in told) and not any("publishers" in text for text in told)


@pytest.mark.ros
def test_a_gap_after_a_killed_publisher_has_left_the_list_is_a_loss(ros, monkeypatch):
    publisher = ros.publisher()
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        for listed, sequence, counters in (
            ({b"killed"}, 5, (0, 0)),
            ({b"killed", b"successor"}, 100, (0, 1)),
            ({b"successor"}, 103, (2, 1)),
        ):
            monkeypatch.setattr(tokens, "_look_up_publishers", lambda listed=frozenset(listed): listed)
            publisher.publish(to_message(make_tokens(sequence)))
            wait_until(lambda sequence=sequence: tokens.latest and tokens.latest.sequence == sequence, 20.0, "the set")
            assert (tokens.lost, tokens.restarts) == counters


@pytest.mark.ros
def test_bfloat16_arrives_exactly(ros):
    with TokenSubscriber(ros.node()) as tokens, ros.fake("--rate", 50, "--first", 3, "--dtype", "bfloat16"):
        visual = tokens.wait(20.0)
        assert visual.dtype == "bfloat16" and visual.numpy().dtype.name == "bfloat16"
        assert (visual.float32() == visual.sequence).all()


@pytest.mark.ros
def test_request_waits_for_a_set_of_its_own(ros):
    with TokenSubscriber(ros.node()) as tokens:
        with pytest.raises(TimeoutError, match="no service /encode"):
            tokens.request(0.3)
        with ros.fake("--first", 4):
            assert tokens.request(20.0).sequence == 4
            assert tokens.request(20.0).sequence == 5
            with pytest.raises(TimeoutError):
                tokens.wait(0.1)  # nothing comes unasked


@pytest.mark.ros
def test_request_and_wait_inside_a_callback_do_not_block_reception(ros):
    node = ros.node()
    tokens = TokenSubscriber(node)
    got = []
    with ros.fake():
        timer = node.create_timer(0.05, lambda: got.append(tokens.request(20.0).sequence))
        ros.spin(node)
        wait_until(lambda: len(got) >= 2, 20.0, "two requests from a timer of a single-threaded executor")
        timer.cancel()
    assert got[:2] == [0, 1]


@pytest.mark.ros
def test_request_tells_the_reason_of_a_refusal(ros):
    from std_srvs.srv import Trigger

    def refuse(_request, response):
        response.success, response.message = False, "no image from front yet"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", refuse)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        wait_until(lambda: tokens._private.get_service_names_and_types(), 20.0, "the service")
        begin = time.monotonic()
        with pytest.raises((RuntimeError, TimeoutError)):
            tokens.request(0.1)
        assert time.monotonic() - begin < 5.0
        with pytest.raises(RuntimeError, match="no image from front yet"):
            tokens.request(3.0)


@pytest.mark.ros
def test_request_waits_for_the_set_that_was_named_and_takes_no_other(ros):
    from std_srvs.srv import Trigger

    publisher, server = ros.publisher(), ros.node("server")

    def encode(_request, response):
        publisher.publish(to_message(make_tokens(8)))  # not the one that is named, and before it
        threading.Timer(0.3, lambda: publisher.publish(to_message(make_tokens(9)))).start()
        response.success, response.message = True, "published as sequence 9, stamp 5 ns"
        return response

    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        publisher.publish(to_message(make_tokens(7)))
        assert tokens.wait(20.0).sequence == 7
        assert tokens.request(20.0).sequence == 9


@pytest.mark.ros
def test_request_to_a_service_that_is_busy_tells_what_is_known(ros):
    from std_srvs.srv import Trigger

    answers, ended = ["the node is not active"], threading.Event()

    def encode(_request, response):
        if not answers:
            ended.wait(20.0)
        response.success, response.message = False, answers.pop() if answers else "too late"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    try:
        with TokenSubscriber(ros.node()) as tokens:
            wait_until(lambda: tokens._private.get_service_names_and_types(), 20.0, "the service")
            with pytest.raises(RuntimeError, match="/encode: the node is not active"):
                tokens.request(3.0)
            with pytest.raises(TimeoutError, match="no answer from /encode within 0.2 s"):
                tokens.request(0.2)
    finally:
        ended.set()


@pytest.mark.ros
def test_request_waits_for_a_image_that_is_not_there_yet(ros):
    from std_srvs.srv import Trigger

    publisher, asked = ros.publisher(), []

    def encode(_request, response):
        asked.append(True)
        response.success, response.message = len(asked) >= 3, "no newer image"
        if response.success:
            publisher.publish(to_message(make_tokens(8)))
            response.message = "published as sequence 8, stamp 5 ns"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        assert tokens.request(20.0).sequence == 8 and len(asked) == 3


@pytest.mark.ros
@pytest.mark.parametrize("camera", ["has another image", "has no other image"])
def test_an_answer_that_was_lost_on_the_way_is_asked_for_again(ros, camera):
    """As Fast DDS drops it while the service does not know the client's reader yet."""
    from std_srvs.srv import Trigger

    publisher, server, asked = ros.publisher(), ros.node("server"), []

    def encode(_request, response):
        asked.append(True)
        response.success = len(asked) == 1 or camera == "has another image"
        response.message = "no newer image"
        if response.success:
            publisher.publish(to_message(make_tokens(len(asked))))
            response.message = f"published as sequence {len(asked)}, stamp 5 ns"
        return response

    service = server.create_service(Trigger, "encode", encode)
    send = service.send_response
    service.send_response = lambda *answer: len(asked) == 1 or send(*answer)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        assert tokens.request(20.0).sequence == (2 if camera == "has another image" else 1)
        assert len(asked) == 2


@pytest.mark.ros
def test_a_tokenizer_that_has_answered_is_given_its_time(ros, monkeypatch):
    from std_srvs.srv import Trigger

    from vla_perception.tokens import subscriber as policy

    publisher, server, asked = ros.publisher(), ros.node("server"), []

    def encode(_request, response):
        asked.append(True)
        if len(asked) == 2:
            time.sleep(0.5)  # encoding
        publisher.publish(to_message(make_tokens(len(asked))))
        response.success, response.message = True, f"published as sequence {len(asked)}, stamp 5 ns"
        return response

    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        assert tokens.request(20.0).sequence == 1
        monkeypatch.setattr(policy, "_ASK_AGAIN", 0.05)
        assert tokens.request(20.0).sequence == 2
        assert tokens.request(20.0).sequence == 3 and len(asked) == 3


@pytest.mark.ros
def test_request_does_not_repeat_what_is_refused_for_good(ros):
    from std_srvs.srv import Trigger

    asked = []

    def refuse(_request, response):
        asked.append(True)
        response.success, response.message = False, FINAL + "every latest set is encoded anyway"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", refuse)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        with pytest.raises(RuntimeError, match="/encode: refused: every latest set is encoded anyway"):
            tokens.request(20.0)
    assert len(asked) == 1


@pytest.mark.ros
def test_callback_is_not_called_for_a_late_set(ros):
    publisher, node, stamps = ros.publisher(), ros.node(), []
    with TokenSubscriber(node, callback=lambda visual: stamps.append(visual.stamp_ns), history=8) as tokens:
        ros.spin(node)
        matched(publisher)
        for sequence, stamp in enumerate([0, 100, 50, 150, 120, 110]):
            publisher.publish(to_message(make_tokens(sequence, stamp_ns=stamp)))
            wait_until(lambda sequence=sequence: tokens.received == sequence + 1, 20.0, "the set")
        wait_until(lambda: stamps and stamps[-1] == 150, 20.0, "the latest set")
        assert stamps == sorted(set(stamps)) and len(stamps) + tokens.skipped == 6
        assert [visual.stamp_ns for visual in tokens.history] == [0, 50, 100, 110, 120, 150]


@pytest.mark.ros
def test_callback_runs_in_the_policys_executor_and_sees_the_newest(ros):
    node, publisher = ros.node(), ros.publisher()
    seen, threads, go = [], set(), threading.Event()

    def act(visual):
        seen.append(visual.sequence)
        threads.add(threading.current_thread())
        go.wait(20.0)

    tokens = TokenSubscriber(node, callback=act)
    ros.spin(node)
    matched(publisher)
    publisher.publish(to_message(make_tokens(0)))
    wait_until(lambda: seen == [0], 20.0, "the first callback")
    for sequence in range(1, 6):
        publisher.publish(to_message(make_tokens(sequence)))
    wait_until(lambda: tokens.received == 6, 20.0, "six sets")
    go.set()
    wait_until(lambda: seen == [0, 5], 20.0, "the latest set, and only that")
    assert tokens.skipped == 4 and tokens.lost == 0
    assert threads == {ros.spinning[0][2]}


@pytest.mark.ros
def test_other_schemas_images_and_damage_are_refused(ros):
    from sensor_msgs.msg import CompressedImage

    node, publisher = ros.node(), ros.publisher()
    calls = []
    tokens = TokenSubscriber(node, callback=calls.append, expect_fingerprint=MODEL["fingerprint"][:16])
    ros.spin(node)
    matched(publisher)
    good = to_message(make_tokens(0))
    bad = [
        (CompressedImage(format="jpeg", data=good.data), TokenFormatError, "no token message"),
        (CompressedImage(format="safetensors; vla_tokens/2", data=good.data), TokenFormatError, "another version"),
        (CompressedImage(format=FORMAT, data=good.data[:-1]), TokenFormatError, "truncated"),
        (to_message(make_tokens(0, fingerprint=OTHER)), FingerprintMismatchError, "other weights"),
    ]
    for count, (message, error, words) in enumerate(bad, start=1):
        publisher.publish(message)
        wait_until(lambda count=count: tokens.rejected == count, 20.0, f"{count} refusals")
        with pytest.raises(error, match=words):
            tokens.latest  # noqa: B018
        with pytest.raises(error, match=words):
            tokens.wait(5.0)
    assert calls == []
    publisher.publish(good)
    assert tokens.wait(20.0).sequence == 0
    wait_until(lambda: len(calls) == 1, 20.0, "the callback")


@pytest.mark.ros
def test_names_follow_namespace_and_remapping(ros):
    node = ros.node("policy", namespace="/robot", cli_args=["--ros-args", "-r", "tokens:=eyes/tokens"])
    with TokenSubscriber(node) as tokens:
        assert tokens.topic == "/robot/eyes/tokens"
        publisher = ros.publisher("/robot/eyes/tokens")
        matched(publisher)
        publisher.publish(to_message(make_tokens(3)))
        assert tokens.wait(20.0).sequence == 3
        with pytest.raises(TimeoutError, match="/robot/eyes/encode"):
            tokens.request(0.1)


@pytest.mark.ros
def test_two_publishers_are_told(ros, monkeypatch):
    told = []
    monkeypatch.setattr(TokenSubscriber, "_log", lambda _self, text, _error: told.append(text))
    first, second = ros.publisher(), ros.publisher()
    with TokenSubscriber(ros.node()) as tokens:
        for publisher in (first, second):
            matched(publisher)
        for sequence in range(3):
            first.publish(to_message(make_tokens(sequence)))
            second.publish(to_message(make_tokens(sequence)))
        wait_until(lambda: tokens.received == 6, 20.0, "all sets")
        assert any("2 publishers on /tokens" in text for text in told)


@pytest.mark.ros
def test_shutdown_ends_a_wait(ros):
    import rclpy
    from rclpy.executors import ExternalShutdownException

    tokens = TokenSubscriber(ros.node())
    threading.Timer(0.2, lambda: rclpy.shutdown(context=ros.context)).start()
    with pytest.raises(ExternalShutdownException):
        tokens.wait(20.0)
    tokens.close()


@pytest.mark.ros
@pytest.mark.parametrize("ended_by", ["close", "shutdown"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_request_tells_that_nothing_can_come_any_more(ros, ended_by, before):
    import rclpy
    from rclpy.executors import ExternalShutdownException

    tokens = TokenSubscriber(ros.node())
    with ros.fake():
        for _ in range(before):
            tokens.request(20.0)
    if ended_by == "close":
        tokens.close()
    else:
        rclpy.shutdown(context=ros.context)
    reason = (RuntimeError, "closed") if ended_by == "close" else (ExternalShutdownException, None)
    with pytest.raises(reason[0], match=reason[1]):
        tokens.request(20.0)
    tokens.close()


@pytest.mark.ros
@pytest.mark.parametrize("ended_by", ["close", "shutdown"])
def test_nothing_is_left_of_one_that_has_ended(ros, ended_by):
    import rclpy

    publisher, tokens = ros.publisher(), TokenSubscriber(ros.node())
    matched(publisher)
    publisher.publish(to_message(make_tokens(0)))
    thread, visual = tokens._thread, weakref.ref(tokens.wait(20.0))
    if ended_by == "close":
        tokens.close()
    else:
        rclpy.shutdown(context=ros.context)
    thread.join(20.0)
    del tokens
    wait_until(lambda: (gc.collect(), visual())[1] is None, 20.0, "the last set is freed")


@pytest.mark.ros
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_policy_process_ends_when_told_to(number):
    code = (
        "import rclpy\n"
        "from rclpy.executors import ExternalShutdownException\n"
        "from vla_perception.tokens.subscriber import TokenSubscriber\n"
        "rclpy.init()\n"
        "tokens = TokenSubscriber(rclpy.create_node('policy'))\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    tokens.wait()\n"
        "except (KeyboardInterrupt, ExternalShutdownException):\n"
        "    print('ended', flush=True)\n"
    )
    with RosProcess(["-c", code], free_domain()) as process:
        process.wait_for("ready")
        assert process.stop(number) == 0, process.output
        assert "ended" in process.output
