"""Node `visual_tokenizer`: camera topics in, one topic of visual tokens out. A lifecycle node (docs/nodes.md).

Lifecycle, parameters, subscriptions and diagnostics are here; what is done with frames is in pipeline.py.
torch is imported when the node is configured, so that the node is up at once and tells what it is doing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.lifecycle.node import LifecycleNodeMixin
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import HistoryPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import Trigger

from vla_perception import options, startup
from vla_perception.images import decode as images
from vla_perception.nodes.node_runner import GRACE_SEC, RosLogHandler, Stop, run_node
from vla_perception.nodes.parameters import declare, warn_of_ignored, warn_of_ignored_qos
from vla_perception.nodes.visual_tokenizer.pipeline import FAILURES, STAGES, Pipeline
from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher
from vla_perception.synchronizer import HISTORY, POLICIES, SetSynchronizer
from vla_perception.tokens.arrivals import Senders
from vla_perception.tokens.message import check_header

if TYPE_CHECKING:
    from rclpy.subscription import MessageInfo  # Jazzy has no name for it

    from vla_perception.tokenizer import VisualTokenizer

TRANSPORTS = ("raw", "compressed")
TRIGGERS = ("continuous", "on_request")
# What the tokenizer knows by these names, written again here: importing it would import torch (test_choices.py compares).
DTYPES = ("float32", "bfloat16", "float16")
RUNTIMES = ("auto", "eager", "onednn", "graph", "compile")
#: What decides which model is loaded and how it runs.
MODEL = (
    "model",
    "adapter",
    "encoders",
    "image_size",
    "image_transforms",
    "token_strategy",
    "projector",
    "pool",
    "device",
    "compute_dtype",
    "runtime",
)
#: Settled for the life of the process where model_locked is true: that, and what an image may take.
LOCKED = (*MODEL, "max_image_pixels")
#: Cameras, and characters of a camera's name: more is a mistake, and a peer must not make the node warm up for it.
MAX_CAMERAS = 64
MAX_CAMERA_NAME = 200
#: Seconds without a frame, or without a set, after which something is wrong.
QUIET_SEC = 5.0
#: Seconds after which a publisher that was killed is not listed any more (Fast DDS: 20).
LISTED_SEC = 30.0
#: Seconds between two log lines about the same trouble.
REPEAT_SEC = 30.0
#: Seconds that the `encode` service waits for an encoding at most.
REQUEST_SEC = 60.0


@dataclass(frozen=True)
class _Setting:
    """One parameter: its default, its description, its range or choices, and when it may change."""

    default: object
    text: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False


SETTINGS: dict[str, _Setting] = {
    "model": _Setting(
        "tiny-random",
        "A checkpoint as it is published (docs/models.md), names of timm's encoders, or a preset's name for random "
        "weights.",
    ),
    "adapter": _Setting(
        "",
        "Directory of a LoRA adapter to add to the model; empty: the one in the checkpoint's lora_adapter, where its "
        "weights are without it; none: none.",
    ),
    "encoders": _Setting([""], "Names of the encoders to keep, such as dinov2; empty: all of the model."),
    "image_size": _Setting(
        [0], "Side of the encoders' input in pixels, one for all or one for each; 0: the model's own."
    ),
    "image_transforms": _Setting(
        [""],
        "What is done to images before they are resized, in this order, as in training: rotate180, "
        "crop:x,y,width,height, jpeg, lanczos3, center_crop_tf, center_crop_pil; camera=step for one camera alone.",
    ),
    "token_strategy": _Setting(
        "patch",
        "patch: a token per patch; cls: each encoder's summary of the whole image; cls+patch: both.",
        choices=("patch", "cls", "cls+patch"),
    ),
    "projector": _Setting(
        "",
        "From the encoders' width to the language model's; empty: the model's own; none: features.",
        choices=("", *options.PROJECTORS),
    ),
    "pool": _Setting(1, "k: k × k neighbouring patch tokens are averaged into one.", 1, 64),
    "device": _Setting(
        "auto",
        "Where encoders and projector run: cpu, cuda or cuda:N; auto: a CUDA device that works, otherwise the CPU.",
    ),
    "compute_dtype": _Setting(
        "auto",
        "Precision of encoders and projector; auto: bfloat16 on CUDA (float16 before Ampere), float32 on a CPU; float8: "
        "the encoders' linear layers in float8, all else in bfloat16: from Ada and Hopper on, less exact.",
        choices=("auto", *DTYPES, "float8"),
    ),
    "runtime": _Setting(
        "auto",
        "How the network runs: auto; eager; onednn (CPU); graph (CUDA graphs); compile (torch.compile, which takes a "
        "minute or more when the node is configured).",
        choices=RUNTIMES,
    ),
    "cameras": _Setting(
        ["front"], "Names of the cameras, in the order of the views; each is subscribed to as <name>/image_raw."
    ),
    "image_transport": _Setting(
        "raw", "raw: <camera>/image_raw; compressed: <camera>/image_raw/compressed.", choices=TRANSPORTS
    ),
    "max_image_pixels": _Setting(
        64_000_000,  # streams.MAX_PIXELS
        "A larger image is counted as undecodable, before anything of it is decoded.",
        1,
        1_000_000_000,
        live=True,
    ),
    "token_dtype": _Setting("bfloat16", "Type of the tokens in the message.", choices=DTYPES, live=True),
    "publish_features": _Setting(
        False, "Whether the message also carries the features before the projector.", live=True
    ),
    "sync_policy": _Setting(
        "approximate",
        "approximate: frames whose stamps lie within sync_slop_sec; latest: each frame of the first camera with the "
        "others' last ones.",
        choices=POLICIES,
        live=True,
    ),
    "sync_slop_sec": _Setting(
        0.05, "approximate: largest difference between the stamps of one set, in seconds.", 0.0, 10.0, live=True
    ),
    "max_age_sec": _Setting(
        0.5, "latest: largest distance of a frame's stamp from the first camera's, in seconds.", 0.0, 60.0, live=True
    ),
    "max_rate_hz": _Setting(
        0.0, "continuous: at most this many token messages per second; 0 for no limit.", 0.0, 1000.0, live=True
    ),
    "trigger": _Setting(
        "continuous",
        "continuous: every latest set; on_request: the latest set when the service encode is called.",
        choices=TRIGGERS,
        live=True,
    ),
    "shared_memory": _Setting(
        True, "Whether policies on this machine may read the tokens from shared memory, where iceoryx2 is installed."
    ),
}


@dataclass
class _Camera:
    """One camera's subscription and what is known about it. Times are seconds on the monotonic clock."""

    name: str
    topic: str
    message_type: type
    since: float
    qos_is_given: bool = False
    reliability: ReliabilityPolicy = ReliabilityPolicy.RELIABLE
    subscription: Subscription | None = None
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    senders: Senders = field(default_factory=Senders)
    numbered: bool = False  # whether the middleware tells the number that the sender gave a message
    several_since: float | None = None  # since when more than one publisher is listed
    complaint: str = ""

    def rate_hz(self, now: float) -> float:
        """Frames per second over the last `QUIET_SEC`."""
        recent = [arrival for arrival in tuple(self.arrivals) if now - arrival <= QUIET_SEC]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 and recent[-1] > recent[0] else 0.0

    def age_sec(self, now: float) -> float:
        """Seconds since the last frame came, infinite before the first."""
        return now - self.arrivals[-1] if self.arrivals else float("inf")


