"""Makes tokens visible: their first three principal components as color over the camera's image.

tokens (and <camera>/image_raw, or <camera>/image_raw/compressed) -> token_image, for RViz, rqt and Foxglove.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vla_perception.nodes import executables

    executables.begin()  # before what takes long to import

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import Trigger

from vla_perception import options
from vla_perception.images.decode import decode_image, warm_up
from vla_perception.images.encode import to_image
from vla_perception.nodes.node_runner import Stop, run_node
from vla_perception.nodes.parameters import Changes, NodeParameters, parameter
from vla_perception.printable import printable
from vla_perception.spelling import nearest
from vla_perception.tokens import View, VisualTokens, from_message
from vla_perception.visualization.color_basis import ColorBasis
from vla_perception.visualization.overlay import overlay, side_by_side, side_by_side_size

#: Images kept until their tokens arrive, of all cameras together, in bytes as received; encoding may take seconds on a
#: CPU.
HISTORY_BYTES = 256 << 20
#: And at most so many of a camera.
HISTORY = 100
#: Cameras whose images are subscribed to.
MAX_CAMERAS = 16
#: An image that is this far from the tokens' stamp still serves where the exact one is not there.
NEAR_NS = 200_000_000
#: Pixels of what is shown; the camera's image, the message and DDS's copies of it take some 20 bytes for each.
MAX_PIXELS = 1 << 25
#: Seconds between two equal log lines.
REPEAT_SEC = 30.0


class _History:
    """The last messages of one camera."""

    def __init__(self):
        self.messages: deque = deque(maxlen=HISTORY)

    def keep(self, message, most_bytes: int):
        if len(message.data) > most_bytes:
            return
        self.messages.append(message)
        while sum(len(kept.data) for kept in self.messages) > most_bytes:
            self.messages.popleft()

    def nearest(self, stamp_ns: int):
        """The message whose stamp is closest, if it is within NEAR_NS."""
        found = min(self.messages, key=lambda message: abs(_stamp_ns(message) - stamp_ns), default=None)
        return found if found is not None and abs(_stamp_ns(found) - stamp_ns) <= NEAR_NS else None


@dataclass(frozen=True)
class TokenViewerParameters:
    """The node's parameters (docs/nodes_cameras.md)."""

    camera: str = parameter(
        "", "Camera whose view is shown. Empty: all of the message, side by side.", changes=Changes.RUN_TIME
    )
    opacity: float = parameter(0.6, "Of the colors over the image.", low=0, high=1, changes=Changes.RUN_TIME)
    show: str = parameter(
        "tokens",
        "What the colors are made of; features: the tokenizer's publish_features.",
        choices=options.OUTPUTS,
    )
    fit_messages: int = parameter(
        10, "The colors' meaning settles over this many messages and then stays.", low=1, high=100
    )
    image_transport: str = parameter("raw", "Which images to subscribe to.", choices=options.IMAGE_TRANSPORTS)


