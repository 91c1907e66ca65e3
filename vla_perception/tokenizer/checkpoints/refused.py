"""Models that are not cut behind their vision part, and why: said by name, instead of failing on a missing entry."""

from __future__ import annotations

from collections.abc import Mapping

from vla_perception.tokenizer.checkpoints import CheckpointError

_DEEPSTACK = (
    "features of three layers of its vision tower go past the connector into the first layers of the language model "
    "(DeepStack), so the tokens alone would be a part of what it sees"
)
#: LeRobot's `groot` does not say which release it is.
_GR00T = (
    f"GR00T N1.7 is built on Qwen3-VL: {_DEEPSTACK}; earlier releases have another tower (Eagle), which is not read"
)
#: Beginning of an entry of config.json that names the model, in lower case → what keeps it from being cut.
_REASONS = {
    "gr00t": _GR00T,
    "groot": _GR00T,
    "qwen3_vl": f"Qwen3-VL: {_DEEPSTACK}",
    "qwen3vl": f"Qwen3-VL: {_DEEPSTACK}",
    "molmoact2": (
        "MolmoAct2 pools features of two layers of its tower by attention over overlapping crops, whose number depends on the "
        "image: there is no fixed grid of tokens"
    ),
    "octo": (
        "Octo has no vision part to cut off: its patches come from a shallow convolution, and its transformer mixes them with "
        "the instruction from the first layer on"
    ),
}


def refuse(config: Mapping[str, object], where: object) -> None:
    """Raises a CheckpointError with the reason if ``config.json`` is such a model's; nothing if it is not."""
    architectures = config.get("architectures")
    named = [config.get("type"), config.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
    model = config.get("model")
    if isinstance(model, Mapping) and "observation_tokenizers" in model:
        named.append("octo")
    for name in named:
        for beginning, reason in _REASONS.items():
            if isinstance(name, str) and name.lower().startswith(beginning):
                raise CheckpointError(f"{where}: {reason}. Run its vision inside the policy")
