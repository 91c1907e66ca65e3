"""Episodes of LeRobot datasets (v3.0, and v2.1): images from parquet or mp4, and the numbers beside them.

Frames are those of LeRobot's own reader: of a video the frame whose time is closest to the row's timestamp, within
LeRobot's tolerance, decoded by FFmpeg's libraries. https://github.com/huggingface/lerobot, datasets/video_utils.py.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vla_perception.offline.recordings import FrameError, FrameSet, Problems, Selection, SourceError, safe_name
from vla_perception.offline.video_recordings import MAX_SECONDS, check_frame_size, frames_of, opened, to_rgb
from vla_perception.sources import image_files

#: Seconds between a row's timestamp and its frame, at most: LeRobot's default.
TOLERANCE_SEC = 1e-4
#: What a feature of images may be.
_IMAGES = ("image", "video")
_PREFIX = "observation.images."
#: Bytes of info.json, and of a line of v2.1's lists.
_MAX_JSON = 8 << 20
#: Of an episode's number and length.
_MAX_COUNT = 10**12
#: Of a dataset; some bytes of parquet can stand for any number of rows.
_MAX_EPISODES = 1 << 20
#: Of all episodes' tasks together.
_MAX_CHARACTERS = 1 << 28
#: Rows that are held at a time: of numbers, and of images.
_ROWS, _IMAGE_ROWS = 256, 16
#: What may stand in info.json's templates for paths.
_FIELD = re.compile(r"\{[a-z_]+(:0?\d{1,2}d)?\}")


@dataclass(frozen=True)
class _Episode:
    """Where an episode lies.

    Attributes:
        data: parquet file with its rows.
        videos: key → (mp4 file, where in it the episode begins, in seconds).
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    videos: dict[str, tuple[Path, float]]


