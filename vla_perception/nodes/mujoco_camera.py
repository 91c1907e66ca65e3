"""Simulated cameras: a MuJoCo scene rendered off screen in step with its physics.

Topics, relative to the node's namespace and for every camera: <camera>/image_raw, <camera>/image_raw/compressed,
<camera>/camera_info. And /clock.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vla_perception.nodes import executables

    executables.begin()  # before what takes long to import

import queue
import threading
import time

from rclpy.node import Node
from rclpy.time import Time
from rosgraph_msgs.msg import Clock

from vla_perception.images.camera_info import pinhole, uncalibrated
from vla_perception.nodes.camera_publisher import CameraPublisher
from vla_perception.nodes.node_runner import GRACE_SEC, Stop, run_node
from vla_perception.nodes.parameters import declare, warn_of_ignored
from vla_perception.sources.simulation import Simulation

CLOCK_PERIOD_SEC = 0.01
#: Real time that the simulation may fall behind before it gives up catching up.
SLIP_SEC = 0.5


class MujocoCamera(Node):
    """All of MuJoCo lives in one thread, as its OpenGL context must; the executor keeps answering beside it."""

    def __init__(self, stop: Stop):
        super().__init__("mujoco_camera")
        self._stop = stop
        scene = declare(self, "scene", "", "Path of an MJCF file. Empty: the table-top scene of this package.")
        # A default of [] would become an array of bytes.
        cameras = declare(self, "cameras", [""], "Names of the scene's cameras. Empty: all that have one.")
        width = declare(self, "width", 320, "Of every image, in pixels.", 16, 4096)
        height = declare(self, "height", 240, "Of every image, in pixels.", 16, 4096)
        self._rate_hz = declare(self, "rate_hz", 10.0, "Images per second of simulated time, per camera.", 0.1, 240)
        self._speed = declare(
            self, "real_time_factor", 1.0, "Simulated seconds per second; 0: as fast as it goes.", 0, 100
        )
        self._with_clock = declare(
            self, "clock", True, "Publish /clock and stamp with simulated time; otherwise stamp with the wall clock."
        )
        motion = declare(
            self,
            "motion",
            "auto",
            "sine: actuators swing through their control range; none; auto: sine for our own scene, none for others.",
        )
        gl = declare(self, "gl", "auto", "egl, osmesa, or auto: MUJOCO_GL, otherwise the first that is installed.")
        frame_suffix = declare(self, "frame_suffix", "_optical_frame", "frame_id is the camera's name and this.")
        declare(self, "jpeg_quality", 90, "Of image_raw/compressed. Can change at run time.", 1, 100, fixed=False)
        warn_of_ignored(self, "mujoco_camera")
        for name, value, choices in (
            ("motion", motion, ("auto", "sine", "none")),
            ("gl", gl, ("auto", "egl", "osmesa")),
        ):
            if value not in choices:
                raise ValueError(f'{name} is one of {", ".join(choices)}, not "{value}"')

        self._closing = threading.Event()
        self._cameras: dict[str, CameraPublisher] | None = None
        self._cameras_made = threading.Event()
        self._opened: queue.Queue[Simulation | Exception] = queue.Queue()
        arguments = (scene, [name for name in cameras if name], width, height, gl, motion)
        self._thread = threading.Thread(target=self._simulate, args=arguments, name="simulation", daemon=True)
        self._thread.start()
        simulation = self._opened.get()
        if isinstance(simulation, Exception):
            self._thread.join()
            raise simulation
        self._clock_publisher = self.create_publisher(Clock, "/clock", 10) if self._with_clock else None
        self._cameras = {name: CameraPublisher(self, name + frame_suffix, f"{name}/") for name in simulation.cameras}
        self._cameras_made.set()
        topics = ", ".join(publisher.topic for publisher in self._cameras.values())
        self.get_logger().info(f"publishing {topics}")

    def close(self):
        self._closing.set()
        self._thread.join(GRACE_SEC)

    def _simulate(self, *arguments):
        try:
            simulation = Simulation(*arguments)
        except Exception as error:
            self._opened.put(error)
            return
        self._opened.put(simulation)
        self._cameras_made.wait()
        try:
            self._run(simulation)
        except Exception as error:
            if not self._closing.is_set():
                self.get_logger().fatal(f"the simulation broke off: {error}")
                self._stop(1)
        finally:
            simulation.close()

    def _run(self, simulation: Simulation):
        infos = {name: self._camera_info(simulation, name) for name in simulation.cameras}
        clock_steps = max(1, round(CLOCK_PERIOD_SEC / simulation.timestep))
        images = 0
        started = time.monotonic()
        complained = False
        while not self._closing.is_set():
            image_due = max(1, round((images + 1) / self._rate_hz / simulation.timestep))
            simulation.step(max(0, min(clock_steps, image_due - simulation.steps)))
            if self._clock_publisher is not None:
                self._clock_publisher.publish(Clock(clock=Time(nanoseconds=simulation.time_ns).to_msg()))
            if simulation.steps >= image_due:
                images += 1
                self._publish_images(simulation, infos)
            if self._speed == 0:
                continue
            ahead = started + simulation.time_ns * 1e-9 / self._speed - time.monotonic()
            if ahead > 0:
                self._closing.wait(ahead)
            elif ahead < -SLIP_SEC:
                started -= ahead
                if not complained:
                    complained = True
                    self.get_logger().warning(
                        "this machine renders slower than real time, so simulated time passes slower: "
                        "lower rate_hz, width and height, or choose fewer cameras"
                    )

    def _publish_images(self, simulation: Simulation, infos: dict):
        stamp = Time(nanoseconds=simulation.time_ns) if self._with_clock else self.get_clock().now()
        quality = self.get_parameter("jpeg_quality").value
        for name, publisher in self._cameras.items():
            if publisher.has_subscribers():  # rendering is what costs
                publisher.publish(simulation.render(name), "rgb8", stamp.to_msg(), infos[name], quality)

    def _camera_info(self, simulation: Simulation, name: str):
        intrinsics = simulation.intrinsics(name)
        if intrinsics is None:
            self.get_logger().warning(f"camera {name} is orthographic, which camera_info cannot say: uncalibrated")
            return uncalibrated(simulation.width, simulation.height)
        return pinhole(simulation.width, simulation.height, *map(float, intrinsics))


def main(args: list[str] | None = None) -> int:
    return run_node(MujocoCamera, args)


if __name__ == "__main__":
    executables.leave(main())
