"""A bag's folder: its storage files, and what metadata.yaml says of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vla_perception.sources.bags.contents import BagError, missing_library

#: Bytes of a metadata.yaml: some thousand topics.
METADATA_LIMIT = 8 << 20


def storage_files(path: Path) -> tuple[list[Path], list[str], dict]:
    """The storage files of a bag, the names of those that metadata.yaml does not list, and what metadata.yaml says.

    The latter two are empty for a single file, and without a metadata.yaml. Raises BagError.
    """
    path = path.parent if path.name == "metadata.yaml" else path
    if not path.is_dir():
        return [_checked_name(path)], [], {}
    claimed = _read_metadata(path / "metadata.yaml") if (path / "metadata.yaml").exists() else {}
    files = _listed_files(path, claimed)
    listed = {file.name.removesuffix(".zstd") for file in files}
    unlisted = [file.name for file in _storage_in(path) if file.name.removesuffix(".zstd") not in listed]
    return files, unlisted, claimed


def first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _is_storage(path: Path) -> bool:
    return path.name.lower().removesuffix(".zstd").endswith((".mcap", ".db3")) and path.is_file()


def _checked_name(path: Path) -> Path:
    """The file itself. BagError with advice where its name is not that of a recording."""
    if _is_storage(path):
        return path
    raise BagError(
        f"{path} is not a bag: expected a folder with metadata.yaml, an .mcap or a .db3 file"
        + (" (ROS 1 bags are converted by `rosbags-convert`)" if path.suffix == ".bag" else "")
    )


def _listed_files(folder: Path, claimed: dict) -> list[Path]:
    """The storage files of a folder, in the order of metadata.yaml. BagError with advice where they are not there."""
    there = _storage_in(folder)
    listed = claimed.get("relative_file_paths")
    # Never outside of the folder, and each once. Until Foxy the paths began with the folder's name.
    names = [PurePosixPath(name).name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    present = {entry.name for entry in folder.iterdir() if entry.is_file()}
    names = list({name.removesuffix(".zstd"): _as_it_lies(present, name) for name in names if name}.values())
    if names:
        absent = [name for name in names if name not in present]
        if absent:
            raise BagError(
                f"{folder}: metadata.yaml lists {', '.join(absent)}, not there: copy what is missing, play the files "
                f"that are there by name, or move them into a separate folder and `ros2 bag reindex` it"
            )
        return [folder / name for name in names]
    if len(there) == 1 or (there and claimed):  # a recording that was cut off before metadata.yaml was written
        return there
    if there:
        raise BagError(
            f"{folder} has {len(there)} recordings but no metadata.yaml: "
            f"`ros2 bag reindex {folder}` writes it, or name one of the files"
        )
    if claimed:
        raise BagError(f"cannot read the bag at {folder}: metadata.yaml lists no files, and there are none")
    raise BagError(f"{folder} is not a bag: it has neither metadata.yaml nor an .mcap or .db3 file")


def _storage_in(folder: Path) -> list[Path]:
    """A folder's storage files. Of one that lies there compressed and expanded, the expanded one."""
    there = sorted(filter(_is_storage, folder.iterdir()))
    return [file for file in there if file.suffix != ".zstd" or file.with_suffix("") not in there]


def _as_it_lies(present: set[str], name: str) -> str:
    """The name, with or without .zstd: the recorder may have been killed before it compressed, or a user expanded it."""
    other = name.removesuffix(".zstd") if name.endswith(".zstd") else f"{name}.zstd"
    return other if other in present and name not in present else name


def _read_metadata(path: Path) -> dict:
    """`rosbag2_bagfile_information`. BagError where the file has none."""
    try:
        import yaml
    except ImportError as error:
        raise missing_library(error) from error

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def flatten_mapping(self, node):
            """Leaves `<<` as it is, which is an error then: a few of them in each other would fill the memory."""

    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        if path.stat().st_size > METADATA_LIMIT:
            raise ValueError(f"it is larger than {METADATA_LIMIT >> 20} MiB")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
        information = content["rosbag2_bagfile_information"]
        if not isinstance(information, dict):
            raise ValueError("rosbag2_bagfile_information is not a mapping")
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise BagError(
            f"cannot read the bag at {path.parent}: metadata.yaml: {said}. Without the file a single recording is "
            "played as it is, and `ros2 bag reindex` writes a new one"
        ) from error
    return information


def claimed_topics(claimed: dict) -> Iterator[tuple[str, str, int]]:
    """(name, type, messages) of each topic that metadata.yaml lists; what is not written as it should be is left out."""
    topics = claimed.get("topics_with_message_count")
    for entry in topics if isinstance(topics, list) else []:
        try:
            name, kind = entry["topic_metadata"]["name"], entry["topic_metadata"]["type"]
            if isinstance(name, str) and isinstance(kind, str):  # as text, nested aliases would be without end
                yield name, kind, _whole(entry["message_count"])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue


def _whole(value: Any) -> int:
    """A count, also where YAML has read it as text ("10", 1e5, 0x10, 1_000)."""
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            value = float(value)
    value = int(value)
    if not 0 <= value < 2**64:
        raise ValueError("no count")
    return value
