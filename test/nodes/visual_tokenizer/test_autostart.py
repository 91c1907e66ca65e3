"""A node that starts by itself, and a client that asks for states at the same time."""

import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("rclpy")
from rclpy._rclpy_pybind11 import RCLError
from rclpy.lifecycle import TransitionCallbackReturn

from vla_perception.nodes.visual_tokenizer.node import VisualTokenizerNode

pytestmark = pytest.mark.ros


class Node:
    """What of a node `_autostart` uses. Each step gives a result, or raises one, and leaves a state behind."""

    def __init__(self, *steps):
        self.lifecycle_state, self.codes, self.steps = "unconfigured", [], list(steps)
        self._closing = threading.Event()

    def _trigger(self):
        result, self.lifecycle_state = self.steps.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    trigger_configure = trigger_activate = _trigger

    def _end_process(self, code):
        self.codes.append(code)

    def get_logger(self):
        return SimpleNamespace(fatal=lambda text: None)


SUCCESS, FAILURE, ERROR = (getattr(TransitionCallbackReturn, name) for name in ("SUCCESS", "FAILURE", "ERROR"))
CONFIGURED = (SUCCESS, "inactive")


@pytest.mark.parametrize(
    ("steps", "codes"),
    [
        ([CONFIGURED, (SUCCESS, "active")], []),
        ([(FAILURE, "unconfigured")], [1]),
        ([CONFIGURED, (ERROR, "unconfigured")], [1]),
        # As rclpy says in Kilted, and in Jazzy, that the state has no such transition.
        *(([(refused, "configuring")], []) for refused in (ERROR, RCLError("not registered"))),
        *(([CONFIGURED, (refused, "active")], []) for refused in (ERROR, RCLError("not registered"))),
    ],
)
def test_it_ends_where_it_could_not_start_and_not_where_a_client_was_faster(steps, codes):
    node = Node(*steps)
    VisualTokenizerNode._autostart(node)
    assert node.codes == codes and not node.steps
