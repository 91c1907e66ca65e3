"""Requests of peers to the services that rclpy gives every node: parameters, and a lifecycle node's states.

rclpy lets the exception of a request that it cannot carry out through to the executor, where it ends the process: in every
release for a parameter of a type that does not exist, in Jazzy for each transition that the present state does not have.
And a client may ask for transitions that only the end of a callback may make: a node that still loads its model would be
*inactive*.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.node import Node

from vla_perception.printable import printable

#: Packages of the requests of rclpy's own services.
_PACKAGES = ("rcl_interfaces", "lifecycle_msgs")
#: What a client may ask for, by label or by number.
_LABELS = ("configure", "cleanup", "activate", "deactivate", "shutdown")
_NUMBERS = range(Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVE_SHUTDOWN + 1)
#: Seconds between two lines of the log about requests that were refused.
_LOG_SEC = 1.0
_MAX_REASON = 300


def guard_requests(node: Node) -> None:
    """From here on a request that cannot be carried out is refused with a reason, and the node lives."""
    for service in node.services:
        if service.srv_type.__module__.partition(".")[0] in _PACKAGES:
            service.callback = functools.partial(_answer, node, service.srv_name, service.callback)


def _answer(node: Node, service: str, callback: Callable[[Any, Any], Any], request: Any, response: Any) -> Any:
    reason = ""
    if isinstance(request, ChangeState.Request):
        asked = request.transition
        if asked.label not in _LABELS if asked.label else asked.id not in _NUMBERS:
            named = repr(asked.label[:100]) if asked.label else asked.id
            reason = f"{named} is not a transition that a client may ask for: these are {', '.join(_LABELS)}"
    if not reason:
        try:
            return callback(request, response)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    reason = printable(reason[:_MAX_REASON])
    node.get_logger().warning(f"a request to {service} was refused: {reason}", throttle_duration_sec=_LOG_SEC)
    # Any other response says that it failed as it is made: success is false, a list is empty.
    refused = SetParametersResult(successful=False, reason=reason)
    if isinstance(request, SetParameters.Request):
        response.results = [*response.results, *[refused] * (len(request.parameters) - len(response.results))]
    elif isinstance(request, SetParametersAtomically.Request):
        response.result = refused
    return response
