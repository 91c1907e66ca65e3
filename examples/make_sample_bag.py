"""Makes the sample bag in `examples/sample_bag`: two virtual cameras over a table with real photographs.

    python examples/make_sample_bag.py [--out examples/sample_bag]

The scene is a handful of textured rectangles in space: a table top, a wall, and photographs that lie on the one,
hang on the other or stand upright like cards. `front` looks at it from across the table and sways, `wrist` flies
over the table as a camera on a gripper does. Both are pinhole cameras without distortion; their `camera_info`
follows from the field of view that renders them. Arrival times jitter by seeded noise. The same seed gives the
same images (the JPEG bytes depend on OpenCV's libjpeg).

Needs numpy, opencv, scikit-image (photographs that ship in its wheel) and rosbags; no ROS.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from skimage import data

SECONDS = 8.0
RATE_HZ = 5.0
START_NS = 1_767_225_600_000_000_000  # 2026-01-01T00:00:00Z: a fixed date keeps the bag the same
JPEG_QUALITY = 76
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Rectangle:
    """A textured rectangle: uint8 RGB [h, w, 3] spread over `right` × `down` (metres) from `corner`."""

    texture: np.ndarray
    corner: np.ndarray
    right: np.ndarray
    down: np.ndarray


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: image size in pixels and horizontal field of view in degrees."""

    name: str
    width: int
    height: int
    fov_deg: float

    @property
    def frame_id(self) -> str:
        return f"{self.name}_camera_optical_frame"

    @property
    def matrix(self) -> np.ndarray:
        """float64 [3, 3]: square pixels, principal point in the middle of the image (pixel centres at integers)."""
        focal = self.width / 2 / np.tan(np.radians(self.fov_deg) / 2)
        return np.array([[focal, 0, (self.width - 1) / 2], [0, focal, (self.height - 1) / 2], [0, 0, 1]])


CAMERAS = (Camera("front", 640, 480, 62.0), Camera("wrist", 640, 480, 75.0))


