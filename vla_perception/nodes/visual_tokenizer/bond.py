"""A bond with the lifecycle manager, as Nav2's own nodes have it: from activate to deactivate, on the topic `bond`."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from rclpy.node import Node

#: Nav2's (nav2_util::LifecycleNode). The manager's own timeout decides when it believes that the node has died.
HEARTBEAT_PERIOD_SEC, HEARTBEAT_TIMEOUT_SEC = 0.1, 4.0


class _BondNode:
    """The node as bondpy may use it, which ends its subscription behind the node's back: the executor dies of that.

    And it declares a parameter whenever heartbeats stop coming, which fails the second time.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def create_publisher(self, *arguments: Any) -> SimpleNamespace:
        publisher = self._node.create_publisher(*arguments)
        return SimpleNamespace(publish=publisher.publish, destroy=lambda: self._node.destroy_publisher(publisher))

    def create_subscription(self, *arguments: Any) -> SimpleNamespace:
        subscription = self._node.create_subscription(*arguments)
        return SimpleNamespace(destroy=lambda: self._node.destroy_subscription(subscription))

    def declare_parameter(self, name: str, default: object) -> Any:
        known = self._node.has_parameter(name)
        return self._node.get_parameter(name) if known else self._node.declare_parameter(name, default)


class ManagerBond:
    """The bond of a node, which has its name as its id. Without a manager that wants one, nothing happens."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._bond: Any = None

    def check(self) -> None:
        """
        Raises:
            ValueError: bondpy is missing; the text says what installs it.
        """
        try:
            importlib.import_module("bondpy.bondpy")
        except ImportError as error:
            raise ValueError(
                f"bond is true, but bondpy is not installed ({error}): install the package `bondpy` of ros/bond_core (branch "
                "ros2) into the workspace, or set bond to false and the lifecycle manager's bond_timeout to 0.0"
            ) from error

    def start(self) -> None:
        """Heartbeats from here on, until `stop`."""
        self.stop()
        bondpy = importlib.import_module("bondpy.bondpy")
        bond = bondpy.Bond(_BondNode(self._node), "bond", self._node.get_name(), self._on_broken, self._on_formed)
        bond.heartbeat_period, bond.heartbeat_timeout = HEARTBEAT_PERIOD_SEC, HEARTBEAT_TIMEOUT_SEC
        bond.start()
        self._bond = bond

    def stop(self) -> None:
        """Tells the manager that the end of the bond is meant."""
        bond, self._bond = self._bond, None
        if bond is not None:
            bond.set_broken_callback(None)
            bond.shutdown()

    def _on_formed(self) -> None:
        self._node.get_logger().info("the lifecycle manager watches this node: the bond is formed")

    def _on_broken(self) -> None:
        # Nav2's nodes go on, too: it is the manager that decides what happens.
        self._node.get_logger().warning(
            "the bond with the lifecycle manager is broken, or was never formed: the manager has ended, hangs, or has "
            "bond_timeout 0.0; the node goes on"
        )
