"""`vla-perception view` and `top`: what a page says, what nodes report, and token messages on their way to the screen."""

from __future__ import annotations

import functools
import io
import json
import math
import re
from pathlib import Path

import camera_images
import numpy as np
import offline_runs
from engine import Target, scratch
from fake_feed import FakeFeed, random_tokens, snapshot_of
from mutations import change_json, change_safetensors

from vla_perception.sources.bags import BagError
from vla_perception.tokens import TokenFormatError, View, VisualTokens
from vla_perception.tokens.message import FORMAT
from vla_perception.view import top
from vla_perception.view.analysis import Palette
from vla_perception.view.health import LogBook, Status, TokenizerHealth
from vla_perception.view.recording import open_recording
from vla_perception.view.session import MODES, Session
from vla_perception.view.wire import unpack


class _Feed(FakeFeed):
    """With messages that a page may choose from."""

    def times(self, topic):
        return (0.0, 0.5)


def _session() -> Session:
    feed = _Feed()
    session = Session(feed, Palette(), 5.0)
    session.select("/tokens")
    feed.publish(random_tokens(1, seed=1))
    session.next_frame()
    feed.publish(random_tokens(2, seed=2))
    return session


def page(data: bytes) -> None:
    """Messages of a page, one on each line, to a session that shows something."""
    session = _session()
    for line in data.decode("utf-8", "replace").split("\n")[:10]:
        for answer in session.receive(line):
            unpack(answer)
    frame = session.next_frame()
    if frame is not None:
        unpack(frame)
    assert 0 < session.hz < 1e3 and session.mode in MODES


def page_seeds() -> list[bytes]:
    touch = {"type": "touch", "camera": "wrist", "box": [45, 25, 45.5, 25], "hold": True}
    messages = [
        {"type": "mode", "mode": "similarity"},
        touch,
        {"type": "hide", "spaces": ["dinov2"]},
        {"type": "hz", "hz": 2.5},
        {"type": "seek", "index": 0},
        {"type": "pause", "paused": True},
        {"type": "select", "topic": "/other/tokens"},
        {"type": "visible", "visible": False},
        {"type": "refit"},
    ]
    texts = [json.dumps(message).encode() for message in messages]
    return [*texts, b"\n".join((texts[0], texts[1], b'{"type": "untouch"}'))]


