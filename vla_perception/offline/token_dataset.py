"""Token files as a dataset to train on: by index, by episode, by time, with a history of frames before each.

    dataset = TokenDataset("tokens", history=4, expect_fingerprint="8c1f0a2b")
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True, num_workers=2)
    for batch in loader:
        batch["tokens"]          # [batch, history, views, tokens, channels], bfloat16
        batch["action"]          # [batch, …], what was recorded beside the images

It is a `torch.utils.data.Dataset` that gives torch tensors where torch is installed, and NumPy arrays where it is not.
Files are mapped into memory where they are read, in each worker for itself: an item reads its frames and nothing else.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vla_perception.offline import run_index
from vla_perception.offline.token_file import TokenFile
from vla_perception.tokens.buffer import FingerprintMismatchError
from vla_perception.tokens.fingerprint import difference, expectation

try:
    import torch
    from torch.utils.data import Dataset
except ImportError:  # a policy's environment without torch: arrays instead of tensors
    torch = None  # type: ignore[assignment]
    Dataset = object  # type: ignore[assignment, misc]

Item = dict[str, Any]

#: What stands in the place of frames before an episode's first: that frame again, or zeros.
PADDINGS = ("repeat", "zeros")
#: Files that are open at a time, in each process.
_OPEN = 64


@dataclass(frozen=True)
class Episode:
    """One token file of the dataset.

    Attributes:
        name, path: of it.
        frames: how many it has.
        start: index of its first frame in the dataset.
        details: what the index says about it, such as ``tasks`` and ``source``.
    """

    name: str
    path: Path
    frames: int
    start: int
    details: Mapping[str, Any]


class TokenDataset(Dataset):
    """The frames of a run of `vla-perception tokenize`, or of some token files, one after the other.

    Item i is a dict:
        tokens: [history, views, tokens, channels], the frame and those before it in its episode, oldest first, in the
            stored dtype; without the first dimension where `history` is 0.
        is_pad: bool [history], where there were no such frames; only with a history.
        stamps_ns: int64 [views]; timestamp: float64; episode, frame: int64, its place.
        further: what was recorded beside the images, by its name (``action``, …), of the frame; with `horizon`, of the
            frame and those after it, [horizon, …], the last one repeated at the episode's end, and
            ``NAME_is_pad`` says where.

    Attributes:
        episodes: the files, an `Episode` each.
        cameras: names of the views.
        fingerprint: of all files.
        metadata: of the model, as in a token message.
        shape: (views, tokens per view, channels).

    Args:
        source: the run's folder, or token files.
        history: frames per item, the item's own included; 0: that frame alone, without the dimension.
        padding: of `PADDINGS`: what stands before an episode's first frame.
        values: names of what else an item has; None: all that every file has.
        horizon: for each of those names, how many frames from the item's on; not named: the frame's alone.
        expect_fingerprint: the fingerprint or its first digits (at least 8), or `VisualTokenizer.metadata()`.
        as_numpy: NumPy arrays also where torch is installed; bfloat16 is ml_dtypes' then.

    Raises:
        FingerprintMismatchError: a file has another fingerprint than the index, the other files, or `expect_fingerprint`.
        TokenFormatError: a damaged file.
        run_index.RunIndexError: the index is damaged, or names files that are not there.
        ValueError: no such files, or files that do not go together.
    """

    def __init__(
        self,
        source: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        history: int = 0,
        padding: str = "repeat",
        values: Sequence[str] | None = None,
        horizon: Mapping[str, int] | None = None,
        expect_fingerprint: str | Mapping[str, object] | None = None,
        as_numpy: bool = False,
    ) -> None:
        if history < 0:
            raise ValueError(f"history is {history}, expected 0 or more frames")
        if padding not in PADDINGS:
            raise ValueError(f"padding is {padding!r}, expected one of {', '.join(PADDINGS)}")
        self.history, self.padding, self.as_numpy = history, padding, as_numpy or torch is None
        self._open: OrderedDict[int, TokenFile] = OrderedDict()
        paths, index_fingerprint = _files(source)
        self.metadata: Mapping[str, Any] = {}
        self._read_episodes(paths, expect_fingerprint, index_fingerprint)
        names = set.intersection(*(set(names) for names in self._names.values()))
        self._values = sorted(names) if values is None else list(values)
        for name in self._values:
            lacking = [episode.name for episode in self.episodes if name not in self._names[episode.name]]
            if lacking:
                raise ValueError(f"{lacking[0]} has no {name!r}; it has {', '.join(self._names[lacking[0]]) or 'none'}")
        self._horizon = dict(horizon or {})
        for name, frames in self._horizon.items():
            if name not in self._values or frames < 1:
                raise ValueError(f"horizon of {name!r} is {frames}: expected 1 or more frames of {self._values}")

    def _read_episodes(
        self, paths: Sequence[tuple[str, Path]], expected: str | Mapping[str, object] | None, index_fingerprint: str
    ) -> None:
        self.episodes: list[Episode] = []
        self._names: dict[str, list[str]] = {}
        digits, inputs = (None, None) if expected is None else expectation(expected)
        start = 0
        for name, path in paths:
            with TokenFile(path) as file:
                found = file.metadata.get("fingerprint_inputs")
                if digits is not None and not file.fingerprint.startswith(digits):
                    raise FingerprintMismatchError(
                        f"{path}: its tokens have the fingerprint {file.fingerprint[:16]}…, expected {digits[:16]}…; "
                        f"{difference(digits, inputs, found, file.fingerprint)}"
                    )
                if index_fingerprint and file.fingerprint != index_fingerprint:
                    raise FingerprintMismatchError(
                        f"{path}: its tokens have the fingerprint {file.fingerprint[:16]}…, and the index of its run says "
                        f"{index_fingerprint[:16]}…: the file was put there from another run"
                    )
                kind = (file.fingerprint, file.cameras, file.shape[1:], file.dtype)
                if not self.episodes:
                    first = kind
                    self.metadata = {key: value for key, value in file.metadata.items() if key != "recording"}
                    self.cameras, self.shape, self.dtype = file.cameras, file.shape[1:], file.dtype
                    self.fingerprint = file.fingerprint
                elif kind != first:
                    error = FingerprintMismatchError if kind[0] != first[0] else ValueError
                    raise error(
                        f"{path} has {kind} (fingerprint, cameras, shape, dtype), and {paths[0][1]} has {first}"
                    )
                details = file.metadata.get("recording") or {}
                self.episodes.append(Episode(name, path, len(file), start, details))
                self._names[name] = sorted(file.values)
                start += len(file)
        self._ends = list(accumulate(episode.frames for episode in self.episodes))

    def __len__(self) -> int:
        """Frames of all episodes."""
        return self._ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """Dataset index → (episode, frame in it). IndexError beyond the dataset."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} frames")
        index %= len(self)
        episode = bisect_right(self._ends, index)
        return episode, index - self.episodes[episode].start

    def indices(self, episode: int) -> range:
        """Dataset indices of an episode."""
        chosen = self.episodes[episode]
        return range(chosen.start, chosen.start + chosen.frames)

    def at(self, episode: int, seconds: float) -> int:
        """Dataset index of the episode's last frame at or before that time (`TokenFile.timestamps`); its first before."""
        times = self.file(episode).timestamps
        frame = max(0, int(np.searchsorted(times, seconds, side="right")) - 1)
        return self.episodes[episode].start + frame

    def file(self, episode: int) -> TokenFile:
        """An episode's file, open."""
        if episode not in self._open:
            self._open[episode] = TokenFile(self.episodes[episode].path)
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(episode)
        return self._open[episode]

    def __getitem__(self, index: int) -> Item:
        episode, frame = self.place(index)
        file = self.file(episode)
        item: Item = {
            **self._tokens(file, frame),
            "stamps_ns": file.stamps_ns[frame].copy(),
            "timestamp": np.array(file.timestamps[frame]),
            "episode": np.array(episode),
            "frame": np.array(frame),
        }
        for name in self._values:
            item |= self._of_values(name, file.values[name], frame)
        return item if self.as_numpy else {name: _as_tensor(value) for name, value in item.items()}

    def _tokens(self, file: TokenFile, frame: int) -> Item:
        if not self.history:
            return {"tokens": file.read(frame, frame + 1)[0]}
        first = frame - self.history + 1
        found = file.read(max(0, first), frame + 1)
        missing = max(0, -first)
        if missing:
            before = np.repeat(found[:1], missing, axis=0)
            found = np.concatenate([before if self.padding == "repeat" else np.zeros_like(before), found])
        return {"tokens": found, "is_pad": np.arange(self.history) < missing}

    def _of_values(self, name: str, values: np.ndarray, frame: int) -> Item:
        if name not in self._horizon:
            return {name: np.array(values[frame])}
        wanted = np.arange(frame, frame + self._horizon[name])
        return {name: values[np.minimum(wanted, len(values) - 1)], f"{name}_is_pad": wanted >= len(values)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # each process maps for itself


def _files(source: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[list[tuple[str, Path]], str]:
    """(name, path) of the token files, and the fingerprint that their index says."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir() or path.name == run_index.NAME:
            folder = path if path.is_dir() else path.parent
            index = run_index.read(folder)
            files = [entry for entry in index["recordings"] if str(entry.get("file", "")).endswith(".safetensors")]
            if not files:
                raise ValueError(f"{folder} holds no token files; bags of token messages are not read as a dataset")
            found = [(str(entry["name"]), folder / str(entry["file"])) for entry in files]
            if missing := [path for _, path in found if not path.is_file()]:
                raise run_index.RunIndexError(
                    f"{missing[0]} is in the index of its run, and is not there ({len(missing)} of {len(found)} files): put "
                    "it back, or let `vla-perception tokenize` with the same --out make it again"
                )
            return found, str(index["model"].get("fingerprint", ""))
        source = [path]
    paths = [Path(each) for each in source]
    if not paths:
        raise ValueError("no token files given")
    return [(str(path.with_suffix("")), path) for path in paths], ""


def _as_tensor(value: np.ndarray) -> Any:
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)
