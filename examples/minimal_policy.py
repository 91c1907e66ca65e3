"""A policy's eyes in twenty lines: prints shape, rate and age of the visual tokens on the topic `tokens`."""

import time

import rclpy
from rclpy.executors import ExternalShutdownException

from vla_perception.tokens import TokenSubscriber

rclpy.init()
try:
    with TokenSubscriber(rclpy.create_node("minimal_policy")) as tokens:
        begin = time.monotonic()
        while True:
            visual = tokens.wait(timeout_sec=30.0)
            array = visual.float32()  # or visual.torch("cuda")
            rate = tokens.received / (time.monotonic() - begin)
            age = 1e3 * tokens.age(visual)
            print(f"{visual.cameras} {array.shape} {visual.dtype} {rate:.1f} Hz, {age:.0f} ms old, {tokens.lost} lost")
except (KeyboardInterrupt, ExternalShutdownException):
    pass
