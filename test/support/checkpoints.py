"""Small checkpoints in OpenVLA's layout, and what they compute, written with timm's own modules alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

#: Both have layers that patch tokens do not need: DINOv2 a final norm, test_vit3 an attention-pooling head.
TIMM_IDS = ("vit_small_patch14_reg4_dinov2.lvd142m", "test_vit3.r160_in1k")
SIZES = (98, 112)  # 7 × 7 patches each
WIDTH = 48
MEANS = ([0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5])
STDS = ([0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5])


def towers(timm_ids=TIMM_IDS, sizes=SIZES, seed: int = 0) -> list[torch.nn.Module]:
    """timm's whole models with random weights that make every part matter."""
    torch.manual_seed(seed)
    models = []
    for timm_id, size in zip(timm_ids, sizes):
        model = timm.create_model(timm_id, pretrained=False, num_classes=0, img_size=size).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.05 + (1.0 if parameter.ndim == 1 else 0.0))
        models.append(model)
    return models


def projector(channels: int, width: int = WIDTH, seed: int = 1) -> dict[str, torch.Tensor]:
    """fc1, fc2, fc3 of a fused-gelu-mlp."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    shapes = ((4 * channels, channels), (width, 4 * channels), (width, width))
    for index, (rows, columns) in enumerate(shapes, start=1):
        weights[f"fc{index}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        weights[f"fc{index}.bias"] = torch.randn(rows, generator=generator) * 0.1
    return weights


def reference(models, weights, pixel_values) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and tokens as prismatic-vlms computes them: `get_intermediate_layers` of block L − 2, MLP."""
    with torch.inference_mode():
        features = torch.cat(
            [
                model.get_intermediate_layers(pixels, n={len(model.blocks) - 2})[0]
                for model, pixels in zip(models, pixel_values)
            ],
            dim=2,
        )
        values = functional.linear(features, weights["fc1.weight"], weights["fc1.bias"])
        for index in (2, 3):
            values = functional.linear(
                functional.gelu(values), weights[f"fc{index}.weight"], weights[f"fc{index}.bias"]
            )
    return features, values


def openvla_tensors(models, weights) -> dict[str, torch.Tensor]:
    """In OpenVLA's naming, with a stub of a language model."""
    tensors = {"language_model.lm_head.weight": torch.zeros(8, 16)}
    for prefix, model in zip(("featurizer", "fused_featurizer"), models):
        for name, value in model.state_dict().items():
            name = name.replace(".gamma", ".scale_factor")
            tensors[f"vision_backbone.{prefix}.{name}"] = value.clone()
    return tensors | {f"projector.{name}": value for name, value in weights.items()}


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    shards: int = 2,
    strategy: str = "resize-naive",
    timm_ids=TIMM_IDS,
    sizes=SIZES,
    width: int = WIDTH,
    config: dict | None = None,
    preprocessor: dict | None = None,
) -> Path:
    """A directory as OpenVLA publishes it; `config` and `preprocessor` replace entries, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for index in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    entries = {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "timm_model_ids": list(timm_ids),
        "timm_override_act_layers": [None] * len(timm_ids),
        "image_sizes": list(sizes),
        "image_resize_strategy": strategy,
        "text_config": {"hidden_size": width},
    }
    processing = {
        "image_resize_strategy": strategy,
        "input_sizes": [[3, size, size] for size in sizes],
        "interpolations": ["bicubic"] * len(sizes),
        "means": MEANS[: len(sizes)],
        "stds": STDS[: len(sizes)],
        "tvf_resize_params": [
            {"interpolation": 3, "size": [size, size] if strategy == "resize-naive" else size} for size in sizes
        ],
        "tvf_crop_params": [{"output_size": [size, size]} for size in sizes],
        "tvf_normalize_params": [{"mean": mean, "std": std} for mean, std in zip(MEANS, STDS)][: len(sizes)],
        "tvf_do_letterbox": strategy == "letterbox",
        "tvf_letterbox_fill": [int(value * 255) for value in MEANS[0]] if strategy == "letterbox" else None,
    }
    for values, changes, file in (
        (entries, config, "config.json"),
        (processing, preprocessor, "preprocessor_config.json"),
    ):
        values = {key: value for key, value in {**values, **(changes or {})}.items() if value is not None}
        (folder / file).write_text(json.dumps(values))
    return folder


def image(seed: int = 0, height: int = 90, width: int = 130) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
