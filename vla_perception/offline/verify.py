"""Stored tokens against themselves, against other stored ones, and against those that arrive: are they the same bits?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vla_perception.offline import run_index
from vla_perception.offline.recordings import SourceError
from vla_perception.offline.token_file import TokenFile
from vla_perception.printable import error_text
from vla_perception.sources.bags import COMPRESSED_IMAGE, Bag, compressed_format
from vla_perception.sources.bags.cdr import read_compressed_image
from vla_perception.tokens import codec
from vla_perception.tokens.fingerprint import difference
from vla_perception.tokens.visual_tokens import VisualTokens

#: What is reported one by one.
_LISTED = 20


@dataclass
class Report:
    """What was found.

    Attributes:
        frames: compared, or looked at.
        equal: of these, those with the same bits; of one side alone, those that are sound.
        only_a, only_b: frames that one side alone has.
        worst, worst_steps: largest difference of two values, in numbers; and the same in steps of the stored dtype.
        worst_at: where it is: recording and frame.
        settings: what differs in model, settings and environment, a line each.
        problems: what is wrong, a line each.
    """

    frames: int = 0
    equal: int = 0
    only_a: int = 0
    only_b: int = 0
    worst: float = 0.0
    worst_steps: int = 0
    worst_at: str = ""
    settings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.problems and self.equal == self.frames > 0 and not self.only_a and not self.only_b

    def problem(self, text: str) -> None:
        if len(self.problems) < _LISTED:
            self.problems.append(error_text(text))  # it quotes files

    def compare(self, a: VisualTokens, b: VisualTokens, where: str) -> None:
        """Takes in two messages of the same images."""
        self.frames += 1
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            self.problem(f"{where}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
            return
        if np.array_equal(a.data, b.data):
            self.equal += 1
            return
        differences = np.abs(a.float32() - b.float32())
        place = np.unravel_index(differences.argmax(), differences.shape)
        if differences[place] >= self.worst:
            self.worst, self.worst_at = float(differences[place]), error_text(where)
            # Of this value: around zero the numbers lie so close that any difference is thousands of steps.
            self.worst_steps = abs(int(_ordered(a.data[place], a.dtype)) - int(_ordered(b.data[place], b.dtype)))


def _ordered(words: np.ndarray, dtype: str) -> np.ndarray:
    """int64 that count a float format's numbers in their order: neighbours differ by one."""
    bits = words.view(np.uint32 if dtype == "float32" else np.uint16).astype(np.int64)
    sign = 1 << (31 if dtype == "float32" else 15)
    return np.where(bits & sign, sign - bits, bits)


class Stored:
    """A run's folder, a token file, or a bag of token messages: frames by recording.

    Raises:
        ValueError: it is none of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: dict[str, Any] = {}
        self._parts: dict[str, Path] = {}
        if not path.exists():
            raise SourceError(f"there is no {path}")
        if (path / run_index.NAME).is_file() or path.name == run_index.NAME:
            folder = path if path.is_dir() else path.parent
            self.index = run_index.read(folder)
            self._parts = {str(entry["name"]): folder / str(entry["file"]) for entry in self.index["recordings"]}
        else:
            self._parts = {path.stem: path}

    @property
    def recordings(self) -> list[str]:
        return list(self._parts)

    def frames(self, recording: str) -> Iterator[VisualTokens]:
        """All of a recording's, in their order; ValueError where it is damaged."""
        file = self.file(recording)
        if file is not None:
            with file:
                for index in range(len(file)):
                    yield file.frame(index)
            return
        with Bag(self._parts[recording]) as bag:
            topics = [topic.name for topic in bag.topics.values() if topic.type == COMPRESSED_IMAGE]
            for message in bag.messages(topics):
                if compressed_format(message.cdr).startswith(codec.FORMAT_OF_ANY_VERSION):
                    yield VisualTokens.from_bytes(read_compressed_image(message.cdr).data)

    def is_file(self, recording: str) -> bool:
        """Whether it is a token file, which gives any frame at once; a bag is read from its beginning to its end."""
        return self._parts[recording].suffix == ".safetensors"

    def file(self, recording: str) -> TokenFile | None:
        """The recording's token file; None of a bag."""
        return TokenFile(self._parts[recording]) if self.is_file(recording) else None

    def by_stamps(self, recording: str) -> Mapping[tuple[int, ...], Any]:
        """The frames' images' stamps → what gives the frame."""
        file = self.file(recording)
        if file is not None:
            return {tuple(map(int, stamps)): (lambda i=i: file.frame(i)) for i, stamps in enumerate(file.stamps_ns)}
        return {frame.stamps_ns: (lambda frame=frame: frame) for frame in self.frames(recording)}

    @cached_property
    def model(self) -> Mapping[str, Any]:
        """What its first frame says about the model. ValueError where there is none."""
        if not self.recordings:
            raise ValueError(f"{self.path} has no recordings")
        return model_of(next(self.frames(self.recordings[0])))


