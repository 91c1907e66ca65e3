"""An opened checkpoint: which tensor lies where, whether they fit, their digest and the fingerprint.

Which layouts there are is open.py's matter; here they all look the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.files import WEIGHT_DTYPES, StoredTensor, dtype_name
from vla_perception.tokenizer.checkpoints.paths import cache_directory
from vla_perception.tokenizer.config import TokenizerConfig

log = logging.getLogger(__name__)

_LISTED = 20


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of one tensor: W + scale · B A.

    Attributes:
        a: [rank, inputs…]; b: [outputs, rank…].
        scale: alpha / rank, or alpha / √rank with rank stabilisation.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float


@dataclass(frozen=True)
class Checkpoint:
    """What files say about a vision part; no weight is read yet.

    Attributes:
        path: where it was found, for messages.
        config: encoders, preprocessing, projector.
        tensors: canonical name (``dinov2.blocks.0.attn.qkv.weight``, ``projector.fc1.bias``) → where it lies.
        adapters: canonical name → what is to be added to the tensor.
        position_grids: canonical name of position embeddings that were trained for another image size → (rows,
            columns, number of prefix tokens among them) that they are to be resampled to, as timm does it.
        notes: sentences for the user about where the weights come from.
        of_lerobot: whether it is a policy of LeRobot's, whose adapters name tensors as the policy does.
    """

    path: Path | str
    config: TokenizerConfig
    tensors: Mapping[str, StoredTensor]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    position_grids: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    of_lerobot: bool = False

    def check(self, expected: Mapping[str, tuple[int, ...]], unused: Callable[[str], bool]) -> None:
        """Raises one CheckpointError that lists every tensor that is missing, unexpected, or wrong in shape or dtype.

        Args:
            expected: canonical name → shape of what the model needs.
            unused: true for canonical names that may be present and are not read.
        """
        missing = [name for name in expected if name not in self.tensors]
        unexpected = [name for name in {**self.tensors, **self.adapters} if name not in expected and not unused(name)]
        wrong = []
        for name, shape in expected.items():
            stored = self.tensors.get(name)
            if stored is None:
                continue
            if stored.shape != tuple(shape) and name not in self.position_grids:
                wrong.append(f"{name} {list(stored.shape)} where {list(shape)} is needed")
            elif stored.dtype not in WEIGHT_DTYPES:
                wrong.append(f"{name} stored as {stored.dtype} where one of {', '.join(WEIGHT_DTYPES)} is needed")
            if name in self.adapters:
                wrong += _misfits(name, tuple(shape), self.adapters[name])
        problems = [
            listing(title, names)
            for title, names in (
                ("missing tensors", missing),
                ("tensors of the wrong shape or dtype", wrong),
                ("unexpected keys", unexpected),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{self.path} does not fit {' + '.join(e.timm_id for e in self.config.encoders)} with projector "
                f"{self.config.projector}: {'; '.join(problems)}. Check that config.json belongs to these weights "
                "and that the download is complete."
            )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yields (canonical name, parts as stored), sorted by name; `merged` makes one tensor of the parts.

        The parts are ``""``, the tensor itself, and where there is an adapter ``.lora_A``, ``.lora_B`` and
        ``.lora_scale``, or ``.position_grid`` where it is to be resampled. They may be views of a mapped file, valid
        until the next ones are asked for: copy them.
        """
        for name in sorted(names):
            parts = {"": self.tensors[name].get()}
            adapter = self.adapters.get(name)
            if adapter is not None:
                parts[".lora_A"] = adapter.a.get()
                parts[".lora_B"] = adapter.b.get()
                parts[".lora_scale"] = torch.tensor(adapter.scale, dtype=torch.float32, device="cpu")
            if name in self.position_grids:
                parts[".position_grid"] = torch.tensor(self.position_grids[name], dtype=torch.float32, device="cpu")
            yield name, parts

    def check_unchanged(self) -> None:
        """CheckpointError if a file was written to since it was opened: what was read may be of two checkpoints."""
        adapters = (part for adapter in self.adapters.values() for part in (adapter.a, adapter.b))
        for source in {id(tensor.source): tensor.source for tensor in (*self.tensors.values(), *adapters)}.values():
            source.check_unchanged()

    def digest_cache(self, names: Iterable[str]) -> Path | None:
        """The file that keeps the digest of these tensors; its name changes with any file's size or mtime.

        None where tensors come from no file, or change on the way, and where there is no home for a cache.
        """
        paths = {self.tensors[name].source.path for name in names}
        files = [path for path in paths if path is not None]
        if self.adapters or self.position_grids or len(files) < len(paths):
            return None
        key = hashlib.sha256()
        for file in sorted(files):
            status = file.stat()
            key.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        for name in sorted(names):
            key.update(f"{name}\0{self.tensors[name].name}\n".encode())
        try:
            return cache_directory() / "digests" / key.hexdigest()
        except CheckpointError as error:
            log.info("the fingerprint is computed again next time: %s", error)
            return None


def merged(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One tensor of the parts that `Checkpoint.read` yields: itself as stored, or adapted and resampled in float32."""
    tensor = parts[""]
    if ".lora_A" in parts:
        low, high = parts[".lora_A"].float().flatten(1), parts[".lora_B"].float().flatten(1)
        tensor = tensor.float() + (high @ low).mul_(parts[".lora_scale"]).reshape(tensor.shape)
    if ".position_grid" in parts:
        from vla_perception.tokenizer.timm_import import resample_abs_pos_embed

        rows, columns, prefix = (int(number) for number in parts[".position_grid"])
        tensor = resample_abs_pos_embed(tensor.float(), [rows, columns], num_prefix_tokens=prefix)
    return tensor


def _misfits(name: str, shape: tuple[int, ...], adapter: Adapter) -> list[str]:
    a, b = adapter.a.shape, adapter.b.shape
    fits = len(a) >= 2 and len(b) >= 2 and (b[0], *a[1:]) == shape and b[1] == a[0] and set(b[2:]) <= {1}
    result = [] if fits else [f"{name}: adapter {list(b)} · {list(a)} where {list(shape)} is needed"]
    for stored in (adapter.a, adapter.b):
        if stored.dtype not in WEIGHT_DTYPES:
            result.append(f"{stored.name} stored as {stored.dtype}")
    return result


class WeightsDigest:
    """SHA-256 over canonical names, dtypes, shapes and bytes of tensors as stored, added in sorted order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._last = ""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name <= self._last:
            raise ValueError(f"tensors must be added in sorted order: {name} after {self._last}")
        self._last = name
        self._hash.update(f"{name}\0{dtype_name(tensor)}\0{','.join(map(str, tensor.shape))}\0".encode())
        self._hash.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def listing(title: str, names: list[str]) -> str:
    shown = ", ".join(name[:200] for name in names[:_LISTED])
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {title}: {shown}{rest}"
