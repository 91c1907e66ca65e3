"""Files of tensors, read without trusting them: safetensors, torch's ``.pt``, JSON.

Whatever a file claims is checked against its size before anything is allocated or parsed at length, so that a
damaged or hostile one ends in one `CheckpointError`, quickly and in little memory.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import pickletools
import re
import stat
import struct
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.paths import is_file

#: safetensors' names of the dtypes that weights may be stored in.
WEIGHT_DTYPES = ("F32", "F16", "BF16")
#: Bytes of JSON or pickle that are parsed at most: a shard of 7 billion parameters has some 50 kB of header.
MAX_HEADER = 1 << 20
_DTYPE_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
#: Those of them that are read, the weights' and others to compare with.
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
#: Bytes that are read in one go.
_CHUNK = 1 << 26
_TORCH_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
#: All that a file of weights names: everything else in a pickle is there to run code, or is not a weight.
_PICKLE_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "torch Size",
} | {
    f"torch {kind}Storage"
    for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
#: Opcodes that get a class or a function by its name.
_CALLING = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")
#: What torch.save writes into its archive. torch.jit.save adds constants.pkl and code/, by which torch before 2.6 runs
#: the archive although only weights were asked for (CVE-2025-32434).
_RECORDS = re.compile(
    r"data\.pkl|data/[0-9]+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)


class TensorSource(Protocol):
    """Something that holds named tensors; `path` is its file, None if it has none."""

    @property
    def path(self) -> Path | None: ...

    def get(self, name: str) -> torch.Tensor: ...

    def check_unchanged(self) -> None: ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `name` in `source`, with its shape and stored dtype."""

    source: TensorSource
    name: str
    shape: tuple[int, ...]
    dtype: str

    def get(self) -> torch.Tensor:
        """The tensor as stored; of a ``.pt`` a view of the mapped file."""
        return self.source.get(self.name)


class SafetensorsFile:
    """One safetensors file; opening reads and checks its header alone.

    Attributes:
        tensors: name → `StoredTensor`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise CheckpointError(f"{str(path):.500} is missing; the download is incomplete")
        with file_errors(path):
            # Open as long as its tensors are wanted: what takes its place in the folder meanwhile is another file.
            stream = self._stream = open(path, "rb", buffering=0)
            weakref.finalize(self, stream.close)
            self._status = _status(stream)
            size = self._status[0]
            start = stream.read(20)
            if start.startswith(b"version https://git"):
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in the checkpoint"
                )
            length = header_length(start, size)
            stream.seek(8)
            entries = parse_header(stream.read(length), size - 8 - length)
        self._spans = {
            name: (8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
        }
        self.tensors = {
            name: StoredTensor(self, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()
        }

    def get(self, name: str) -> torch.Tensor:
        """A copy, read and not mapped: where the file becomes shorter meanwhile, a mapped page would end the process."""
        stored, (start, length) = self.tensors[name], self._spans[name]
        if stored.dtype not in _STORED:
            raise CheckpointError(f"{self.path}: {name[:200]!r} is stored as {stored.dtype}, which is not read")
        # Of its own pages, which go back to the system at once: freed blocks of malloc between the copies that stay
        # would remain, some hundred MB of them.
        buffer = mmap.mmap(-1, max(length, 1))
        view, at = memoryview(buffer)[:length], 0
        with file_errors(self.path):
            while at < length:
                count = os.preadv(self._stream.fileno(), [view[at : at + _CHUNK]], start + at)
                if count == 0:
                    raise CheckpointError(_changed(self.path))
                at += count
        if not length:
            return torch.empty(stored.shape, dtype=_STORED[stored.dtype], device="cpu")
        data = torch.frombuffer(buffer, dtype=torch.uint8, count=length)
        return data.view(_STORED[stored.dtype]).reshape(stored.shape)

    def check_unchanged(self) -> None:
        """CheckpointError if the file was written to since it was opened."""
        if _status(self._stream) != self._status:
            raise CheckpointError(_changed(self.path))


class MemoryTensors:
    """Tensors that are in memory already."""

    path = None

    def check_unchanged(self) -> None:
        """Nothing can: no other process writes to them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.tensors = {
            name: StoredTensor(self, name, tuple(value.shape), dtype_name(value)) for name, value in tensors.items()
        }

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class PickledTensors:
    """State dicts of a ``.pt`` file, mapped into memory and read with ``weights_only=True``.

    Attributes:
        tree: what the file holds: dicts, tensors, and plain values.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise CheckpointError(f"{str(path):.500} is missing; the download is incomplete")
        try:
            stream = self._stream = open(path, "rb")
            weakref.finalize(self, stream.close)
            self._status = _status(stream)
            _check_archive(stream)
            self.tree = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # pickles fail in every way that Python knows
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise CheckpointError(f"{path} cannot be read as a .pt file of weights ({reason})") from error
        if not isinstance(self.tree, Mapping):
            raise CheckpointError(f"{path} holds no dict of tensors")
        self._found: dict[str, torch.Tensor] = {}

    def part(self, *keys: str) -> dict[str, StoredTensor]:
        """The tensors of one state dict in the tree, empty if it is not there; the file's own names."""
        node: object = self.tree
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None:
            return {}
        if not isinstance(node, Mapping) or not all(isinstance(value, torch.Tensor) for value in node.values()):
            raise CheckpointError(f"{self.path}: {'.'.join(keys)} is not a state dict of tensors")
        prefix = "/".join(keys)
        result = {}
        for name, value in node.items():
            if value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise CheckpointError(
                    f"{self.path}: {str(name)[:200]!r} claims the shape {list(value.shape)}, more than it holds"
                )
            self._found[f"{prefix}/{name}"] = value
            result[str(name)] = StoredTensor(self, f"{prefix}/{name}", tuple(value.shape), dtype_name(value))
        return result

    def get(self, name: str) -> torch.Tensor:
        # The file is mapped: a page that is not there any more would end the process.
        self.check_unchanged()
        return self._found[name].detach()

    def check_unchanged(self) -> None:
        """CheckpointError if the file was written to since it was opened."""
        if _status(self._stream) != self._status:
            raise CheckpointError(_changed(self.path))


