"""A camera in a process of its own: noise at 10 Hz, stamped with this process's clock.

python test/support/fake_camera.py NAME
"""

from __future__ import annotations

import sys
import time

import numpy as np
import rclpy
from sensor_msgs.msg import Image

from vla_perception.byte_array import byte_array


def main(name: str) -> None:
    rclpy.init()
    publisher = rclpy.create_node(f"{name}_camera").create_publisher(Image, f"{name}/image_raw", 10)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    message = Image(height=96, width=128, encoding="rgb8", step=384, data=byte_array(pixels))
    while True:
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
        publisher.publish(message)
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
