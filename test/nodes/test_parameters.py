"""What a table of parameters says, and what a node makes of it."""

from __future__ import annotations

import array
import math
from dataclasses import FrozenInstanceError, dataclass

import pytest

rclpy = pytest.importorskip("rclpy")

from rclpy.parameter import Parameter  # noqa: E402
from ros_harness import RosContext, free_domain  # noqa: E402

from vla_perception.nodes.parameters import Changes, NodeParameters, parameter, parameter_specs  # noqa: E402


@dataclass(frozen=True)
class Table:
    rate_hz: float = parameter(10.0, "Images per second.", low=0.0, high=1000.0, changes=Changes.RUN_TIME)
    speed: float = parameter(1.0, "No upper limit.", low=0.001)
    depth: int = parameter(5, "Messages.", low=1, high=8, changes=Changes.RUN_TIME)
    names: tuple[str, ...] = parameter((), "Empty: all.", changes=Changes.RUN_TIME)
    sizes: tuple[int, ...] = parameter((0,), "Of each.")
    mode: str = parameter("auto", "How.", choices=("auto", "fast"), changes=Changes.RUN_TIME)
    model: str = parameter("tiny", "Which.", check=lambda text: "" if text else "must not be empty", locked=True)
    source: str = parameter("0", "Where from.", any_type=True)
    loop: bool = parameter(False, "Whether.")


SPECS = parameter_specs(Table)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("rate_hz", 3, 3.0),
        ("rate_hz", 1000.0, 1000.0),
        ("speed", 1e300, 1e300),
        ("depth", 8, 8),
        ("names", [""], ()),
        ("names", ["a", "b"], ("a", "b")),
        ("sizes", array.array("q", [224, 0]), (224, 0)),
        ("mode", "fast", "fast"),
        ("source", 0, "0"),
        ("loop", True, True),
    ],
)
def test_values_that_are_accepted(name, given, value):
    accepted = SPECS[name].validate(name, given)
    assert accepted == value and type(accepted) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("rate_hz", -1, "rate_hz must be from 0 to 1000, got -1"),
        ("rate_hz", math.nan, "rate_hz must be a number, got nan"),
        ("rate_hz", True, "rate_hz must be a number"),
        ("rate_hz", None, "rate_hz must be a number"),
        ("speed", 0, "speed must be at least 0.001, got 0"),
        ("depth", 9, "depth must be from 1 to 8, got 9"),
        ("depth", True, "depth must be of type int"),
        ("depth", 2.0, "depth must be of type int"),
        ("names", "a", "names must be a list of str"),
        ("names", [1], "names must be a list of str"),
        ("names", None, "names must be a list"),
        ("sizes", ["a"], "sizes must be a list of int"),
        ("mode", "slow", "mode must be one of auto, fast, got 'slow'"),
        ("model", "", "model must not be empty"),
        ("model", None, "model must be of type str"),
        ("source", None, "source must be of type str"),
        ("loop", 1, "loop must be of type bool"),
        ("names", ["a"] * 1025, "names must have at most 1024 elements, got 1025"),
        ("sizes", array.array("q", bytes(8 * 100_000)), "sizes must have at most 1024 elements"),
        ("model", "x" * 4097, "model must have at most 4096 characters, got 4097"),
        ("names", ["a", "x" * 4097], "names must have at most 4096 characters"),
        ("model", "a\x1b[2J", "model must have no control characters, got 'a\\x1b[2J'"),
        ("names", ["a\n"], "names must have no control characters"),
        ("source", "\u202e", "source must have no control characters, got '\\u202e'"),
    ],
)
def test_values_that_are_not(name, given, words):
    with pytest.raises(ValueError) as error:
        SPECS[name].validate(name, given)
    assert str(error.value).startswith(words) and len(str(error.value)) < 5000


def test_an_error_quotes_a_part_of_a_long_value():
    with pytest.raises(ValueError, match="mode must be one of auto, fast") as error:
        SPECS["mode"].validate("mode", "x" * 4096)
    with pytest.raises(ValueError, match="sizes must be a list of int") as other:
        SPECS["sizes"].validate("sizes", ["x" * 4096] * 1024)
    assert len(str(error.value)) < 5000 and len(str(other.value)) < 5000


@pytest.fixture(scope="module")
def domain():
    return free_domain()


@pytest.fixture
def declared(domain):
    """Makes the parameters of a node that was started with these arguments."""
    made = []

    def declare(*arguments, **options):
        words = ["--ros-args", *(word for argument in arguments for word in ("-p", argument))]
        made.append(RosContext(domain, words))
        node = made[-1].node("camera", start_parameter_services=False)
        return node, NodeParameters(node, Table, "camera", **options)

    yield declare
    for ros in made:
        ros.close()


def test_a_node_has_what_it_was_started_with(declared):
    _, parameters = declared("rate_hz:=3", "names:=[a, b]", "source:=0")
    assert parameters.values == Table(rate_hz=3.0, names=("a", "b"), source="0")
    with pytest.raises(FrozenInstanceError):
        parameters.values.rate_hz = 4.0


def test_changes_are_checked_and_applied_together(declared):
    changed, locked = [], {"mode": "mode is locked"}
    node, parameters = declared(refusal=lambda name: locked.get(name, ""), on_change=lambda: changed.append(1))

    def change(**values):
        return node.set_parameters_atomically([Parameter(name, value=value) for name, value in values.items()])

    assert change(rate_hz=7, names=["c"]).successful
    assert (parameters.values.rate_hz, parameters.values.names, changed) == (7.0, ("c",), [1])
    for values, words in (
        ({"rate_hz": 8, "depth": 9}, "depth"),
        ({"rate_hz": -1}, "rate_hz must be from 0 to 1000"),  # rclpy looks at numbers with a decimal point alone
        ({"rate_hz": 8.0, "mode": "fast"}, "mode is locked"),
        ({"rate_hz": 8.0, "loop": True}, "read-only"),
        ({"": 1}, "a parameter has a name"),  # rclpy would declare it
    ):
        result = change(**values)
        assert not result.successful and words in result.reason
    assert (parameters.values.rate_hz, parameters.values.mode, changed) == (7.0, "auto", [1])


def test_descriptions_say_range_and_choices(declared):
    node, _ = declared()
    (rate,) = node.describe_parameter("rate_hz").floating_point_range
    (depth,) = node.describe_parameter("depth").integer_range
    assert (rate.from_value, rate.to_value) == (0.0, 1000.0) and (depth.from_value, depth.to_value) == (1, 8)
    assert node.describe_parameter("mode").description == "How. One of: auto, fast."
    assert node.describe_parameter("loop").read_only and not node.describe_parameter("mode").read_only


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_value_that_is_not_a_number_is_refused(declared, value):
    """rclpy takes NaN for a number within any range."""
    with pytest.raises(Exception, match="rate_hz"):
        declared(f"rate_hz:={value}")
