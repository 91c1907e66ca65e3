"""Files people have → weights and fingerprint.

A checkpoint directory as OpenVLA publishes it: ``config.json``, ``preprocessor_config.json``, one or several
safetensors files, with ``model.safetensors.index.json`` where there are several. Only the tensors of the
vision backbone and the projector are read, one at a time; the language model's are never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vla_perception.tokenizer.presets import EncoderConfig, ModelConfig

#: safetensors' names of the dtypes that weights may be stored in.
WEIGHT_DTYPES = ("F32", "F16", "BF16")
_ENCODER_PREFIXES = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
_PROJECTOR_PREFIX = "projector."
_LANGUAGE_MODEL_PREFIX = "language_model."
_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
_LISTED = 20


class CheckpointError(ValueError):
    """The files do not hold a vision part that can be used; the message says what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `name` in the safetensors file `file`, with its shape and stored dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory says about its vision part; no weight is read yet.

    Attributes:
        config: encoders, preprocessing, projector.
        tensors: canonical name (``dinov2.blocks.0.attn.qkv.weight``, ``projector.fc1.bias``) → where it lies.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: str | os.PathLike) -> Checkpoint:
        """Reads the configuration and the safetensors headers of a directory; CheckpointError if they are amiss."""
        directory = Path(path).expanduser()
        if not directory.is_dir():
            raise CheckpointError(
                f"no checkpoint directory at {directory}; give the folder that holds config.json, "
                "preprocessor_config.json and the safetensors files"
            )
        config = read_config(directory)
        tensors, surplus = {}, []
        for stored in _stored_tensors(directory):
            canonical = _canonical_name(stored.name, config)
            if canonical is not None:
                tensors[canonical] = stored
            elif not stored.name.startswith(_LANGUAGE_MODEL_PREFIX):
                surplus.append(stored.name)
        if surplus:
            raise CheckpointError(f"{directory}: {_listing('tensors that belong to no known part', surplus)}")
        return cls(directory, config, tensors)

    def check(self, expected: Mapping[str, tuple[int, ...]], unused: Callable[[str], bool]) -> None:
        """Raises one CheckpointError that lists every tensor that is missing, surplus, or wrong in shape or dtype.

        Args:
            expected: canonical name → shape of what the model needs.
            unused: true for canonical names that may be present and are not read.
        """
        missing = [name for name in expected if name not in self.tensors]
        surplus = [name for name in self.tensors if name not in expected and not unused(name)]
        wrong = []
        for name, shape in expected.items():
            stored = self.tensors.get(name)
            if stored is None:
                continue
            if stored.shape != tuple(shape):
                wrong.append(f"{name} {list(stored.shape)} where {list(shape)} is needed")
            elif stored.dtype not in WEIGHT_DTYPES:
                wrong.append(f"{name} stored as {stored.dtype} where one of {', '.join(WEIGHT_DTYPES)} is needed")
        problems = [
            _listing(title, names)
            for title, names in (
                ("missing tensors", missing),
                ("tensors of the wrong shape or dtype", wrong),
                ("surplus tensors", surplus),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{self.path} does not fit {' + '.join(e.timm_id for e in self.config.encoders)} with projector "
                f"{self.config.projector}: {'; '.join(problems)}. Check that config.json belongs to these weights "
                "and that the download is complete."
            )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (canonical name, tensor as stored), one at a time, sorted by name.

        The tensor is a view of the mapped file and valid until the next one is asked for: copy it.
        """
        opened: dict[Path, object] = {}
        for name in sorted(names):
            stored = self.tensors[name]
            if stored.file not in opened:
                opened[stored.file] = safe_open(stored.file, framework="pt")
            with _file_errors(stored.file):
                tensor = opened[stored.file].get_tensor(stored.name)
            yield name, tensor

    def digest_cache(self, names: Iterable[str]) -> Path:
        """The file that keeps the digest of these tensors; its name changes with any file's size or mtime."""
        key = hashlib.sha256()
        for file in sorted({self.tensors[name].file for name in names}):
            status = file.stat()
            key.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        for name in sorted(names):
            key.update(f"{name}\0{self.tensors[name].name}\n".encode())
        return cache_directory() / "digests" / key.hexdigest()


class WeightsDigest:
    """SHA-256 over canonical names, dtypes, shapes and bytes of tensors as stored, added in sorted order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._last = ""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name <= self._last:
            raise ValueError(f"tensors must be added in sorted order: {name} after {self._last}")
        self._last = name
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
        self._hash.update(f"{name}\0{dtype}\0{','.join(map(str, tensor.shape))}\0".encode())
        self._hash.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def fingerprint(weights_digest: str, settings: Mapping[str, object]) -> str:
    """SHA-256 (hex) over the digest of the weights and the settings that change tokens, as sorted JSON."""
    text = json.dumps({"settings": settings, "weights": weights_digest}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/vla_perception``, ``~/.cache/vla_perception`` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_perception"


def read_config(directory: Path) -> ModelConfig:
    """Vision settings from ``config.json`` and ``preprocessor_config.json``.

    The ``tvf_*`` entries are what OpenVLA's processor really uses, so where they are there, they are in force
    over ``means``, ``stds`` and ``image_resize_strategy``.
    """
    config = _read_json(directory / "config.json")
    preprocessor = _read_json(directory / "preprocessor_config.json")
    try:
        timm_ids = config["timm_model_ids"]
        sizes = config["image_sizes"]
        count = len(timm_ids)
        if count not in (1, 2) or len(sizes) != count:
            raise CheckpointError(
                f"{directory / 'config.json'}: one or two timm_model_ids with as many image_sizes are supported, "
                f"got {timm_ids} and {sizes}"
            )
        activations = config.get("timm_override_act_layers") or [None] * count
        encoders = tuple(
            _encoder_config(timm_ids[i], int(sizes[i]), activations[i], config, preprocessor, i) for i in range(count)
        )
        projector = "fused-gelu-mlp" if count == 2 else "gelu-mlp"
        if str(config.get("arch_specifier", "")).endswith("linear"):
            projector = "linear"
        # openvla-7b's own file leaves the width out: it is what transformers' LlamaConfig has by default.
        width = int(config.get("text_config", {}).get("hidden_size", 4096))
        return ModelConfig(directory.resolve().name, encoders, projector, width)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{directory}: config.json or preprocessor_config.json has no entry {error}; "
            "is this an OpenVLA checkpoint directory?"
        ) from error
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{directory}: config.json or preprocessor_config.json: {error}") from error


def _encoder_config(
    timm_id: str, size: int, activation: str | None, config: dict, preprocessor: dict, index: int
) -> EncoderConfig:
    if list(preprocessor.get("input_sizes", [[3, size, size]] * (index + 1))[index][-2:]) != [size, size]:
        raise CheckpointError(
            f"config.json says {size} pixels for {timm_id}, preprocessor_config.json {preprocessor['input_sizes']}"
        )
    strategy = preprocessor.get("image_resize_strategy", config.get("image_resize_strategy"))
    fill = None
    if preprocessor.get("tvf_do_letterbox"):
        strategy = "letterbox"
    elif preprocessor.get("tvf_resize_params"):
        target = preprocessor["tvf_resize_params"][index]["size"]
        strategy = "resize-naive" if isinstance(target, (list, tuple)) and len(target) == 2 else "resize-crop"
    if strategy == "letterbox":
        # The released processor pads for every encoder with the first one's mean.
        fill = preprocessor.get("tvf_letterbox_fill") or [int(value * 255) for value in preprocessor["means"][0]]
    interpolation = _INTERPOLATIONS[preprocessor.get("interpolations", ["bicubic"] * (index + 1))[index]]
    if preprocessor.get("tvf_resize_params"):
        resize = preprocessor["tvf_resize_params"][index]
        interpolation = int(resize.get("interpolation", interpolation))
        target = resize["size"]
        if {size} != set(target if isinstance(target, (list, tuple)) else [target]):
            raise CheckpointError(f"tvf_resize_params resizes to {target}, the encoder {timm_id} takes {size} pixels")
    if preprocessor.get("tvf_crop_params"):
        crop = preprocessor["tvf_crop_params"][index]["output_size"]
        if {size} != set(crop if isinstance(crop, (list, tuple)) else [crop]):
            raise CheckpointError(f"tvf_crop_params crops to {crop}, the encoder {timm_id} takes {size} pixels")
    if preprocessor.get("tvf_normalize_params"):
        mean, std = (preprocessor["tvf_normalize_params"][index][key] for key in ("mean", "std"))
    else:
        mean, std = preprocessor["means"][index], preprocessor["stds"][index]
    name = next((family for family in ("dinov2", "siglip", "clip") if family in timm_id), timm_id.split(".")[0])
    return EncoderConfig(
        name=name,
        timm_id=timm_id,
        image_size=size,
        mean=_triple(mean),
        std=_triple(std),
        resize_strategy=strategy,
        letterbox_fill=None if fill is None else tuple(int(value) for value in fill),  # type: ignore[arg-type]
        interpolation=interpolation,
        overrides={"act_layer": activation} if activation else {},
    )


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _canonical_name(name: str, config: ModelConfig) -> str | None:
    if name.startswith(_PROJECTOR_PREFIX):
        return name
    for encoder, prefix in zip(config.encoders, _ENCODER_PREFIXES):
        if name.startswith(prefix):
            # OpenVLA renamed LayerScale's `gamma`, which transformers would otherwise rewrite on loading.
            return f"{encoder.name}." + name[len(prefix) :].replace("scale_factor", "gamma")
    return None


def _stored_tensors(directory: Path) -> Iterator[StoredTensor]:
    """Every tensor of the checkpoint; files with nothing but the language model's are not opened."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; download it again")
        wanted: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not name.startswith(_LANGUAGE_MODEL_PREFIX):
                wanted.setdefault(file, []).append(name)
        for file, names in sorted(wanted.items()):
            if Path(file).name != file:
                raise CheckpointError(f"{index} names {file!r}; a plain file name beside it is needed")
            held = {stored.name: stored for stored in _file_tensors(directory / file)}
            # A name that the file lacks is reported as missing, together with the others.
            yield from (held[name] for name in names if name in held)
        return
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory} has no .safetensors file; weights are read from safetensors, never from a pickle"
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{directory} has {len(files)} safetensors files and no model.safetensors.index.json; download the index"
        )
    yield from _file_tensors(files[0])


def _file_tensors(file: Path) -> Iterator[StoredTensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the download is incomplete")
    with open(file, "rb") as stream:
        if stream.read(20).startswith(b"version https://git"):
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in the checkpoint")
    with _file_errors(file), safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            part = tensors.get_slice(name)
            yield StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())


@contextmanager
def _file_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}); download it again") from error


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint directory is incomplete") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return value


def _listing(title: str, names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {title}: {shown}{rest}"
