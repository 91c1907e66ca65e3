"""The bond with a lifecycle manager, over a stand-in for bondpy (test/support/stand_in_bondpy.py)."""

import importlib.util
import json
import sys
import types

import pytest

rclpy = pytest.importorskip("rclpy")
pytest.importorskip("std_msgs")

import stand_in_bondpy  # noqa: E402
from ros_harness import RosContext, in_domain, wait_until  # noqa: E402
from std_msgs.msg import String  # noqa: E402

from vla_perception.nodes.visual_tokenizer.bond import _BondNode  # noqa: E402

pytestmark = pytest.mark.ros


@pytest.fixture
def tokenizer_node(monkeypatch):
    """The node, configured with a model that computes nothing; and the lines of its log."""
    pytest.importorskip("torch")
    from fake_model import Model

    from vla_perception.nodes.visual_tokenizer import node as node_module

    monkeypatch.setattr(node_module, "load_tokenizer", lambda *_arguments: Model())
    logged = []
    with RosContext() as ros:
        with in_domain(ros.domain):
            node = node_module.VisualTokenizerNode(lambda _code: None, context=ros.context)
        ros.nodes.append(node)
        logger = types.SimpleNamespace(**dict.fromkeys(("info", "warning", "error", "fatal"), logged.append))
        monkeypatch.setattr(node, "get_logger", lambda: logger)
        ros.spin(node)
        try:
            yield ros, node, logged
        finally:
            node.close()


def test_without_bondpy_configure_says_what_to_install(tokenizer_node):
    _ros, node, logged = tokenizer_node
    if importlib.util.find_spec("bondpy") is not None:
        pytest.skip("needs an environment without bondpy")
    assert node.set_parameters([rclpy.parameter.Parameter("bond", value=True)])[0].successful
    node.trigger_configure()
    assert node.lifecycle_state == "unconfigured"
    assert any("bondpy is not installed" in line and "ros/bond_core" in line for line in logged)
    assert node.set_parameters([rclpy.parameter.Parameter("bond", value=False)])[0].successful
    node.trigger_configure()
    assert node.lifecycle_state == "inactive"


def test_a_manager_sees_the_node_from_activate_to_deactivate(tokenizer_node, monkeypatch):
    ros, node, logged = tokenizer_node
    monkeypatch.setitem(sys.modules, "bondpy", types.ModuleType("bondpy"))
    monkeypatch.setitem(sys.modules, "bondpy.bondpy", stand_in_bondpy)
    beats: list[dict] = []
    manager = ros.node("lifecycle_manager")
    manager.create_subscription(String, "bond", lambda message: beats.append(json.loads(message.data)), 50)
    other_side = stand_in_bondpy.Bond(_BondNode(manager), "bond", "visual_tokenizer")
    assert node.set_parameters([rclpy.parameter.Parameter("bond", value=True)])[0].successful
    node.trigger_configure()
    other_side.heartbeat_period = 0.1
    other_side.start()
    ros.spin(manager)

    def of_the_node():
        return [beat for beat in beats if beat["instance_id"] != other_side.instance_id]

    assert not of_the_node()
    node.trigger_activate()
    wait_until(lambda: len(of_the_node()) > 3, 20, "heartbeats")
    first = of_the_node()[0]
    # What nav2_util::LifecycleNode has, which Nav2's manager expects.
    assert (first["id"], first["heartbeat_period"], first["heartbeat_timeout"]) == ("visual_tokenizer", 0.1, 4.0)
    wait_until(lambda: any("the bond is formed" in line for line in logged), 20, "the bond is formed")

    node.trigger_deactivate()
    wait_until(lambda: not of_the_node()[-1]["active"], 20, "the end of the bond is told")
    count = len(of_the_node())
    node.trigger_activate()
    wait_until(lambda: len(of_the_node()) > count + 1 and of_the_node()[-1]["active"], 20, "heartbeats of a new bond")
    assert of_the_node()[-1]["instance_id"] != first["instance_id"]
    assert not any("is broken" in line for line in logged)

    other_side.shutdown()  # a manager that has died: the node says so, and goes on
    node._bond._bond._broken()
    assert any("is broken" in line for line in logged) and node.lifecycle_state == "active"
