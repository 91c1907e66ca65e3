"""What clients and cameras do at the same moment, in a certain order: the node runs callbacks in several threads."""

import threading

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("torch")

from fake_model import Model
from rcl_interfaces.msg import SetParametersResult
from rclpy.parameter import Parameter
from ros_harness import RosContext, in_domain, wait_until
from sensor_msgs.msg import Image

from vla_perception.nodes.visual_tokenizer import node as node_module

pytestmark = pytest.mark.ros


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setattr(node_module, "load_tokenizer", lambda *_arguments: Model())
    with RosContext() as ros:
        with in_domain(ros.domain):
            node = node_module.VisualTokenizerNode(lambda _code: None, context=ros.context)
        ros.nodes.append(node)
        yield node
        node.close()


def set_cameras(node, *names):
    return node.set_parameters_atomically([Parameter("cameras", value=list(names))])


class Lock:
    """A lock that tells when a second thread asks for it."""

    def __init__(self):
        self.lock, self.asked, self.owner = threading.RLock(), threading.Event(), threading.current_thread()

    def __enter__(self):
        if threading.current_thread() is not self.owner:
            self.asked.set()
        self.lock.acquire()

    def __exit__(self, *_exception):
        self.lock.release()


def test_a_parameter_that_is_accepted_is_in_force_where_a_transition_begins_meanwhile(node):
    """Otherwise the node is configured for other cameras than it subscribes to: their first frame ended it."""
    node._settling = lock = Lock()
    configuring = threading.Thread(target=node.trigger_configure)

    def begin(_parameters):
        """Asked after the node's own callback, which has accepted the change."""
        configuring.start()
        wait_until(lambda: lock.asked.is_set() or not configuring.is_alive(), 20, "configure begins")
        return SetParametersResult(successful=True)

    node._on_set_parameters_callbacks.append(begin)
    assert set_cameras(node, "left", "right").successful
    configuring.join()
    assert node.lifecycle_state == "inactive"
    assert tuple(node._pipeline.report()[0]) == node.parameters.values.cameras == ("left", "right")
    node._on_set_parameters_callbacks.remove(begin)
    assert not set_cameras(node, "front").successful


def test_a_frame_that_waited_while_the_cameras_were_changed_is_nobodys(node):
    node.trigger_configure()
    node.trigger_activate()
    front = node._cameras["front"]
    node.trigger_deactivate()
    node.trigger_cleanup()
    assert set_cameras(node, "left").successful
    node.trigger_configure()
    node.trigger_activate()
    message = Image(height=1, width=1, encoding="mono8", step=1, data=b"\0")
    node._cameras._on_image(front, message, {"publication_sequence_number": 1})
    assert {name: counts["received"] for name, counts in node._pipeline.report()[0].items()} == {"left": 0}
