"""What the node says of itself: /diagnostics, a warning where cameras do not match, failures in the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.ma  # np.percentile does at its first call, which may be one without a file descriptor left
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node

from vla_perception.nodes.visual_tokenizer.cameras import QUIET_SEC, Camera, Cameras
from vla_perception.nodes.visual_tokenizer.levels import (
    WINDOW_SEC,
    CameraLevel,
    CameraSample,
    Finding,
    Level,
    ModelLevel,
    timing_level,
)
from vla_perception.nodes.visual_tokenizer.parameters import TokenizerParameters
from vla_perception.nodes.visual_tokenizer.pipeline import FAILURES, STAGES, Pipeline
from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher

if TYPE_CHECKING:
    from rclpy.impl.rcutils_logger import RcutilsLogger

    from vla_perception.tokenizer import VisualTokenizer

#: Minimum seconds between repeats of one log message.
REPEAT_SEC = 30.0


class FailureLog:
    """Where a pipeline's failures go. From any thread.

    Args:
        on_fatal: called when the pipeline cannot go on, with the reason.
    """

    def __init__(self, logger: RcutilsLogger, on_fatal: Callable[[str], None]) -> None:
        self._logger = logger
        self._on_fatal = on_fatal
        self._last_logged: dict[str, float] = {}

    def report(self, subject: str, text: str) -> None:
        """Logs what may fail with every frame, once per subject in `REPEAT_SEC`."""
        now = time.monotonic()
        if now - self._last_logged.get(subject, -REPEAT_SEC) >= REPEAT_SEC:
            self._last_logged[subject] = now
            self._logger.error(text)

    def fatal(self, text: str) -> None:
        """Fatal: the process exits non-zero, so that a supervisor can restart it."""
        self._on_fatal(text)


class FrameSetMonitor:
    """Warns once where every camera delivers and yet no frame set comes out."""

    def __init__(self, logger: RcutilsLogger) -> None:
        self._logger = logger
        self.restart(0.0)
        self._frame_sets = 0

    def restart(self, now: float) -> None:
        """The node was activated."""
        self._last_frame_set = now
        self._warned = False

    def check(self, pipeline: Pipeline, cameras: Cameras, now: float) -> None:
        frame_sets, stamps = pipeline.frame_sets()
        if frame_sets != self._frame_sets:
            self._frame_sets, self._last_frame_set, self._warned = frame_sets, now, False
        delivering = all(camera.age_sec(now) < QUIET_SEC for camera in cameras.all())
        known = [stamp for stamp in stamps.values() if stamp is not None]
        if self._warned or not delivering or now - self._last_frame_set < QUIET_SEC or len(known) < len(stamps):
            return
        self._warned = True
        parameters = pipeline.parameters
        approximate = parameters.sync_policy == "approximate"
        limit = "sync_slop_sec" if approximate else "max_age_sec"
        self._logger.warning(
            f"every camera delivers, but for {QUIET_SEC:g} s their stamps did not come within {limit} "
            f"({getattr(parameters, limit):g} s): the last ones are {(max(known) - min(known)) / 1e9:.3f} s apart. "
            f"Synchronise the cameras' clocks, raise {limit}"
            + (", or set sync_policy to latest" if approximate else "")
        )


class Diagnostics:
    """Publishes /diagnostics (docs/nodes.md has the keys and levels).

    Attributes:
        configure_error: why the last `configure` failed; empty if it did not.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.configure_error = ""
        self._model_level = ModelLevel()
        self._camera_levels: dict[str, CameraLevel] = {}

    def restart(self) -> None:
        """Another pipeline counts from zero."""
        self.configure_error = ""
        self._model_level.restart()
        self._camera_levels.clear()

    def publish(
        self,
        state: str,
        parameters: TokenizerParameters,
        pipeline: Pipeline | None,
        cameras: Cameras,
        token_publisher: TokenPublisher,
        token_messages: int,
    ) -> None:
        """One DiagnosticArray.

        Args:
            state: the lifecycle state.
            pipeline: the configured node's, None otherwise.
            token_messages: how many were published since the process began.
        """
        array = DiagnosticArray()
        array.header.stamp = self._node.get_clock().now().to_msg()
        counts, failures, timings = pipeline.report() if pipeline is not None else ({}, dict.fromkeys(FAILURES, 0), {})
        now = time.monotonic()
        for name, counters in counts.items():
            array.status.append(self._camera_status(name, counters, cameras.get(name), parameters, now))
        values = {
            **({"model": parameters.model} if pipeline is None else _model_values(pipeline.tokenizer)),
            "token_messages": token_messages,
            "on_topic": token_publisher.messages,
            "in_shared_memory": token_publisher.written,
            "shared_memory_readers": token_publisher.readers(),
            **failures,
        }
        finding = self._model_level.of(state, self.configure_error, failures, token_messages, parameters, now)
        array.status.append(self._status("model", finding, values))
        ages = token_publisher.ages(WINDOW_SEC)
        finding = timing_level(ages, parameters)
        array.status.append(self._status("timing", finding, _timing_values(timings) | _percentiles("age", ages)))
        self._publisher.publish(array)

    def _camera_status(
        self, name: str, counters: dict[str, int], camera: Camera | None, parameters: TokenizerParameters, now: float
    ) -> DiagnosticStatus:
        rate, age = (camera.rate_hz(now), camera.age_sec(now)) if camera is not None else (0.0, math.inf)
        values = {**counters, "rate_hz": f"{rate:.2f}", "age_sec": f"{age:.3f}"}
        if camera is None:  # not active
            self._camera_levels.pop(name, None)
            return self._status(f"camera {name}", (Level.OK, "ok"), values)
        subscribed = now - camera.since
        sample = CameraSample(counters, rate, min(age, subscribed), subscribed, camera.health_problem)
        finding = self._camera_levels.setdefault(name, CameraLevel()).of(sample, parameters, now)
        return self._status(f"camera {name}", finding, values)

    def _status(self, name: str, finding: Finding, values: Mapping[str, object]) -> DiagnosticStatus:
        level, message = finding
        return DiagnosticStatus(
            level=bytes([level]),
            name=f"{self._node.get_name()}: {name}",
            message=message,
            hardware_id=self._node.get_fully_qualified_name(),
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
        )


def _model_values(tokenizer: VisualTokenizer) -> dict[str, object]:
    keys = ("model", "weights", "fingerprint", "compute_dtype", "device", "runtime", "kernels")
    values: dict[str, object] = {key: getattr(tokenizer, key) for key in keys}
    if tokenizer.device.type == "cuda":
        import torch

        # Reserved: what CUDA graphs hold is not counted as allocated.
        values["device_memory_mb"] = f"{torch.cuda.memory_reserved(tokenizer.device) / 2**20:.0f}"
    return values


def _timing_values(timings: Mapping[str, np.ndarray]) -> dict[str, str]:
    values: dict[str, str] = {}
    for stage in STAGES:
        values |= _percentiles(stage, timings.get(stage, ()))
    return values


def _percentiles(stage: str, seconds: Sequence[float] | np.ndarray) -> dict[str, str]:
    return {
        f"{stage}_p{percent}_ms": f"{np.percentile(seconds, percent) * 1e3:.3f}" if len(seconds) else "nan"
        for percent in (50, 95, 99)
    }
