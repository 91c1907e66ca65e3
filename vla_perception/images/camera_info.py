"""sensor_msgs/CameraInfo from a calibration file, from a pinhole model, or for an uncalibrated camera."""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote, urlparse

from sensor_msgs.msg import CameraInfo

from vla_perception.printable import printable

# How many distortion coefficients a model takes, as image_geometry and OpenCV read them.
DISTORTION_MODELS = {"plumb_bob": (4, 5), "rational_polynomial": (8, 12, 14), "equidistant": (4,), "fisheye": (4,)}


#: Bytes of a calibration file. Real ones have one or two thousand, and parsing 50 000 takes a second.
MAX_BYTES = 1 << 15
#: Brackets within brackets. A calibration has two.
_MAX_DEPTH = 20


class CalibrationError(ValueError):
    """A calibration file that cannot be used. The text names the file and what is wrong in it."""

    def __init__(self, text: str) -> None:
        # It may quote a file of any content, and goes into logs; YAML's errors have several lines.
        text = " ".join(text.split())
        super().__init__(printable(text if len(text) <= 500 else f"{text[:500]}…"))


def uncalibrated(width: int, height: int) -> CameraInfo:
    """The message's own convention for "not calibrated": a size, and zeros for everything else."""
    return CameraInfo(width=width, height=height)


def pinhole(width: int, height: int, fx: float, fy: float, cx: float, cy: float) -> CameraInfo:
    """An ideal camera without distortion. Focal lengths and centre in pixels; pixel centres are integers."""
    return CameraInfo(
        width=width,
        height=height,
        distortion_model="plumb_bob",
        d=[0.0] * 5,
        k=[fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )


def read_calibration(location: str) -> CameraInfo:
    """A CameraInfo of the YAML file that camera_calibration and camera_info_manager write.

    `location`: a path, file://PATH, or package://PACKAGE/PATH (needs ament_index_python).
    Raises CalibrationError if there is no such file or anything in it does not fit.
    """
    try:
        path = _local_path(location)
    except (ValueError, LookupError, RuntimeError, OSError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{location!r} names no calibration file: {error}") from error
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may never end
            raise OSError("it is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(f"it has more than {MAX_BYTES} bytes")
        text = data.decode()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read the calibration file {path}: {error}") from error
    try:
        return _from_yaml(_parse(text))
    except ValueError as error:
        raise CalibrationError(f"calibration file {path}: {error}") from error


def _parse(text: str):
    """YAML of strings, lists and dictionaries; ValueError if it is none, or refers to itself.

    Numbers stay text: YAML 1.1 takes 1e-05, as C++ writes it, for none. Nothing is made of tags such as !!python or
    !!timestamp, and aliases, of which a few lines make billions of values, are refused.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        depth = 0

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias (*name): write the values themselves")
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        return yaml.load(text, Loader)  # noqa: S506 - made of BaseLoader, which makes nothing but strings
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not YAML: {error}") from error


def _local_path(location: str) -> Path:
    url = urlparse(location)
    if url.scheme == "file":
        return Path(unquote(url.path))
    if url.scheme == "package":
        from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

        try:
            return Path(get_package_share_directory(url.netloc)) / unquote(url.path).lstrip("/")
        except (PackageNotFoundError, ValueError) as error:
            raise CalibrationError(f"{location}: there is no package {url.netloc!r}") from error
    if "://" in location:
        raise CalibrationError(f"{location}: only paths, file:// and package:// are understood")
    return Path(os.path.expanduser(location))


def _from_yaml(content) -> CameraInfo:
    if not isinstance(content, dict):
        raise ValueError("expected keys such as image_width and camera_matrix, as camera_calibration writes them")
    width, height = (_size(content, name) for name in ("image_width", "image_height"))
    model = content.get("distortion_model", "plumb_bob")  # files from before the key existed
    if not isinstance(model, str) or model not in DISTORTION_MODELS:
        raise ValueError(f"unknown distortion_model {model!r}; known are {', '.join(DISTORTION_MODELS)}")
    camera = _matrix(content, "camera_matrix", 3, 3)
    if camera[0] <= 0 or camera[4] <= 0 or camera[6:] != [0, 0, 1]:
        raise ValueError("camera_matrix is not an intrinsic matrix: focal lengths above 0, last row 0 0 1")
    distortion = _matrix(content, "distortion_coefficients", 1, None)
    if len(distortion) not in DISTORTION_MODELS[model]:
        counts = " or ".join(map(str, DISTORTION_MODELS[model]))
        raise ValueError(f"{model} takes {counts} distortion_coefficients, the file has {len(distortion)}")
    identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    unrectified = [*camera[0:3], 0.0, *camera[3:6], 0.0, *camera[6:9], 0.0]
    return CameraInfo(
        width=width,
        height=height,
        distortion_model=model,
        d=distortion,
        k=camera,
        r=_matrix(content, "rectification_matrix", 3, 3, identity),
        p=_matrix(content, "projection_matrix", 3, 4, unrectified),
    )


def _size(content: dict, name: str) -> int:
    text = content.get(name)
    if not isinstance(text, str) or not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) <= 65536:
        raise ValueError(f"{name} must be a number of pixels, got {text!r}")
    return int(text)


def _matrix(content: dict, name: str, rows: int, columns: int | None, default: list | None = None) -> list[float]:
    """Row-major values of {rows, cols, data}; any number of columns where `columns` is None."""
    if name not in content and default is not None:
        return default
    matrix = content.get(name)
    data = matrix.get("data") if isinstance(matrix, dict) else None
    if not isinstance(matrix, dict) or not isinstance(data, list):
        raise ValueError(f"{name} is missing or has no data")
    try:
        values = [float(text) for text in data]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} holds something other than finite numbers")
    if columns is not None and len(values) != rows * columns:
        raise ValueError(f"{name} must be {rows} x {columns}, got {len(values)} values")
    # Old files lack them. A transposed matrix has as many values.
    said = [str(matrix.get(key, "")) for key in ("rows", "cols")]
    expected = [str(rows), str(columns)]
    if columns is not None and any(said) and said != expected:
        raise ValueError(
            f"{name} says rows {said[0] or '?'} and cols {said[1] or '?'}, expected {' and '.join(expected)}"
        )
    return values
