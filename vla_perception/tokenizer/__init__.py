"""Images → visual tokens, in PyTorch; nothing here imports ROS.

Words:

encoder
    One vision transformer (DINOv2, SigLIP, …), which gives patch features: a vector per patch of its input.
cls token
    One vector for the whole image: DINOv2's class token, or what SigLIP's attention pooling makes of all patches.
features, tokens
    The encoders' vectors joined along channels, and what the projector makes of them.
projector
    Maps features to the width of the language model that reads the tokens.
preset
    A model's configuration with random weights.
image transforms
    What is done to images before they are resized, as in training.
options
    What a user chooses of a model: `TokenizerConfig.with_options`.
fingerprint
    One hash over the weights and everything else that changes tokens.

Modules, in the order of an image's way:

tokenizer
    `VisualTokenizer`, the whole flow.
config, presets
    Configurations, and those that have a name.
image_inputs, image_transforms, preprocess
    Images as people have them → uint8 RGB → each encoder's pixel values. On a GPU: image_transforms_gpu, preprocess_gpu, upload, image_layout and the
    Triton kernels beside them.
network, encoder, projector
    Pixel values → features → tokens.
weights, checkpoints/
    Which tensors of a checkpoint the network reads, and where they lie in files.
devices, runtime
    Where the network computes, and how: cuda_graphs, fused_blocks, float8 and their kernels; tuned_products, and cublaslt
    and product_search beside it.
cost, vits
    What tokens are and cost, by arithmetic.

PyTorch is imported when something is taken from here that needs it: programs check what they were given before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.config import EncoderConfig, TokenizerConfig
from vla_perception.tokenizer.presets import PRESETS

if TYPE_CHECKING:
    from vla_perception.tokenizer.tokenizer import TokenizerOutput, VisualTokenizer

__all__ = ["PRESETS", "CheckpointError", "EncoderConfig", "TokenizerConfig", "TokenizerOutput", "VisualTokenizer"]


def __getattr__(name: str) -> object:
    if name in ("TokenizerOutput", "VisualTokenizer"):
        from vla_perception.tokenizer import tokenizer

        return getattr(tokenizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
