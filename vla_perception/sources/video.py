"""Frames from a camera device, a network stream or a video file through OpenCV. Knows nothing of ROS."""

from __future__ import annotations

import glob
import math
import os
import re
import stat
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_perception.images import streams

#: Frames per second of a file that says none, or one that no camera has (1000 is what WebM says for want of a rate).
DEFAULT_RATE_HZ = 30.0
RATES_HZ = (0.1, 480.0)
#: Frames per second that may be asked for: a frame in a quarter of an hour.
MIN_RATE_HZ = 0.001

#: JPEG frames of a device that may be damaged one after the other.
MAX_DAMAGED = 100


class SourceError(RuntimeError):
    """A source that cannot be opened or broke off. The text says what to do about it."""


def import_cv2() -> Any:
    """OpenCV; SourceError that names the package where it cannot be loaded, which no retry mends."""
    try:
        import cv2
    except ImportError as error:
        raise SourceError(f"OpenCV cannot be loaded: {error}. pip install opencv-python-headless") from error
    return cv2


@dataclass(frozen=True)
class Frame:
    """pixels: uint8 [height, width, 3], BGR. age_sec: how long ago it was captured, as far as the driver says."""

    pixels: np.ndarray
    age_sec: float


class VideoSource:
    """One of: a V4L2 device ("/dev/video0" or "0"), a stream ("rtsp://..", "http://.."), a video file.

    width, height, rate_hz, pixel_format (four characters, "MJPG"): asked of a device, which may choose otherwise;
    rate_hz also sets the pace of a file. 0 and "" leave it to the source. loop: a file starts again at its end.
    timeout_sec: when a silent stream counts as broken.

    A device's JPEG frames that are damaged, as USB leaves them, are left out: OpenCV would fill the holes with grey. In
    files and streams FFmpeg decides.

    Attribute `remark`: what is odd about an open source, in a sentence; "" if nothing is.
    """

    def __init__(self, source, *, width=0, height=0, rate_hz=0.0, pixel_format="", loop=True, timeout_sec=5.0):
        if not source:
            raise SourceError(
                "no source given: a device (/dev/video0), a stream (rtsp://.., http://..) or a video file"
            )
        if pixel_format and len(pixel_format) != 4:
            raise SourceError(f'pixel_format is four characters such as "MJPG" or "YUYV", got "{pixel_format}"')
        if not (math.isfinite(rate_hz) and (rate_hz == 0 or rate_hz >= MIN_RATE_HZ)):
            raise SourceError(
                f"rate_hz is {rate_hz}, expected frames per second, at least {MIN_RATE_HZ}, or 0 for the source's own"
            )
        self.source = f"/dev/video{source}" if re.fullmatch(r"\d+", source) else source
        if "://" in self.source and not self.source.startswith("file://"):
            self.kind = "stream"
        else:
            self.source = os.path.expanduser(self.source.removeprefix("file://"))
            self.kind = "device" if os.path.realpath(self.source).startswith("/dev/") else "file"
        self.width, self.height, self.rate_hz, self.pixel_format = width, height, rate_hz, pixel_format
        self.loop, self.timeout_sec = loop, timeout_sec
        self.remark = ""
        self._capture: Any = None  # a cv2.VideoCapture while open
        self._undecoded = False  # whether it gives JPEG streams, to be decoded here
        self._rate_hz = 0.0  # of a file
        self._any = False  # whether a file has given a frame since it was opened
        self._due = 0.0  # steady clock: when the next frame of a file is to be shown

    @property
    def is_open(self) -> bool:
        return self._capture is not None

    def open(self):
        """Raises SourceError if that fails. May take up to `timeout_sec` for a stream."""
        cv2 = import_cv2()
        self.close()
        if self.kind == "device":
            capture = self._open_device(cv2)
        elif self.kind == "stream":
            timeout_ms = int(self.timeout_sec * 1000)
            capture = cv2.VideoCapture(
                self.source,
                cv2.CAP_FFMPEG,
                [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms],
            )
            if not capture.isOpened():
                raise SourceError(f"cannot open the stream {self.source}: is the camera reachable and the URL right?")
        else:
            capture = self._open_file(cv2)
            self._set_pace(capture.get(cv2.CAP_PROP_FPS))
            self._due, self._any = time.monotonic(), False
        self._capture = capture

    def read(self) -> Frame | None:
        """The next frame; waits for it. None at the end of a file that does not loop. Raises SourceError."""
        import cv2

        if self.kind == "file":
            return self._read_file(cv2)
        for _ in range(MAX_DAMAGED):
            ok = self._capture.grab()
            captured = time.monotonic()
            # V4L2 stamps its buffers on the monotonic clock; streams report their position instead.
            at = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 if ok and self.kind == "device" else 0.0
            ok, pixels = self._capture.retrieve() if ok else (False, None)
            if not ok or pixels is None:
                raise SourceError(f"{self.source} delivers no more frames")
            age = time.monotonic() - captured
            if 0 <= captured - at < 1:
                age += captured - at
            image = self._decode(pixels) if self._undecoded else pixels
            if image is None:
                continue
            return Frame(image, age)
        raise SourceError(
            f"{self.source}: {MAX_DAMAGED} damaged frames. Try another USB port or cable, or a lower rate"
        )

    def _decode(self, data: np.ndarray) -> np.ndarray | None:
        """BGR of a JPEG stream [1, bytes]; None if it is damaged."""
        if data.ndim == 3:  # a driver that does not deliver what it said
            return data
        try:
            pixels = streams.decode_jpeg(data.tobytes(), order="BGR")
        except streams.ImageDecodeError:
            self.remark = f"{self.source} sends damaged frames, which are left out: try another USB port or cable"
            return None
        return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels

    def close(self):
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _open_device(self, cv2):
        if not os.path.exists(self.source):
            there = ", ".join(sorted(glob.glob("/dev/video*"))) or "none"
            raise SourceError(f"there is no device {self.source} (video devices here: {there}). Is it plugged in?")
        if not os.access(self.source, os.R_OK | os.W_OK):
            raise SourceError(f"no permission to open {self.source}: add this user to the group video")
        capture = cv2.VideoCapture(self.source, cv2.CAP_V4L2)
        if capture.isOpened():
            if self.pixel_format:
                capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*self.pixel_format))
            wanted = {
                cv2.CAP_PROP_FRAME_WIDTH: self.width,
                cv2.CAP_PROP_FRAME_HEIGHT: self.height,
                cv2.CAP_PROP_FPS: self.rate_hz,
            }
            for name, value in wanted.items():
                if value:
                    capture.set(name, value)
            self._undecoded = self._takes_jpeg(capture, cv2)
            # A device that another program streams from can be opened; only the first frame shows it.
            if capture.grab():
                return capture
        capture.release()
        raise SourceError(
            f"{self.source} delivers no image: it is busy (who has it: fuser -v {self.source}), or no camera "
            "(v4l2-ctl --list-devices shows which are)"
        )

    def _takes_jpeg(self, capture, cv2) -> bool:
        """Asks a device that sends JPEG for the streams as they are; False where it does not, or nothing could check."""
        fourcc = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(8, "little", signed=True)[:4]
        if fourcc not in (b"MJPG", b"JPEG"):
            return False
        try:
            streams.import_simplejpeg()
        except ImportError as error:
            self.remark = f"{self.source}: damaged frames cannot be distinguished from whole ones. {error}"
            return False
        return bool(capture.set(cv2.CAP_PROP_CONVERT_RGB, 0))

    def _open_file(self, cv2):
        if os.path.exists(self.source) and stat.S_ISFIFO(os.stat(self.source).st_mode):
            raise SourceError(
                f"{self.source} is a pipe, which OpenCV waits for without end: give a file or a stream's URL"
            )
        if not os.path.isfile(self.source):
            raise SourceError(f"there is no video file {self.source}")
        capture = cv2.VideoCapture(self.source)
        if not capture.isOpened():
            raise SourceError(f"OpenCV cannot read {self.source}: no video file, or a codec that it lacks")
        return capture

    def _set_pace(self, said: float):
        """The pace of a file: as asked for, or as the file says, if a camera can have it."""
        self.remark, self._rate_hz = "", self.rate_hz
        if self._rate_hz:
            return
        self._rate_hz = said
        if not RATES_HZ[0] <= said <= RATES_HZ[1]:  # also where it is not a number
            self._rate_hz = DEFAULT_RATE_HZ
            self.remark = (
                f"{self.source} says that it has {said:g} frames per second, which no camera has: played at "
                f"{DEFAULT_RATE_HZ:g}; rate_hz sets another pace"
            )

    def _read_file(self, cv2) -> Frame | None:
        ok, pixels = self._capture.read()
        if not ok and self.loop:
            # Opened anew rather than rewound: many files (MJPEG and H.264 without a container) cannot be.
            self._capture.release()
            self._capture = self._open_file(cv2)
            self._any = False
            ok, pixels = self._capture.read()
        if not ok and not self._any:
            raise SourceError(f"{self.source} holds no frame that OpenCV can decode")
        if not ok:
            return None
        self._any = True
        now = time.monotonic()
        time.sleep(max(0.0, self._due - now))
        self._due = max(self._due, now - 1.0) + 1 / self._rate_hz  # a late frame is made up for, a long pause is not
        return Frame(pixels, 0.0)
