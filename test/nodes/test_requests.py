"""What peers ask of a node through the services that every node has."""

import signal
import threading

import pytest

rclpy = pytest.importorskip("rclpy")

from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetAvailableStates, GetAvailableTransitions, GetState  # noqa: E402
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue  # noqa: E402
from rcl_interfaces.srv import SetParameters, SetParametersAtomically  # noqa: E402
from rclpy.callback_groups import ReentrantCallbackGroup  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.lifecycle.node import LifecycleNodeMixin  # noqa: E402
from rclpy.node import Node  # noqa: E402
from ros_harness import RosContext, answer_of, free_domain, in_domain, wait_until  # noqa: E402

from vla_perception.nodes.node_runner import run_node  # noqa: E402

pytestmark = pytest.mark.ros

NO_TYPE = Parameter(name="count", value=ParameterValue(type=77))


class Counter(LifecycleNodeMixin, Node):
    """Configures until it is told to end that."""

    def __init__(self):
        Node.__init__(self, "counter")
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.declare_parameter("count", 1)
        self.configuring, self.may_end = threading.Event(), threading.Event()

    def on_configure(self, state):
        self.configuring.set()
        assert self.may_end.wait(30.0)
        return TransitionCallbackReturn.SUCCESS


class Peer:
    """Asks the node for everything that follows, while `run_node` runs it."""

    def __init__(self, ros: RosContext) -> None:
        self.node = ros.node("peer")
        ros.spin(self.node)

    def ask(self, kind, name, **fields):
        return answer_of(self.node.create_client(kind, f"counter/{name}"), kind.Request(**fields))

    def change(self, **transition) -> bool:
        return self.ask(ChangeState, "change_state", transition=Transition(**transition)).success

    @property
    def state(self) -> str:
        return self.ask(GetState, "get_state").current_state.label


@pytest.fixture
def meet():
    """Runs a `Counter` by `run_node`, and `talk(node, peer)` beside it; what that raises is raised."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def meet(talk):
        domain, raised = free_domain(), []

        def make(stop):
            node = Counter()

            def beside():
                try:
                    with RosContext(domain) as ros:
                        talk(node, Peer(ros))
                except BaseException as error:
                    raised.append(error)
                finally:
                    node.may_end.set()
                    stop(0)

            threading.Thread(target=beside).start()
            return node

        with in_domain(domain):
            assert run_node(make, ["test"], threads=3) == 0
        if raised:
            raise raised[0]

    yield meet
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_parameter_of_a_type_that_does_not_exist_is_refused(meet):
    """rclpy raises ValueError for it."""

    def talk(node, peer):
        good = Parameter(name="count", value=ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=2))
        first, second = peer.ask(SetParameters, "set_parameters", parameters=[good, NO_TYPE]).results
        assert first.successful and not second.successful and "77 is not a valid" in second.reason
        result = peer.ask(SetParametersAtomically, "set_parameters_atomically", parameters=[good, NO_TYPE]).result
        assert not result.successful and "77 is not a valid" in result.reason
        assert node.get_parameter("count").value == 2

    meet(talk)


def test_transitions_that_the_state_does_not_have_are_refused(meet):
    """rclpy 7 (Jazzy) raises RCLError for them."""

    def talk(node, peer):
        assert not peer.change(id=Transition.TRANSITION_ACTIVATE)
        assert not peer.change(id=77) and not peer.change(label="\x1b[2J" * 1000)
        assert peer.state == "unconfigured"

    meet(talk)


@pytest.mark.parametrize("given", [("id",), ("label",), ("id", "label")], ids=" and ".join)
def test_every_state_is_reached_as_clients_ask_for_it(meet, given):
    """Nav2's manager and launch_ros give numbers, `ros2 lifecycle set` both as it finds them among those available."""
    ways = [("configure", "inactive"), ("activate", "active"), ("deactivate", "inactive"), ("cleanup", "unconfigured")]
    ways += [("configure", "inactive"), ("activate", "active"), ("shutdown", "finalized")]

    def talk(node, peer):
        node.may_end.set()
        states = peer.ask(GetAvailableStates, "get_available_states").available_states
        assert {state for _, state in ways} <= {state.label for state in states}
        for label, state in ways:
            available = peer.ask(GetAvailableTransitions, "get_available_transitions").available_transitions
            (transition,) = [each.transition for each in available if each.transition.label == label]
            assert peer.change(**{name: getattr(transition, name) for name in given})
            assert peer.state == state

    meet(talk)


@pytest.mark.parametrize(
    "transition", [{"id": Transition.TRANSITION_ON_CONFIGURE_SUCCESS}, {"label": "transition_success"}]
)
def test_no_client_ends_a_transition_that_is_under_way(meet, transition):
    def talk(node, peer):
        request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
        client = peer.node.create_client(ChangeState, "counter/change_state")
        assert client.wait_for_service(20.0)
        configured = client.call_async(request)
        assert node.configuring.wait(20.0)
        assert not peer.change(**transition)
        assert peer.state == "configuring" and not configured.done()
        node.may_end.set()
        wait_until(configured.done, 20.0, "the answer to configure")
        assert configured.result().success and peer.state == "inactive"

    meet(talk)
