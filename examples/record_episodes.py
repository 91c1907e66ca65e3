"""Records episodes of a scripted motion in the simulated scene, a bag each: what a policy is trained on.

    python examples/record_episodes.py --out episodes --episodes 40

In every episode the red cube lies somewhere else. The arm waits, turns to the cube, nods over it and turns back; when it
begins and how fast it is are drawn anew. A bag has the images of two cameras (JPEG, as a camera node publishes them) and
`/arm/command`, the joint targets that were sent at each frame. The same seed gives the same episodes.

Needs the extras `sim` and `offline`; no ROS.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_perception.sources.simulation import Simulation

RATE_HZ = 5.0
SECONDS = 6.0
START_NS = 1_767_225_600_000_000_000  # 2026-01-01T00:00:00Z: a fixed date keeps the bags the same
JOINTS = ("turn", "lift", "bend", "tilt")
#: Where the arm's base stands, and how far from it the cube may lie, in metres of the scene.
BASE, DISTANCE = (-0.2, 0.0), (0.32, 0.5)
JPEG_QUALITY = 90


class Script:
    """Joint targets of one episode, by time."""

    def __init__(self, random: np.random.Generator, ranges: dict[str, tuple[float, float]]) -> None:
        low, high = ranges["turn"]
        self.angle = float(random.uniform(0.85 * low, 0.85 * high))
        self.distance = float(random.uniform(*DISTANCE))
        self._ranges = ranges
        self._begins = random.uniform(0.2, 1.4)
        self._turning = random.uniform(1.0, 1.8)
        self._nodding = 1.6

    @property
    def cube(self) -> tuple[float, float]:
        return BASE[0] + self.distance * math.cos(self.angle), BASE[1] + self.distance * math.sin(self.angle)

    def targets(self, seconds: float) -> np.ndarray:
        """float64 [joints], in the order of JOINTS."""
        there = self._begins + self._turning
        nod = _smooth((seconds - there) / 0.6) - _smooth((seconds - there - self._nodding) / 0.6)
        back = _smooth((seconds - there - self._nodding) / self._turning)
        turn = self.angle * (_smooth((seconds - self._begins) / self._turning) - back)
        nods = [low + (high - low) * nod for low, high in (self._ranges[name] for name in JOINTS[1:])]
        return np.array([turn, *nods])


def _smooth(part: float) -> float:
    """0 to 1 with minimal jerk."""
    part = min(1.0, max(0.0, part))
    return part**3 * (10 - 15 * part + 6 * part**2)


def record(path: Path, simulation: Simulation, script: Script, frames: int) -> None:
    types = get_typestore(Stores.ROS2_JAZZY)
    new = types.types
    names = list(simulation.target_ranges)
    places = [names.index(name) for name in JOINTS]
    simulation.place("red_cube", *script.cube)
    steps = round(1 / RATE_HZ / simulation.timestep)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        kinds = {"/arm/command": "sensor_msgs/msg/JointState"}
        kinds |= {f"/{camera}/image_raw/compressed": "sensor_msgs/msg/CompressedImage" for camera in simulation.cameras}
        topics = {topic: bag.add_connection(topic, kind, typestore=types) for topic, kind in kinds.items()}

        def write(topic: str, message: object, time_ns: int) -> None:
            bag.write(topics[topic], time_ns, types.serialize_cdr(message, kinds[topic]))

        for frame in range(frames):
            stamp_ns = START_NS + round(frame / RATE_HZ * 1e9)
            stamp = new["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9))
            targets = script.targets(frame / RATE_HZ)
            header = new["std_msgs/msg/Header"](stamp=stamp, frame_id="")
            nothing = np.zeros(0)
            command = new[kinds["/arm/command"]](
                header=header, name=list(JOINTS), position=targets, velocity=nothing, effort=nothing
            )
            write("/arm/command", command, stamp_ns)
            for camera in simulation.cameras:
                header = new["std_msgs/msg/Header"](stamp=stamp, frame_id=f"{camera}_optical_frame")
                image = cv2.cvtColor(simulation.render(camera), cv2.COLOR_RGB2BGR)
                jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].reshape(-1)
                message = new["sensor_msgs/msg/CompressedImage"](header=header, format="jpeg", data=jpeg)
                write(f"/{camera}/image_raw/compressed", message, stamp_ns + 5_000_000)
            simulation.targets[places] = targets
            simulation.step(steps)


def main() -> int:
    parser = argparse.ArgumentParser(description="Records episodes of a scripted motion in the simulated scene.")
    parser.add_argument("--out", type=Path, default=Path("episodes"))
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--frames", type=int, default=round(SECONDS * RATE_HZ), help="of each, 5 per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(160, 120), metavar=("WIDTH", "HEIGHT"))
    given = parser.parse_args()
    for episode in range(given.episodes):
        path = given.out / f"episode_{episode:03d}"
        if path.exists():
            if not (path / "metadata.yaml").exists() and any(path.iterdir()):
                print(f"{path} exists and is not a bag; choose another --out", file=sys.stderr)
                return 2
            shutil.rmtree(path)
        simulation = Simulation(width=given.size[0], height=given.size[1], motion="none")
        try:
            script = Script(np.random.default_rng([given.seed, episode]), simulation.target_ranges)
            record(path, simulation, script, given.frames)
        finally:
            simulation.close()
    print(f"{given.out}: {given.episodes} episodes of {given.frames} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
