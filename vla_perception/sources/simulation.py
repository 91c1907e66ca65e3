"""A MuJoCo scene with cameras that are rendered off screen. Knows nothing of ROS."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

import numpy as np

from vla_perception.printable import error_text

TABLETOP = Path(__file__).parent / "scenes" / "tabletop.xml"
"""The scene that comes with this package: an arm over a table with things on it."""

GL_LIBRARIES = {"egl": ("libEGL.so.1", "libEGL.so"), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}
GL_ADVICE = "apt install libegl1 libgl1 libgl1-mesa-dri (a GPU where there is one), or libosmesa6 (CPU only)"


#: Seconds of simulated time per step that a scene may have: MuJoCo takes any number, and nothing that renders does.
TIMESTEPS = (1e-6, 1.0)
#: Cameras that are rendered at most.
MAX_CAMERAS = 64


class SimulationError(RuntimeError):
    """A scene that cannot be loaded or rendered. The text says what to install or change."""

    def __init__(self, text: str) -> None:
        super().__init__(error_text(" ".join(text.split())))  # MuJoCo quotes the file, in several lines


class Simulation:
    """Physics of one MJCF scene and images of its cameras.

    To be made, used and closed in one thread: OpenGL contexts belong to threads.

    scene: path of an MJCF file; "" for TABLETOP. cameras: names, an empty list for all that have one. width, height:
    pixels of every image. gl: "egl", "osmesa", or "auto": what MUJOCO_GL says, otherwise the first that is
    installed. motion: "sine" moves every actuator to and fro within its control range, "none" leaves them alone,
    "auto" is "sine" for TABLETOP and "none" for any other. Starts from the keyframe `home` where there is one.
    Raises SimulationError.
    """

    def __init__(self, scene="", cameras=(), width=320, height=240, gl="auto", motion="auto"):
        path = Path(os.path.expanduser(scene)) if scene else TABLETOP
        if not path.is_file():
            raise SimulationError(f"there is no MJCF file {path}")
        mujoco = self._mujoco = _import_mujoco(gl)
        try:
            self._model = mujoco.MjModel.from_xml_path(str(path))
            self._data = mujoco.MjData(self._model)
        except Exception as error:  # ValueError, its FatalError, and RuntimeError for what it does not know itself
            raise SimulationError(
                f"{path} is not a scene that MuJoCo {mujoco.__version__} can load: {error}"
            ) from error
        if not TIMESTEPS[0] <= self.timestep <= TIMESTEPS[1]:
            raise SimulationError(
                f"{path} has a timestep of {self.timestep:g} s; set one from {TIMESTEPS[0]:g} to {TIMESTEPS[1]:g}"
            )
        self.cameras = self._chosen(cameras, path)
        self.width, self.height = width, height
        for camera in self.cameras:
            self._check_lens(camera, path)
        self.steps = 0
        self._moves = motion == "sine" or (motion == "auto" and path == TABLETOP)
        home = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_KEY, "home")
        if home >= 0:
            mujoco.mj_resetDataKeyframe(self._model, self._data, home)
        mujoco.mj_forward(self._model, self._data)
        # The largest image is part of the scene's settings, 640 x 480 unless it says otherwise.
        buffer = self._model.vis.global_
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, height)
        try:
            self._renderer = mujoco.Renderer(self._model, height, width)
        except Exception as error:  # whatever the GL stack raises: ImportError, RuntimeError, its own
            raise SimulationError(
                f"cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}. Is another one installed? {GL_ADVICE}"
            ) from error

    @property
    def timestep(self) -> float:
        """Seconds of simulated time per step."""
        return self._model.opt.timestep

    @property
    def time_ns(self) -> int:
        """Simulated time since the start; exact, does not drift."""
        return round(self.steps * round(self.timestep * 1e12) / 1000)

    @property
    def targets(self) -> np.ndarray:
        """float64 [actuators]: the command for each, to be written into. ``motion`` "none" leaves it to the caller."""
        return self._data.ctrl

    @property
    def target_ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest target of each actuator, by its name, in the order of `targets`."""
        model = self._model
        ranges = model.actuator_ctrlrange.tolist()
        return {model.actuator(index).name: (low, high) for index, (low, high) in enumerate(ranges)}

    def place(self, body: str, x: float, y: float) -> None:
        """Puts a free body elsewhere, in metres of the scene; its height and attitude stay."""
        joint = self._model.body(body).jntadr[0]
        start = self._model.jnt_qposadr[joint]
        self._data.qpos[start : start + 2] = x, y
        self._mujoco.mj_forward(self._model, self._data)

    def step(self, count: int = 1):
        for _ in range(count):
            if self._moves:
                self._swing()
            self._mujoco.mj_step(self._model, self._data)
        self.steps += count

    def render(self, camera: str) -> np.ndarray:
        """uint8 [height, width, 3] RGB: what `camera` sees now."""
        self._renderer.update_scene(self._data, camera=camera)
        return self._renderer.render()

    def intrinsics(self, camera: str) -> tuple[float, float, float, float] | None:
        """(fx, fy, cx, cy) in pixels, pixel centres at integers; None for an orthographic camera."""
        model, index = self._model, self._camera_id(camera)
        flags = model.cam_projection if hasattr(model, "cam_projection") else model.cam_orthographic
        if flags[index]:
            return None
        cx, cy = (self.width - 1) / 2, (self.height - 1) / 2
        sensor = model.cam_sensorsize[index]
        if sensor[1] <= 0:
            focal = self.height / 2 / math.tan(math.radians(model.cam_fovy[index]) / 2)
            return focal, focal, cx, cy
        # A camera described by focal length and sensor. MuJoCo fits the sensor's height and keeps pixels square.
        focal_x, focal_y, principal_x, principal_y = model.cam_intrinsic[index]
        per_metre_x, per_metre_y = self.width / sensor[0], self.height / sensor[1]
        return (
            focal_x * per_metre_x,
            focal_y * per_metre_y,
            cx - principal_x * per_metre_x,
            cy - principal_y * per_metre_y,
        )

    def close(self):
        self._renderer.close()

    def _chosen(self, cameras, path: Path) -> list[str]:
        named = [self._model.camera(index).name for index in range(self._model.ncam)]
        named = [name for name in named if name]
        missing = [name for name in cameras if name not in named]
        if missing:
            raise SimulationError(f"{path} has no camera {', '.join(missing)}; it has {', '.join(named) or 'none'}")
        if not named:
            raise SimulationError(f'{path} has no camera with a name: add <camera name="front" .../> to it')
        chosen = list(cameras) or named
        if len(chosen) > MAX_CAMERAS:
            raise SimulationError(
                f"{path} has {len(chosen)} cameras with a name; choose at most {MAX_CAMERAS} by the parameter cameras"
            )
        return chosen

    def _check_lens(self, camera: str, path: Path) -> None:
        """Before camera_info says it: MuJoCo takes an angle of 0, and values that are not finite."""
        try:
            numbers = self.intrinsics(camera) or (1.0,)
        except ZeroDivisionError:
            numbers = (math.inf,)
        if not all(map(math.isfinite, numbers)) or min(numbers[:2]) <= 0:
            raise SimulationError(
                f"{path}: camera {camera!r} has no image: its fovy, or its focal and sensorsize, cannot be"
            )

    def _camera_id(self, camera: str) -> int:
        return self._model.camera(camera).id

    def _swing(self):
        """Every limited actuator along a sine with a period for each, so that the whole does not repeat soon."""
        model = self._model
        low, high = model.actuator_ctrlrange.T
        periods = 5 + 1.7 * np.arange(model.nu)
        swing = np.sin(2 * math.pi * self._data.time / periods)
        target = (low + high) / 2 + (high - low) / 2 * swing
        self._data.ctrl[:] = np.where(model.actuator_ctrllimited, target, self._data.ctrl)