def tiled(grey: np.ndarray, repeats: tuple[int, int], tint: tuple[int, int, int], contrast: float) -> np.ndarray:
    """A grey texture repeated down and across, softened and colored about `tint`: uint8 RGB."""
    soft = (cv2.GaussianBlur(grey, (0, 0), 1.5) - grey.mean()) / grey.std() * contrast + 1
    # Every other copy is mirrored, so that no seams show.
    mirrored = np.block([[soft, soft[:, ::-1]], [soft[::-1], soft[::-1, ::-1]]])
    tall = np.tile(mirrored, ((repeats[0] + 1) // 2, (repeats[1] + 1) // 2)).astype(np.float32)
    return np.clip(tall[..., None] * np.array(tint, np.float32), 0, 255).astype(np.uint8)


def framed(photograph: np.ndarray, width: int) -> np.ndarray:
    """The photograph scaled to `width` pixels with a white border, as a print."""
    height = round(photograph.shape[0] * width / photograph.shape[1])
    border = width // 28
    small = cv2.resize(photograph, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(small, *[border] * 4, cv2.BORDER_CONSTANT, value=(244, 242, 236))


def lying(texture: np.ndarray, centre: tuple[float, float], width: float, degrees: float) -> Rectangle:
    """A print on the table: `centre` (x, y) and `width` in metres, turned by `degrees` about the vertical."""
    angle = np.radians(degrees)
    right = np.array([np.cos(angle), np.sin(angle), 0]) * width
    down = np.array([np.sin(angle), -np.cos(angle), 0]) * width * texture.shape[0] / texture.shape[1]
    return Rectangle(texture, np.array([*centre, 0.004]) - right / 2 - down / 2, right, down)


def standing(texture: np.ndarray, foot: tuple[float, float, float], width: float, degrees: float) -> Rectangle:
    """An upright card: `foot` is the middle of its lower edge."""
    angle = np.radians(degrees)
    right = np.array([np.cos(angle), np.sin(angle), 0]) * width
    down = np.array([0, 0, -1.0]) * width * texture.shape[0] / texture.shape[1]
    return Rectangle(texture, np.array(foot) - right / 2 - down, right, down)


def table_top() -> list[Rectangle]:
    """The scene. x to the right, y away from the front camera, z up; the table's surface is z = 0."""
    astronaut, coffee, chelsea, rocket = data.astronaut(), data.coffee(), data.chelsea(), data.rocket()
    table = tiled(data.gravel(), (6, 8), (176, 148, 116), 0.10)
    wall = tiled(np.rot90(data.brick()), (4, 8), (168, 158, 150), 0.14)
    return [
        Rectangle(table, np.array([-2.0, 1.3, 0]), np.array([4.0, 0, 0]), np.array([0, -3.0, 0])),
        Rectangle(wall, np.array([-3.0, 1.3, 3.0]), np.array([6.0, 0, 0]), np.array([0, 0, -3.0])),
        standing(framed(rocket, 640), (0.60, 1.29, 0.26), 0.74, 0),
        standing(framed(astronaut, 512), (-0.46, 1.29, 0.10), 0.70, 0),
        lying(framed(coffee, 600), (-0.30, 0.42), 0.62, 14),
        standing(framed(chelsea, 451), (0.38, 0.76, 0), 0.56, -12),
        lying(framed(data.hubble_deep_field()[:700, :900], 450), (0.34, 0.26), 0.44, -22),
    ]


def looking_at(eye: np.ndarray, target: np.ndarray, roll_deg: float) -> np.ndarray:
    """float64 [3, 3]: columns are the optical frame's axes (x right, y down, z forward) in the world."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    up = np.array([0.0, 0.35, 1.0])  # leaning forward, so that looking straight down is well defined
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    roll = np.radians(roll_deg)
    return np.column_stack(
        [np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right, forward]
    )


def pose(camera: str, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the camera is (metres) and how it is turned (see `looking_at`) at a time of the bag."""
    turn = 2 * np.pi * seconds / SECONDS
    if camera == "front":
        eye = np.array([0.34 * np.sin(turn), -0.62 + 0.08 * np.cos(2 * turn), 0.74 + 0.08 * np.sin(turn + 1)])
        target = np.array([0.04 + 0.06 * np.sin(turn + 0.5), 0.85, 0.22])
        return eye, looking_at(eye, target, 1.2 * np.sin(2 * turn))
    # From print to print in a figure of eight, down to each and up in between.
    over = np.array([0.42 * np.sin(turn), 0.36 + 0.18 * np.sin(2 * turn)])
    eye = np.array([*(over - [0, 0.30]), 0.50 + 0.10 * np.cos(2 * turn)])
    return eye, looking_at(eye, np.array([*over, 0.05]), 9 * np.sin(turn + 0.8))


def render(scene: list[Rectangle], camera: Camera, seconds: float) -> np.ndarray:
    """uint8 RGB [height, width, 3]: every pixel's ray meets the nearest rectangle; 2 × 2 samples per pixel."""
    eye, axes = pose(camera.name, seconds)
    step = 1 / SUPERSAMPLING
    columns = np.arange(camera.width * SUPERSAMPLING) * step + (step - 1) / 2
    rows = np.arange(camera.height * SUPERSAMPLING) * step + (step - 1) / 2
    u, v = np.meshgrid(columns, rows)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ (axes @ np.linalg.inv(camera.matrix)).T

    image = np.zeros((*u.shape, 3), np.uint8)
    nearest = np.full(u.shape, np.inf)
    for shape in scene:
        normal = np.cross(shape.right, shape.down)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = ((shape.corner - eye) @ normal) / (rays @ normal)
            hit = eye + distance[..., None] * rays - shape.corner
            across = hit @ shape.right / (shape.right @ shape.right)
            along = hit @ shape.down / (shape.down @ shape.down)
            seen = (distance > 0.01) & (distance < nearest)
            seen &= (across >= 0) & (across < 1) & (along >= 0) & (along < 1)
        height, width = shape.texture.shape[:2]
        sampled = cv2.remap(
            shape.texture,
            np.where(seen, across * width - 0.5, 0).astype(np.float32),
            np.where(seen, along * height - 0.5, 0).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        image[seen] = sampled[seen]
        nearest[seen] = distance[seen]
    return cv2.resize(image, (camera.width, camera.height), interpolation=cv2.INTER_AREA)


def schedule(seed: int) -> list[tuple[int, int, Camera]]:
    """(arrival ns, exposure ns, camera) of every frame, by arrival.

    Exposures are 200 ms apart with some milliseconds of jitter, `wrist` 12 ms behind `front`; a frame arrives
    4 to 10 ms after its exposure, as through a driver.
    """
    random = np.random.default_rng(seed)
    frames = []
    for index, camera in enumerate(CAMERAS):
        count = int(SECONDS * RATE_HZ)
        exposures = np.arange(count) / RATE_HZ + 0.02 + 0.012 * index
        exposures = exposures + np.clip(random.normal(0, 0.005, count), -0.012, 0.012)
        arrivals = exposures + random.uniform(0.004, 0.010, count)
        for exposure, arrival in zip(exposures, arrivals, strict=True):
            frames.append((START_NS + int(arrival * 1e9), START_NS + int(exposure * 1e9), camera))
    return sorted(frames, key=lambda frame: frame[0])


def write_bag(out: Path, seed: int) -> None:
    """Renders every frame and writes the bag (MCAP with `metadata.yaml`) to the folder `out`, which must be new."""
    types = get_typestore(Stores.ROS2_JAZZY)
    Header, Time = types.types["std_msgs/msg/Header"], types.types["builtin_interfaces/msg/Time"]
    CompressedImage = types.types["sensor_msgs/msg/CompressedImage"]
    CameraInfo = types.types["sensor_msgs/msg/CameraInfo"]
    RegionOfInterest = types.types["sensor_msgs/msg/RegionOfInterest"]

    scene = table_top()
    with Writer(out, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        images, infos = {}, {}
        for camera in CAMERAS:
            images[camera] = bag.add_connection(
                f"/{camera.name}/image_raw/compressed", CompressedImage.__msgtype__, typestore=types
            )
            infos[camera] = bag.add_connection(f"/{camera.name}/camera_info", CameraInfo.__msgtype__, typestore=types)
        for arrival, exposure, camera in schedule(seed):
            image = render(scene, camera, (exposure - START_NS) / 1e9)
            ok, jpeg = cv2.imencode(
                ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
            )
            if not ok:
                raise RuntimeError("OpenCV could not encode a JPEG")
            header = Header(stamp=Time(*divmod(exposure, 1_000_000_000)), frame_id=camera.frame_id)
            message = CompressedImage(header=header, format="jpeg", data=jpeg.reshape(-1))
            bag.write(images[camera], arrival, types.serialize_cdr(message, message.__msgtype__))
            matrix = camera.matrix
            info = CameraInfo(
                header=header,
                height=camera.height,
                width=camera.width,
                distortion_model="plumb_bob",
                d=np.zeros(5),
                k=matrix.reshape(-1),
                r=np.eye(3).reshape(-1),
                p=np.column_stack([matrix, np.zeros(3)]).reshape(-1),
                binning_x=0,
                binning_y=0,
                roi=RegionOfInterest(x_offset=0, y_offset=0, height=0, width=0, do_rectify=False),
            )
            bag.write(infos[camera], arrival, types.serialize_cdr(info, info.__msgtype__))


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the sample bag: two virtual cameras over photographs.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample_bag")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        if not (arguments.out / "metadata.yaml").exists():
            print(f"{arguments.out} exists and is not a bag; choose another --out", file=sys.stderr)
            return 2
        shutil.rmtree(arguments.out)
    write_bag(arguments.out, arguments.seed)
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
