"""LeRobot's own policies in miniature, where LeRobot is installed: made by test/data/make_lerobot_policy.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))

#: What embeds SmolVLM's positions.
_POSITIONS = "model.vlm_with_expert.vlm.model.vision_model.embeddings.position_embedding.weight"


def version(name: str) -> Version:
    return Version(importlib.metadata.version(name))


def reason_to_skip(kind: str) -> str:
    """Why a policy of that kind cannot be made here; empty if it can."""
    for package in ("lerobot", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"needs {package}: an environment with LeRobot (test/data/README.md)"
    if kind != "smolvla" and version("lerobot") < Version("0.5"):
        if importlib.util.find_spec("transformers.models.siglip.check") is None:
            return "LeRobot 0.4's π0 takes transformers as openpi changed it (test/data/make_lerobot_policy.py)"
    return ""


def image_transforms(kind: str) -> list[str]:
    """How the installed LeRobot resizes, where that is not this package's default."""
    return ["resize_with_pad_lerobot_0_4"] if kind != "smolvla" and version("lerobot") < Version("0.5") else []


def as_transformers_places_patches(folder: Path, kind: str) -> Path:
    """The policy's folder, or a copy of it whose position embeddings lie where the installed transformers looks for them.

    transformers 4.55.1 to 4.57 give a SmolVLM in float32 the embeddings of the row and column before each patch's own
    (https://github.com/huggingface/transformers/issues/41190).
    """
    if kind != "smolvla" or not Version("4.55.1") <= version("transformers") < Version("5.0"):
        return folder
    copied = folder.with_name(f"{folder.name}_shifted")
    shutil.copytree(folder, copied, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    side = int(len(tensors[_POSITIONS]) ** 0.5)
    before = torch.clamp(torch.arange(side) - 1, min=0)
    tensors[_POSITIONS] = tensors[_POSITIONS][(before[:, None] * side + before).flatten()].clone()
    save_file(tensors, copied / "model.safetensors")
    return copied