def _guarded(transition: Callable[..., TransitionCallbackReturn]):
    """Logs what goes wrong in a transition: rclpy would swallow it."""

    @functools.wraps(transition)
    def guarded(self: VisualTokenizerNode, state: LifecycleState) -> TransitionCallbackReturn:
        name = transition.__name__.removeprefix("on_")
        try:
            return transition(self, state)
        except ValueError as error:
            self.get_logger().error(f"{name} failed: {error}")
        except Exception as error:
            self.get_logger().error(f"{name} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        self._stop_streaming()
        self._unload()
        return TransitionCallbackReturn.FAILURE if name == "configure" else TransitionCallbackReturn.ERROR

    return guarded


class VisualTokenizerNode(LifecycleNodeMixin, Node):
    """The node. `stop` ends the process; it is called if autostart fails, and if nothing can go on."""

    def __init__(self, stop: Stop, **node_options: object) -> None:
        Node.__init__(self, "visual_tokenizer", **node_options)
        # A group of its own: the states are told while a model is loading.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self._end_process = stop
        self._closing = threading.Event()

        self._pipeline: Pipeline | None = None  # from configure to cleanup
        self._next_sequence = 0  # goes on where another pipeline follows
        self._configured = False
        self._subscribing = threading.Lock()  # held while subscriptions come and go
        self._cameras: dict[str, _Camera] = {}
        self._last_set = 0.0
        self._sets_seen = 0
        self._no_sets_told = False
        self._told: dict[str, float] = {}
        self._failures: dict[str, int] = {}

        # What the tokenizer says: where it computes and why, how far a download is, what it assumes.
        self._log_handler = RosLogHandler(self.get_logger())
        logging.getLogger("vla_perception").addHandler(self._log_handler)

        given = {name: self._declare(name, setting) for name, setting in SETTINGS.items()}
        self._model_locked = declare(
            self,
            "model_locked",
            False,
            "Whether what decides on the model (model, adapter, device, …) keeps for the life of the process the value that "
            "it was started with, whoever asks.",
        )
        autostart = declare(
            self, "autostart", False, "Whether the node configures and activates itself, or ends if it cannot."
        )
        warn_of_ignored(self, "visual_tokenizer", qos=False)
        self._settings = {name: _checked(name, value) for name, value in given.items()}
        self._qos_looked_at = False
        self.add_on_set_parameters_callback(self._may_set)
        self.add_post_set_parameters_callback(self._have_set)

        self._tokens = TokenPublisher(self)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(Trigger, "encode", self._on_encode, callback_group=MutuallyExclusiveCallbackGroup())
        # Not the node's clock: with use_sim_time that one stops whenever the simulation or the bag does.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._watch, clock=steady)
        self._qos_mismatch = self.create_guard_condition(self._follow_publishers)
        if autostart:
            threading.Thread(target=self._autostart, name="autostart", daemon=True).start()
        else:
            name = self.get_fully_qualified_name()
            self.get_logger().info(f"waits to be configured: `ros2 lifecycle set {name} configure`, or autostart")

    # Lifecycle

    @_guarded
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._configured = True  # from here on, what shapes the model and the topics is settled
        settings = self._settings
        tokenizer = self._load()
        if tokenizer is None:
            return TransitionCallbackReturn.FAILURE
        if settings["shared_memory"]:
            self._tokens.open_shared_memory()
        self._failures = {}
        self._pipeline = Pipeline(
            tokenizer,
            SetSynchronizer(
                settings["cameras"], settings["sync_policy"], settings["sync_slop_sec"], settings["max_age_sec"]
            ),
            settings,
            decode=self._to_rgb,
            publish=self._tokens.publish,
            wanted=self._tokens.has_subscribers,
            complain=self._complain,
            fail=self._fail,
            sequence=self._next_sequence,
        )
        # Python looks through the objects of torch and the model now and then, 0.1 to 0.2 s each time. Not any more.
        gc.collect()
        gc.freeze()
        return TransitionCallbackReturn.SUCCESS

    @_guarded
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        now = time.monotonic()
        compressed = self._settings["image_transport"] == "compressed"
        self._pipeline.start()
        self._last_set = now
        self._no_sets_told = False
        with self._subscribing:
            for name in self._settings["cameras"]:
                topic = f"{name}/image_raw"
                if compressed:
                    # Resolved before the suffix is appended: remapping the base name moves both.
                    topic = f"{self.resolve_topic_name(topic)}/compressed"
                camera = _Camera(
                    name=name, topic=topic, message_type=CompressedImage if compressed else Image, since=now
                )
                self._subscribe(camera, ReliabilityPolicy.RELIABLE)
                self._cameras[name] = camera
        if not self._qos_looked_at:
            self._qos_looked_at = True
            warn_of_ignored_qos(self, [self._reliability_parameter(camera) for camera in self._cameras.values()])
        return TransitionCallbackReturn.SUCCESS

    @_guarded
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_streaming()
        return TransitionCallbackReturn.SUCCESS

    @_guarded
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    @_guarded
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop_streaming()
        self._unload()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Everything was undone where the error was caught: back to unconfigured."""
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """The process ends: gives up what waits, and stops the threads as far as they can be."""
        self._closing.set()
        if (pipeline := self._pipeline) is not None:
            pipeline.close(GRACE_SEC)
        self._tokens.close_shared_memory()
        logging.getLogger("vla_perception").removeHandler(self._log_handler)

    def _autostart(self) -> None:
        if self._closing.is_set() or self._state_machine.current_state[1] != "unconfigured":
            return  # somebody else was faster
        steps = (("configured", self.trigger_configure), ("activated", self.trigger_activate))
        for name, trigger in steps:
            if trigger() != TransitionCallbackReturn.SUCCESS:
                if not self._closing.is_set():
                    self.get_logger().fatal(f"autostart: the node could not be {name}, so it ends")
                    self._end_process(1)
                return

    def _load(self) -> VisualTokenizer | None:
        """The model, loaded and warmed up; None if the process is to end meanwhile."""
        settings = dict(self._settings)
        views = len(settings["cameras"])
        self.get_logger().info(
            f"loading {settings['model']} (device {settings['device']}, compute_dtype {settings['compute_dtype']}), "
            f"{views} camera(s)"
        )
        result: list[VisualTokenizer | BaseException] = []
        finished = threading.Event()

        begun = phase = time.monotonic()

        def ended(what: str) -> None:
            nonlocal phase
            now = time.monotonic()
            self.get_logger().info(f"{what} took {now - phase:.1f} s")
            phase = now

        # Read by OpenMP when torch is imported. Threads that spin while they wait make encoding four times as long
        # where something else needs the cores (measured: 2 cores, load 6, two views of `tiny-random`).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

        def load() -> None:
            try:
                from vla_perception.tokenizer.checkpoints.open import check_model
                from vla_perception.tokenizer.image_transforms import parse_chains

                choices = _choices(settings)
                # Before PyTorch is imported, which takes seconds.
                check_model(settings["model"], **choices)
                strangers = set(parse_chains(choices["image_transforms"], [224])) - {"", *settings["cameras"]}
                if strangers:
                    raise ValueError(
                        f"image_transforms names {', '.join(sorted(strangers))}, which is not among the cameras "
                        f"({', '.join(settings['cameras'])})"
                    )
                try:
                    images.warm_up()
                except ImportError as error:
                    if settings["image_transport"] == "compressed":
                        raise ValueError(f"image_transport compressed: {error}") from error
                with startup.imports():
                    from vla_perception.tokenizer.runtime import limit_threads
                    from vla_perception.tokenizer.tokenizer import VisualTokenizer

                    limit_threads()
                ended("importing PyTorch and timm")
                tokenizer = VisualTokenizer.load(
                    settings["model"],
                    device=settings["device"],
                    compute_dtype=settings["compute_dtype"],
                    runtime=settings["runtime"],
                    **choices,
                )
                ended("loading the model")
                tokenizer.warm_up(views, cameras=settings["cameras"])
                ended("warming up")
                result.append(tokenizer)
            except ImportError as error:
                result.append(ValueError(f"{error}; run `pip install '.[tokenizer]'` in vla_perception's sources"))
            except BaseException as error:
                result.append(error)
            finished.set()

        # Reading 15 GB cannot be interrupted, but it can be left behind.
        threading.Thread(target=load, name="load", daemon=True).start()
        while not finished.wait(0.05):
            if self._closing.is_set():
                return None
        if isinstance(result[0], BaseException):
            raise result[0]
        tokenizer = result[0]
        if tokenizer.weights == "random":
            self.get_logger().warning(
                f"{tokenizer.model} has random weights: the tokens mean nothing to a policy. Set `model` to the "
                "directory of a checkpoint for real ones"
            )
        for note in tokenizer.notes:
            self.get_logger().info(note)
        self.get_logger().info(
            f"ready after {time.monotonic() - begun:.1f} s: {tokenizer.model} ({tokenizer.weights} weights), "
            f"{tokenizer.tokens_per_view} tokens × {tokenizer.channels} channels per view, fingerprint {tokenizer.fingerprint[:12]}, "
            f"runtime {tokenizer.runtime} on {tokenizer.device} in {tokenizer.compute_dtype}"
        )
        return tokenizer

    def _stop_streaming(self) -> None:
        with self._subscribing:
            for camera in self._cameras.values():
                if camera.subscription is not None:
                    self.destroy_subscription(camera.subscription)
            self._cameras = {}
        if self._pipeline is not None:
            self._pipeline.stop()

    def _unload(self) -> None:
        """Ends the threads and gives the device's memory back."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()  # an encoding that runs uses the memory that is to be given back
            self._next_sequence = pipeline.sequence
            del pipeline
        self._tokens.close_shared_memory()
        gc.unfreeze()
        gc.collect()
        if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_initialized():
            with contextlib.suppress(RuntimeError):  # of a device that failed, or older torches after a failed capture
                torch.cuda.empty_cache()
        self._configured = False

    # Parameters

    def _declare(self, name: str, setting: _Setting) -> object:
        text = setting.text + (f" One of: {', '.join(setting.choices)}." if setting.choices else "")
        # A number may be given without a decimal point, which a parameter of type double would refuse.
        number = isinstance(setting.default, float)
        return declare(self, name, setting.default, text, setting.low, setting.high, fixed=False, any_type=number)

    def _may_set(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            setting = SETTINGS.get(parameter.name)
            if setting is None:
                continue
            if self._model_locked and parameter.name in LOCKED:
                return SetParametersResult(
                    successful=False,
                    reason=f"{parameter.name} keeps the value that the process was started with, because model_locked is "
                    "true: start it with another one",
                )
            if self._configured and not setting.live:
                return SetParametersResult(
                    successful=False,
                    reason=f"{parameter.name} is settled when the node is configured: deactivate and clean it up first",
                )
            try:
                _checked(parameter.name, parameter.value)
            except ValueError as error:
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _have_set(self, parameters: list[Parameter]) -> None:
        for parameter in parameters:
            if parameter.name in SETTINGS:
                self._settings[parameter.name] = _checked(parameter.name, parameter.value)
        if (pipeline := self._pipeline) is not None:
            pipeline.settings_changed()

    # Cameras

    def _subscribe(self, camera: _Camera, reliability: ReliabilityPolicy) -> None:
        """(Re)creates the camera's subscription; `qos_overrides` parameters come first."""
        camera.qos_is_given = self._is_given(self._reliability_parameter(camera))
        policies = [QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH]
        if camera.qos_is_given:
            policies.append(QoSPolicyKind.RELIABILITY)
        if camera.subscription is not None:
            self.destroy_subscription(camera.subscription)
        camera.reliability = reliability
        camera.subscription = self.create_subscription(
            camera.message_type,
            camera.topic,
            lambda message, info: self._on_image(camera, message, info),
            QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=HISTORY, reliability=reliability),
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=lambda _event: self._qos_mismatch.trigger()),
            qos_overriding_options=QoSOverridingOptions(policies),
        )

    def _reliability_parameter(self, camera: _Camera) -> str:
        return f"qos_overrides.{self.resolve_topic_name(camera.topic)}.subscription.reliability"

    def _is_given(self, name: str) -> bool:
        """Whether the user gave a value for a parameter that is not declared (rclpy has no other way to ask)."""
        if self.has_parameter(name):
            return True
        self.declare_parameter(name, None, ParameterDescriptor(dynamic_typing=True))
        given = self.get_parameter(name).type_ != Parameter.Type.NOT_SET
        self.undeclare_parameter(name)
        return given

    def _follow_publishers(self) -> None:
        """Takes the reliability that each camera's publishers offer: best effort if any offers no more."""
        with self._subscribing:
            for camera in self._cameras.values():
                if camera.qos_is_given:
                    continue
                offers = {info.qos_profile.reliability for info in self.get_publishers_info_by_topic(camera.topic)}
                best_effort = ReliabilityPolicy.BEST_EFFORT in offers
                wanted = ReliabilityPolicy.BEST_EFFORT if best_effort else ReliabilityPolicy.RELIABLE
                if offers and wanted != camera.reliability:
                    self.get_logger().info(f"camera {camera.name}: publishers offer {wanted.short_key}, so it is taken")
                    self._subscribe(camera, wanted)

    def _on_image(self, camera: _Camera, message: Image | CompressedImage, info: MessageInfo | None = None) -> None:
        pipeline, stamp, now = self._pipeline, message.header.stamp, time.monotonic()
        if pipeline is None:
            return
        subject = "header"
        try:
            check_header(message.header)
            subject = "size"
            # Now, not when it is decoded: several wait for each camera.
            images.check_message_size(message, self._settings["max_image_pixels"])
        except ValueError as error:
            taken = pipeline.refuse(camera.name, str(error), subject)
        else:
            taken = pipeline.add(camera.name, stamp.sec * 10**9 + stamp.nanosec, message)
        if taken:
            camera.arrivals.append(now)
            number = None if info is None else info["publication_sequence_number"]
            camera.numbered = number is not None
            if camera.numbered:
                camera.senders.add(number, now)

    def _to_rgb(self, message: Image | CompressedImage) -> np.ndarray:
        return images.decode_image(message, self._settings["max_image_pixels"])

    def _on_encode(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if (pipeline := self._pipeline) is None:
            response.success, response.message = False, "the node is not active"
            return response
        request = pipeline.request()
        if not request.wait(REQUEST_SEC):
            request.answer(False, f"not encoded within {REQUEST_SEC:g} s")
        response.success, response.message = request.success, request.text
        return response

    # Telling

    def _complain(self, subject: str, text: str) -> None:
        """Logs trouble that may come with every frame, once per subject in `REPEAT_SEC`."""
        now = time.monotonic()
        if now - self._told.get(subject, -REPEAT_SEC) >= REPEAT_SEC:
            self._told[subject] = now
            self.get_logger().error(text)

    def _fail(self, text: str) -> None:
        """Nothing can go on in this process: whoever started it may start another one."""
        if not self._closing.is_set():
            self.get_logger().fatal(text)
            self._end_process(1)

    def _watch(self) -> None:
        """Once a second: follows the publishers, notices what is missing, publishes diagnostics."""
        self._follow_publishers()
        self._tokens.tidy()
        now = time.monotonic()
        for camera in tuple(self._cameras.values()):
            complaint = self._complaint(camera, now)
            if complaint and not camera.complaint:
                self.get_logger().warning(f"camera {camera.name}: {complaint}")
            elif camera.complaint and not complaint:
                self.get_logger().info(f"camera {camera.name}: frames arrive, and from one publisher")
            camera.complaint = complaint
        self._watch_sets(now)
        self._publish_diagnostics(now)

    def _complaint(self, camera: _Camera, now: float) -> str:
        """What is wrong with a camera and what to do about it; empty if nothing is."""
        topic = self.resolve_topic_name(camera.topic)
        publishers = self.get_publishers_info_by_topic(camera.topic)
        if min(camera.age_sec(now), now - camera.since) < QUIET_SEC:
            return self._several_complaint(camera, topic, publishers, now)
        other = topic.removesuffix("/compressed") if topic.endswith("/compressed") else f"{topic}/compressed"
        if not publishers:
            if self.count_publishers(other):
                transport = "raw" if topic.endswith("/compressed") else "compressed"
                return f"nobody publishes {topic}, but somebody does {other}: set image_transport to {transport}"
            return (
                f"nobody publishes {topic}: start the camera, or remap {camera.name}/image_raw to the topic that it "
                "publishes"
            )
        kind = f"sensor_msgs/msg/{camera.message_type.__name__}"
        if all(info.topic_type != kind for info in publishers):
            return f"{topic} carries {publishers[0].topic_type}, not {kind}: look at image_transport and the remapping"
        if camera.arrivals:
            return f"no frame for {QUIET_SEC:g} s although {topic} has a publisher: has the camera stopped?"
        if camera.reliability == ReliabilityPolicy.BEST_EFFORT and not topic.endswith("/compressed"):
            return (
                f"{topic} has a publisher, but no frame arrives. Best-effort images are lost where Fast DDS's shared "
                "memory is smaller than a frame: start the *camera* with FASTRTPS_DEFAULT_PROFILES_FILE and "
                "FASTDDS_DEFAULT_PROFILES_FILE set to vla_perception's config/fastdds.xml, let it publish reliably, or "
                "set image_transport to compressed (docs/transport.md)"
            )
        return (
            f"{topic} has a publisher, but no frame arrives: does the camera capture? Does qos_overrides ask for more "
            "than it offers?"
        )

    def _several_complaint(self, camera: _Camera, topic: str, publishers: list[TopicEndpointInfo], now: float) -> str:
        """That several publishers send on a camera's topic. One that is only listed may have been killed, or be idle."""
        if len(publishers) < 2:
            camera.several_since = None
            return ""
        camera.several_since = camera.several_since or now
        # Cyclone DDS tells no numbers: there, one that is listed for long is believed to send.
        listed_long = not camera.numbered and camera.arrivals and now - camera.several_since > LISTED_SEC
        if not camera.senders.take_turns(now) and not listed_long:
            return ""
        names = ", ".join(sorted(f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in publishers))
        return (
            f"more than one publisher sends on {topic} (listed: {names}): their images alternate as one view. Stop one, or "
            "remap its topic and name it in `cameras`"
        )

    def _watch_sets(self, now: float) -> None:
        """Says once if every camera delivers and yet no set comes out."""
        pipeline = self._pipeline
        if pipeline is None or not self._cameras:
            return
        sets, stamps = pipeline.sets()
        if sets != self._sets_seen:
            self._sets_seen, self._last_set, self._no_sets_told = sets, now, False
        delivering = all(camera.age_sec(now) < QUIET_SEC for camera in tuple(self._cameras.values()))
        if self._no_sets_told or not delivering or now - self._last_set < QUIET_SEC or None in stamps.values():
            return
        self._no_sets_told = True
        spread = (max(stamps.values()) - min(stamps.values())) / 1e9
        approximate = self._settings["sync_policy"] == "approximate"
        limit = "sync_slop_sec" if approximate else "max_age_sec"
        self.get_logger().warning(
            f"every camera delivers, but for {QUIET_SEC:g} s their stamps did not come within {limit} "
            f"({self._settings[limit]:g} s): the last ones are {spread:.3f} s apart. Synchronise the cameras' clocks, "
            f"raise {limit}" + (", or set sync_policy to latest" if approximate else "")
        )

    def _publish_diagnostics(self, now: float) -> None:
        name = self.get_name()
        array = DiagnosticArray()
        array.header.stamp = self.get_clock().now().to_msg()
        pipeline = self._pipeline
        tokenizer = pipeline.tokenizer if pipeline is not None else None
        counts, failures, timings = pipeline.report() if pipeline is not None else ({}, dict.fromkeys(FAILURES, 0), {})
        facts: dict[str, object] = {
            "token_messages": pipeline.sequence if pipeline is not None else self._next_sequence,
            "on_topic": self._tokens.messages,
            "in_shared_memory": self._tokens.written,
            "shared_memory_readers": self._tokens.readers(),
            **failures,
        }
        for camera_name, values in counts.items():
            camera = self._cameras.get(camera_name)
            complaint = camera.complaint if camera is not None else ""
            values["rate_hz"] = f"{camera.rate_hz(now) if camera is not None else 0.0:.2f}"
            values["age_sec"] = f"{camera.age_sec(now) if camera is not None else float('inf'):.3f}"
            array.status.append(self._status(f"{name}: camera {camera_name}", complaint, values))
        if tokenizer is None:
            facts = {"model": self._settings["model"]} | facts
        else:
            keys = ("model", "weights", "fingerprint", "compute_dtype", "device", "runtime")
            facts = {key: getattr(tokenizer, key) for key in keys} | facts
            if tokenizer.device.type == "cuda":
                import torch

                # Reserved: what CUDA graphs hold is not counted as allocated.
                facts["device_memory_mb"] = f"{torch.cuda.memory_reserved(tokenizer.device) / 2**20:.0f}"
        rose = [key for key, value in failures.items() if value > self._failures.get(key, 0)]
        self._failures = failures
        status = self._status(f"{name}: model", ", ".join(rose), facts)
        state = self._state_machine.current_state[1]
        status.message = f"{state}, and sets fail ({', '.join(rose)}): see the log" if rose else state
        array.status.append(status)
        stages = {}
        for stage in STAGES:
            values = timings.get(stage, ())
            for percent in (50, 95, 99):
                number = f"{np.percentile(values, percent) * 1e3:.3f}" if len(values) else "nan"
                stages[f"{stage}_p{percent}_ms"] = number
        array.status.append(self._status(f"{name}: timing", "", stages))
        self._diagnostics.publish(array)

    def _status(self, name: str, complaint: str, values: dict[str, object]) -> DiagnosticStatus:
        return DiagnosticStatus(
            level=DiagnosticStatus.WARN if complaint else DiagnosticStatus.OK,
            name=name,
            message=complaint or "ok",
            hardware_id=self.get_fully_qualified_name(),
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
        )


def _choices(settings: Mapping[str, object]) -> dict[str, object]:
    """What a user chooses of a model, as `VisualTokenizer.load` takes it."""
    return {
        "adapter": settings["adapter"] or None,
        # A parameter cannot be an empty list of strings: what is empty within it is left out.
        "encoders": list(filter(None, settings["encoders"])),
        "image_size": list(settings["image_size"]),
        "image_transforms": list(filter(None, settings["image_transforms"])),
        "token_strategy": settings["token_strategy"],
        "projector": settings["projector"] or None,
        "pool": settings["pool"],
    }


def _checked(name: str, value: object) -> object:
    """The value of a parameter as it is used. ValueError says what would be accepted."""
    setting = SETTINGS[name]
    if isinstance(setting.default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not setting.low <= value <= setting.high:
            raise ValueError(f"{name} must be from {setting.low:g} to {setting.high:g}, got {value:g}")
        return float(value)
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{name} must be one of {', '.join(setting.choices)}, got {value!r}")
    if name == "cameras":
        cameras = list(value or [])
        if not cameras or len(set(cameras)) != len(cameras):
            raise ValueError(f"cameras must be one or more different names, got {cameras}")
        if len(cameras) > MAX_CAMERAS or max(map(len, cameras)) > MAX_CAMERA_NAME:
            raise ValueError(
                f"cameras must be at most {MAX_CAMERAS} names of at most {MAX_CAMERA_NAME} characters, got {len(cameras)} "
                f"of at most {max(map(len, cameras))}"
            )
        for camera in cameras:
            if not all(part.isidentifier() and part.isascii() for part in camera.removeprefix("/").split("/")):
                raise ValueError(
                    f"cameras: {camera!r} is no name; use letters, digits and _, and remap {camera!r}'s topic"
                )
        return cameras
    if name in ("encoders", "image_transforms", "image_size"):
        return list(value or setting.default)
    if name in ("model", "device") and not value:
        raise ValueError(f"{name} must not be empty: {setting.text}")
    return value


def main(args: list[str] | None = None) -> int:
    """Executable `visual_tokenizer`; returns its exit code."""
    logging.basicConfig(format="%(name)s: %(message)s")
    own = logging.getLogger("vla_perception")  # goes through the node's logger
    own.setLevel(logging.INFO)
    own.propagate = False
    # Transitions, parameters and images, the service `encode`, and one to spare for the states.
    return run_node(VisualTokenizerNode, args, threads=4)
