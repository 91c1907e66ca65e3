"""A node inside the test process that publishes to and collects from the processes under test."""

from __future__ import annotations

import threading

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from ros_domain import in_domain, wait_until


class Listener:
    """`with Listener(domain) as listener`: `listener.collect(Image, "/image_raw")` is a list that fills up."""

    def __init__(self, domain: int):
        self._domain = domain

    def __enter__(self) -> Listener:
        self._context = rclpy.Context()
        with in_domain(self._domain):
            rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("listener", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()
        return self

    def _spin(self):
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.1)

    def __exit__(self, *_exception):
        self._stop.set()
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def collect(self, message_type, topic: str, depth: int = 50) -> list:
        received: list = []
        self.node.create_subscription(message_type, topic, received.append, depth)
        self._executor.wake()
        return received

    def publisher(self, message_type, topic: str, depth: int = 10):
        return self.node.create_publisher(message_type, topic, depth)


def wait_for_messages(received: list, count: int, timeout: float = 20.0) -> list:
    wait_until(lambda: len(received) >= count, timeout, f"{count} messages (got {len(received)})")
    return received[:count]
