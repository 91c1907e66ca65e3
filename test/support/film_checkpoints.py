"""Checkpoints of OpenVLA-OFT with FiLM, small: the encoders in a ``.pt`` of their own, wrapped in LoRA, the rest beside it."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import checkpoints
import numpy as np
import torch

DATA = Path(__file__).parents[1] / "data"


def formula_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    spec = importlib.util.spec_from_file_location("make_checkpoint", DATA / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.formula_weight(name, shape)


@functools.cache
def film_state(condition_channels: int = 96) -> dict[str, torch.Tensor]:
    """The encoders' state in openvla-oft's naming, without LoRA: the weights of test/data/film.npz, in float32."""
    shapes = {}
    for prefix, model in zip(("featurizer", "fused_featurizer"), checkpoints.towers()):
        for name, value in model.state_dict().items():
            name = f"vision_backbone.{prefix}.{name}"
            head, found, rest = name.partition(".blocks.")
            if found:
                number, _, inner = rest.partition(".")
                name = f"{head}.blocks.{number}.block.{inner}"
                for layer in ("scale", "shift"):
                    shapes[f"{head}.blocks.{number}.{layer}.weight"] = (model.embed_dim, condition_channels)
                    shapes[f"{head}.blocks.{number}.{layer}.bias"] = (model.embed_dim,)
            shapes[name] = tuple(value.shape)
    return {
        name.replace(".gamma", ".scale_factor"): formula_weight(name.replace(".gamma", ".scale_factor"), shape).float()
        for name, shape in shapes.items()
    }


def lora_wrapped(
    state: dict[str, torch.Tensor], rank: int = 4, scale: float | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The same encoders behind peft's LoRA (all linear layers but FiLM's): base weights less what LoRA adds to them.

    Args:
        scale: peft's factor; None for what openvla-oft's code comes to.
    """
    if scale is None:
        scale = min(rank, 16) / rank
    generator = torch.Generator().manual_seed(seed)
    wrapped = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        linear = value.ndim == 2 and kind == "weight" and not module.endswith((".scale", ".shift"))
        biased = f"{module}.weight" in state and state[f"{module}.weight"].ndim == 2 and ".block." in module
        if linear:
            a = torch.randn(rank, value.shape[1], generator=generator) * 0.02
            b = torch.randn(value.shape[0], rank, generator=generator) * 0.02
            wrapped[f"{module}.base_layer.weight"] = value - (b @ a) * scale
            wrapped[f"{module}.lora_A.default.weight"], wrapped[f"{module}.lora_B.default.weight"] = a, b
        elif kind == "bias" and biased and state[f"{module}.weight"].ndim == 2:
            wrapped[f"{module}.base_layer.bias"] = value
        else:
            wrapped[name] = value
    return wrapped


def write(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A directory with merged weights of the base model's encoders, a projector, and `state` in a file of its own."""
    models = checkpoints.towers(seed=7)  # other weights: those of the file count
    channels = sum(model.num_features for model in models)
    checkpoints.write(folder, checkpoints.openvla_tensors(models, checkpoints.projector(channels)))
    torch.save(state, folder / "vision_backbone--100_checkpoint.pt")
    return folder


def reference() -> dict[str, np.ndarray]:
    return dict(np.load(DATA / "film.npz"))
