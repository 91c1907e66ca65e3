"""Recordings that are not bags: what LeRobot's tables and lists say, and video files."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from itertools import islice
from pathlib import Path

import offline_runs
import recorded
from engine import Target, scratch
from mutations import change_json

from vla_perception.offline.recordings import Selection, SourceError, open_recordings

#: Frame sets of a recording that are looked at.
_FRAME_SETS = 20
_KEYS = ("episode_index", "frame_index", "index")
_FEATURES = {
    "observation.images.front": {"dtype": "video", "shape": [24, 32, 3]},
    "observation.images.top": {"dtype": "image", "shape": [6, 8, 3]},
    "action": {"dtype": "float32", "shape": [2]},
    "next.done": {"dtype": "bool", "shape": [1]},
    "timestamp": {"dtype": "float32", "shape": [1]},
    **{name: {"dtype": "int64", "shape": [1]} for name in _KEYS},
}


def _read(root: Path) -> None:
    """What `vla-perception tokenize` reads of a path."""
    for recording in islice(open_recordings([root], Selection()), 3):
        assert recording.expected_sets() >= 0 and recording.seconds >= 0
        for frames in islice(recording.frame_sets(), _FRAME_SETS):
            assert all(value.dtype != object for value in frames.values.values())
            assert abs(frames.time_ns) < 1 << 63 and max(map(abs, frames.stamps_ns)) < 1 << 63
            with contextlib.suppress(ValueError, OSError):  # of a damaged image: its frame set is left out
                assert all(image.shape[2] == 3 for image in frames.images())
        json.dumps([recording.details, recording.problems.shown], allow_nan=False)


@functools.cache
def _video(kind: str = "mp4", codec: str = "mpeg4") -> bytes:
    """Five frames a tenth of a second apart."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = 32, 24, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(5):
            image = recorded.numbered_image(index, 24, 32)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def _png() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(recorded.numbered_image(1, 6, 8)).save(stream, "PNG")
    return stream.getvalue()


def _tables() -> dict[str, list[dict]]:
    """As LeRobot has them, but for an image's bytes."""
    video = "videos/observation.images.front"
    places = {"data/chunk_index": 0, "data/file_index": 0, f"{video}/chunk_index": 0, f"{video}/file_index": 0}
    episodes = [
        {"episode_index": index, "length": 2, "tasks": ["push"], **places, f"{video}/from_timestamp": 0.2 * index}
        for index in range(2)
    ]
    rows = [
        {
            "observation.images.top": {"bytes": "PNG", "path": None},
            "action": [0.5, 1.0],
            "next.done": frame == 1,
            "episode_index": episode,
            "frame_index": frame,
            "index": 2 * episode + frame,
            "timestamp": frame / 10,
        }
        for episode in range(2)
        for frame in range(2)
    ]
    return {"episodes": episodes, "rows": rows}


def _dataset(name: str, version: str, data_path: str) -> Path:
    root = scratch() / name
    if not root.exists():
        video = root / "videos/observation.images.front/0_0.mp4"
        video.parent.mkdir(parents=True)
        video.write_bytes(_video())
        info = {"codebase_version": version, "fps": 10, "chunks_size": 1000, "features": _FEATURES}
        info |= {"data_path": data_path, "video_path": "videos/{video_key}/0_0.mp4"}
        (root / "meta/episodes").mkdir(parents=True)
        (root / "meta/info.json").write_text(json.dumps(info))
    return root


def _write_table(path: Path, rows: object) -> bool:
    """A parquet file of these rows; false for what no table can hold."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        for row in rows:  # type: ignore[attr-defined]
            image = row.get("observation.images.top")
            if isinstance(image, dict) and isinstance(image.get("bytes"), str):
                image["bytes"] = _png() if image["bytes"] == "PNG" else image["bytes"].encode("utf-8", "replace")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    except (pyarrow.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
        return False
    return True


def tables(data: bytes) -> None:
    """The list of episodes and the rows of version 3: the input is a JSON object of both."""
    root = _dataset("tables", "v3.0", "{file_index}.parquet")
    try:
        content = json.loads(data)
        episodes, rows = content["episodes"], content["rows"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    if _write_table(root / "meta/episodes/0.parquet", episodes) and _write_table(root / "0.parquet", rows):
        _read(root)


def tables_seeds() -> list[bytes]:
    return [json.dumps(_tables()).encode()]


def parquet(data: bytes) -> None:
    """A damaged table of rows."""
    root = _dataset("parquet", "v2.1", "0.parquet")
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 2, "tasks": ["push"]}')
    (root / "0.parquet").write_bytes(data)
    _read(root)


def parquet_seeds() -> list[bytes]:
    path = scratch() / "seed.parquet"
    assert _write_table(path, _tables()["rows"])
    return [path.read_bytes(), next(offline_runs.DATASET.glob("data/*/*.parquet")).read_bytes()]


def lines(data: bytes) -> None:
    """The list of episodes of version 2."""
    root = _dataset("lines", "v2.1", "{episode_chunk}.parquet")
    if not (root / "0.parquet").exists():
        assert _write_table(root / "0.parquet", _tables()["rows"])
    (root / "meta/episodes.jsonl").write_bytes(data)
    _read(root)


def lines_seeds() -> list[bytes]:
    rows = [{"episode_index": index, "length": 2, "tasks": ["push"]} for index in range(2)]
    return ["\n".join(map(json.dumps, rows)).encode(), json.dumps(rows[0]).encode()]


def video(data: bytes) -> None:
    path = scratch() / "x.mp4"
    path.write_bytes(data)
    _read(path)


def video_seeds() -> list[bytes]:
    kinds = (("mp4", "mpeg4"), ("mp4", "h264"), ("matroska", "mpeg4"), ("avi", "mjpeg"), ("mpegts", "mpeg2video"))
    return [_video(*kind) for kind in kinds]


TARGETS = [
    Target("dataset_tables", tables, tables_seeds, (SourceError,), (change_json,), max_bytes=8192, cost=4),
    Target("dataset_parquet", parquet, parquet_seeds, (SourceError,), max_bytes=16384, cost=4),
    Target("dataset_episodes", lines, lines_seeds, (SourceError,), (change_json,), max_bytes=4096, cost=4),
    Target("video", video, video_seeds, (SourceError,), max_bytes=16384, cost=4),
]