class _Dataset:
    """The index of a dataset. SourceError if it is none that is understood."""

    def __init__(self, root: Path) -> None:
        self.root = root
        info = _object(_read_text(root / "meta" / "info.json"), root / "meta" / "info.json")
        self.version = str(info.get("codebase_version", ""))
        if not self.version.startswith(("v3.", "v2.")):
            raise SourceError(
                f"{root} is a LeRobot dataset of version {self.version[:20]!r}; v3.0 and v2.1 are read (LeRobot converts)"
            )
        try:
            self.fps = float(info["fps"])
            self.features: dict[str, dict] = {str(key): dict(feature) for key, feature in info["features"].items()}
            self._data_path = str(info["data_path"])
            self._video_path = str(info.get("video_path") or "")
            self._chunk_size = int(info.get("chunks_size") or 1000)
            if not 0 < self.fps < 1e6 or self._chunk_size < 1:
                raise ValueError("fps or chunks_size is not a positive number")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SourceError(f"{root}/meta/info.json is not as LeRobot writes it: {error!r}") from error
        self.image_keys = [key for key, feature in self.features.items() if feature.get("dtype") in _IMAGES]
        self.depth_keys = [key for key in self.image_keys if _is_depth(self.features[key])]

    @cached_property
    def episodes(self) -> list[_Episode]:
        found: list[_Episode] = []
        characters = 0
        try:
            for episode in self._episodes_of_v3() if self.version.startswith("v3.") else self._episodes_of_v2():
                characters += sum(map(len, episode.tasks))
                if len(found) == _MAX_EPISODES or characters > _MAX_CHARACTERS:
                    raise SourceError(
                        f"{self.root}/meta lists more than {_MAX_EPISODES} episodes, or tasks of more than "
                        f"{_MAX_CHARACTERS >> 20} Mi characters: split the dataset"
                    )
                found.append(episode)
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001 - pyarrow's errors, and whatever odd content leads to
            raise SourceError(f"{self.root}/meta: the list of episodes cannot be read: {_reason(error)}") from error
        return sorted(found, key=lambda episode: episode.index)

    def _episodes_of_v3(self) -> Iterator[_Episode]:
        videos = [key for key in self.image_keys if self.features[key]["dtype"] == "video"]
        columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        for key in videos:
            columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        files = sorted((self.root / "meta" / "episodes").rglob("*.parquet"))
        if not files:
            raise SourceError(f"{self.root}/meta/episodes holds no parquet file: is the dataset complete?")
        for file in files:
            for row in _table_rows(file, columns):
                yield _Episode(
                    _count(row, "episode_index"),
                    _count(row, "length"),
                    tuple(map(str, row["tasks"] or ())),
                    self._file(self._data_path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]),
                    {
                        key: (
                            self._file(
                                self._video_path,
                                video_key=key,
                                chunk_index=row[f"videos/{key}/chunk_index"],
                                file_index=row[f"videos/{key}/file_index"],
                            ),
                            _seconds(row, f"videos/{key}/from_timestamp"),
                        )
                        for key in videos
                    },
                )

    def _episodes_of_v2(self) -> Iterator[_Episode]:
        path = self.root / "meta" / "episodes.jsonl"
        for line in _read_text(path, 1 << 30).splitlines():
            if not line.strip():
                continue
            row = _object(line, path)
            index = _count(row, "episode_index")
            names = {"episode_chunk": index // self._chunk_size, "episode_index": index}
            videos = {
                key: (self._file(self._video_path, video_key=key, **names), 0.0)
                for key in self.image_keys
                if self.features[key]["dtype"] == "video"
            }
            tasks = tuple(map(str, row.get("tasks") or ()))
            yield _Episode(index, _count(row, "length"), tasks, self._file(self._data_path, **names), videos)

    def _file(self, template: str, **names: Any) -> Path:
        """A file of the dataset, by info.json's template for its path; never outside of the dataset."""
        numbers = {name: value if name == "video_key" else int(value) for name, value in names.items()}
        # The template comes with the dataset: it may name these values with a width, and reach into nothing.
        if len(template) > 500 or re.search(r"[{}]", _FIELD.sub("", template)):
            raise SourceError(f"{self.root}/meta/info.json has an odd path: {template[:100]!r}")
        path = PurePosixPath(template.format(**numbers))
        if path.is_absolute() or ".." in path.parts:
            raise SourceError(f"{self.root}/meta/info.json leads outside of the dataset: {template[:100]!r}")
        return self.root / path


class EpisodeRecording:
    """One episode of a dataset."""

    kind = "lerobot"

    def __init__(self, dataset: _Dataset, episode: _Episode, keys: dict[str, str], selection: Selection) -> None:
        self.name = f"{safe_name(dataset.root.resolve().name)}/episode_{episode.index:06d}"
        self.source = str(dataset.root)
        self.cameras = tuple(keys)
        self.seconds = episode.length / dataset.fps
        self.problems = Problems()
        self._dataset, self._episode, self._keys = dataset, episode, keys
        self._max_pixels = selection.max_image_pixels
        used = [episode.videos[key][0] for key in keys.values() if key in episode.videos]
        self.files = list(dict.fromkeys([dataset.root / "meta" / "info.json", episode.data, *used]))
        self.details: dict[str, object] = {
            "episode_index": episode.index,
            "tasks": list(episode.tasks),
            "fps": dataset.fps,
            "keys": dict(keys),
            "lerobot_version": dataset.version,
        }

    def expected_sets(self) -> int:
        return self._episode.length

    def frame_sets(self) -> Iterator[FrameSet]:
        """One per row; `FrameSet.values` has the dataset's numbers under the dataset's names."""
        self.problems.clear()
        with contextlib.ExitStack() as stack:
            readers = [self._reader(key, stack) for key in self._keys.values()]
            ordinal = -1
            for ordinal, row in enumerate(self._rows()):
                seconds, values = self._numbers(row, ordinal)
                images = [reader(row, seconds) for reader in readers]
                stamp_ns = round(seconds * 1e9)
                yield FrameSet(
                    ordinal,
                    stamp_ns,
                    seconds,
                    (stamp_ns,) * len(images),
                    ("",) * len(images),
                    partial(_all, images),
                    values,
                )
            if ordinal + 1 < self._episode.length:
                self.problems.add(
                    f"{self._episode.data} has {ordinal + 1} of the {self._episode.length} rows of episode "
                    f"{self._episode.index}: is the dataset complete?"
                )

    def _reader(self, key: str, stack: contextlib.ExitStack) -> Any:
        """(row, seconds) → what gives the camera's image."""
        if key not in self._episode.videos:
            return partial(_stored_image, key=key, root=self._dataset.root, max_pixels=self._max_pixels)
        path, start_sec = self._episode.videos[key]
        container, stream = stack.enter_context(opened(path))
        check_frame_size(stream, path, self._max_pixels)
        return _ClosestFrames(path, frames_of(container, stream, start_sec), start_sec, self._max_pixels)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The episode's rows, in their order, some at a time."""
        import pyarrow.parquet as parquet

        index = self._episode.index
        wanted = [name for name in self._dataset.features if name not in self._episode.videos]
        try:
            with parquet.ParquetFile(self._episode.data) as file:
                columns = [name for name in file.schema_arrow.names if name in (*wanted, "episode_index", "timestamp")]
                unused = [key for key in self._dataset.image_keys if key not in self._keys.values()]
                columns = [name for name in columns if name not in unused]
                groups = _row_groups(self._episode.data, index)
                rows = _IMAGE_ROWS if set(columns) & set(self._dataset.image_keys) else _ROWS
                for batch in file.iter_batches(rows, row_groups=groups, columns=columns):
                    for row in batch.to_pylist():
                        if row["episode_index"] == index:
                            yield row
        except Exception as error:  # noqa: BLE001 - pyarrow's errors, and whatever odd content leads to
            raise SourceError(f"{self._episode.data} cannot be read: {_reason(error)}") from error

    def _numbers(self, row: dict[str, Any], ordinal: int) -> tuple[float, dict[str, np.ndarray]]:
        """The time of a row, and its values. SourceError for a row that is not as info.json says."""
        try:
            return _seconds(row, "timestamp"), self._values(row)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SourceError(
                f"{self._episode.data}: row {ordinal} of episode {self._episode.index} is not as meta/info.json says: "
                f"{_reason(error)}"
            ) from error

    def _values(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        found = {}
        for name, feature in self._dataset.features.items():
            dtype = _DTYPES.get(str(feature.get("dtype")))
            if dtype is None or name not in row or name == "timestamp":
                continue
            try:
                value: np.ndarray = np.asarray(row[name], dtype)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{name} is not {feature.get('dtype')}: {error}") from error
            found[name] = value if list(value.shape) != [1] else value.reshape(())
        return found


#: Features whose numbers are stored beside the tokens.
_DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float64": np.float64,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


class _ClosestFrames:
    """Of a video's frames, in their order, the one closest to each time that is asked for, in its order."""

    def __init__(self, path: Path, frames: Iterator[tuple[float, Any]], start_sec: float, max_pixels: int) -> None:
        self._path, self._start_sec, self._max_pixels = path, start_sec, max_pixels
        self._frames = ((at, frame) for at, frame in frames if not isinstance(frame, FrameError))
        self._at, self._next = next(self._frames, None), next(self._frames, None)
        self._image: tuple[float, Any] | None = None

    def __call__(self, _row: dict, seconds: float) -> Any:
        """What gives uint8 RGB of the frame."""
        wanted = self._start_sec + seconds
        while (
            self._next is not None and self._at is not None and abs(self._next[0] - wanted) < abs(self._at[0] - wanted)
        ):
            self._at, self._next = self._next, next(self._frames, None)
        if self._at is None or abs(self._at[0] - wanted) > TOLERANCE_SEC:
            nearest = "none" if self._at is None else f"the closest is at {self._at[0]:.4f} s"
            error = FrameError(f"{self._path.name} has no frame at {wanted:.4f} s: {nearest}")
            return partial(_raise, error)
        if self._image is None or self._image[0] != self._at[0]:
            try:
                self._image = self._at[0], to_rgb(self._at[1], self._max_pixels)
            except ValueError as error:
                return partial(_raise, error)
        image = self._image[1]
        return lambda: image


def episodes(root: Path, selection: Selection) -> list[EpisodeRecording]:
    """The wanted episodes of a dataset. SourceError if it is none, or lacks what was asked for."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise SourceError(f"{error}: datasets are read with pyarrow: pip install '.[offline]'") from error
    dataset = _Dataset(root)
    keys = _camera_keys(dataset, selection)
    wanted = [
        episode for episode in dataset.episodes if selection.episodes is None or episode.index in selection.episodes
    ]
    if selection.episodes is not None:
        absent = sorted(selection.episodes - {episode.index for episode in wanted})
        if absent:
            raise SourceError(f"{root} has no episode {absent[0]}; it has {len(dataset.episodes)}")
    if not wanted:
        raise SourceError(f"{root} has no episodes")
    return [EpisodeRecording(dataset, episode, keys, selection) for episode in wanted]


def _camera_keys(dataset: _Dataset, selection: Selection) -> dict[str, str]:
    """Camera → key of its feature."""
    named = {key.removeprefix(_PREFIX): key for key in dataset.image_keys}
    if not selection.cameras:
        named = {name: key for name, key in named.items() if key not in dataset.depth_keys}
        if not named:
            raise SourceError(f"{dataset.root} has no images in color; its features are {', '.join(dataset.features)}")
        return named
    keys = {}
    for name, where in selection.cameras:
        key = where or named.get(name, name)
        if key not in dataset.image_keys:
            raise SourceError(
                f"{dataset.root} has no images {key} for the camera {name}; it has {', '.join(dataset.image_keys)} "
                "(--cameras NAME=KEY)"
            )
        if key in dataset.depth_keys:
            raise SourceError(
                f"{dataset.root}: {key} holds depth maps, not images in color; leave the camera {name} out"
            )
        keys[name] = key
    return keys


def _is_depth(feature: dict[str, Any]) -> bool:
    """Whether a feature of images holds depth maps, as LeRobot from 0.6 on says it, or earlier versions said it."""
    for name in ("info", "video_info"):
        found = feature.get(name)
        if isinstance(found, dict) and (found.get("is_depth_map") or found.get("video.is_depth_map")):
            return True
    return False


def _row_groups(path: Path, index: int) -> list[int]:
    """Those in which rows of an episode may be."""
    state = path.stat()
    bounds = _episode_bounds(path, state.st_mtime_ns, state.st_size)
    return np.flatnonzero((bounds[:, 0] <= index) & (index <= bounds[:, 1])).tolist()


@lru_cache(maxsize=16)  # a file of version 3 holds many episodes
def _episode_bounds(path: Path, _changed: int, _size: int) -> np.ndarray:
    """int64 [row groups, 2]: the lowest and highest `episode_index` of each.

    Of the rows, and not by the groups' statistics: damaged ones end the process, whatever asks for them (pyarrow 26).
    """
    import pyarrow.parquet as parquet
    from pyarrow import compute

    bounds = []
    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["episode_index"], use_threads=False)
            found = compute.min_max(table.column("episode_index")).as_py()
            bounds.append((0, -1) if found["min"] is None else (int(found["min"]), int(found["max"])))
    return np.array(bounds, np.int64).reshape(-1, 2)


def _stored_image(row: dict, _seconds: float, *, key: str, root: Path, max_pixels: int) -> Any:
    """What gives the image that lies in a row: a file's bytes, or the path of one."""
    cell = row.get(key)
    content, file = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, None)
    if content and isinstance(content, bytes):
        return partial(image_files.decode, content, f"{key} of frame {row.get('frame_index')}", max_pixels)
    if not file or not isinstance(file, str):
        return partial(_raise, FrameError(f"{key} holds no image"))
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        return partial(_raise, FrameError(f"{key} leads outside of the dataset"))
    return partial(image_files.read, root / path, max_pixels)


def _all(images: list) -> list[np.ndarray]:
    return [image() for image in images]


def _raise(error: Exception) -> None:
    raise error


def _table_rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, some at a time."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(_ROWS, columns=columns):
            yield from batch.to_pylist()


def _count(row: dict[str, Any], name: str) -> int:
    """A whole number that something is counted with. ValueError for what is none."""
    value = int(row[name])
    if not 0 <= value <= _MAX_COUNT:
        raise ValueError(f"{name} is {str(value):.50}")
    return value


def _seconds(row: dict[str, Any], name: str) -> float:
    """ValueError for a time that no frame has."""
    value = float(row[name])
    if not abs(value) <= MAX_SECONDS:
        raise ValueError(f"{name} is {value}")
    return value


def _reason(error: Exception) -> str:
    """What an error says, in few words; a KeyError says the name alone."""
    if isinstance(error, KeyError) and error.args:
        return f"there is no {str(error.args[0]):.100}"
    return f"{str(error):.500}" or type(error).__name__


def _read_text(path: Path, limit: int = _MAX_JSON) -> str:
    try:
        if path.stat().st_size > limit:
            raise SourceError(f"{path} is larger than {limit >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _object(text: str, path: Path) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds no JSON object")
    return value
