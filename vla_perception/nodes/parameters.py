"""Parameters: each node has one table of them, a frozen dataclass of `parameter(...)` fields, and declares all from it.

    @dataclass(frozen=True)
    class CameraParameters:
        rate_hz: float = parameter(10.0, "Images per second.", low=0.1, high=240.0)

    self.parameters = NodeParameters(self, CameraParameters, "camera")
    self.parameters.values.rate_hz

A spec says everything about a parameter: default, description, range or choices, and when it may change. Tables need no
ROS to be read (launch files, tests, documentation); `NodeParameters` does.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vla_perception.nodes.ignored_parameters import warn_of_ignored
from vla_perception.printable import CONTROL_CHARACTER, error_text

if TYPE_CHECKING:
    from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
    from rclpy.node import Node
    from rclpy.parameter import Parameter

Table = TypeVar("Table")
"""A frozen dataclass whose fields are made by `parameter`."""

#: Characters of a string and elements of a list: more is a mistake, and a peer must fill neither memory nor log with it.
MAX_CHARACTERS, MAX_ELEMENTS = 4096, 1024
_SPEC = "parameter"  # key of a field's metadata


class Changes(enum.Enum):
    """When a parameter may change; the values are the words of docs/nodes.md."""

    AT_START = "at the start"  # read-only
    UNCONFIGURED = "unconfigured"  # of lifecycle nodes: before configure, and after cleanup
    RUN_TIME = "run time"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        default: bool, int, float, str, or a tuple of int or str. An empty tuple is one of str.
        description: a sentence, as `ros2 param describe` shows it.
        low, high: smallest and largest number; None: no limit.
        choices: the strings that are accepted; (): any.
        changes: when it may change.
        locked: keeps its value for the life of the process where the node's `model_locked` is true.
        check: says what is wrong with a value of the right type and range ("must not be empty"), or nothing.
        any_type: a value of another type is accepted and converted to str: `source:=0`.
    """

    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    changes: Changes = Changes.AT_START
    locked: bool = False
    check: Callable[[Any], str] = lambda _value: ""
    any_type: bool = False

    def validate(self, name: str, value: object) -> Any:
        """The value as the node uses it; ValueError says what is accepted.

        Numbers may be given without a decimal point. Lists become tuples; where the default is empty, empty strings are
        left out: ROS 2 has no empty list of strings.
        """
        try:
            _check_strings(name, value)
            return self._accepted(name, value)
        except ValueError as error:
            raise ValueError(error_text(str(error))) from None

    def _accepted(self, name: str, value: object) -> Any:
        accepted = self._convert(name, value)
        if isinstance(accepted, (int, float)) and not isinstance(accepted, bool):
            low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
            if not low <= accepted <= high:
                bounds = f"at least {low:.15g}" if high == math.inf else f"from {low:.15g} to {high:.15g}"
                raise ValueError(f"{name} must be {bounds}, got {accepted:.15g}")
        if self.choices and accepted not in self.choices:
            raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {accepted!r}")
        if problem := self.check(accepted):
            raise ValueError(f"{name} {problem}")
        return accepted

    def _convert(self, name: str, value: object) -> Any:
        default = self.default
        if isinstance(default, float):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a number, got {value!r}")
            return float(value)
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
            if any(not isinstance(item, kind) for item in items):
                raise ValueError(f"{name} must be a list of {kind.__name__}, got {value!r}")
            return items if default else tuple(filter(None, items))
        if self.any_type and value is not None:
            return str(value)
        if type(value) is not type(default):
            raise ValueError(f"{name} must be of type {type(default).__name__}, got {value!r}")
        return value

    @property
    def ros_default(self) -> Any:
        """The default as ROS 2 takes it. A list without an element would be one of bytes."""
        return (list(self.default) or [""]) if isinstance(self.default, tuple) else self.default

    def descriptor(self) -> ParameterDescriptor:
        """What `ros2 param describe` shows, and rclpy enforces by itself."""
        from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
        from rclpy.parameter import Parameter

        choices = f" One of: {', '.join(filter(None, self.choices))}." if self.choices else ""
        is_float = isinstance(self.default, float)
        descriptor = ParameterDescriptor(
            description=self.description + choices,
            type=Parameter.Type.from_parameter_value(self.ros_default).value,
            read_only=self.changes is Changes.AT_START,
            # A parameter of type double refuses a number without a decimal point.
            dynamic_typing=self.any_type or is_float,
        )
        if self.low is not None and is_float:
            high = sys.float_info.max if self.high is None else float(self.high)
            descriptor.floating_point_range = [FloatingPointRange(from_value=float(self.low), to_value=high)]
        elif self.low is not None:
            high = 2**63 - 1 if self.high is None else int(self.high)
            descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=high, step=1)]
        return descriptor


