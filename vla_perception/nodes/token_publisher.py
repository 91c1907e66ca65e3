"""How the node's tokens leave it: the topic `tokens`."""

from __future__ import annotations

from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage

from vla_perception.messages.tokens import VisualTokens, to_message

#: Token messages kept for a reliable subscriber that is behind: 2 MiB each for openvla-7b.
DEPTH = 10


class TokenPublisher:
    """Publishes sets of tokens on the topic `tokens` of `node`, reliably; `qos_overrides` parameters come first."""

    def __init__(self, node: Node) -> None:
        self._publisher = node.create_publisher(
            CompressedImage,
            "tokens",
            QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )

    def wanted(self) -> bool:
        """Whether somebody reads."""
        return self._publisher.get_subscription_count() > 0

    def publish(self, tokens: VisualTokens) -> None:
        self._publisher.publish(to_message(tokens))
