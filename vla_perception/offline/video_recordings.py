"""Video files, decoded by FFmpeg's libraries, which PyAV brings along.

Not by OpenCV, as opencv_camera does: it does not say which frames are damaged, when each is shown, or with which of its
several decoders; and LeRobot reads its videos through the same libraries, so that frames are equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vla_perception.images.streams import check_size
from vla_perception.offline.image_recordings import CAMERA
from vla_perception.offline.recordings import (
    DamagedError,
    FrameError,
    FrameSet,
    Problems,
    Selection,
    SourceError,
    safe_name,
)

SUFFIXES = frozenset((".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg"))
#: FFmpeg's names of the containers that are read. Others are playlists, which lead to further files and addresses.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo"
#: Of a frame's time: nanoseconds beyond it do not fit into 64 bits.
MAX_SECONDS = float(1 << 33)


class VideoRecording:
    """One frame set per frame of the file's first video, at the times at which they are shown."""

    kind = "video"

    def __init__(self, path: Path, selection: Selection) -> None:
        if len(selection.cameras) > 1:
            raise SourceError(f"{path} is a video of one camera, and --cameras names {len(selection.cameras)}")
        self.name = safe_name(path.stem)
        self.source = str(path)
        self.files = [path]
        self.cameras: tuple[str, ...] = (selection.cameras[0][0] if selection.cameras else CAMERA,)
        self.problems = Problems()
        self._path = path
        self._max_pixels = selection.max_image_pixels
        with opened(path) as (_, stream):
            check_frame_size(stream, path, self._max_pixels)
            rate = float(stream.average_rate or stream.guessed_rate or 30)
            self.seconds = _seconds(stream)
            self._frames = stream.frames or round(self.seconds * rate)
            self.details: dict[str, object] = {"codec": stream.codec_context.name, "rate_hz": rate}

    def expected_sets(self) -> int:
        return max(1, self._frames)

    def frame_sets(self) -> Iterator[FrameSet]:
        self.problems.clear()
        with opened(self._path) as (container, stream):
            for ordinal, (seconds, frame) in enumerate(frames_of(container, stream)):
                stamp_ns = round(seconds * 1e9)
                # Converted here: the decoder's memory is used again for later frames.
                image = _attempt(frame, self._max_pixels)
                yield FrameSet(ordinal, stamp_ns, seconds, (stamp_ns,), ("",), partial(_given, image))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream) of a file. SourceError if there is none that can be read."""
    try:
        import av
    except ImportError as error:
        raise SourceError(f"{error}: videos are read with PyAV: pip install '.[offline]'") from error
    av.logging.set_level(av.logging.PANIC)  # damage is reported frame by frame
    try:
        container = av.open(str(path), options={"protocol_whitelist": "file", "format_whitelist": _CONTAINERS})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read as a video: {error}") from error
    with container:
        if not container.streams.video:
            raise DamagedError(f"{path} holds no video")
        stream = container.streams.video[0]
        if stream.codec_context is None or not stream.time_base:
            raise DamagedError(f"{path}: its video is damaged, or of a codec that PyAV cannot decode")
        yield container, stream


def frames_of(container: Any, stream: Any, start_sec: float = 0.0) -> Iterator[tuple[float, Any]]:
    """(seconds, av.VideoFrame) in the order in which they are shown, from the key frame at or before `start_sec` on.

    A damaged one comes as a FrameError in the place of the frame, and so do those after it that build on it, up to the
    next key frame: FFmpeg conceals damage, and smears it over what follows.

    Raises:
        DamagedError: nothing can be read from there on.
    """
    import av

    try:
        yield from _frames_of(container, stream, start_sec)
    except (av.FFmpegError, OverflowError) as error:
        raise DamagedError(f"{container.name} cannot be read any further: {error}") from error


def _frames_of(container: Any, stream: Any, start_sec: float) -> Iterator[tuple[float, Any]]:
    import av

    if start_sec > 0:
        container.seek(round(start_sec / stream.time_base), stream=stream, backward=True, any_frame=False)
    first = min(stream.start_time or 0, 0)
    seconds, damaged = 0.0, False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            damaged = True
            yield seconds, FrameError(f"a frame after {seconds:.3f} s cannot be decoded: {error}")
            continue
        for frame in frames:
            shown = seconds if frame.pts is None else float((frame.pts - first) * stream.time_base)
            if abs(shown) > MAX_SECONDS:
                yield seconds, FrameError(f"a frame after {seconds:.3f} s says that it is shown at {shown:.3g} s")
                continue
            seconds = shown
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            yield seconds, FrameError(f"the frame at {seconds:.3f} s is damaged") if damaged else frame


def check_frame_size(stream: Any, path: Path, max_pixels: int) -> None:
    """SourceError for a video of larger images than are allowed, before any is decoded."""
    try:
        check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error


def to_rgb(frame: Any, max_pixels: int) -> np.ndarray:
    """uint8 RGB [height, width, 3] of an av.VideoFrame, turned as the file says. ValueError if it cannot be had."""
    import av

    if isinstance(frame, FrameError):
        raise frame
    check_size(frame.width, frame.height, max_pixels)
    try:
        image = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise FrameError(f"a frame cannot be made an image: {error}") from error
    turns = round(getattr(frame, "rotation", 0) / 90)
    return np.ascontiguousarray(np.rot90(image, turns)) if turns % 4 else image


def _attempt(frame: Any, max_pixels: int) -> np.ndarray | Exception:
    try:
        return to_rgb(frame, max_pixels)
    except ValueError as error:
        return error


def _given(image: np.ndarray | Exception) -> list[np.ndarray]:
    if isinstance(image, Exception):
        raise image
    return [image]


def _seconds(stream: Any) -> float:
    """How long a video is; 0 if it does not say."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    container = stream.container
    return container.duration / 1e6 if container.duration else 0.0