def _check_strings(name: str, value: object) -> None:
    """Size and characters, before anything else looks at a value or quotes it. The log has strings as they are."""
    items: Collection[object] = (value,)
    if isinstance(value, Collection) and not isinstance(value, str):
        if len(value) > MAX_ELEMENTS:
            raise ValueError(f"{name} must have at most {MAX_ELEMENTS} elements, got {len(value)}")
        items = value
    for text in items:
        if isinstance(text, str) and len(text) > MAX_CHARACTERS:
            raise ValueError(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(text)}")
        if isinstance(text, str) and CONTROL_CHARACTER.search(text):
            raise ValueError(f"{name} must have no control characters, got {text!r}")


def parameter(default: Any, description: str, **spec: Any) -> Any:
    """A field of a table; `spec` as in `ParameterSpec`."""
    return dataclasses.field(default=default, metadata={_SPEC: ParameterSpec(default, description, **spec)})


def parameter_specs(table: type) -> dict[str, ParameterSpec]:
    """Parameter's name → spec, in the order of the table."""
    return {field.name: field.metadata[_SPEC] for field in dataclasses.fields(table)}


class NodeParameters(Generic[Table]):
    """Declares all parameters of a table on a node, warns of settings without effect, and accepts valid changes alone.

    Args:
        executable: the node's name where it is not remapped.
        foreign: names of parameters that a section for several nodes may have for another one (`warn_of_ignored`).
        qos: whether to warn of `qos_overrides` without effect, too; false where they are declared later.
        refusal: asked before a parameter changes: why it may not now, or nothing. Beside what the spec says.
        on_change: called when `values` has changed.

    Attributes:
        values: the present values, an instance of the table; replaced as a whole.

    Raises:
        ValueError: a value that was given at the start is not accepted.
    """

    values: Table

    def __init__(
        self,
        node: Node,
        table: type[Table],
        executable: str,
        *,
        foreign: Collection[str] = (),
        qos: bool = True,
        refusal: Callable[[str], str] = lambda _name: "",
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._specs = parameter_specs(table)
        self._refusal, self._on_change = refusal, on_change
        from rcl_interfaces.msg import ParameterDescriptor

        # Type and range come after `validate`, whose sentences say more than rclpy's exceptions.
        anything = ParameterDescriptor(dynamic_typing=True)
        given = {n: node.declare_parameter(n, spec.ros_default, anything).value for n, spec in self._specs.items()}
        # Before values are checked: a misspelt name may be the reason why one is not accepted.
        warn_of_ignored(node, executable, others=foreign, qos=qos)
        self.values = table(**{name: spec.validate(name, given[name]) for name, spec in self._specs.items()})
        for name, spec in self._specs.items():
            node.set_descriptor(name, spec.descriptor())
        node.add_on_set_parameters_callback(self._validate_parameters)
        node.add_post_set_parameters_callback(self._apply_parameters)

    def _validate_parameters(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        from rcl_interfaces.msg import SetParametersResult

        for parameter in parameters:
            if not parameter.name:  # rclpy would declare it
                return SetParametersResult(successful=False, reason="a parameter has a name")
            if (spec := self._specs.get(parameter.name)) is None:
                continue
            reason = self._refusal(parameter.name)
            try:
                spec.validate(parameter.name, parameter.value)
            except ValueError as error:
                reason = reason or str(error)
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _apply_parameters(self, parameters: Sequence[Parameter]) -> None:
        changed = {
            parameter.name: self._specs[parameter.name].validate(parameter.name, parameter.value)
            for parameter in parameters
            if parameter.name in self._specs
        }
        if changed:
            self.values = dataclasses.replace(self.values, **changed)  # type: ignore[type-var]
            self._on_change()
