"""Image files, and folders of them, as recordings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vla_perception.offline.recordings import FrameSet, Problems, Selection, SourceError, safe_name
from vla_perception.sources import image_files

#: Names that count as images in a folder; what a file is, its content says.
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
#: The only camera's name where none is given, as the node's.
CAMERA = "front"


class ImageRecording:
    """One frame set per image file, `Selection.image_rate` of them per second."""

    kind = "images"

    def __init__(
        self, name: str, source: str, files: Sequence[Path], selection: Selection, *, folders: Sequence[Path] = ()
    ) -> None:
        """`files`: of the only camera; or, with `folders` (one per camera), names that lie in each of them."""
        if not folders and len(selection.cameras) > 1:
            raise SourceError(
                f"{source} has images of one camera, and --cameras names {len(selection.cameras)}; those of several lie "
                "in a folder with one subfolder per camera, in files of the same names"
            )
        self.name, self.source = name, source
        self.problems = Problems()
        self.details: dict[str, object] = {}
        self._selection = selection
        if folders:
            self.cameras = tuple(camera for camera, _ in selection.cameras) or tuple(path.name for path in folders)
            self._sets = [tuple(folder / file for folder in folders) for file in files]
        else:
            self.cameras = (selection.cameras[0][0] if selection.cameras else CAMERA,)
            self._sets = [(file,) for file in files]
        self.files = [file for paths in self._sets for file in paths]
        self.seconds = len(self._sets) / selection.image_rate

    def expected_sets(self) -> int:
        return len(self._sets)

    def frame_sets(self) -> Iterator[FrameSet]:
        self.problems.clear()
        for ordinal, paths in enumerate(self._sets):
            seconds = ordinal / self._selection.image_rate
            stamp_ns = round(seconds * 1e9)
            yield FrameSet(
                ordinal,
                stamp_ns,
                seconds,
                (stamp_ns,) * len(paths),
                ("",) * len(paths),
                partial(_images, paths, self._selection.max_image_pixels),
            )


def open_folder(path: Path, selection: Selection) -> ImageRecording:
    """A folder of images, in the order of their names (numbers by their value); or one subfolder per camera.

    Raises:
        SourceError: no images, no such subfolders, or names that are not in all of them.
    """
    files = _images_in(path)
    if files and len(selection.cameras) < 2:
        return ImageRecording(safe_name(path.resolve().name), str(path), files, selection)
    if selection.cameras:
        folders = [path / (where or name) for name, where in selection.cameras]
    else:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and _images_in(entry))
    absent = [folder for folder in folders if not folder.is_dir()]
    if absent:
        raise SourceError(f"{path} has no folder {absent[0].name}; name one per camera: --cameras NAME=FOLDER")
    names = [[file.name for file in _images_in(folder)] for folder in folders]
    if not folders or not names[0]:
        raise SourceError(f"{path} holds no images")
    for folder, others in zip(folders, names):
        odd = sorted(set(others) ^ set(names[0]))
        if odd:
            raise SourceError(f"{folders[0]} and {folder} must hold files of the same names; only one has {odd[0]}")
    return ImageRecording(
        safe_name(path.resolve().name), str(path), [Path(name) for name in names[0]], selection, folders=folders
    )


def _images_in(folder: Path) -> list[Path]:
    files = [entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and entry.is_file()]
    return sorted(files, key=lambda file: _by_numbers(file.name))


def _by_numbers(name: str) -> list[str | int]:
    """Sorts 2 before 10: text and numbers alternate."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


def _images(paths: Sequence[Path], max_pixels: int) -> list[np.ndarray]:
    return [image_files.read(path, max_pixels) for path in paths]