class TokenViewer(Node):
    def __init__(self, _stop: Stop):
        super().__init__("token_viewer")
        # A file with the tokenizer's parameters may have its `cameras` for all nodes.
        self.parameters = NodeParameters(self, TokenViewerParameters, "token_viewer", foreign=("cameras",))
        self._compressed = self.parameters.values.image_transport == "compressed"
        if self._compressed:
            warm_up()  # ImportError says what is missing

        self._basis: ColorBasis | None = None
        self._basis_of: tuple | None = None  # what model the basis belongs to
        self._images: dict[str, _History] = {}  # of each camera that is subscribed to, or cannot be
        self._image_subscriptions: dict[str, Subscription] = {}
        self._best_effort: set[str] = set()  # cameras to subscribe to anew, because they offer no more
        self._resubscribe = self.create_guard_condition(self._subscribe_anew)
        self._last_logged: dict[str, float] = {}  # text -> when (steady clock)
        self._publisher = self.create_publisher(Image, "token_image", 5)
        self.create_subscription(CompressedImage, "tokens", self._on_tokens, 2)
        self.create_service(Trigger, "~/refit", self._on_refit)
        self.get_logger().info(
            f"{self.resolve_topic_name('tokens')} as colors on {self.resolve_topic_name('token_image')}"
        )

    def _on_refit(self, _request, response):
        self._basis_of = None
        response.success, response.message = (
            True,
            f"colors settle anew over {self.parameters.values.fit_messages} messages",
        )
        return response

    def _on_tokens(self, message: CompressedImage):
        if not self._publisher.get_subscription_count():
            return
        try:
            tokens = from_message(message)
            shown = self._shown(tokens)
            self._watch([tokens.views[index].camera for index in shown])
            self._publisher.publish(to_image(self._draw(tokens, shown), message.header))
        except KeyError as error:  # another camera may come with the next message
            self._log_throttled(str(error.args[0]), self.get_logger().warning)
        except ValueError as error:
            self._log_throttled(str(error), self.get_logger().error)
        except Exception as error:  # noqa: BLE001 - whatever a message does, the next one is shown
            self._log_throttled(f"a message cannot be shown: {type(error).__name__}: {error}", self.get_logger().error)

    def _shown(self, tokens: VisualTokens) -> list[int]:
        """Indices of the views to show. KeyError for a camera that is not there, ValueError for too much."""
        camera = self.parameters.values.camera
        if camera and camera not in tokens.cameras:
            names = ", ".join(tokens.cameras[:MAX_CAMERAS])
            alike = nearest(camera, tokens.cameras[:1000], 0.5)
            raise KeyError(
                f"no camera {camera!r} among {names}" + (f": did you mean {alike[:200]!r}?" if alike else "")
            )
        shown = [tokens.cameras.index(camera)] if camera else list(range(len(tokens.views)))
        if len(shown) > MAX_CAMERAS:
            raise ValueError(f"a message of {len(shown)} views: at most {MAX_CAMERAS} are shown; set `camera` to one")
        sizes = [(tokens.views[index].height, tokens.views[index].width) for index in shown]
        for height, width in sizes:
            if not 0 < height * width <= MAX_PIXELS:
                raise ValueError(f"a view of {width} x {height} pixels cannot be shown; at most {MAX_PIXELS} are")
        height, width = side_by_side_size(sizes)
        if max(height * width, sum(height * width for height, width in sizes)) > MAX_PIXELS:
            raise ValueError(
                f"views that fill {width} x {height} pixels side by side cannot be shown, at most {MAX_PIXELS} are: set "
                "`camera` to one of them"
            )
        return shown

    def _draw(self, tokens: VisualTokens, shown: list[int]) -> np.ndarray:
        values = tokens.features_float32() if self.parameters.values.show == "features" else tokens.float32()
        grids = tokens.as_grid(values)
        _, rows, columns, channels = grids.shape
        model = (tokens.fingerprint, self.parameters.values.show, rows, columns, channels)
        if self._basis is None or model != self._basis_of:
            self._basis, self._basis_of = ColorBasis(self.parameters.values.fit_messages), model
        colors = self._basis.colors_of_views(grids, np.array(tokens.valid))
        finer = rows // tokens.grid[0]
        return side_by_side([self._draw_view(tokens.views[i].on_finer_grid(finer), colors[i]) for i in shown])

    def _draw_view(self, view: View, colors: np.ndarray) -> np.ndarray:
        image = self._image_of(view)
        opacity = self.parameters.values.opacity if view.valid else 0.0
        return overlay(colors, view, image, opacity)

    def _image_of(self, view: View) -> np.ndarray | None:
        """The image with the view's stamp, or one close to it, decoded; None where there is none of its size."""
        nearest = self._images[view.camera].nearest(view.stamp_ns)
        if nearest is None:
            return None
        try:
            image = decode_image(nearest, view.height * view.width)
        except ValueError:
            return None  # the tokenizer counts and reports these
        return image if image.shape[:2] == (view.height, view.width) else None

    def _watch(self, cameras: list[str]):
        """Subscribes to the images of these cameras, and no longer to others' where they would be too many."""
        missing = [camera for camera in cameras if camera not in self._images]
        if len(self._images) + len(missing) > MAX_CAMERAS:
            for camera in [camera for camera in self._images if camera not in cameras]:
                self._forget(camera)
        for camera in missing:
            self._subscribe(camera, ReliabilityPolicy.RELIABLE)

    def _forget(self, camera: str):
        del self._images[camera]
        if (subscription := self._image_subscriptions.pop(camera, None)) is not None:
            self.destroy_subscription(subscription)

    def _subscribe(self, camera: str, reliability: ReliabilityPolicy):
        history = self._images[camera] = _History()

        def keep(message):
            history.keep(message, HISTORY_BYTES // len(self._images))

        def offers_less(_event):
            self._best_effort.add(camera)  # a subscription cannot be replaced inside its own callback
            self._resubscribe.trigger()

        try:
            # Only the base name is remapped by ROS; the compressed topic follows it, as with image_transport.
            topic = self.resolve_topic_name(f"{camera}/image_raw") + ("/compressed" if self._compressed else "")
            self._image_subscriptions[camera] = self.create_subscription(
                CompressedImage if self._compressed else Image,
                topic,
                keep,
                QoSProfile(depth=5, reliability=reliability),
                event_callbacks=SubscriptionEventCallbacks(incompatible_qos=offers_less),
            )
        except Exception as error:  # noqa: BLE001 - rclpy has many for a name that is none; its tokens are shown without
            self.get_logger().warning(f"no images of camera {camera[:100]!r}: {' '.join(str(error).split())[:300]}")

    def _subscribe_anew(self):
        while self._best_effort:
            camera = self._best_effort.pop()
            if camera in self._images:
                self._forget(camera)
                self._subscribe(camera, ReliabilityPolicy.BEST_EFFORT)

    def _log_throttled(self, text: str, log):
        """Logs a text at most every REPEAT_SEC."""
        text, now = printable(text if len(text) <= 500 else f"{text[:500]}…"), time.monotonic()
        if now - self._last_logged.get(text, -REPEAT_SEC) < REPEAT_SEC:
            return
        if len(self._last_logged) >= 32:
            self._last_logged.clear()
        self._last_logged[text] = now
        log(text)


def _stamp_ns(message) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def main(args: list[str] | None = None) -> int:
    return run_node(TokenViewer, args)


if __name__ == "__main__":
    executables.leave(main())
