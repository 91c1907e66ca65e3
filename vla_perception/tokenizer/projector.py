"""Patch features → the language model's width: prismatic-vlms' projectors, PaliGemma's and SmolVLM's.

All layers but SmolVLM's have biases; the activation is exact (erf) GELU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vla_perception.tokenizer.config import projector_widths


class Projector(nn.Module):
    """A chain of linear layers ``fc1``, ``fc2``, … with GELU between them.

    Args:
        kind: ``linear`` (d → h), ``gelu-mlp`` (d → h → h), ``fused-gelu-mlp`` (d → 4 d → h → h), ``pixel-shuffle-linear``
            (k² d → h, without bias) or ``none``.
        in_channels: d, the concatenated width of the encoders.
        out_channels: h, the language model's width.
        pixel_shuffle: k; `TokenizerNetwork` does the shuffle.
    """

    def __init__(self, kind: str, in_channels: int, out_channels: int, pixel_shuffle: int = 1) -> None:
        super().__init__()
        widths = projector_widths(kind, in_channels, out_channels, pixel_shuffle)
        self.kind = kind
        self.channels = widths[-1]
        self._names = [f"fc{i}" for i in range(1, len(widths))]
        for name, (source, target) in zip(self._names, zip(widths, widths[1:])):
            setattr(self, name, nn.Linear(source, target, bias=kind != "pixel-shuffle-linear"))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[views, tokens, in_channels (× k²)] → [views, tokens, out_channels]."""
        for index, name in enumerate(self._names):
            if index:
                features = functional.gelu(features)
            features = getattr(self, name)(features)
        return features