def _status(stream: BinaryIO | io.FileIO) -> tuple[int, int]:
    """Size and time of the last change."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _changed(path: Path) -> str:
    return (
        f"{path} was changed while it was read. Start again when it is whole; to replace a checkpoint that is in use, write "
        "the new file beside it and rename it (mv), which leaves the old one to those who read it"
    )


def dtype_name(tensor: torch.Tensor) -> str:
    """safetensors' name of a tensor's dtype, or torch's where weights cannot have it."""
    return _TORCH_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def header_length(start: bytes, file_size: int) -> int:
    """Length of the header of a safetensors file that begins with `start`; CheckpointError if it cannot be."""
    if len(start) < 8:
        raise CheckpointError(f"too short for a safetensors file ({file_size} bytes)")
    length = int.from_bytes(start[:8], "little")
    if length > file_size - 8:
        raise CheckpointError(f"its header claims {length} bytes, the file has {file_size}")
    if length > MAX_HEADER:
        raise CheckpointError(f"its header claims {length} bytes; more than {MAX_HEADER} are not read")
    return length


def parse_header(header: bytes, payload: int) -> dict[str, dict]:
    """safetensors header → entries, checked: dtypes known, sizes right, no tensor beyond `payload` bytes or over another.

    Raises:
        CheckpointError: the header is not one.
    """
    entries = parse_json(header, "its header")
    entries.pop("__metadata__", None)
    spans = []
    for name, entry in entries.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, stop]
            # Language models are quantised to dtypes that come up every year: of tensors that are not read any will do.
            named = isinstance(dtype, str) and re.fullmatch(r"[A-Z][A-Z0-9_]{0,31}", dtype) is not None
            known = named and isinstance(shape, list) and len(shape) <= 16
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"its entry {name[:200]!r} is not a tensor's") from error
        if not known or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise CheckpointError(f"its entry {name[:200]!r} has a dtype or numbers that cannot be")
        if stop > payload:
            raise CheckpointError(f"{name[:200]!r} ends at byte {stop} of {payload}: truncated, or never whole")
        if stop < start or (dtype in _DTYPE_SIZES and stop - start != math.prod(shape) * _DTYPE_SIZES[dtype]):
            raise CheckpointError(f"{name[:200]!r}: {stop - start} bytes are not {dtype} {shape}")
        spans.append((start, stop, name))
    spans.sort()
    for (_, end, first), (start, _, second) in zip(spans, spans[1:]):
        if start < end:
            raise CheckpointError(f"the tensors {first[:200]!r} and {second[:200]!r} overlap")
    return entries


def parse_json(text: bytes, what: str) -> dict:
    """A JSON object of at most `MAX_HEADER` bytes; CheckpointError for anything else."""
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{what} is longer than {MAX_HEADER} bytes, which no checkpoint needs")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must hold a JSON object")
    return value


def read_json(file: Path) -> dict:
    """A JSON object from a file; CheckpointError if it is missing or no such thing."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe never ends, or never begins
            raise CheckpointError(f"{file} is not a file")
        with open(file, "rb") as stream:
            text = stream.read(MAX_HEADER + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint directory is incomplete") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return parse_json(text, str(file))


def is_statistics(file: str) -> bool:
    """Whether a file of that name is one of LeRobot's beside ``model.safetensors``: statistics of states and actions."""
    return file.startswith(("policy_preprocessor", "policy_postprocessor"))


