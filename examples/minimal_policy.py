"""A policy's eyes in twenty lines: prints shape, rate and age of the visual tokens on the topic `tokens`."""

import time

import rclpy
from rclpy.executors import ExternalShutdownException

from vla_perception.tokens import TokenSubscriber

rclpy.init()
try:
    with TokenSubscriber(rclpy.create_node("minimal_policy")) as subscriber:
        begin = time.monotonic()
        while True:
            tokens = subscriber.wait(timeout_sec=30.0)
            array = tokens.float32()  # or tokens.torch("cuda")
            rate = subscriber.received / (time.monotonic() - begin)
            age, lost = 1e3 * subscriber.age(tokens), subscriber.lost
            print(f"{tokens.cameras} {array.shape} {tokens.dtype} {rate:.1f} Hz, {age:.0f} ms old, {lost} lost")
except (KeyboardInterrupt, ExternalShutdownException):
    pass
