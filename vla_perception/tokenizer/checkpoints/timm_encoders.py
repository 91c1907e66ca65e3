"""timm's pretrained encoders: by name, from the Hugging Face hub, from a local folder or file.

Weights in timm's own naming are read straight from their safetensors file; anything else goes through timm's
loader. Nothing is read with ``weights_only=False``.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint
from vla_perception.tokenizer.checkpoints.files import (
    MemoryTensors,
    PickledTensors,
    SafetensorsFile,
    StoredTensor,
    read_json,
)
from vla_perception.tokenizer.checkpoints.model_args import check_architecture, checked_model_args
from vla_perception.tokenizer.checkpoints.paths import local_path
from vla_perception.tokenizer.config import INTERPOLATIONS, EncoderConfig, TokenizerConfig, encoder_name, per_encoder
from vla_perception.tokenizer.timm_import import create_model, get_pretrained_cfg, is_model, on_meta, timm

log = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Encoder:
    """One pretrained encoder.

    Attributes:
        config: what it is, and what its input looks like.
        tensors: timm's name → where it lies.
        position_grid: (rows, columns, prefix tokens among them) if its position embeddings are to be resampled.
    """

    config: EncoderConfig
    tensors: Mapping[str, StoredTensor]
    position_grid: tuple[int, int, int] | None

    def named(self, name: str) -> dict[str, StoredTensor]:
        """Canonical names, for an encoder that is called `name`; a classifier's head is left out."""
        return {f"{name}.{key}": value for key, value in self.tensors.items() if not key.startswith("head.")}

    def grids(self, name: str) -> dict[str, tuple[int, int, int]]:
        return {} if self.position_grid is None else {f"{name}.pos_embed": self.position_grid}


def is_name(model: str) -> bool:
    """Whether `model` names timm encoders: a prefix says so, or timm knows all the names."""
    if model.startswith(("timm:", "hf-hub:", "local-dir:")):
        return True
    return all(is_model(re.split("[.@=]", part)[0]) for part in model.split("+"))


def open_encoders(model: str, image_size: int | Sequence[int] | None = None) -> Checkpoint:
    """``NAME[@SIZE][=FILE]``, several joined by ``+`` → a checkpoint of features, without a projector.

    NAME is timm's (``vit_base_patch14_reg4_dinov2.lvd142m``), ``hf-hub:…`` or ``local-dir:…``; FILE a local file of
    the weights. SIZE is the side of the input in pixels, by default what the weights were trained with.
    """
    encoders = [read(*part) for part in _parts(model, image_size)]
    config = _joined([encoder.config for encoder in encoders])
    tensors: dict[str, StoredTensor] = {}
    grids: dict[str, tuple[int, int, int]] = {}
    for own, encoder in zip(config.encoders, encoders):
        tensors |= encoder.named(own.name)
        grids |= encoder.grids(own.name)
    return Checkpoint(model, config, tensors, position_grids=grids)


def read_config(model: str, image_size: int | Sequence[int] | None = None) -> TokenizerConfig:
    """The configuration that `open_encoders` gives; without their weights where timm itself knows the encoders."""
    parts = _parts(model, image_size)
    if any(file is not None or ":" in source for source, _, file in parts):
        return open_encoders(model, image_size).config
    return _joined([_encoder_config(source, _known_facts(source), size, {}) for source, size, _ in parts])


def _parts(model: str, image_size: int | Sequence[int] | None) -> list[tuple[str, int | None, Path | None]]:
    """Of each encoder its source, the side of its input (None: its own) and the file of its weights."""
    written = model.removeprefix("timm:").split("+")
    parts = []
    for part, size in zip(written, per_encoder(image_size, len(written))):
        source, _, file = part.partition("=")
        match = re.fullmatch(r"(.+?)(?:@(\d{1,5}))?", source)
        if match is None:
            raise ValueError(f"{model!r} names no timm encoder; write NAME[@SIZE][=FILE][+…]")
        side = size or (int(match.group(2)) if match.group(2) else None)
        parts.append((match.group(1), side, local_path(file) if file else None))
    return parts


def _joined(encoders: Sequence[EncoderConfig]) -> TokenizerConfig:
    """Encoders side by side, under names that differ, without a projector."""
    configs: list[EncoderConfig] = []
    for encoder in encoders:
        taken = encoder.name in {config.name for config in configs}
        configs.append(replace(encoder, name=f"{encoder.name}_{len(configs) + 1}") if taken else encoder)
    return TokenizerConfig("+".join(config.timm_id for config in configs), tuple(configs), "none", 0)


def read(source: str, image_size: int | None, file: Path | None = None) -> Encoder:
    """One encoder: `source` is timm's name, ``hf-hub:…`` or ``local-dir:…``.

    Raises:
        CheckpointError: timm does not know it, or the weights cannot be had; says how to get them without a network.
    """
    if source.startswith(("hf-hub:", "local-dir:")):
        name, facts, overrides, held_file = _own_facts(source)
        file = file or held_file
    else:
        name, facts, overrides = source, _known_facts(source), {}
    config = _encoder_config(name, facts, image_size, overrides)
    try:
        with on_meta():
            model = create_model(name.split(".")[0], num_classes=0, img_size=config.image_size, **config.overrides)
        grid, prefix = model.patch_embed.grid_size, 0 if model.no_embed_class else model.num_prefix_tokens
    except Exception as error:  # timm's architectures refuse arguments in every way
        raise CheckpointError(f"{source}: timm cannot build this encoder at {image_size} pixels ({error})") from error
    if file is None and facts.get("hf_hub_id") and not facts.get("hf_hub_filename"):
        file = _download_if_there(facts["hf_hub_id"], _WEIGHTS)
    if (
        file is not None
        and file.suffix == ".safetensors"
        and "blocks.0.attn.qkv.weight" in (held := SafetensorsFile(file).tensors)
    ):
        tensors: Mapping[str, StoredTensor] = held
    else:
        tensors = _through_timm(name, int(facts["input_size"][-1]), config, file)
    return Encoder(config, tensors, _position_grid(source, tensors, grid, prefix))


