"""Makes tokens visible: their first three principal components as colour over the camera's picture.

tokens (and <camera>/image_raw, or <camera>/image_raw/compressed) -> token_image, for RViz, rqt and Foxglove.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque

import numpy as np
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.exceptions import InvalidTopicNameException
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import Trigger

from vla_perception.messages.images import ImageDecodeError, compressed_to_rgb, image_to_rgb
from vla_perception.messages.tokens import TokenFormatError, View, VisualTokens, from_message
from vla_perception.nodes.parameters import declare
from vla_perception.nodes.process import Stop, run_node
from vla_perception.principal_components import PrincipalComponents
from vla_perception.token_picture import overlay, side_by_side

#: Pictures kept per camera until their tokens arrive, in bytes as received; encoding may take seconds on a CPU.
HISTORY_BYTES = 64 << 20
#: A picture that is this far from the tokens' stamp still serves where the exact one is not there.
NEAR_NS = 200_000_000
#: Pixels of a view beyond which the message is taken for damaged.
MAX_PIXELS = 1 << 26
#: Tokens that a basis is fitted to. More cost seconds and change little.
FIT_TOKENS = 768


class ColourBasis:
    """Principal components that settle over the first messages and then stay, so that colours do not flicker."""

    def __init__(self, messages: int):
        self._messages = messages
        self._samples: list[np.ndarray] = []
        self._basis: PrincipalComponents | None = None

    def colours(self, tokens: np.ndarray) -> np.ndarray:
        """uint8 [n, 3] of tokens float32 [n, channels]. ValueError if there is nothing finite to fit to."""
        if len(self._samples) < self._messages:
            self._samples.append(_at_most(tokens, FIT_TOKENS))
            try:
                self._basis = PrincipalComponents.fit(_at_most(np.concatenate(self._samples), FIT_TOKENS), self._basis)
            except ValueError:
                self._samples.pop()
                raise
        return self._basis.rgb(tokens)


def _at_most(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[:: -(-len(rows) // count)]


class TokenViewer(Node):
    def __init__(self, _stop: Stop):
        super().__init__("token_viewer")
        declare(self, "camera", "", "Camera whose view is shown. Empty: all of the message, side by side.", fixed=False)
        declare(self, "opacity", 0.6, "Of the colours over the picture. Can change at run time.", 0, 1, fixed=False)
        self._show = declare(self, "show", "tokens", "tokens, or features (the tokenizer's publish_features).")
        self._fit_messages = declare(
            self, "fit_messages", 10, "The colours' meaning settles over this many messages and then stays.", 1, 100
        )
        transport = declare(self, "image_transport", "raw", "raw or compressed: which pictures to subscribe to.")
        for name, value, choices in (
            ("show", self._show, ("tokens", "features")),
            ("image_transport", transport, ("raw", "compressed")),
        ):
            if value not in choices:
                raise ValueError(f'{name} is {" or ".join(choices)}, not "{value}"')
        self._compressed = transport == "compressed"

        self._basis: ColourBasis | None = None
        self._basis_of = None  # what model the basis belongs to
        self._pictures: dict[str, deque] = {}  # camera -> messages, oldest first
        self._picture_subscriptions: dict[str, object] = {}
        self._best_effort: set[str] = set()  # cameras to subscribe to anew, because they offer no more
        self._resubscribe = self.create_guard_condition(self._subscribe_anew)
        self._complaint = ""
        self._publisher = self.create_publisher(Image, "token_image", 5)
        self.create_subscription(CompressedImage, "tokens", self._on_tokens, 2)
        self.create_service(Trigger, "~/refit", self._on_refit)
        self.get_logger().info(
            f"{self.resolve_topic_name('tokens')} as colours on {self.resolve_topic_name('token_image')}"
        )

    def _on_refit(self, _request, response):
        self._basis_of = None
        response.success, response.message = True, f"colours settle anew over {self._fit_messages} messages"
        return response

    def _on_tokens(self, message: CompressedImage):
        try:
            if not self._publisher.get_subscription_count():
                return
            tokens = from_message(message)
            for view in tokens.views:
                self._watch(view.camera)
            picture = self._draw(tokens)
        except (TokenFormatError, ValueError, KeyError) as error:
            self._complain(str(error.args[0]) if error.args else repr(error))
            return
        self._complaint = ""
        height, width = picture.shape[:2]
        image = Image(header=message.header, height=height, width=width, encoding="rgb8", step=3 * width)
        data = array("B")
        data.frombytes(memoryview(np.ascontiguousarray(picture)).cast("B"))
        image.data = data
        self._publisher.publish(image)

    def _draw(self, tokens: VisualTokens) -> np.ndarray:
        camera = self.get_parameter("camera").value
        values = tokens.features_float32() if self._show == "features" else tokens.float32()
        grids = tokens.on_grid(values)
        views, rows, columns, channels = grids.shape
        valid = np.array([view.valid for view in tokens.views])
        model = (tokens.fingerprint, self._show, rows, columns, channels)
        if model != self._basis_of:
            self._basis, self._basis_of = ColourBasis(self._fit_messages), model
        colours = np.zeros((views, rows, columns, 3), np.uint8)
        if valid.any():
            painted = self._basis.colours(grids[valid].reshape(-1, channels))
            colours[valid] = painted.reshape(-1, rows, columns, 3)
        shown = range(views)
        if camera:
            tokens.view(camera)  # KeyError names the cameras that there are
            shown = [tokens.cameras.index(camera)]
        return side_by_side([self._draw_view(tokens.views[i], colours[i]) for i in shown])

    def _draw_view(self, view: View, colours: np.ndarray) -> np.ndarray:
        if not 0 < view.height * view.width <= MAX_PIXELS:
            raise ValueError(f"a view of {view.width} x {view.height} pixels cannot be shown")
        picture = self._picture_of(view)
        opacity = self.get_parameter("opacity").value if view.valid else 0.0
        return overlay(colours, view.affine, view.height, view.width, picture, opacity)

    def _picture_of(self, view: View) -> np.ndarray | None:
        """The picture with the view's stamp, or one close to it, decoded; None where there is none of its size."""
        history = self._pictures.get(view.camera, ())
        nearest = min(history, key=lambda m: abs(_stamp_ns(m) - view.stamp_ns), default=None)
        if nearest is None or abs(_stamp_ns(nearest) - view.stamp_ns) > NEAR_NS:
            return None
        try:
            picture = compressed_to_rgb(nearest) if self._compressed else image_to_rgb(nearest)
        except ImageDecodeError:
            return None  # the tokenizer counts and reports these
        return picture if picture.shape[:2] == (view.height, view.width) else None

    def _watch(self, camera: str, reliability=ReliabilityPolicy.RELIABLE):
        """Subscribes to a camera's pictures, once."""
        if camera in self._pictures:
            return
        history = self._pictures[camera] = deque()

        def keep(message):
            history.append(message)
            while len(history) > 1 and sum(len(kept.data) for kept in history) > HISTORY_BYTES:
                history.popleft()

        def offers_less(_event):
            self._best_effort.add(camera)  # a subscription cannot be replaced inside its own callback
            self._resubscribe.trigger()

        # Only the base name is remapped by ROS; the compressed topic follows it, as with image_transport.
        try:
            topic = self.resolve_topic_name(f"{camera}/image_raw") + ("/compressed" if self._compressed else "")
        except InvalidTopicNameException:
            return
        self._picture_subscriptions[camera] = self.create_subscription(
            CompressedImage if self._compressed else Image,
            topic,
            keep,
            QoSProfile(depth=5, reliability=reliability),
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=offers_less),
        )

    def _subscribe_anew(self):
        while self._best_effort:
            camera = self._best_effort.pop()
            self.destroy_subscription(self._picture_subscriptions.pop(camera))
            del self._pictures[camera]
            self._watch(camera, ReliabilityPolicy.BEST_EFFORT)

    def _complain(self, text: str):
        """Once, not for every message."""
        if text != self._complaint:
            self._complaint = text
            self.get_logger().error(text)


def _stamp_ns(message) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def main(args: list[str] | None = None) -> int:
    return run_node(TokenViewer, args)


if __name__ == "__main__":
    sys.exit(main())
