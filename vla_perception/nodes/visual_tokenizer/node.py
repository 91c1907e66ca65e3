"""Node `visual_tokenizer`: camera topics in, one topic of visual tokens out. A lifecycle node (docs/nodes.md).

Its lifecycle is here, and how its parts are put together: parameters.py, loading.py, cameras.py, pipeline.py,
token_publisher.py, diagnostics.py. A frame's way is cameras → pipeline → token_publisher.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy._rclpy_pybind11 import RCLError
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.lifecycle.node import LifecycleNodeMixin
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from vla_perception.images.decode import decode_image
from vla_perception.nodes.node_runner import GRACE_SEC, RosLogHandler, Stop, run_node
from vla_perception.nodes.parameters import Changes, NodeParameters
from vla_perception.nodes.visual_tokenizer.bond import ManagerBond
from vla_perception.nodes.visual_tokenizer.cameras import Cameras
from vla_perception.nodes.visual_tokenizer.condition import ConditionTopic
from vla_perception.nodes.visual_tokenizer.diagnostics import Diagnostics, FailureLog, FrameSetMonitor
from vla_perception.nodes.visual_tokenizer.empty_views import EmptyViews
from vla_perception.nodes.visual_tokenizer.loading import (
    BrokenImportError,
    freeze_loaded_objects,
    load_tokenizer,
    release_memory,
    trim_memory,
)
from vla_perception.nodes.visual_tokenizer.parameters import PARAMETERS, TokenizerParameters
from vla_perception.nodes.visual_tokenizer.pipeline import Pipeline
from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher
from vla_perception.printable import error_text
from vla_perception.synchronizer import SetSynchronizer

#: Seconds that the `encode` service waits for an encoding at most.
REQUEST_SEC = 60.0
#: Seconds between two times that freed memory is given back to the system.
TRIM_SEC = 10.0


def _transition(during: str, after: str) -> Callable:
    """A lifecycle callback that keeps the state's name, and logs exceptions, which rclpy would swallow.

    Where it does not succeed, everything is undone and the node is unconfigured.
    """

    def decorate(callback: Callable[..., TransitionCallbackReturn]):
        @functools.wraps(callback)
        def guarded(self: VisualTokenizerNode, state: LifecycleState) -> TransitionCallbackReturn:
            with self._settling:
                self.lifecycle_state = during
            name = callback.__name__.removeprefix("on_")
            result = TransitionCallbackReturn.FAILURE if name == "configure" else TransitionCallbackReturn.ERROR
            try:
                result = callback(self, state)
            except Exception as error:
                expected = isinstance(error, ValueError)
                text = error_text(str(error) if expected else f"{type(error).__name__}: {error}")
                self.get_logger().error(f"{name} failed: {text}" + ("" if expected else f"\n{traceback.format_exc()}"))
                if name == "configure":
                    self._diagnostics.configure_error = text
            succeeded = result == TransitionCallbackReturn.SUCCESS
            if not succeeded:
                self._stop_streaming()
                self._unload()
            self.lifecycle_state = after if succeeded else "unconfigured"
            return result

        return guarded

    return decorate


class VisualTokenizerNode(LifecycleNodeMixin, Node):
    """The node. `stop` ends the process: autostart failed, or only a new process can go on.

    Attributes:
        lifecycle_state: the state's name, as `ros2 lifecycle get` shows it.
    """

    def __init__(self, stop: Stop, **node_options: Any) -> None:
        # Held while parameters are set and while a transition begins: a change that is accepted is in force before it.
        self._settling = threading.RLock()
        Node.__init__(self, "visual_tokenizer", **node_options)
        # A separate group: services answer while a model is loading.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self.lifecycle_state = "unconfigured"
        self._end_process = stop
        self._closing = threading.Event()
        self._pipeline: Pipeline | None = None  # from configure to cleanup
        self._next_sequence = 0  # of a next pipeline: numbers go on
        self._trimmed = time.monotonic()

        # What the tokenizer says: where it computes and why, how far a download is, what it assumes.
        self._log_handler = RosLogHandler(self.get_logger())
        logging.getLogger("vla_perception").addHandler(self._log_handler)

        self.parameters = NodeParameters(
            self,
            TokenizerParameters,
            "visual_tokenizer",
            qos=False,  # those of cameras are declared when the node is activated
            refusal=self._refusal,
            on_change=self._on_parameters_changed,
        )
        self._token_publisher = TokenPublisher(self)
        self._cameras = Cameras(self)
        self._condition = ConditionTopic(self)
        self._diagnostics = Diagnostics(self)
        self._bond = ManagerBond(self)
        self._frame_set_monitor = FrameSetMonitor(self.get_logger())
        self.create_service(Trigger, "encode", self._on_encode, callback_group=MutuallyExclusiveCallbackGroup())
        # Not the node's clock: with use_sim_time that one stops whenever the simulation or the bag does.
        self.create_timer(1.0, self._on_timer, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._autostarting = threading.Thread(target=self._autostart, name="autostart", daemon=True)
        if self.parameters.values.autostart:
            self._autostarting.start()
        else:
            name = self.get_fully_qualified_name()
            self.get_logger().info(f"waits to be configured: `ros2 lifecycle set {name} configure`, or autostart")

    # Lifecycle

    @_transition("configuring", "inactive")
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        parameters = self.parameters.values
        if parameters.bond:
            self._bond.check()
        try:
            tokenizer = load_tokenizer(parameters, self.get_logger(), self._closing)
        except BrokenImportError as error:
            self._end_after_failure(str(error))
            return TransitionCallbackReturn.FAILURE
        if tokenizer is None:
            return TransitionCallbackReturn.FAILURE
        if parameters.shared_memory:
            self._token_publisher.open_shared_memory()
        self._diagnostics.restart()
        self._pipeline = Pipeline(
            tokenizer,
            SetSynchronizer(
                parameters.subscribed_cameras,
                parameters.sync_policy,
                parameters.sync_slop_sec,
                parameters.max_age_sec,
            ),
            parameters,
            self._token_publisher,
            FailureLog(self.get_logger(), self._end_after_failure),
            decode=decode_image,
            empty_views=EmptyViews(tokenizer, parameters.cameras),
            sequence=self._next_sequence,
        )
        self._condition.open(tokenizer)
        self._on_parameters_changed()  # of those that may change at any time, one may have meanwhile
        freeze_loaded_objects()
        return TransitionCallbackReturn.SUCCESS

    @_transition("activating", "active")
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        parameters, pipeline = self.parameters.values, self._pipeline
        assert pipeline is not None, "activated before it was configured"
        pipeline.start()
        self._frame_set_monitor.restart(time.monotonic())
        self._cameras.subscribe(parameters.subscribed_cameras, parameters.image_transport, pipeline)
        if parameters.bond:
            self._bond.start()
        return TransitionCallbackReturn.SUCCESS

    @_transition("deactivating", "inactive")
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_streaming()
        return TransitionCallbackReturn.SUCCESS

    @_transition("cleaningup", "unconfigured")
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    @_transition("shuttingdown", "finalized")
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_streaming()
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Everything was undone where the error was caught: back to unconfigured."""
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """The process ends: answers what waits, and stops the threads as far as they can be."""
        self._closing.set()
        self._bond.stop()
        if (pipeline := self._pipeline) is not None:
            pipeline.close(GRACE_SEC)
        self._token_publisher.close_shared_memory()
        if self._autostarting.is_alive():  # in a transition, which uses the node
            self._autostarting.join(GRACE_SEC)
        logging.getLogger("vla_perception").removeHandler(self._log_handler)

    def _autostart(self) -> None:
        if self._closing.is_set() or self.lifecycle_state != "unconfigured":
            return  # a lifecycle manager was faster
        steps = (("configured", self.trigger_configure), ("activated", self.trigger_activate))
        for name, trigger in steps:
            try:
                result = trigger()
            except RCLError:  # Jazzy's rclpy: the state does not have this transition any more
                result = TransitionCallbackReturn.ERROR
            if result != TransitionCallbackReturn.SUCCESS:
                # Otherwise a client asked for the same, or for something else, meanwhile. What fails leaves it unconfigured.
                if not self._closing.is_set() and self.lifecycle_state == "unconfigured":
                    self.get_logger().fatal(f"autostart: the node could not be {name}, so it ends")
                    self._end_process(1)
                return

    def _stop_streaming(self) -> None:
        self._bond.stop()
        self._cameras.unsubscribe()
        if self._pipeline is not None:
            self._pipeline.stop()

    def _unload(self) -> None:
        """Ends the threads and gives the device's memory back."""
        pipeline, self._pipeline = self._pipeline, None
        self._condition.close()
        if pipeline is not None:
            pipeline.close()  # an encoding in progress uses the memory that is to be given back
            self._next_sequence = pipeline.sequence
            del pipeline
        self._token_publisher.close_shared_memory()
        release_memory()

    def _end_after_failure(self, reason: str) -> None:
        """Fatal: the process exits non-zero, so that a supervisor can restart it."""
        if not self._closing.is_set():
            self.get_logger().fatal(reason)
            self._end_process(1)

    # Parameters

    def set_parameters_atomically(self, parameter_list: list[Parameter]) -> SetParametersResult:
        """What clients ask for comes here. Between the question whether it may change and the change nothing begins."""
        with self._settling:
            return super().set_parameters_atomically(parameter_list)

    def _refusal(self, name: str) -> str:
        """Why a parameter may not change now; empty if it may."""
        spec = PARAMETERS[name]
        if spec.locked and self.parameters.values.model_locked:
            return (
                f"{name} keeps the value that the process was started with, because model_locked is true: start it with "
                "another one"
            )
        if spec.changes is Changes.UNCONFIGURED and self.lifecycle_state != "unconfigured":
            return f"{name} cannot change while the node is configured: deactivate and clean it up first"
        return ""

    def _on_parameters_changed(self) -> None:
        with self._settling:
            if (pipeline := self._pipeline) is not None:
                pipeline.apply_parameters(self.parameters.values)

    # While it is active

    def _on_encode(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if (pipeline := self._pipeline) is None:
            response.success, response.message = False, "the node is not active"
            return response
        request = pipeline.request()
        if not request.wait(REQUEST_SEC):
            request.answer(False, f"not encoded within {REQUEST_SEC:g} s")
        response.success, response.message = request.success, request.text
        return response

    def _on_timer(self) -> None:
        """Once a second: follows the publishers, notices what is missing, publishes diagnostics, gives memory back."""
        now, pipeline = time.monotonic(), self._pipeline
        self._cameras.follow_publishers()
        self._cameras.check_health(now, self.parameters.values.warn_age_sec)
        self._token_publisher.cleanup_dead_nodes()
        if pipeline is not None and self._cameras.all():
            self._frame_set_monitor.check(pipeline, self._cameras, now)
        self._diagnostics.publish(
            self.lifecycle_state,
            self.parameters.values,
            pipeline,
            self._cameras,
            self._token_publisher,
            self._next_sequence if pipeline is None else pipeline.sequence,
        )
        if now - self._trimmed >= TRIM_SEC:
            self._trimmed = now
            trim_memory()


def main(args: list[str] | None = None) -> int:
    """Executable `visual_tokenizer`; returns its exit code."""
    logging.basicConfig(format="%(name)s: %(message)s")
    own = logging.getLogger("vla_perception")  # goes through the node's logger
    own.setLevel(logging.INFO)
    own.propagate = False
    # Transitions, parameters, the service `encode`, and one to spare for the states.
    return run_node(VisualTokenizerNode, args, threads=4)
