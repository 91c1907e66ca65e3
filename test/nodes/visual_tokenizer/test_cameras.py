"""The cameras that an active node subscribes to."""

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("torch")

from fake_model import Model
from rclpy.lifecycle import TransitionCallbackReturn
from ros_harness import RosContext, in_domain

from vla_perception.nodes.visual_tokenizer import node as node_module

pytestmark = pytest.mark.ros


def test_a_camera_that_is_remapped_to_another_topic_of_the_node_is_named(monkeypatch, capfd):
    """DDS has one type for each topic of a process."""
    monkeypatch.setattr(node_module, "load_tokenizer", lambda *_arguments: Model())
    with RosContext(args=["--ros-args", "-r", "front/image_raw:=tokens"]) as ros:
        with in_domain(ros.domain):
            node = node_module.VisualTokenizerNode(lambda _code: None, context=ros.context)
        ros.nodes.append(node)
        node.trigger_configure()
        assert node.trigger_activate() != TransitionCallbackReturn.SUCCESS
        assert node.lifecycle_state == "unconfigured"
        node.close()
    said = capfd.readouterr().err
    assert "camera front: /tokens cannot be subscribed to; does a remapping" in said and "Traceback" not in said