def change_page(data: bytes, random) -> bytes:
    """One of the messages."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = change_json(lines[at], random)
    return b"\n".join(lines)


def health(data: bytes) -> None:
    """Diagnostics, twice, and lines of the log: the input is a JSON object of what their messages hold."""
    try:
        content = json.loads(data)
        statuses = [
            Status.of(str(name), int(level) % 5, str(text), [(str(key), str(value)) for key, value in values.items()])
            for name, level, text, values in content["statuses"][:1000]
        ]
        lines = [
            (int(level) % 256, str(node), str(text), int(sec) % 2**31) for level, node, text, sec in content["log"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return  # what no message of ROS can hold
    known, log = TokenizerHealth("/tokens", "/visual_tokenizer"), LogBook()
    for now in (1.0, 2.0):
        known.on_statuses(statuses, now)
        known.sample(now)
    known.on_statuses(statuses[::-1], 3.0)
    for line in lines[:1000]:
        log.add(*line)
    details = known.details(3.5)
    assert len(json.dumps([details, list(known.samples), log.after(0)], allow_nan=False)) < 1 << 22
    text = top.as_text("a test", [details], log.after(0))
    assert not (odd := re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]", text)), odd


def health_seeds() -> list[bytes]:
    counts = {"received": "5", "encoded": "3", "replaced": "1", "unmatched": "0", "undecodable": "0", "pending": "1"}
    model = {"model": "tiny-random", "weights": "random", "token_messages": "7", "fingerprint": "ab" * 32}
    model |= {"shared_memory_readers": "1", "device": "cpu", "encode_errors": "2"}
    times = {f"{stage}_{percent}_ms": "1.5" for stage in top.STAGES for percent in ("p50", "p95")}
    statuses = [
        ("visual_tokenizer: model", 0, "active", model),
        ("visual_tokenizer: timing", 1, "slow", times | {"age_p50_ms": "12.5", "age_p95_ms": "20"}),
        ("visual_tokenizer: camera front", 2, "no image", counts | {"rate_hz": "29.9", "age_sec": "0.1"}),
    ]
    log = [(30, "visual_tokenizer", "a camera is late", 1_700_000_000), (40, "other", "two\nlines", 0)]
    return [json.dumps({"statuses": statuses, "log": log}).encode()]


def tokens(data: bytes) -> None:
    """A token message that a policy would accept, in every mode, with a place touched."""
    message = VisualTokens.from_bytes(data)
    feed = FakeFeed()
    session = Session(feed, Palette(), 5.0)
    session.select("/tokens")
    session.hidden = frozenset()
    feed.latest = snapshot_of(message, before=message)
    for mode in MODES:
        session.mode = mode
        for camera in message.cameras[:2]:
            where = {"type": "touch", "camera": camera, "box": [1, 1, 60, 40], "hold": False}
            session.receive(json.dumps(where))
        unpack(session.frame(feed.latest))


def _small_tokens(stamp_ns: int, grid: tuple[int, int] = (3, 4), **changes) -> VisualTokens:
    affine = (0.1, 0.0, 0.0, 0.0, 0.1, 0.0)
    views = tuple(View(name, name, stamp_ns, 30, 40, affine) for name in ("front", "wrist"))
    return random_tokens(1, seed=1, channels=3, grid=grid, views=views, **changes)


def tokens_seeds() -> list[bytes]:
    words = np.arange(72, dtype=np.uint16).reshape(2, 12, 3)
    changes = (
        {},
        {"features": False},
        {"features": False, "grid": (1, 1), "token_strategy": "cls"},
        {"features": False, "data": words, "dtype": "bfloat16"},
    )
    return [_small_tokens(10**18, **change).to_bytes() for change in changes]


# Recordings


def _show(path: Path) -> None:
    """Every message of a recording, with its images."""
    with open_recording(path) as feed:
        for tokenizer in feed.tokenizers():
            topic = str(tokenizer["topic"])
            session = Session(feed, Palette(), 5.0)
            session.select(topic)
            times = feed.times(topic)
            assert all(map(math.isfinite, times[:1000]))
            for index in {0, 1, len(times) - 1} & set(range(len(times))):
                session.receive(json.dumps({"type": "seek", "index": index}))
                frame = session.next_frame()
                if frame is not None:
                    unpack(frame)
            json.dumps(feed.details(topic), allow_nan=False)


def bag(data: bytes) -> None:
    path = scratch() / "view.mcap"
    path.write_bytes(data)
    _show(path)


def bag_seeds() -> list[bytes]:
    """Two token messages and their images, raw and as JPEG; without checksums, so that mutations are read."""
    from mcap.writer import CompressionType, IndexType, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    types = {name: store.types[f"sensor_msgs/msg/{name}"] for name in ("Image", "CompressedImage")}
    head, time = store.types["std_msgs/msg/Header"], store.types["builtin_interfaces/msg/Time"]
    jpeg = np.frombuffer(camera_images.jpeg(camera_images.photograph(30, 40)), np.uint8)
    seeds = []
    for index_types in (IndexType.ALL, IndexType.NONE):
        stream = io.BytesIO()
        writer = Writer(stream, compression=CompressionType.NONE, enable_crcs=False, index_types=index_types)
        writer.start(profile="ros2", library="test")
        topics = {"/front/image_raw": "Image", "/wrist/image_raw/compressed": "CompressedImage"}
        topics["/tokens"] = "CompressedImage"
        channels = {}
        for topic, kind in topics.items():
            schema = writer.register_schema(f"sensor_msgs/msg/{kind}", "ros2msg", b"")
            channels[topic] = writer.register_channel(topic, "cdr", schema)
        for second in (1, 2):
            header = head(stamp=time(sec=second, nanosec=0), frame_id="camera")
            message = _small_tokens(second * 10**9, features=False)
            pixels = np.zeros(30 * 40, np.uint8)
            messages = {
                "/front/image_raw": types["Image"](header, 30, 40, "mono8", 0, 40, pixels),
                "/wrist/image_raw/compressed": types["CompressedImage"](header, "jpeg", jpeg),
                "/tokens": types["CompressedImage"](header, FORMAT, np.frombuffer(message.to_bytes(), np.uint8)),
            }
            for topic, content in messages.items():
                cdr = bytes(store.serialize_cdr(content, f"sensor_msgs/msg/{topics[topic]}"))
                writer.add_message(channels[topic], second * 10**9, cdr, second * 10**9)
        writer.finish()
        seeds.append(stream.getvalue())
    return seeds


def token_file(data: bytes) -> None:
    path = scratch() / "view.safetensors"
    path.write_bytes(data)
    _show(path)


@functools.cache
def token_file_seeds() -> list[bytes]:
    """Of a run, whose recording lies where the file says, and a message that a page has saved."""
    folder = scratch() / "sources"
    folder.mkdir(exist_ok=True)
    run = scratch() / "run"
    offline_runs.tokenize(run, [offline_runs.write_drive(folder / "one")])
    return [next(run.glob("*.safetensors")).read_bytes(), _small_tokens(10**18).to_bytes()]


TARGETS = [
    Target("view_page", page, page_seeds, (ValueError,), (change_page,), max_bytes=4096, cost=2),
    Target("view_health", health, health_seeds, (), (change_json,), max_bytes=8192),
    Target("view_tokens", tokens, tokens_seeds, (TokenFormatError,), (change_safetensors,), max_bytes=8192, cost=4),
    Target("view_bag", bag, bag_seeds, (ValueError, BagError, TokenFormatError), max_bytes=16384, cost=4),
    Target(
        "view_token_file", token_file, token_file_seeds, (ValueError, TokenFormatError), (change_safetensors,), cost=4
    ),
]
