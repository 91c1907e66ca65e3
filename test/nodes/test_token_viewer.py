"""token_viewer: colors that stay; then the node over DDS."""

import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_perception.tokens import View, VisualTokens
from vla_perception.visualization.color_basis import ColorBasis
from vla_perception.visualization.overlay import overlay

ROWS, COLUMNS, CHANNELS = 3, 4, 16
HEIGHT, WIDTH = 30, 48
# Pixels to the grid: everything is seen, and a patch is 12 x 10 pixels.
WHOLE = (COLUMNS / WIDTH, 0, 0, 0, ROWS / HEIGHT, 0)
#: Fingerprint of what is only sent to see whether anything arrives.
WARM_UP = "0" * 64


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def view_of(affine) -> View:
    return View("front", "", 0, HEIGHT, WIDTH, tuple(affine))


# The node.

try:
    from ros_harness import Listener, RosProcess, answer_of, free_domain, wait_for_messages, wait_until
    from sensor_msgs.msg import CompressedImage, Image
    from std_srvs.srv import Trigger

    from vla_perception.images.decode import image_to_rgb
    from vla_perception.tokens import to_message
    from vla_perception.visualization.principal_components import PrincipalComponents
except ImportError:  # no ROS here: the tests below are not selected
    pass


def token_values(seed, views=1):
    """float32 [views, tokens, channels] in which a few directions stand out."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(4, 0.2, CHANNELS)
    return (rng.normal(size=(views, ROWS * COLUMNS, CHANNELS)) * spread).astype(np.float32)


def tokens(values, sequence, *, stamp_ns=None, cameras=("front",), fingerprint="a" * 64):
    stamp_ns = 10**9 * (100 + sequence) if stamp_ns is None else stamp_ns
    return VisualTokens(
        data=values,
        dtype="float32",
        views=tuple(View(camera, f"{camera}_optical", stamp_ns, HEIGHT, WIDTH, WHOLE) for camera in cameras),
        sequence=sequence,
        model="test",
        weights="random",
        fingerprint=fingerprint,
        compute_dtype="float32",
        grid=(ROWS, COLUMNS),
        token_strategy="patch",
        pool=1,
        encoders=({"name": "dinov2", "layer": 0, "channels": (0, CHANNELS)},),
        projector="none",
    )


def camera_image(rgb, stamp_ns):
    image = Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH)
    image.header.stamp.sec, image.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    image.data.frombytes(rgb.tobytes())
    return image


def viewer(domain, **parameters):
    command = ["-m", "vla_perception.nodes.token_viewer", "--ros-args"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={value}"]
    return RosProcess(command, domain)


class Robot:
    """Publishes tokens to the viewer and gives what it shows for them."""

    def __init__(self, listener):
        self.listener = listener
        self.tokens = listener.publisher(CompressedImage, "tokens")
        self.shown = listener.collect(Image, "token_image")

    def connect(self):
        wait_until(self.tokens.get_subscription_count, 30, "the viewer subscribes")
        # Its publisher has found us too once a first image arrives.
        for _ in range(200):
            self.tokens.publish(to_message(tokens(token_values(999), 0, fingerprint=WARM_UP)))
            try:
                wait_for_messages(self.shown, 1, 0.1)
            except AssertionError:
                continue
            break
        self.drain()

    def drain(self):
        """Waits until warm-up images have passed: their answers come in order, the last is known by its stamp."""
        self.show(tokens(token_values(998), 1, stamp_ns=77 * 10**9, fingerprint=WARM_UP))

    def show(self, message):
        stamp = message.stamp_ns
        start = len(self.shown)
        self.tokens.publish(to_message(message))

        def answer():
            of_stamp = [m for m in self.shown[start:] if m.header.stamp.sec * 10**9 + m.header.stamp.nanosec == stamp]
            return of_stamp[-1:]

        return wait_until(answer, 20, "the viewer's image")[0]


@pytest.mark.ros
def test_node_shows_components_that_settle_and_then_stay():
    domain = free_domain()
    with Listener(domain) as listener, viewer(domain, fit_messages=3) as process:
        robot = Robot(listener)
        robot.connect()
        # 1 to 3 are fitted to; afterwards the same tokens give the same colors, whatever came between.
        shown = [image_to_rgb(robot.show(tokens(token_values(k), 10 + k))) for k in range(3)]
        again = image_to_rgb(robot.show(tokens(token_values(2), 20)))
        other = image_to_rgb(robot.show(tokens(-10 * token_values(5), 21)))
        assert np.array_equal(again, shown[2])
        assert np.array_equal(image_to_rgb(robot.show(tokens(token_values(2), 22))), shown[2])
        assert not np.array_equal(other, again)
        # And they are the principal components of what was fitted to.
        basis = ColorBasis(3)
        expected = [basis.colors(token_values(k)[0]) for k in range(3)][2].reshape(ROWS, COLUMNS, 3)
        assert np.array_equal(again, overlay(expected, view_of(WHOLE)))

        refit = listener.node.create_client(Trigger, "/token_viewer/refit")
        answer_of(refit, Trigger.Request())
        fresh = image_to_rgb(robot.show(tokens(token_values(7), 23)))
        colors = PrincipalComponents.fit(token_values(7)[0]).rgb(token_values(7)[0]).reshape(ROWS, COLUMNS, 3)
        assert np.array_equal(fresh, overlay(colors, view_of(WHOLE)))
        assert process.stop(signal.SIGINT) == 0, process.output


@pytest.mark.ros
@pytest.mark.parametrize("reliable", [True, False])
def test_node_lays_colors_over_the_image_with_the_same_stamp(reliable):
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    reliability = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
    domain = free_domain()
    with Listener(domain) as listener, viewer(domain, fit_messages=1, opacity=0.5) as process:
        robot = Robot(listener)
        robot.connect()
        camera = listener.publisher(Image, "front/image_raw", QoSProfile(depth=10, reliability=reliability))
        wait_until(camera.get_subscription_count, 20, "the viewer subscribes to the camera")
        images = [noise(HEIGHT, WIDTH, 3, seed=k) for k in range(3)]
        for k, image in enumerate(images):
            camera.publish(camera_image(image, 10**9 * (200 + k)))
        colors = PrincipalComponents.fit(token_values(1)[0]).rgb(token_values(1)[0]).reshape(ROWS, COLUMNS, 3)
        expected = overlay(colors, view_of(WHOLE), images[1], 0.5)

        def shows_the_image():  # images and tokens travel apart
            shown = robot.show(tokens(token_values(1), 1, stamp_ns=201 * 10**9))
            assert shown.header.frame_id == "front_optical"
            return np.array_equal(image_to_rgb(shown), expected)

        wait_until(shows_the_image, 20, "the colors over the image of that stamp")
        assert process.stop(signal.SIGTERM) == 0, process.output


@pytest.mark.ros
def test_node_shows_all_views_or_one():
    domain = free_domain()
    with Listener(domain) as listener, viewer(domain) as process:
        robot = Robot(listener)
        robot.connect()
        message = tokens(token_values(1, views=2), 1, cameras=("front", "wrist"))
        assert robot.show(message).width == 2 * WIDTH
        assert process.stop() == 0, process.output
    with Listener(domain) as listener, viewer(domain, camera="wrist") as process:
        robot = Robot(listener)
        wait_until(robot.tokens.get_subscription_count, 30, "the viewer subscribes")
        wait_until(lambda: listener.node.count_publishers("token_image"), 30, "the viewer's publisher")

        def shown():
            robot.tokens.publish(to_message(message))
            return robot.shown

        wait_until(shown, 20, "an image")
        assert robot.shown[0].width == WIDTH
        robot.tokens.publish(to_message(tokens(token_values(1, views=2), 2, cameras=("front", "wrist_left"))))
        process.wait_for("no camera 'wrist' among front, wrist_left: did you mean 'wrist_left'?")
        assert process.stop() == 0, process.output


@pytest.mark.ros
def test_node_says_once_what_it_cannot_read():
    domain = free_domain()
    with Listener(domain) as listener, viewer(domain) as process:
        publisher = listener.publisher(CompressedImage, "tokens")
        listener.collect(Image, "token_image")  # it reads nothing while nobody looks

        def reports():
            publisher.publish(CompressedImage(format="jpeg"))
            return "not a token message" in process.output

        wait_until(reports, 30, "a report")
        for _ in range(3):
            publisher.publish(CompressedImage(format="jpeg"))
        assert process.stop() == 0
        assert process.output.count("not a token message") == 1


def of_sizes(sizes, names=None):
    """Tokens of views with these (height, width)."""
    names = names or [f"c{index}" for index in range(len(sizes))]
    message = tokens(token_values(1, views=len(sizes)), 1, cameras=[str(index) for index in range(len(sizes))])
    views = [
        View(name, "camera", 10**9, height, width, (COLUMNS / width, 0, 0, 0, ROWS / height, 0))
        for name, (height, width) in zip(names, sizes)
    ]
    return replace(message, views=tuple(views))


def hostile_messages():
    return {
        "beyond": of_sizes([(8192, 8192)]),
        "line": of_sizes([(1, 10**9 - 1)]),
        "thin beside flat": of_sizes([(10**6, 1), (1, 10**6)]),
        "a strip that grows": of_sizes([(4000, 10), (1, 4000)]),
        "together": of_sizes([(4000, 4000)] * 3),
        "many cameras": of_sizes([(8, 8)] * 500),
        "names": of_sizes(
            [(8, 8)] * 9,
            ["~/{node}", "a//b", "", "/", "x" * 999, "é", "a b", "parameter_events/../x", "{"],
        ),
        "NaN": tokens(np.full((1, ROWS * COLUMNS, CHANNELS), 3e38, np.float32), 1),
    }


@pytest.mark.ros
def test_no_message_ends_the_viewer_or_fills_its_memory():
    domain = free_domain()
    with Listener(domain) as listener, viewer(domain) as process:
        robot = Robot(listener)
        robot.connect()
        status = Path(f"/proc/{process.process.pid}/status")
        for name, message in hostile_messages().items():
            robot.tokens.publish(to_message(message))
            shown = robot.show(tokens(token_values(1), 2, stamp_ns=10**9 * (500 + len(name))))
            assert (shown.height, shown.width) == (HEIGHT, WIDTH), name
        for number in range(20):  # ever other cameras: those of before are given up
            names = [f"n{number}_{index}" for index in range(16)]
            message = of_sizes([(8, 8)] * 16, names)
            robot.show(
                replace(message, views=tuple(replace(v, stamp_ns=10**9 * (900 + number)) for v in message.views))
            )
        subscribed = [topic for topic, _ in listener.node.get_topic_names_and_types() if "_" in topic and "/n" in topic]
        counted = sum(listener.node.count_subscribers(topic) for topic in subscribed)
        assert counted <= 32, counted  # some may only just have gone
        peak_kb = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
        assert peak_kb < 600 << 10
        assert process.stop() == 0, process.output
    for said in (
        "at most 33554432 are",
        "side by side cannot be shown",
        "500 views: at most 16",
        "no images of camera",
    ):
        assert said in process.output, (said, process.output)


@pytest.mark.ros
def test_the_images_that_are_kept_are_bounded():
    from vla_perception.nodes.token_viewer import HISTORY, _History

    history = _History()
    for _ in range(1000):
        history.keep(CompressedImage(data=bytes(10)), 10**6)
    assert len(history.messages) == HISTORY
    history.keep(CompressedImage(data=bytes(10**6 - 5)), 10**6)
    assert len(history.messages) == 1
    history.keep(CompressedImage(data=bytes(10**6 + 1)), 10**6)  # too large: what is there stays
    assert len(history.messages) == 1 and len(history.messages[0].data) == 10**6 - 5


@pytest.mark.ros
def test_node_refuses_bad_parameters_in_one_sentence():
    with viewer(free_domain(), show="pixels") as process:
        assert process.wait(30) == 1
    assert "show must be one of tokens, features, got 'pixels'" in process.output
