"""What a tensor's name in a checkpoint says: which part it belongs to, and what was wrapped around the model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.config import TokenizerConfig

_ENCODER_PREFIXES = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
_PROJECTOR_PREFIX = "projector."
_LANGUAGE_MODEL_PREFIX = "language_model."
#: Components that wrappers put into names: torch.compile, FSDP, activation checkpointing; `module.` in front is DDP's.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(module\.)+")
#: Heads of policies beside the model, which read what the language model makes of the tokens.
_HEADS = (
    "value_head",
    "v_head",
    "q_head",
    "critic",
    "critic_head",
    "reward_head",
    "score",
    "action_head",
    "policy_head",
    "proprio_projector",
    "noisy_action_projector",
    "action_queries",
    "lm_head",
)


def unwrapped(name: str) -> str:
    """The name in the model itself, without what wrapped it in training (``module.``, ``_orig_mod.``, …)."""
    while (shorter := _WRAPPERS.sub("", name)) != name:
        name = shorter
    return name


def is_vision(name: str) -> bool:
    """Whether a tensor of that name has to be looked at: neither the language model's nor a policy head's."""
    name = unwrapped(name).removeprefix("base_model.model.")
    return not name.startswith(_LANGUAGE_MODEL_PREFIX) and not is_head(name)


def is_known(name: str) -> bool:
    """Whether a tensor of that name, of those that have to be looked at, can belong to the vision part of a model."""
    inner = unwrapped(unwrapped(name).removeprefix("base_model.model."))
    return inner.startswith((*_ENCODER_PREFIXES, _PROJECTOR_PREFIX))


def is_head(name: str) -> bool:
    return unwrapped(name).partition(".")[0] in _HEADS


def canonical_name(name: str, config: TokenizerConfig) -> str | None:
    """OpenVLA's name → ``dinov2.…``, ``siglip.…``, ``projector.…``; None if it belongs to no known part."""
    name = unwrapped(name)
    if name.startswith(_PROJECTOR_PREFIX):
        return name
    for encoder, prefix in zip(config.encoders, _ENCODER_PREFIXES):
        if name.startswith(prefix):
            # OpenVLA renamed LayerScale's `gamma`, which transformers would otherwise rewrite on loading.
            return f"{encoder.name}." + name[len(prefix) :].replace("scale_factor", "gamma")
    return None


def refuse_unknown(where: object, names: Iterable[str]) -> None:
    """Raises a CheckpointError about tensors that belong to no known part, grouped by what is in common; nothing if none."""
    names = list(names)
    if not names:
        return
    inner = (*_ENCODER_PREFIXES, _PROJECTOR_PREFIX)
    prefixes = {name[: name.index(f".{part}") + 1] for name in names for part in inner if f".{part}" in name}
    if len(prefixes) == 1:
        raise CheckpointError(
            f"{where}: the tensors' names begin with the prefix {next(iter(prefixes))[:200]!r}, so the model was saved inside "
            "another one; save the model itself (that part's save_pretrained), or rename the tensors without the prefix"
        )
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    shown = [
        f"{part[:100]}. ({len(members)}: {', '.join(name[:200] for name in members[:3])}{', …' if len(members) > 3 else ''})"
        for part, members in list(groups.items())[:8]
    ]
    rest = f", and {len(groups) - 8} more parts" if len(groups) > 8 else ""
    raise CheckpointError(
        f"{where}: {len(names)} tensors that belong to no known part: {'; '.join(shown)}{rest}. Known are vision_backbone., "
        f"projector., language_model. and the heads {', '.join(_HEADS)}; where a part has no bearing on the visual tokens, "
        "save the model without it"
    )
