#!/usr/bin/env python3
"""Write a miniature policy of LeRobot's own class, as LeRobot saves it, and what LeRobot's own code computes with it.

    python make_lerobot_policy.py smolvla OUT      # or pi0, pi05

OUT gets config.json, model.safetensors, the policy's processors and their tokenizer; and reference-VERSION.npz: images,
state and noise, the embeddings of `embed_image` and the actions of `predict_action_chunk`, in float32 on a CPU. Weights are
random by their names, the same for every version, and numbers that bfloat16 holds: they are stored in that.

Runs with lerobot 0.4.4 (`pip install 'lerobot[smolvla]==0.4.4'`, Python 3.10 or 3.11) and 0.6.1
(`'lerobot[smolvla,pi]==0.6.1'`, Python 3.12). For π0 and π0.5, 0.4.4 asks for transformers as openpi changed it, in the
environment or on PYTHONPATH: 4.53.2 with the files of openpi's `src/openpi/models_pytorch/transformers_replace` copied over
it (those of commit 15a9616 were used). LeRobot's code fixes PaliGemma's dimensions: here its classes are given a smaller
configuration in the moment in which LeRobot makes them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

VIEWS = {
    "smolvla": ("camera1", "camera2"),
    "pi0": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    "pi05": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
}
#: Side of the square that the tower sees.
SIZES = {"smolvla": 128, "pi0": 56, "pi05": 56}
STATE, ACTIONS, STEPS, DENOISING = 6, 7, 5, 4
INSTRUCTION = "pick up the cup"
#: Of the tokenizer: all bytes, and what the policies' processors look for.
SPECIAL = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
VOCABULARY = 256 + len(SPECIAL)


def write_tokenizer(folder: Path) -> Any:
    """A tokenizer of bytes, saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL.values(), *alphabet]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    usual = {key: value for key, value in SPECIAL.items() if key.split("_")[0] in ("bos", "eos", "pad", "unk")}
    others = {key: value for key, value in SPECIAL.items() if key not in usual}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **usual, extra_special_tokens=others)
    fast.save_pretrained(folder)
    return fast


def text_config(kind: str, width: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_smolvlm(folder: Path, side: int) -> None:
    """Configuration and processor of a small SmolVLM: what a SmolVLA's `vlm_model_name` names."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 80,
        "image_size": side,
        "patch_size": 16,
    }
    SmolVLMConfig(
        vision_config=vision, text_config=text_config("llama", 32, 2, 1, 16), scale_factor=4, pad_token_id=2
    ).save_pretrained(folder)
    tokenizer = write_tokenizer(folder)
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()).save_pretrained(folder)


def features(kind: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    images = {f"observation.images.{view}": PolicyFeature(FeatureType.VISUAL, shape) for view in VIEWS[kind]}
    return {
        "input_features": {**images, "observation.state": PolicyFeature(FeatureType.STATE, (STATE,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
    }


def make_smolvla(folder: Path, shape: tuple[int, int, int]) -> Any:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    side = SIZES["smolvla"]
    write_smolvlm(folder / "language", side)
    config = SmolVLAConfig(
        **features("smolvla", shape),
        device="cpu",
        vlm_model_name=str(folder / "language"),
        load_vlm_weights=False,
        resize_imgs_with_padding=(side, side),
        num_vlm_layers=2,
        chunk_size=STEPS,
        n_action_steps=STEPS,
        num_steps=DENOISING,
        max_state_dim=8,
        max_action_dim=8,
        empty_cameras=1,
    )
    return SmolVLAPolicy(config)


def make_pi(kind: str, folder: Path, shape: tuple[int, int, int]) -> Any:
    write_tokenizer(folder / "language")
    side = SIZES[kind]
    module, config_class, policy_class = miniature_pi(kind)
    config = config_class(
        **features(kind, shape),
        device="cpu",
        dtype="float32",
        image_resolution=(side, side),
        chunk_size=STEPS,
        n_action_steps=STEPS,
        num_inference_steps=DENOISING,
        max_state_dim=8,
        max_action_dim=8,
        tokenizer_max_length=64,
    )
    return policy_class(config)


def miniature_pi(kind: str) -> tuple[Any, Any, Any]:
    """LeRobot's module, configuration and policy of π0 or π0.5; from the first call on of a small PaliGemma and Gemma."""
    if kind == "pi0":
        from lerobot.policies.pi0 import modeling_pi0 as module

        config_class, policy_class = module.PI0Config, module.PI0Policy
    else:
        from lerobot.policies.pi05 import modeling_pi05 as module

        config_class, policy_class = module.PI05Config, module.PI05Policy
    if getattr(module, "is_miniature", False):
        return module, config_class, policy_class
    module.is_miniature = True
    # The attention's width, 8 heads, is fixed in LeRobot's code.
    sizes = {"gemma_2b": 64, "gemma_300m": 32}
    module.get_gemma_config = lambda variant: module.GemmaConfig(sizes[variant], 2, 48, 8, 1, 8)

    # transformers' own classes in 0.4, LeRobot's subclasses of them in 0.6.
    names = ("PaliGemmaForConditionalGeneration", "GemmaForCausalLM")
    if hasattr(module, "PiGemmaForCausalLM"):
        names = ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    original_paligemma, original_gemma = (getattr(module, name) for name in names)

    def paligemma(config: Any) -> Any:
        config._vocab_size = config.text_config.vocab_size = VOCABULARY
        config.image_token_index, config.pad_token_id, config.text_config.pad_token_id = VOCABULARY - 1, 2, 2
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size = 72, 80
        vision.num_hidden_layers, vision.num_attention_heads = 2, 1
        config.projection_dim = vision.projection_dim = config.text_config.hidden_size
        return original_paligemma(config)

    def gemma(config: Any) -> Any:
        config.vocab_size, config.pad_token_id = VOCABULARY, 2
        return original_gemma(config)

    setattr(module, names[0], paligemma)
    setattr(module, names[1], gemma)
    return module, config_class, policy_class


@torch.no_grad()
def randomize(policy: Any) -> None:
    """Weights by their names, so that all versions have the same; with the initial ones many biases do nothing."""
    for name, parameter in policy.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        values = torch.randn(parameter.shape, generator=generator) * scale
        is_gemmas = "gemma" in name and "vision" not in name  # whose norms add 1 themselves
        if "norm" in name and name.endswith("weight") and parameter.ndim == 1 and not is_gemmas:
            values += 1.0
        parameter.copy_(values.bfloat16())


def statistics() -> dict[str, dict[str, torch.Tensor]]:
    """Of states and actions, as a dataset has them."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for key, count in (("observation.state", STATE), ("action", ACTIONS)):
        mean, std = torch.randn(count, generator=generator), torch.rand(count, generator=generator) + 0.5
        limits = {"min": mean - 3 * std, "max": mean + 3 * std, "q01": mean - 2 * std, "q99": mean + 2 * std}
        found[key] = {"mean": mean, "std": std, **limits}
    return found


def save(policy: Any, folder: Path) -> None:
    """As LeRobot saves a policy and its processors; the weights in bfloat16."""
    import copy

    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.processor import tokenizer_processor

    copy.deepcopy(policy).to(torch.bfloat16).save_pretrained(folder)
    original = tokenizer_processor.AutoTokenizer
    language = folder / "language"

    class LocalTokenizer:  # π0's and π0.5's names PaliGemma's on the hub
        @staticmethod
        def from_pretrained(_name: str) -> Any:
            return original.from_pretrained(language)

    tokenizer_processor.AutoTokenizer = LocalTokenizer
    try:
        for processor in make_pre_post_processors(policy.config, dataset_stats=statistics()):
            processor.save_pretrained(folder)
    finally:
        tokenizer_processor.AutoTokenizer = original
    file = folder / "policy_preprocessor.json"
    steps = json.loads(file.read_text())
    for step in steps["steps"]:
        if "tokenizer_name" in step.get("config", {}):
            step["config"]["tokenizer_name"] = str(language)
    file.write_text(json.dumps(steps, indent=1))


def load(folder: Path) -> Any:
    """The policy of `folder`, in float32, of LeRobot's own class."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    if config.type in ("pi0", "pi05"):
        miniature_pi(config.type)
    else:
        config.vlm_model_name = str(folder / "language")
    return get_policy_class(config.type).from_pretrained(folder, config=config).eval()


def drawn(kind: str, shape: tuple[int, int, int], seed: int) -> dict[str, np.ndarray]:
    """Images [views, height, width, 3] in uint8 (waves and noise), state [6] and noise [1, steps, actions]."""
    random = np.random.default_rng(seed)
    _, height, width = shape
    rows, columns = np.mgrid[:height, :width]
    images = []
    for _view in VIEWS[kind]:
        angle, length, phase = random.uniform(0, 3.1), random.uniform(6, 20), random.uniform(0, 6, 3)
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle))[..., None] / length * 6.28 + phase)
        images.append(np.clip(127 + 90 * wave + random.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8))
    return {
        "images": np.stack(images),
        "state": random.normal(0, 0.5, STATE).astype(np.float32),
        "noise": random.normal(0, 1, (1, STEPS, 8)).astype(np.float32),
    }


