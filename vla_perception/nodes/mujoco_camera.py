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
from dataclasses import dataclass

from rclpy.node import Node
from rclpy.time import Time
from rosgraph_msgs.msg import Clock

from vla_perception import options
from vla_perception.images.camera_info import pinhole, uncalibrated
from vla_perception.nodes.camera_publisher import CameraPublisher
from vla_perception.nodes.node_runner import GRACE_SEC, Stop, run_node
from vla_perception.nodes.parameters import Changes, NodeParameters, parameter
from vla_perception.sources.simulation import Simulation

CLOCK_PERIOD_SEC = 0.01
#: Real time that the simulation may fall behind before it gives up catching up.
SLIP_SEC = 0.5


@dataclass(frozen=True)
class MujocoCameraParameters:
    """The node's parameters (docs/nodes_cameras.md)."""

    scene: str = parameter("", "Path of an MJCF file. Empty: the table-top scene of this package.")
    cameras: tuple[str, ...] = parameter((), "Names of the scene's cameras. Empty: all that have one.")
    width: int = parameter(320, "Of every image, in pixels.", low=16, high=4096)
    height: int = parameter(240, "Of every image, in pixels.", low=16, high=4096)
    rate_hz: float = parameter(10.0, "Images per second of simulated time, per camera.", low=0.1, high=240)
    real_time_factor: float = parameter(1.0, "Simulated seconds per second; 0: as fast as it goes.", low=0, high=100)
    clock: bool = parameter(True, "Publish /clock and stamp with simulated time; otherwise stamp with the wall clock.")
    motion: str = parameter(
        "auto",
        "sine: actuators swing through their control range; none; auto: sine for our own scene, none for others.",
        choices=options.SIMULATION_MOTIONS,
    )
    gl: str = parameter(
        "auto",
        "What renders: egl, osmesa, or auto: MUJOCO_GL, otherwise the first that is installed.",
        choices=options.SIMULATION_GL,
    )
    frame_suffix: str = parameter("_optical_frame", "frame_id is the camera's name and this.")
    jpeg_quality: int = parameter(90, "Of image_raw/compressed.", low=1, high=100, changes=Changes.RUN_TIME)


class MujocoCamera(Node):
    """All of MuJoCo lives in one thread, as its OpenGL context must; the executor keeps answering beside it."""

    def __init__(self, stop: Stop):
        super().__init__("mujoco_camera")
        self._stop = stop
        self.parameters = NodeParameters(self, MujocoCameraParameters, "mujoco_camera")
        given = self.parameters.values

        self._closing = threading.Event()
        self._cameras: dict[str, CameraPublisher] = {}
        self._cameras_made = threading.Event()
        self._opened: queue.Queue[Simulation | Exception] = queue.Queue()
        arguments = (given.scene, list(given.cameras), given.width, given.height, given.gl, given.motion)
        self._thread = threading.Thread(target=self._simulate, args=arguments, name="simulation", daemon=True)
        self._thread.start()
        simulation = self._opened.get()
        if isinstance(simulation, Exception):
            self._thread.join()
            raise simulation
        self._clock_publisher = self.create_publisher(Clock, "/clock", 10) if given.clock else None
        self._cameras = {
            name: CameraPublisher(self, name + given.frame_suffix, f"{name}/") for name in simulation.cameras
        }
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
        rate_hz, speed = self.parameters.values.rate_hz, self.parameters.values.real_time_factor
        started = time.monotonic()
        reported = False
        while not self._closing.is_set():
            image_due = max(1, round((images + 1) / rate_hz / simulation.timestep))
            simulation.step(max(0, min(clock_steps, image_due - simulation.steps)))
            if self._clock_publisher is not None:
                self._clock_publisher.publish(Clock(clock=Time(nanoseconds=simulation.time_ns).to_msg()))
            if simulation.steps >= image_due:
                images += 1
                self._publish_images(simulation, infos)
            if speed == 0:
                continue
            ahead = started + simulation.time_ns * 1e-9 / speed - time.monotonic()
            if ahead > 0:
                self._closing.wait(ahead)
            elif ahead < -SLIP_SEC:
                started -= ahead
                if not reported:
                    reported = True
                    self.get_logger().warning(
                        "this machine renders slower than real time, so simulated time passes slower: "
                        "lower rate_hz, width and height, or choose fewer cameras"
                    )

    def _publish_images(self, simulation: Simulation, infos: dict):
        stamp = Time(nanoseconds=simulation.time_ns) if self.parameters.values.clock else self.get_clock().now()
        quality = self.parameters.values.jpeg_quality
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
