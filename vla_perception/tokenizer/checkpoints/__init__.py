"""What people have on disk or on the hub → a `Checkpoint`: its configuration, and which tensor lies where.

Words:

checkpoint
    Trained weights with their configuration, in whatever layout; `checkpoint.Checkpoint` looks the same for all of them.
canonical name
    A tensor's name without its layout: ``dinov2.blocks.0.attn.qkv.weight``, ``projector.fc1.bias``.
adapter
    A low-rank change (LoRA, by peft) of tensors of a base model.
unexpected keys
    Tensors of the vision part that nothing is known about: an error, because the tokens could depend on them.

Modules, from a name to bytes:

open
    The one dispatch from a name: a path, a Hugging Face id, timm's encoders; and from a path to its layout.
openvla, prismatic, lerobot, timm_encoders
    One layout each → `Checkpoint`.
film
    A `Checkpoint` of OpenVLA-OFT and the file of its encoders with FiLM → a `Checkpoint`.
refused
    Models that are not cut behind vision, and why.
lora
    A `Checkpoint` and an adapter → a `Checkpoint`.
hub, http_range
    A Hugging Face id → a folder here with the vision part alone, over connections that break.
tensor_names
    Which part a tensor belongs to, by its name in a file.
checkpoint
    `Checkpoint`: do its tensors fit, their values, digest and fingerprint.
model_args
    Which arguments of a configuration timm may be given.
files, paths
    safetensors, ``.pt`` and JSON, read without trusting them.

Which of a checkpoint's tensors are read is decided in tokenizer/weights.py.
"""

from __future__ import annotations

from vla_perception.printable import error_text


class CheckpointError(ValueError):
    """The files do not hold a vision part that can be used; the message says what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(error_text(text))  # it quotes names of any content