def _known_facts(name: str) -> Mapping[str, Any]:
    """timm's own pretrained configuration of an encoder; CheckpointError if it has none."""
    known = get_pretrained_cfg(name) if is_model(name.split(".")[0]) else None
    if known is None:
        raise CheckpointError(f"timm {timm.__version__} does not know the encoder {name!r}; check the name")
    return known.to_dict()


def _own_facts(source: str) -> tuple[str, Mapping[str, Any], dict[str, object], Path]:
    """Of ``hf-hub:…`` or ``local-dir:…``: timm's name, pretrained configuration, arguments, file of the weights."""
    kind, _, where = source.partition(":")
    folder = local_path(where) if kind == "local-dir" else _download(where, "config.json").parent
    settings = read_json(folder / "config.json")
    overrides = settings.get("model_args") or {}
    facts = settings.get("pretrained_cfg") or settings
    if "architecture" not in settings or not isinstance(facts, dict) or not isinstance(overrides, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a configuration of a timm model")
    architecture, tag = check_architecture(settings["architecture"], str(folder / "config.json")), facts.get("tag")
    if tag and not (isinstance(tag, str) and re.fullmatch(r"[\w.-]{1,200}", tag, re.ASCII)):
        raise CheckpointError(f"{folder / 'config.json'}: the tag {tag!r:.200} is not a name")
    # Size and classes are chosen here.
    overrides = {key: value for key, value in overrides.items() if key not in ("img_size", "num_classes")}
    overrides = checked_model_args(overrides, f"{folder / 'config.json'}: model_args")
    file = folder / _WEIGHTS if kind == "local-dir" else _download(where, _WEIGHTS)
    return architecture + (f".{tag}" if tag else ""), facts, overrides, file


def _encoder_config(
    name: str, facts: Mapping[str, Any], image_size: int | None, overrides: Mapping[str, object]
) -> EncoderConfig:
    try:
        return EncoderConfig(
            name=encoder_name(name),
            timm_id=name,
            image_size=image_size or int(facts["input_size"][-1]),
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            interpolation=INTERPOLATIONS[facts.get("interpolation", "bicubic")],
            overrides=overrides,
        )
    except Exception as error:  # timm's configurations fail in every way
        raise CheckpointError(f"{name}: timm cannot build this encoder at {image_size} pixels ({error})") from error


def _position_grid(
    source: str, tensors: Mapping[str, StoredTensor], grid: tuple[int, int], prefix: int
) -> tuple[int, int, int] | None:
    stored = tensors.get("pos_embed")
    if stored is None or len(stored.shape) != 3 or stored.shape[1] == grid[0] * grid[1] + prefix:
        return None
    side = math.isqrt(max(0, stored.shape[1] - prefix))
    if side < 1 or side * side != stored.shape[1] - prefix:
        raise CheckpointError(f"{source}: position embeddings {list(stored.shape)} lie on no square grid")
    log.info("%s: position embeddings resampled from %d × %d to %d × %d", source, side, side, *grid)
    return (*grid, prefix)


def _through_timm(name: str, native: int, config: EncoderConfig, file: Path | None) -> Mapping[str, StoredTensor]:
    """The state dict as timm loads and renames it, at the size that the weights were trained with."""
    overlay = None
    if file is not None:
        if file.suffix == ".safetensors":
            SafetensorsFile(file)
        else:
            PickledTensors(file)
        overlay = {"file": str(file)}
        # What a configuration says is built in memory here: no more of it than the file can fill.
        with on_meta():
            empty = create_model(name.split(".")[0], num_classes=0, img_size=native, **config.overrides)
        count = sum(parameter.numel() for parameter in empty.parameters())
        if count > file.stat().st_size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, too few for the {count} numbers of {name} at {native} pixels"
            )
    try:
        model = timm.create_model(
            name, pretrained=True, num_classes=0, img_size=native, pretrained_cfg_overlay=overlay, **config.overrides
        )
    except Exception as error:
        raise CheckpointError(_unavailable(name, error)) from error
    return MemoryTensors(model.state_dict()).tensors


def _download(repository: str, file: str) -> Path:
    """A file of a repository, from the cache where it is there."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:
        raise CheckpointError(_unavailable(repository, error)) from error


def _download_if_there(repository: str, file: str) -> Path | None:
    """As `_download`; None if the repository lacks the file."""
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _download(repository, file)
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return None
        raise


def _unavailable(name: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0][:300]
    return (
        f"the pretrained weights of {name} cannot be had ({type(error).__name__}: {reason}). Without a network give a "
        "local file of them (timm:NAME=FILE.safetensors, or local-dir:FOLDER), or copy them into Hugging Face's cache"
    )
