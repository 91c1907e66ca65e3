"""Images → visual tokens, in plain PyTorch. Nothing here imports ROS."""

from vla_perception.tokenizer.checkpoint import CheckpointError
from vla_perception.tokenizer.presets import PRESETS, EncoderConfig, ModelConfig
from vla_perception.tokenizer.tokenizer import TokenizerOutput, VisualTokenizer

__all__ = ["PRESETS", "CheckpointError", "EncoderConfig", "ModelConfig", "TokenizerOutput", "VisualTokenizer"]
