"""The index of a run, `index.json`: what the tokens were made of and with, and which files there are.

It is a function of the sources and the settings: no dates, no durations. So an interrupted run that goes on, or one that
many workers share, ends with the same bytes as any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path, PurePosixPath

from vla_perception import __version__
from vla_perception.offline.token_file import TokenFile
from vla_perception.tokens.codec import TokenFormatError

SCHEMA = "vla_tokens_run/1"
NAME = "index.json"
#: In the folder of a bag of token messages, beside its own files: its entry in the index.
BAG_ENTRY = "recording.json"
#: Bytes of that file.
_MAX_ENTRY = 1 << 24
#: What else decides on the last bits of tokens, or on decoded images: versions of these packages.
_PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "av",
)  # fmt: skip
#: What an entry counts, and the index sums up.
_COUNTS = ("frames", "frames_skipped", "frames_damaged", "bytes")
#: Source files that are listed one by one.
_LISTED = 16


class RunIndexError(ValueError):
    """Not an index, or one of other settings; the text says what to do."""


def environment() -> dict[str, object]:
    """What computes here: versions, processor, threads."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def build(
    model: Mapping[str, object], settings: Mapping[str, object], computed_by: Mapping[str, object]
) -> dict[str, object]:
    """The index of a run that has not written anything yet."""
    return {
        "schema": SCHEMA,
        "tool": {"name": "vla_perception", "version": __version__},
        "complete": False,
        "model": dict(model),
        "settings": dict(settings),
        "environment": dict(computed_by),
        "batch_tolerance": None,
        "recordings": [],
        "failed": [],
    }


def read(folder: Path) -> dict:
    """RunIndexError where there is none that can be read."""
    path = folder / NAME if folder.is_dir() else folder
    try:
        if path.stat().st_size > 1 << 30:
            raise ValueError("it is too large")
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict) or index.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        if not all(isinstance(index.get(key), kind) for key, kind in (("recordings", list), ("model", dict))):
            raise ValueError("it lacks recordings or model")
        if not isinstance(index["model"].get("fingerprint"), str):
            raise ValueError("its model has no fingerprint")
        if not all(map(_is_entry, index["recordings"])):
            raise ValueError(
                "an entry of its recordings has no name, or a file outside of the run's folder, or no number of frames"
            )
    except (OSError, ValueError, RecursionError) as error:
        raise RunIndexError(f"{path} is not the index of a run of `vla-perception tokenize`: {error}") from error
    return index


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or type(entry.get("frames")) is not int:
        return False
    file = entry.get("file")
    return isinstance(file, str) and not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts


def write(folder: Path, index: Mapping[str, object]) -> None:
    """In place of the one that is there, whole or not at all."""
    partial = folder / f"{NAME}.part"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / NAME)


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs between two runs' tool, model, settings and environment: ``settings.batch: 1, now 4``."""
    parts = []
    for section in ("tool", "model", "settings", "environment"):
        old, new = _flat(before.get(section)), _flat(now.get(section))
        for key in sorted({*old, *new}, key=lambda key: (key == "fingerprint", key)):  # a digest tells the least
            if _is_input(key) and not (any(map(_is_input, old)) and any(map(_is_input, new))):
                continue  # a preset that nobody has changed has none: model and settings say what differs
            if old.get(key) != new.get(key):
                parts.append(f"{section}.{key}: {_brief(old.get(key))}, now {_brief(new.get(key))}")
    return parts


def _is_input(key: str) -> bool:
    return key.startswith("fingerprint_inputs.")


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    found: dict[str, object] = {}
    for key, part in value.items():
        found |= _flat(part, f"{prefix}{key}.")
    return found


def _brief(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 80 else f"{text[:80]}…"


def collect(folder: Path, index: dict, names: Sequence[str], failed: Sequence[Mapping[str, str]]) -> dict:
    """The index with the files of the folder in it: those it had, and `names` (without suffix), sorted by name.

    complete: none of the command's recordings is missing.
    """
    before = {str(entry["name"]): entry for entry in index["recordings"]}
    entries: list[dict] = []
    for name in sorted({*before, *names}):
        path = folder / f"{name}.safetensors"
        if path.is_file():
            with TokenFile(path) as file:
                entries.append(entry_of(name, file))
        elif (entry := bag_entry(folder, name)) is not None:
            entries.append(entry)
    return index | {
        "recordings": entries,
        "failed": [dict(entry) for entry in failed],
        "complete": set(names) <= {str(entry["name"]) for entry in (*entries, *failed)},
        "totals": {key: sum(int(entry[key]) for entry in entries) for key in _COUNTS},
    }


def bag_entry(folder: Path, name: str) -> dict | None:
    """What the index says about a bag of token messages (bag_output.py); None where there is none."""
    path = folder / name / BAG_ENTRY
    try:
        if path.stat().st_size > _MAX_ENTRY:
            raise ValueError("it is too large")
        entry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise RunIndexError(f"{path} is damaged: remove its folder, and it is made again ({error})") from error
    if not _is_entry(entry) or not all(type(entry.get(key)) is int for key in _COUNTS):
        raise RunIndexError(f"{path} is damaged: remove its folder, and it is made again")
    return entry


def entry_of(name: str, file: TokenFile) -> dict:
    """What the index says about a token file."""
    recording = file.metadata.get("recording")
    if not isinstance(recording, dict):
        raise TokenFormatError(f"{file.path} was not written by `vla-perception tokenize`")
    return {
        "frames_damaged": 0,
        **recording,
        "name": name,
        "file": f"{name}.safetensors",
        "bytes": file.path.stat().st_size,
        "cameras": list(file.cameras),
        "shape": list(file.shape),
        "dtype": file.dtype,
        "first_stamp_ns": int(file.stamps_ns.min()),
        "last_stamp_ns": int(file.stamps_ns.max()),
        "fingerprint": file.fingerprint,
    }


class Digests:
    """SHA-256 of source files, computed beside the encoding; each file once. A context manager: its end is theirs."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._known: dict[Path, str] = {}

    def of(self, files: Sequence[Path]):  # -> Future of what the index says about these files
        return self._thread.submit(self._describe, list(files))

    def _describe(self, files: Sequence[Path]) -> dict[str, object]:
        digests = []
        for file in files:
            if file not in self._known:
                with file.open("rb") as opened:
                    self._known[file] = file_digest(opened, self._ended)
            digests.append(self._known[file])
        listed = [
            {"path": str(file), "bytes": file.stat().st_size, "sha256": digest} for file, digest in zip(files, digests)
        ]
        together = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        return {
            "source_sha256": together,
            "source_files": len(files),
            **({"files": listed} if len(listed) <= _LISTED else {}),
        }

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()  # the process would wait for minutes, for a large file
        self._thread.shutdown(wait=False, cancel_futures=True)


def file_digest(file, ended: threading.Event) -> str:
    """SHA-256 (hex) of an open file's content. CancelledError where it `ended` before."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        if ended.is_set():
            raise CancelledError
        digest.update(block)
    return digest.hexdigest()
