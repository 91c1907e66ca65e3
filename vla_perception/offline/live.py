"""Stored tokens against those that a running tokenizer publishes. This module alone of the folder knows ROS."""

from __future__ import annotations

import contextlib
import time

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage

from vla_perception.offline.verify import Report, Stored, differing_models, model_of
from vla_perception.tokens.codec import TokenFormatError
from vla_perception.tokens.message import from_message


def compare_live(a: Stored, topic: str, silence_sec: float = 10.0) -> Report:
    """Compares what arrives on `topic` with the stored frames of the same images, matched by their stamps.

    Ends when every stored frame has been seen, or when nothing has come for `silence_sec` after the first message.
    Waits for the first one without end: the user plays the recording. `Report.only_a` are stored frames that did not
    arrive (a node that is busy takes the latest), `only_b` those that arrived and are not stored.
    """
    known = {stamps: frame for name in a.recordings for stamps, frame in a.by_stamps(name).items()}
    report = Report()
    last = float("inf")

    def on_message(message: CompressedImage) -> None:
        nonlocal last
        last = time.monotonic()
        try:
            tokens = from_message(message)
        except TokenFormatError as error:
            report.problem(str(error))
            return
        frame = known.pop(tokens.stamps_ns, None)
        if frame is None:
            report.only_b += 1
            return
        report.compare(frame(), tokens, f"sequence {tokens.sequence}")
        if not report.settings:
            report.settings = differing_models(a.model, model_of(tokens))

    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("token_verifier", context=context)
    executor = SingleThreadedExecutor(context=context)
    try:
        executor.add_node(node)
        # Every message counts here, where a policy takes the latest: hence no TokenSubscriber.
        qos = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=100, reliability=ReliabilityPolicy.RELIABLE)
        node.create_subscription(CompressedImage, topic, on_message, qos)
        while known and time.monotonic() - last < silence_sec:
            executor.spin_once(0.1)
    finally:
        executor.shutdown()
        node.destroy_node()
        with contextlib.suppress(RuntimeError):  # Ctrl-C: rclpy may be shutting down at this moment
            rclpy.try_shutdown(context=context)
    report.only_a = len(known)
    return report
