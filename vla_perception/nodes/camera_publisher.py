"""The topics of one camera: image_raw, image_raw/compressed and camera_info."""

from __future__ import annotations

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.duration import Duration
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from vla_perception.images.encode import to_image, to_jpeg

QUEUE_DEPTH = 5


class CameraPublisher:
    """Publishes images in the forms that have subscribers, each with its camera_info.

    The topics are `<prefix>image_raw`, relative to the node's namespace, and beside it `image_raw/compressed` and
    `camera_info`. Remapping `<prefix>image_raw` moves all three.
    """

    def __init__(self, node: Node, frame_id: str, prefix: str = ""):
        # Only the base name is remapped by ROS; the others follow it, as with image_transport.
        self.topic = node.resolve_topic_name(prefix + "image_raw")
        self.frame_id = frame_id
        self._raw = node.create_publisher(Image, self.topic, QUEUE_DEPTH)
        self._compressed = node.create_publisher(CompressedImage, self.topic + "/compressed", QUEUE_DEPTH)
        self._info = node.create_publisher(CameraInfo, self.topic.rpartition("/")[0] + "/camera_info", QUEUE_DEPTH)

    def has_subscribers(self) -> bool:
        """Whether anybody subscribes to the images or to camera_info."""
        return any(p.get_subscription_count() for p in (self._raw, self._compressed, self._info))

    def publish(self, pixels: np.ndarray, encoding: str, stamp: Time, info: CameraInfo, jpeg_quality: int):
        """pixels: uint8 [height, width, 3] in the order that encoding, "rgb8" or "bgr8", says."""
        info.header.stamp, info.header.frame_id = stamp, self.frame_id
        if self._raw.get_subscription_count():
            self._raw.publish(to_image(pixels, info.header, encoding))
        if self._compressed.get_subscription_count():
            self._compressed.publish(to_jpeg(pixels, info.header, encoding, jpeg_quality))
        self._info.publish(info)

    def flush(self, timeout_sec: float):
        """Waits until reliable subscribers have everything, for a publisher that is about to end."""
        for publisher in (self._raw, self._compressed, self._info):
            publisher.wait_for_all_acked(Duration(seconds=timeout_sec))
