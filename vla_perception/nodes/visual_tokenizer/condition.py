"""The topic `condition`: what modulates the encoders of a model with FiLM, as the policy sends it.

A topic and no service: a latched message reaches a node that starts, or is configured again, after the policy. Its type is
one that every ROS 2 has and that holds a vector of numbers and a name, ``sensor_msgs/msg/ChannelFloat32``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import ChannelFloat32

from vla_perception.printable import printable

if TYPE_CHECKING:
    from vla_perception.tokenizer.tokenizer import VisualTokenizer


class ConditionTopic:
    """The subscription, while a model that takes a condition is loaded."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._subscription: Subscription | None = None
        self._tokenizer: VisualTokenizer | None = None

    def open(self, tokenizer: VisualTokenizer) -> None:
        """From here on conditions go to `tokenizer`; nothing for a model without FiLM."""
        if not tokenizer.condition_channels:
            return
        self._tokenizer = tokenizer
        latched = QoSProfile(
            depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        self._subscription = self._node.create_subscription(ChannelFloat32, "condition", self._on_condition, latched)
        self._node.get_logger().info(
            f"the model has FiLM: no tokens before the policy sends {tokenizer.condition_channels} numbers on "
            f"{self._subscription.topic_name}"
        )

    def close(self) -> None:
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
        self._subscription = self._tokenizer = None

    def _on_condition(self, message: ChannelFloat32) -> None:
        if (tokenizer := self._tokenizer) is None:
            return
        try:
            digest = tokenizer.set_condition(np.asarray(message.values, np.float32))
        except ValueError as error:
            self._node.get_logger().error(f"a condition was rejected, the last one stays: {error}")
            return
        self._node.get_logger().info(f"condition {digest[:16]}… {printable(message.name[:200])!r}")
