"""OpenVLA-OFT with FiLM: ``vision_backbone--…_checkpoint.pt``, the encoders' state while LoRA was around them.

The file holds the base weights, LoRA's two halves for each linear layer, and FiLM's own layers; the projector is in the
directory's other files, as without FiLM (openvla-oft's ``_apply_film_to_vla``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vla_perception.tokenizer.checkpoints import CheckpointError, lora
from vla_perception.tokenizer.checkpoints.checkpoint import Adapter, Checkpoint, listing
from vla_perception.tokenizer.checkpoints.files import PickledTensors, StoredTensor, read_json
from vla_perception.tokenizer.checkpoints.tensor_names import canonical_name, unwrapped


def film_file(directory: Path) -> Path | None:
    """The file with the encoders' state; None for a checkpoint without FiLM. CheckpointError if there are several."""
    found = sorted(directory.glob("vision_backbone--*_checkpoint.pt"))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory} has {len(found)} vision_backbone files ({', '.join(file.name for file in found[:8])}); leave the one "
            "that belongs to the other weights"
        )
    return found[0] if found else None


def with_film(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """The checkpoint with the encoders of `file`: base weights, LoRA and FiLM.

    Raises:
        CheckpointError: tensors that belong to no known part, halves of a pair, layers that do not fit together.
    """
    tensors: dict[str, StoredTensor] = {}
    halves: dict[str, dict[str, StoredTensor]] = {}
    modules: dict[str, str] = {}  # as peft knows them: LoRA is inside of FiLM's blocks
    unexpected, twice = [], []
    for name, stored in PickledTensors(file).part().items():
        inner = re.sub(r"\.blocks\.(\d+)\.block\.", r".blocks.\1.", unwrapped(name)).replace(".base_layer.", ".")
        low_rank = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", inner)
        canonical = canonical_name(f"{low_rank[1]}.weight" if low_rank else inner, checkpoint.config)
        if canonical is None or canonical.startswith("projector."):
            unexpected.append(name)
            continue
        place = halves.setdefault(canonical, {}) if low_rank else tensors
        key = low_rank[2] if low_rank else canonical
        if key in place:
            twice.append(name)
        place[key] = stored
        if low_rank:
            modules[canonical] = low_rank[1]
    odd = [name for name, pair in halves.items() if len(pair) != 2 or name not in tensors]
    problems = (
        ("tensors that belong to no known part", unexpected),
        ("tensors twice", twice),
        ("tensors with one half of a pair, or without the weight it changes", odd),
    )
    if any(names for _, names in problems):
        raise CheckpointError(f"{file}: {'; '.join(listing(title, names) for title, names in problems if names)}")
    adapters = {
        name: Adapter(pair["A"], pair["B"], _scale(file, modules[name], pair["A"])) for name, pair in halves.items()
    }
    # What is not the encoders': the projector, and what may have been trained of it.
    own = tuple(f"{encoder.name}." for encoder in checkpoint.config.encoders)
    tensors |= {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(own)}
    adapters |= {name: adapter for name, adapter in checkpoint.adapters.items() if not name.startswith(own)}
    channels = _condition_channels(file, tensors)
    encoders = tuple(replace(encoder, film=channels) for encoder in checkpoint.config.encoders)
    config = replace(checkpoint.config, encoders=encoders)
    return replace(checkpoint, config=config, tensors=tensors, adapters=adapters)


def _scale(file: Path, module: str, a: StoredTensor) -> float:
    """peft's factor before B A: of ``lora_adapter/``, or as openvla-oft's code has it."""
    rank = a.shape[0] if a.shape else 0
    if not rank:
        raise CheckpointError(f"{file}: {a.name[:200]!r} has the rank 0")
    beside = file.parent / "lora_adapter" / "adapter_config.json"
    settings = read_json(beside) if beside.is_file() else {"lora_alpha": min(rank, 16)}
    try:
        return lora.scale_of(settings, module, rank)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{beside}: {error!r}") from error


def _condition_channels(file: Path, tensors: dict[str, StoredTensor]) -> int:
    """Length of the condition, the same in all of FiLM's layers."""
    shapes = {
        stored.shape for name, stored in tensors.items() if re.search(r"\.blocks\.\d+\.(scale|shift)\.weight$", name)
    }
    lengths = {shape[1] for shape in shapes if len(shape) == 2}
    if len(lengths) != 1 or not all(len(shape) == 2 for shape in shapes):
        raise CheckpointError(f"{file}: FiLM's layers (scale, shift) are missing, or do not take one condition")
    return next(iter(lengths))
