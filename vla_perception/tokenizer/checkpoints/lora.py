"""peft's LoRA adapters: which kinds can be added to a checkpoint's weights, and how.

Only what is known to be W + scale · B A on the base model's own weights is added. Some initialisations (PiSSA, OLoRA,
LoftQ, CorDA, LoRA-GA) subtract the first B A from the base weights, which then are not those of the base model; some
variants (DoRA, aLoRA, …) compute something else. What is not known is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vla_perception.tokenizer.checkpoints import CheckpointError, lerobot
from vla_perception.tokenizer.checkpoints.checkpoint import Adapter, Checkpoint, listing
from vla_perception.tokenizer.checkpoints.files import SafetensorsFile, StoredTensor, file_errors, read_json
from vla_perception.tokenizer.checkpoints.tensor_names import canonical_name, is_vision, unwrapped

#: peft's wrapping of a model's names.
_PEFT_PREFIX = "base_model.model."
#: Initialisations that leave the base weights alone (peft's LoraLayer.update_layer).
_KNOWN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
#: Entries of peft's LoraConfig that say nothing beside the tensors, or are read below.
_KNOWN_SETTINGS = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
        "trainable_token_indices",
        "ensure_weight_tying",
    }
)
#: What merges any adapter, whatever its kind.
_CURE = (
    "merge it into the base model with peft (PeftModel.from_pretrained(base, adapter).merge_and_unload(), then "
    "save_pretrained) and give the merged model"
)


def check_kind(settings: Mapping[str, object], directory: Path) -> None:
    """Raises a CheckpointError, with the cure, if an adapter is not known to be plain LoRA on the base model's weights."""
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{directory}: only plain LoRA can be added, not {settings.get('peft_type')!r:.200}; {_CURE}"
        )
    start = settings.get("init_lora_weights", True)
    if not any(
        start is known or (isinstance(start, str) and start.lower() == known) for known in _KNOWN_INITIALISATIONS
    ):
        raise CheckpointError(
            f"{directory}: init_lora_weights {start!r:.200} is not an initialisation that is known to leave the base weights "
            "alone (PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA subtract the first B A from them), so B A cannot be added to "
            f"the base model's own; {_CURE}, or convert it with save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    switched_on = sorted(key for key, value in settings.items() if key not in _KNOWN_SETTINGS and value)
    if switched_on:
        named = ", ".join(f"{key[:100]}={settings[key]!r:.60}" for key in switched_on[:8])
        raise CheckpointError(f"{directory}: only plain LoRA can be added, and this one has {named}; {_CURE}")


def with_adapter(checkpoint: Checkpoint, directory: Path, of_film: bool = False) -> Checkpoint:
    """A checkpoint and peft's LoRA adapter for it (``adapter_config.json``, ``adapter_model.safetensors``).

    What the adapter changes in the language model is left out, and with `of_film` in the encoders.

    Raises:
        CheckpointError: what is not known to be plain LoRA, or changes the vision of a policy of LeRobot's.
    """
    settings = read_json(directory / "adapter_config.json")
    if checkpoint.of_lerobot:  # of any kind, as nothing of it is read
        lerobot.refuse_adapter(directory, (stored.name for stored in _stored_tensors(directory)), _CURE)
        return checkpoint
    check_kind(settings, directory)
    if checkpoint.adapters:
        raise CheckpointError(f"{directory}: {checkpoint.path} has an adapter already, and only one is added; {_CURE}")
    pairs, whole = read_adapter(checkpoint, directory, of_film)
    adapters = {}
    try:
        for name, (module, a, b) in pairs.items():
            said = None if settings.get("rank_pattern") else settings.get("r")
            if said is not None and said != a.shape[0]:
                raise ValueError(f"r is {said!r:.200}, but {module[:200]} has the rank {a.shape[0]}")
            adapters[name] = Adapter(a, b, scale_of(settings, module, a.shape[0]))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"{directory / 'adapter_config.json'}: {error!r}") from error
    return replace(checkpoint, tensors={**checkpoint.tensors, **whole}, adapters=adapters)


def read_adapter(
    checkpoint: Checkpoint, directory: Path, of_film: bool = False
) -> tuple[dict[str, tuple[str, StoredTensor, StoredTensor]], dict[str, StoredTensor]]:
    """Canonical name → (peft's name of the module, A, B), and canonical name → tensor that is replaced as a whole.

    Args:
        of_film: the encoders were wrapped for FiLM, and are in a separate file: what is here of them is left out.
    """
    halves: dict[str, dict[str, StoredTensor]] = {}
    modules: dict[str, str] = {}
    whole: dict[str, StoredTensor] = {}
    unexpected, twice = [], []
    for stored in _stored_tensors(directory):
        name = unwrapped(stored.name).removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", unwrapped(name))
        if not is_vision(name) or (of_film and name.startswith("vision_backbone.vision_backbone.")):
            continue
        low_rank = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        module = low_rank.group(1) if low_rank else ""
        canonical = canonical_name(f"{module}.weight" if low_rank else name, checkpoint.config)
        if canonical is None or canonical not in checkpoint.tensors:
            unexpected.append(stored.name)
            continue
        places = halves.setdefault(canonical, {}) if low_rank else whole
        place = low_rank.group(2) if low_rank else canonical
        if place in places:
            twice.append(stored.name)
        places[place] = stored
        if low_rank:
            modules[canonical] = module
    odd = [name for name, pair in halves.items() if len(pair) != 2]
    problems = (
        ("tensors that fit no part", unexpected),
        ("tensors with one half of a pair", odd),
        ("tensors twice", twice),
    )
    if unexpected or odd or twice:
        parts = [listing(title, names) for title, names in problems if names]
        raise CheckpointError(f"{directory} does not fit {checkpoint.path}: {'; '.join(parts)}")
    return {name: (modules[name], pair["A"], pair["B"]) for name, pair in halves.items()}, whole


def _stored_tensors(directory: Path) -> list[StoredTensor]:
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; an adapter is read from safetensors, never from a pickle")
    with file_errors(file):
        return list(SafetensorsFile(file).tensors.values())


def scale_of(settings: Mapping, module: str, rank: int) -> float:
    """peft's factor before B A; `alpha_pattern` names modules by the end of their path. ValueError if it is unusable."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.search(r"[^\w.-]", pattern):
            raise ValueError(f"alpha_pattern {pattern!r:.200} is a regular expression; only names are read")
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
            break
    scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if not abs(scale) < 1e30:  # it becomes a float32 number
        raise ValueError(f"lora_alpha {alpha!r:.200} is not a usable number")
    return scale
