"""Bytes for the field `data` of a ROS message, in the type that rclpy takes as it is."""

from __future__ import annotations

from array import array
from typing import Any


def byte_array(*parts: Any) -> array:
    """The bytes of contiguous buffers (bytes, memoryviews, NumPy arrays), one after the other, copied once.

    rclpy checks a NumPy array or bytes element by element, which takes some hundred times as long as an array.array.
    """
    data = array("B")
    for part in parts:
        data.frombytes(memoryview(part).cast("B"))
    return data
