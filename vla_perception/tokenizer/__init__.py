"""Images → visual tokens, in plain PyTorch. Nothing here imports ROS.

PyTorch is imported when something is taken from here that needs it: programs check what they were given before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vla_perception.tokenizer.presets import PRESETS, EncoderConfig, ModelConfig

if TYPE_CHECKING:
    from vla_perception.tokenizer.checkpoints.files import CheckpointError
    from vla_perception.tokenizer.tokenizer import TokenizerOutput, VisualTokenizer

__all__ = ["PRESETS", "CheckpointError", "EncoderConfig", "ModelConfig", "TokenizerOutput", "VisualTokenizer"]


def __getattr__(name: str) -> object:
    if name == "CheckpointError":
        from vla_perception.tokenizer.checkpoints import files as module
    elif name in ("TokenizerOutput", "VisualTokenizer"):
        from vla_perception.tokenizer import tokenizer as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
