"""Small policies in LeRobot's layout, and what transformers' own classes compute with their weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

#: What is in such files beside vision, by LeRobot's names.
OTHERS = {
    "pi05": (
        "paligemma_with_expert.paligemma.lm_head.weight",
        "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.q_proj.weight",
        "paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.dense.weight",
        "action_in_proj.weight",
        "action_out_proj.bias",
        "time_mlp_in.weight",
    ),
    "smolvla": (
        "model.vlm_with_expert.vlm.lm_head.weight",
        "model.vlm_with_expert.vlm.model.text_model.layers.0.self_attn.q_proj.weight",
        "model.vlm_with_expert.lm_expert.layers.0.self_attn.q_proj.weight",
        "model.state_proj.weight",
        "model.action_in_proj.weight",
    ),
}
#: Where LeRobot's names have what transformers calls a vision-language model.
PREFIXES = {"pi05": "paligemma_with_expert.paligemma.model.", "smolvla": "model.vlm_with_expert.vlm.model."}
#: Of those with random weights: channels, blocks and hidden channels of pi05's tower, channels of the tokens; image sizes.
WIDTH, BLOCKS, HIDDEN, OUT = 144, 2, 160, 48
SIZES = {"pi05": 56, "smolvla": 128}


def paligemma(width=144, blocks=2, hidden=160, image_size=56, out=48, seed=0):
    """transformers' PaliGemmaModel with random weights; heads of 72 channels, patches of 14."""
    import transformers

    torch.manual_seed(seed)
    vision = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 72,
        "intermediate_size": hidden,
        "image_size": image_size,
        "patch_size": 14,
        "projection_dim": out,
        "vision_use_head": False,
        "hidden_act": "gelu_pytorch_tanh",
        "model_type": "siglip_vision_model",
    }
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=_text("gemma", out), projection_dim=out)
    return _randomized(transformers.PaliGemmaModel(config))


def smolvlm(width=128, blocks=2, hidden=160, image_size=128, shuffle=4, out=48, seed=0):
    """transformers' SmolVLMModel with random weights; heads of 64 channels, patches of 16."""
    import transformers

    torch.manual_seed(seed)
    vision = {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
        "intermediate_size": hidden,
        "image_size": image_size,
        "patch_size": 16,
    }
    config = transformers.SmolVLMConfig(
        vision_config=vision, text_config=_text("llama", out), scale_factor=shuffle, pad_token_id=0
    )
    return _randomized(transformers.SmolVLMModel(config))


def _text(kind: str, width: int) -> dict:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def computed(model: torch.nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features after the tower's final norm and tokens, as the policies' `embed_image` makes them."""
    if hasattr(model, "multi_modal_projector"):
        outputs = model.get_image_features(pixel_values)
        return outputs.last_hidden_state, outputs.pooler_output
    features = model.vision_model(pixel_values=pixel_values, patch_attention_mask=None).last_hidden_state
    return features, model.connector(features)


def vision_tensors(kind: str, model: torch.nn.Module, with_vision_model: bool = True) -> dict[str, torch.Tensor]:
    """Tower and connector by LeRobot's names, of ``pi05`` or ``smolvla``."""
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.startswith(("vision_tower.", "multi_modal_projector.", "vision_model.", "connector.")):
            continue
        if kind == "pi05":
            inner = name.replace("vision_tower.vision_model.", "vision_tower.")
            name = inner.replace("vision_tower.", "vision_tower.vision_model.") if with_vision_model else inner
        tensors[PREFIXES[kind] + name] = value.clone()
    return tensors


def write(folder: Path, kind: str, tensors: dict[str, torch.Tensor], image_size: int, **changes: object) -> Path:
    """A policy's directory; `changes` replace entries of ``config.json``, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    others = {name: torch.zeros(4, 8) for name in OTHERS["smolvla" if kind == "smolvla" else "pi05"]}
    save_file({name: value.contiguous() for name, value in (tensors | others).items()}, folder / "model.safetensors")
    statistics = {"observation.state.mean": torch.zeros(6)}
    save_file(statistics, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    size_key = "resize_imgs_with_padding" if kind == "smolvla" else "image_resolution"
    config = {
        "type": kind,
        "input_features": {
            "observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, image_size, image_size]},
            "observation.images.left_wrist_0_rgb": {"type": "VISUAL", "shape": [3, image_size, image_size]},
            "observation.state": {"type": "STATE", "shape": [32]},
        },
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
        size_key: [image_size, image_size],
    }
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# With random weights, and without transformers


def _tower(prefix: str, width: int, patch: int, positions: int) -> dict[str, torch.Tensor]:
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (positions, width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    for block in range(BLOCKS):
        layers = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        layers |= {"mlp.fc1": (HIDDEN, width), "mlp.fc2": (width, HIDDEN)}
        layers |= {"layer_norm1": (width,), "layer_norm2": (width,)}
        for layer, shape in layers.items():
            shapes[f"encoder.layers.{block}.{layer}.weight"] = shape
            shapes[f"encoder.layers.{block}.{layer}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def policy(kind: str) -> dict[str, torch.Tensor]:
    """Tower and connector of ``pi05`` or ``smolvla`` by LeRobot's names, with random weights."""
    generator = torch.Generator().manual_seed(1)
    if kind == "smolvla":
        root = PREFIXES[kind]
        connector = {f"{root}connector.modality_projection.proj.weight": (OUT, 16 * 128)}
        tensors = _tower(f"{root}vision_model.", 128, 16, 64)
    else:
        root = PREFIXES["pi05"]
        connector = {
            f"{root}multi_modal_projector.linear.weight": (OUT, WIDTH),
            f"{root}multi_modal_projector.linear.bias": (OUT,),
        }
        tensors = _tower(f"{root}vision_tower.vision_model.", WIDTH, 14, 16)
    return tensors | {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in connector.items()}


def written(
    folder: Path, kind: str = "pi05", tensors: dict[str, torch.Tensor] | None = None, **changes: object
) -> Path:
    """The directory of such a policy (`write`)."""
    return write(folder, kind, policy(kind) if tensors is None else tensors, SIZES.get(kind, 56), **changes)