def whole(policy: Any, folder: Path, inputs: dict[str, np.ndarray], views: int | None = None) -> dict[str, np.ndarray]:
    """What LeRobot's own code computes: `embeddings` [views, tokens, channels], `actions` [steps, dimensions].

    Args:
        views: of the first so many cameras there are images.
    """
    from lerobot.policies.factory import make_pre_post_processors

    before, behind = make_pre_post_processors(
        policy.config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    names = VIEWS[policy.config.type][:views]
    images = {
        f"observation.images.{name}": (torch.from_numpy(image).type(torch.float32) / 255).permute(2, 0, 1)[None]
        for name, image in zip(names, inputs["images"])
    }
    batch = before({"observation.state": torch.from_numpy(inputs["state"])[None], "task": INSTRUCTION, **images})
    parts = ("paligemma_with_expert", "vlm_with_expert")
    embedder = next(getattr(policy.model, part) for part in parts if hasattr(policy.model, part))
    original, seen = embedder.embed_image, []
    embedder.embed_image = lambda image: seen.append(original(image)) or seen[-1]
    try:
        with torch.inference_mode():
            chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(inputs["noise"]).clone())
    finally:
        del embedder.embed_image
    return {"embeddings": torch.cat(seen).float().numpy(), "actions": behind(chunk)[0].float().numpy()}


def write(kind: str, folder: Path, shape: tuple[int, int, int]) -> None:
    """The policy's folder, for images [3, height, width]."""
    folder.mkdir(parents=True, exist_ok=True)
    policy = make_smolvla(folder, shape) if kind == "smolvla" else make_pi(kind, folder, shape)
    randomize(policy)
    save(policy, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=VIEWS)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--size", type=int, nargs=2, default=(60, 90), metavar=("HEIGHT", "WIDTH"), help="of the images"
    )
    options = parser.parse_args()
    shape = (3, *options.size)
    write(options.kind, options.out, shape)
    inputs = drawn(options.kind, shape, seed=2)
    results = whole(load(options.out), options.out, inputs)
    file = options.out / f"reference-{importlib.metadata.version('lerobot')}.npz"
    np.savez_compressed(file, **inputs, **results)
    print(file, {name: values.shape for name, values in results.items()})


if __name__ == "__main__":
    main()
