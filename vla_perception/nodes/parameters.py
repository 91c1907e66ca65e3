"""Declaring parameters with a description and a range in one line each."""

from __future__ import annotations

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node


def declare(node: Node, name: str, default, description: str, low=None, high=None, *, fixed=True, any_type=False):
    """Declares a parameter and returns its value.

    low, high: the range, both or none. fixed: it cannot change while the node runs. any_type: a value of another
    type than the default's is accepted, for the caller to convert.
    """
    descriptor = ParameterDescriptor(description=description, read_only=fixed, dynamic_typing=any_type)
    if isinstance(default, float) and low is not None:
        descriptor.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high))]
    elif isinstance(default, int) and low is not None:
        descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
    return node.declare_parameter(name, default, descriptor).value