def model_of(tokens: VisualTokens) -> dict[str, Any]:
    """What a message says about the model, for `differing_models`."""
    names = ("fingerprint", "fingerprint_inputs", "model", "weights", "compute_dtype", "projector", "pool")
    return {name: getattr(tokens, name) for name in names}


def check(a: Stored) -> Report:
    """One side alone: every frame has the bytes that were written, and the index says what is there."""
    report = Report()
    for name in a.recordings:
        try:
            file = a.file(name)
            frames = 0
            for index, frame in enumerate(a.frames(name)):
                frames += 1
                report.frames += 1
                sound = file is None or file.is_sound(index)
                if not sound:
                    report.problem(f"{name}, frame {index}: its bytes are not those that were written (checksum)")
                elif not codec.is_finite(frame.data, frame.dtype):
                    sound = False
                    report.problem(f"{name}, frame {index}: tokens that are not finite")
                report.equal += sound
        except (ValueError, OSError) as error:
            report.problem(f"{name}: {error}")
            continue
        _check_entry(a, name, file, frames, report)
    if a.index and not a.index.get("complete"):
        report.problem("the run is not complete: the same command goes on with it")
    return report


def _check_entry(a: Stored, name: str, file: TokenFile | None, frames: int, report: Report) -> None:
    entry = next((entry for entry in a.index.get("recordings", []) if entry["name"] == name), None)
    if entry is None:
        return
    if entry["frames"] != frames:
        report.problem(f"{name}: {frames} frames, and the index says {entry['frames']}")
    if file is not None and file.fingerprint != a.index["model"]["fingerprint"]:
        report.problem(
            f"{name}: fingerprint {file.fingerprint[:16]}…, and the index says {a.index['model']['fingerprint'][:16]}…"
        )


def compare(a: Stored, b: Stored) -> Report:
    """Both sides' frames of the same images, matched by their stamps; recordings of the same name, or the only ones."""
    report = Report()
    pairs = {name: name for name in a.recordings if name in b.recordings}
    if not pairs and len(a.recordings) == len(b.recordings) == 1:
        pairs = {a.recordings[0]: b.recordings[0]}
    for missing, where in ((set(a.recordings) - set(pairs), b), (set(b.recordings) - set(pairs.values()), a)):
        for name in sorted(missing):
            report.problem(f"{where.path} has no recording {name}")
    for name, other in pairs.items():
        try:
            _compare_recordings(a, name, b, other, report)
        except (ValueError, OSError) as error:
            report.problem(f"{name}: {error}")
    report.settings = what_differs(a, b)
    return report


def _compare_recordings(a: Stored, name: str, b: Stored, other: str, report: Report) -> None:
    swapped = not b.is_file(other)
    if swapped:
        a, name, b, other = b, other, a, name
    known, unpaired = dict(b.by_stamps(other)), 0
    for frame in a.frames(name):
        twin = known.pop(frame.stamps_ns, None)
        if twin is None:
            unpaired += 1
        else:
            report.compare(frame, twin(), f"{name}, frame {frame.sequence}")
    report.only_a += len(known) if swapped else unpaired
    report.only_b += unpaired if swapped else len(known)


def what_differs(a: Stored, b: Stored) -> list[str]:
    """In model, settings and environment, as far as both sides say."""
    if a.index and b.index:
        return list(map(error_text, run_index.differences(a.index, b.index)))
    try:
        return list(map(error_text, differing_models(a.model, b.model)))
    except (ValueError, OSError, StopIteration):  # what is damaged is a problem already
        return []


def differing_models(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between two models' metadata, a line each; first the fingerprint, with what it comes from."""
    lines = [f"model.{key}: {a[key]}, now {b[key]}" for key in sorted(a) if key in b and a[key] != b[key]]
    lines = [line for line in lines if not line.startswith(("model.fingerprint:", "model.fingerprint_inputs:"))]
    if a["fingerprint"] != b["fingerprint"]:
        text = difference(a["fingerprint"], a.get("fingerprint_inputs"), b.get("fingerprint_inputs"), b["fingerprint"])
        lines.insert(0, f"fingerprint: {a['fingerprint'][:16]}…, now {b['fingerprint'][:16]}…: {text}")
    return lines