def stored_tensors(directory: Path, is_wanted: Callable[[str], bool]) -> Iterator[StoredTensor]:
    """Every tensor of a directory of safetensors; of several files those without a wanted tensor are not opened."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; download it again")
        wanted: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise CheckpointError(f"{index}: {name[:200]!r} is in no file; download it again")
            if is_wanted(name):
                wanted.setdefault(file, []).append(name)
        for file, names in sorted(wanted.items()):
            if Path(file).name != file:
                raise CheckpointError(f"{index} names {file!r}; a plain file name beside it is needed")
            held = SafetensorsFile(directory / file).tensors
            # A name that the file lacks is reported as missing, together with the others.
            yield from (held[name] for name in names if name in held)
        return
    files = sorted(file for file in directory.glob("*.safetensors") if not is_statistics(file.name))
    if not files:
        raise CheckpointError(
            f"{directory} has no .safetensors file; weights are read from safetensors, never from a pickle"
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{directory} has {len(files)} safetensors files and no model.safetensors.index.json; download the index"
        )
    yield from SafetensorsFile(files[0]).tensors.values()


@contextmanager
def file_errors(file: Path) -> Iterator[None]:
    """Names the file in whatever goes wrong with it."""
    try:
        yield
    except CheckpointError as error:
        if str(file) in str(error):
            raise
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}); download it again") from error


def _check_archive(stream: BinaryIO) -> None:
    """Refuses what a ``.pt`` file of weights never has, before torch unpickles it."""
    name = stream.name
    _check_directory(stream)
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{name} is not a zip archive as torch.save writes it ({error}); it is truncated, or of before torch 1.6: "
            "then save it again with a recent torch"
        ) from error
    pickles, roots = [], set()
    for entry in archive.infolist():
        root, _, record = entry.filename.partition("/")
        if not _RECORDS.fullmatch(record):
            raise CheckpointError(
                f"{name} is refused: it holds {entry.filename[:200]!r}, which torch.save never writes for weights. A "
                "TorchScript archive (constants.pkl, code/) can run code when it is opened; if you trust the file, save "
                "its state dict with torch.save"
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{name}: {entry.filename[:200]!r} is compressed, which torch.save never does")
        roots.add(root)
        if record == "data.pkl":
            pickles.append(entry)
    if len(roots) > 1:
        raise CheckpointError(f"{name}: several archives in one ({', '.join(sorted(roots)[:4])!r:.200})")
    if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER:
        raise CheckpointError(
            f"{name}: one data.pkl of at most {MAX_HEADER} bytes is expected in a .pt file of weights"
        )
    try:
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name not in _CALLING:
                continue
            # All but GLOBAL take names from the stack, where this check cannot see them; torch.save writes GLOBAL alone.
            named = str(argument) if opcode.name == "GLOBAL" else opcode.name
            if named not in _PICKLE_GLOBALS:
                raise CheckpointError(
                    f"{name} is refused: its pickle calls {named[:200]!r}, which weights do not need. Pickles can run "
                    "code; if you trust the file, convert it to safetensors"
                )
    except CheckpointError:
        raise
    except (ValueError, IndexError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{name}: its pickle is damaged ({error}); download it again") from error


def _check_directory(stream: BinaryIO) -> None:
    """Refuses a zip archive whose directory is too long to be listed in a moment, or that readers find in two places.

    Python looks for the directory before the end record, torch where that record says: they must be the same, or what
    is checked here is not what torch opens.
    """
    stream.seek(0, os.SEEK_END)
    size = stream.tell()
    stream.seek(max(0, size - 66_000))
    tail = stream.read()
    stream.seek(0)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22 or stream.read(4) != b"PK\x03\x04":
        raise CheckpointError(
            f"{stream.name} is not a zip archive as torch.save writes it; it is truncated, or of before torch 1.6: "
            "then save it again with a recent torch"
        )
    here = size - len(tail) + at
    count, length, begin = struct.unpack_from("<HII", tail, at + 10)
    sound = at + 22 == len(tail)
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # what is wide stands right before, as torch writes it
        wide = at - 76
        (said,) = struct.unpack_from("<Q", tail, at - 12)
        sound &= wide >= 0 and tail[wide : wide + 4] == b"PK\x06\x06" and said == here - 76
        if sound:
            wide_count, wide_length, wide_begin = struct.unpack_from("<QQQ", tail, wide + 32)
            sound &= count in (wide_count, 0xFFFF) and length in (wide_length, 0xFFFFFFFF)
            sound &= begin in (wide_begin, 0xFFFFFFFF)
            length, begin, here = wide_length, wide_begin, said
    if length > 4 * MAX_HEADER:
        raise CheckpointError(f"{stream.name}: a directory of {length} bytes is not a .pt file of weights")
    if not sound or begin + length != here:
        raise CheckpointError(
            f"{stream.name} is not a zip archive as torch.save writes it: its directory is not where its end says"
        )
    stream.seek(0)
