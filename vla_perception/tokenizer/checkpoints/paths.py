"""Paths as people give them, looked at without an error for names that cannot be paths; and the folder of the cache."""

from __future__ import annotations

import os
from pathlib import Path

from vla_perception.tokenizer.checkpoints import CheckpointError


def local_path(path: str | os.PathLike) -> Path:
    """The path with ``~`` written out; as it is where no home directory is known."""
    return Path(os.path.expanduser(path))


def exists(path: Path) -> bool:
    """Whether something is there that can be seen: false also for names that cannot be, and in folders of others."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """As `exists`, for a directory."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """As `exists`, for a file: nothing else can be read to its end."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/vla_perception``, ``~/.cache/vla_perception`` by default, also where the first is not an absolute path.

    Raises:
        CheckpointError: there is no home directory (neither HOME nor an entry of the user's), nor XDG_CACHE_HOME.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "vla_perception"
    try:
        home = Path.home()
        if os.environ.get("HOME") == "" or not home.is_absolute():
            raise RuntimeError("no absolute path")
    except RuntimeError as error:
        raise CheckpointError(
            "there is no home directory to keep files in: HOME is not set, or not an absolute path; set it, or XDG_CACHE_HOME "
            "and HF_HOME"
        ) from error
    return home / ".cache" / "vla_perception"
