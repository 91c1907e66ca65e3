"""The feed of a running system, against a stand-in for the tokenizer: no browser."""

import contextlib
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("rclpy")

from fake_feed import HEIGHT, WIDTH, random_tokens
from ros_harness import ROOT, destroy, in_domain, ros_environment, wait_until

from vla_perception.tokens import to_message
from vla_perception.view.live import LiveFeed

pytestmark = pytest.mark.ros


@contextlib.contextmanager
def live(ros, **options):
    with in_domain(ros.domain), LiveFeed(**options) as feed:
        yield feed


def camera_image(stamp_ns, value=7):
    from sensor_msgs.msg import Image

    message = Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    message.data.frombytes(np.full((HEIGHT, WIDTH, 3), value, np.uint8).tobytes())
    return message


def diagnostics(node="/robot/visual_tokenizer", **values):
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

    values = {"model": "test", "token_messages": "3", "shared_memory_readers": "0"} | values
    pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
    status = DiagnosticStatus(name="visual_tokenizer: model", message="active", hardware_id=node, values=pairs)
    return DiagnosticArray(status=[status])


def test_tokens_are_received_while_a_page_shows_them(ros):
    with live(ros) as feed, ros.fake("--rate", 20) as fake:
        fake.wait_for("ready")
        wait_until(lambda: [t["node"] for t in feed.tokenizers()] == ["/fake_tokenizer"], 20, "the tokenizer is found")
        (summary,) = feed.tokenizers()
        assert summary["topic"] == "/tokens"
        assert not summary["gone"]
        assert feed.snapshot("/tokens") is None, "nobody wanted tokens"
        changes = []
        feed.changed = lambda: changes.append(1)
        feed.acquire("/tokens")
        snapshot = wait_until(lambda: feed.snapshot("/tokens"), 20, "a message")
        assert snapshot.tokens.model == "fake"
        wait_until(lambda: len(changes) > 3, 20, "more messages")
        wait_until(lambda: feed.details("/tokens")["reception"]["received"] > 3, 20, "they are counted")
        feed.release("/tokens")
        wait_until(lambda: feed.details("/tokens")["reception"]["received"] == 0, 20, "no subscription is left")
        assert feed.details("/other") is None and feed.samples("/other") == []


def test_a_tokenizer_under_another_name_is_found_by_its_diagnostics(ros):
    from diagnostic_msgs.msg import DiagnosticArray
    from sensor_msgs.msg import CompressedImage

    node = ros.node("visual_tokenizer", namespace="/robot")
    ros.spin(node)
    node.create_publisher(CompressedImage, "/vision", 10)
    node.create_publisher(CompressedImage, "/front/image_raw/compressed", 10)
    publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
    node.create_timer(0.2, lambda: publisher.publish(diagnostics(weights="random")))
    with live(ros) as feed:
        found = wait_until(lambda: {t["topic"]: t for t in feed.tokenizers()}.get("/vision"), 20, "it is found")
        wait_until(lambda: feed.details("/vision")["weights"] == "random", 20, "its diagnostics are known")
        assert found["node"] == "/robot/visual_tokenizer"


def test_images_come_from_the_topics_that_the_tokenizer_subscribes_to(ros):
    from sensor_msgs.msg import CompressedImage, Image

    node = ros.node("visual_tokenizer", namespace="/robot")
    ros.spin(node)
    node.create_subscription(Image, "/robot/front/image_raw", lambda _message: None, 5)
    node.create_subscription(Image, "/renamed/color", lambda _message: None, 5)
    cameras = [node.create_publisher(Image, topic, 5) for topic in ("/robot/front/image_raw", "/renamed/color")]
    publisher = node.create_publisher(CompressedImage, "tokens", 5)
    with live(ros) as feed:
        wait_until(feed.tokenizers, 20, "it is found")
        feed.acquire("/robot/tokens")
        sequence = [0]

        def snapshot_with_images():
            """Images, then their tokens, until both have arrived: subscriptions take a while."""
            tokens = random_tokens(sequence[0])
            sequence[0] += 1
            for camera, view, value in zip(cameras, tokens.views, (50, 200)):
                camera.publish(camera_image(view.stamp_ns, value))
            publisher.publish(to_message(tokens))
            with contextlib.suppress(AssertionError):
                wait_until(
                    lambda: (s := feed.snapshot("/robot/tokens")) and s.tokens.sequence == sequence[0] - 1, 1, "it"
                )
            shown = feed.snapshot("/robot/tokens")
            return shown if shown is not None and all(shown.images) else None

        snapshot = wait_until(snapshot_with_images, 30, "tokens with both images")
        assert [image.stamp_ns for image in snapshot.images] == [view.stamp_ns for view in snapshot.tokens.views]
        images = [image.get() for image in snapshot.images]
        assert all(image.kind == "image/jpeg" for image in images)
        assert images[0].data != images[1].data


def test_passive_reads_only_beside_another_subscriber(ros):
    from sensor_msgs.msg import CompressedImage

    with live(ros, passive=True) as feed, ros.fake("--rate", 20) as fake:
        fake.wait_for("ready")
        wait_until(feed.tokenizers, 20, "the tokenizer is found")
        feed.acquire("/tokens")
        before = len(feed.samples("/tokens"))
        wait_until(lambda: len(feed.samples("/tokens")) > before + 2, 20, "two seconds of looking")
        assert feed.snapshot("/tokens") is None and "sent" not in fake.output
        policy = ros.node("policy")
        ros.spin(policy)
        subscription = policy.create_subscription(CompressedImage, "tokens", lambda _message: None, 10)
        wait_until(lambda: feed.snapshot("/tokens"), 20, "tokens beside the policy")
        destroy(policy, subscription)
        wait_until(lambda: not feed.details("/tokens")["reception"]["transport"], 20, "it leaves after the policy")


def test_control_calls_the_tokenizers_services(ros):
    with live(ros) as feed, ros.fake() as fake:
        fake.wait_for("ready")
        wait_until(feed.tokenizers, 20, "the tokenizer is found")

        def encoded():
            with contextlib.suppress(ValueError):  # an answer may be lost while the two discover each other
                return feed.control("/tokens", "encode")

        assert re.fullmatch(r"encode: sequence \d+", wait_until(encoded, 30, "an answer"))
        with pytest.raises(ValueError, match="unknown action"):
            feed.control("/tokens", "rm -rf /")


def test_top_once_as_json(ros):
    from diagnostic_msgs.msg import DiagnosticArray
    from sensor_msgs.msg import CompressedImage

    node = ros.node("visual_tokenizer", namespace="/robot")
    ros.spin(node)
    node.create_publisher(CompressedImage, "tokens", 10)
    publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
    counted = []

    def tell() -> None:
        counted.append(time.monotonic())
        publisher.publish(diagnostics(token_messages=str(10 * len(counted))))

    node.create_timer(0.2, tell)
    command = [sys.executable, "-m", "vla_perception.cli", "top", "--once", "--json", "--wait", "20"]
    result = subprocess.run(
        command, env=ros_environment(ros.domain), capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout)["tokenizers"]
    assert report["topic"] == "/robot/tokens" and report["state"] == "active" and report["out_hz"] > 0
