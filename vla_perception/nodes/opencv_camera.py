"""Camera node on OpenCV: a V4L2 device, an RTSP or HTTP stream, or a video file as ROS images.

Topics, relative to the node's namespace: image_raw, image_raw/compressed, camera_info. Started as
`--ros-args -r __ns:=/front`, it is the camera `front` of the visual tokenizer.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vla_perception.nodes import executables

    executables.begin()  # before what takes long to import

import threading
from dataclasses import dataclass

from rclpy.node import Node
from rclpy.time import Time

from vla_perception.images.camera_info import read_calibration, uncalibrated
from vla_perception.nodes.camera_publisher import CameraPublisher
from vla_perception.nodes.node_runner import GRACE_SEC, Stop, run_node
from vla_perception.nodes.parameters import Changes, NodeParameters, parameter
from vla_perception.sources.video import Frame, SourceError, VideoSource, import_cv2

FIRST_RETRY_SEC = 0.5


@dataclass(frozen=True)
class OpencvCameraParameters:
    """The node's parameters (docs/nodes_cameras.md)."""

    source: str = parameter(
        "/dev/video0", "Device (/dev/video0 or 0), stream (rtsp://.., http://..) or video file.", any_type=True
    )
    frame_id: str = parameter("camera", "frame_id of the images: the camera's optical frame.")
    camera_info_url: str = parameter("", "Calibration YAML: a path, file:// or package://. Empty: uncalibrated.")
    width: int = parameter(0, "Width to ask of a device, in pixels. 0: its own.", low=0, high=16384)
    height: int = parameter(0, "Height to ask of a device, in pixels. 0: its own.", low=0, high=16384)
    rate_hz: float = parameter(
        0.0, "Frames per second to ask of a device, or to play a file at. 0: its own.", low=0, high=1000
    )
    pixel_format: str = parameter("", "Four characters to ask of a device, such as MJPG or YUYV.")
    loop: bool = parameter(True, "Start a video file again at its end; otherwise the node ends there.")
    timeout_sec: float = parameter(5.0, "After this long without a frame a stream is opened anew.", low=0.1, high=600)
    retry_max_sec: float = parameter(
        10.0, "Longest pause between attempts to reopen a source that broke.", low=0.5, high=3600
    )
    jpeg_quality: int = parameter(90, "Of image_raw/compressed.", low=1, high=100, changes=Changes.RUN_TIME)


class OpencvCamera(Node):
    """One thread captures, so that a driver's queue never fills up; another publishes the latest frame."""

    def __init__(self, stop: Stop):
        super().__init__("opencv_camera")
        self._stop = stop
        self.parameters = NodeParameters(self, OpencvCameraParameters, "opencv_camera")
        given = self.parameters.values

        self._calibration = read_calibration(given.camera_info_url) if given.camera_info_url else None
        self._size_reported = False
        self._source = VideoSource(
            given.source,
            width=given.width,
            height=given.height,
            rate_hz=given.rate_hz,
            pixel_format=given.pixel_format,
            loop=given.loop,
            timeout_sec=given.timeout_sec,
        )
        import_cv2()  # without it no source ever opens, a stream neither
        if self._source.kind != "stream":  # a network camera may come up after the robot, a device will not
            self._source.open()
        self._publisher = CameraPublisher(self, given.frame_id)
        self.get_logger().info(f"publishing {self._source.source} on {self._publisher.topic}")

        self._closing = threading.Event()
        self._slot = threading.Condition()
        self._latest: tuple[Frame, int] | None = None  # (Frame, stamp in ns), until it is published
        self._ended = False
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True)
            for target in (self._capture_frames, self._publish_frames)
        ]
        for thread in self._threads:
            thread.start()

    def close(self):
        """Ends the threads. One inside OpenCV may take `timeout_sec` and is not waited for that long."""
        self._closing.set()
        with self._slot:
            self._slot.notify_all()
        for thread in self._threads:
            thread.join(GRACE_SEC)
        if not self._threads[0].is_alive():
            self._source.close()

    def _capture_frames(self):
        retry, broken, remark = FIRST_RETRY_SEC, False, ""
        while not self._closing.is_set():
            try:
                if not self._source.is_open:
                    self._source.open()
                if self._source.remark != remark:
                    remark = self._source.remark
                    if remark:
                        self.get_logger().warning(remark)
                frame = self._source.read()
            except SourceError as error:
                self._source.close()
                self.get_logger().error(f"{error}. Next attempt in {retry:g} s")
                broken = True
                self._closing.wait(retry)
                retry = min(2 * retry, self.parameters.values.retry_max_sec)
                continue
            if broken:
                self.get_logger().info(f"{self._source.source} delivers frames again")
                retry, broken = FIRST_RETRY_SEC, False
            with self._slot:
                if self._source.kind == "file":  # waits for us, so no frame need be skipped
                    self._slot.wait_for(lambda: self._latest is None or self._closing.is_set())
                if frame is None:
                    self._ended = True
                else:
                    # After a wait, which is short of a frame's duration, a file's frame is due now.
                    stamp = self.get_clock().now().nanoseconds - int(frame.age_sec * 1e9)
                    self._latest = frame, max(0, stamp)
                self._slot.notify_all()
            if frame is None:
                return

    def _publish_frames(self):
        while True:
            with self._slot:
                self._slot.wait_for(lambda: self._latest or self._ended or self._closing.is_set())
                if self._closing.is_set():
                    return
                latest, self._latest = self._latest, None
                self._slot.notify_all()
            if latest is None:
                self.get_logger().info(f"{self._source.source} has ended")
                self._publisher.flush(2.0)
                self._stop(0)
                return
            if self._publisher.has_subscribers():
                frame, stamp = latest
                height, width = frame.pixels.shape[:2]
                quality = self.parameters.values.jpeg_quality
                stamp = Time(nanoseconds=stamp).to_msg()
                self._publisher.publish(frame.pixels, "bgr8", stamp, self._camera_info(width, height), quality)

    def _camera_info(self, width: int, height: int):
        """The calibration, unless it is for images of another size: wrong intrinsics are worse than none."""
        calibration = self._calibration
        if calibration is None:
            return uncalibrated(width, height)
        if (calibration.width, calibration.height) == (width, height):
            return calibration
        if not self._size_reported:
            self._size_reported = True
            self.get_logger().error(
                f"the calibration is for {calibration.width} x {calibration.height} pixels, but the images have "
                f"{width} x {height}: camera_info says uncalibrated. Calibrate at this size, or set width and height"
            )
        return uncalibrated(width, height)


def main(args: list[str] | None = None) -> int:
    return run_node(OpencvCamera, args)


if __name__ == "__main__":
    executables.leave(main())