def _import_mujoco(gl: str):
    """MuJoCo with an OpenGL that needs no screen. Which one is settled by its first import in a process."""
    wanted: str | None = os.environ.get("MUJOCO_GL", "") if gl == "auto" else gl
    if not wanted:
        wanted = next((name for name in GL_LIBRARIES if _is_there(name)), None)
        if wanted is None:
            raise SimulationError(f"there is no OpenGL library that renders without a screen: {GL_ADVICE}")
    elif wanted in GL_LIBRARIES and not _is_there(wanted):
        raise SimulationError(f"MUJOCO_GL is {wanted}, but {GL_LIBRARIES[wanted][0]} is not installed: {GL_ADVICE}")
    os.environ["MUJOCO_GL"] = wanted
    try:
        import mujoco
    except ImportError as error:
        if error.name == "mujoco":
            raise SimulationError("MuJoCo is not installed: pip install mujoco") from error
        raise SimulationError(f"MuJoCo cannot be loaded with MUJOCO_GL={wanted}: {error}. {GL_ADVICE}") from error
    except Exception as error:  # PyOpenGL's, of several kinds
        raise SimulationError(f"MuJoCo cannot be loaded with MUJOCO_GL={wanted}: {error}. {GL_ADVICE}") from error
    return mujoco


def _is_there(gl: str) -> bool:
    for name in GL_LIBRARIES[gl]:
        try:
            ctypes.CDLL(name)
            return True
        except OSError:
            continue
    return False
