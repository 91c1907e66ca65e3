"""What computes: encoders, concatenation of their features along channels, projector, pooling."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from vla_perception.tokenizer.config import TokenizerConfig
from vla_perception.tokenizer.encoder import PatchEncoder
from vla_perception.tokenizer.projector import Projector
from vla_perception.tokenizer.timm_import import on_meta


class TokenizerNetwork(nn.Module):
    """One `PatchEncoder` for each configured encoder, side by side, then the projector.

    Attributes:
        config: what it was built from.
        encoders: name → `PatchEncoder`, in channel order.
        projector: the `Projector`.
        patch_grid: (rows, columns) of patches, before pooling.
        feature_channels: width of a token before the projector.
        channels: width of a token.

    Raises:
        ValueError: encoders, projector and options do not go together.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        encoders = {encoder.name: PatchEncoder(encoder, cls_token=config.cls_token) for encoder in config.encoders}
        self.encoders = nn.ModuleDict(encoders)
        self.patch_grid = config.joint_grid({name: encoder.grid for name, encoder in encoders.items()})
        self.feature_channels = sum(encoder.channels for encoder in encoders.values())
        self.projector = Projector(config.projector, self.feature_channels, config.output_channels)
        self.channels = self.projector.channels

    @property
    def towers(self) -> list[PatchEncoder]:
        """The encoders, in channel order."""
        return list(self.encoders.values())  # type: ignore[arg-type]  # ModuleDict knows modules alone

    def canonical_tensors(self) -> dict[str, str]:
        """Canonical tensor name (``dinov2.blocks.0.attn.qkv.weight``) → name in this module's state dict."""
        return {re.sub(r"^encoders\.([^.]+)\.vit\.", r"\1.", name): name for name in self.state_dict()}

    def forward(self, pixel_values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """One [views, 3, side, side] per encoder → features and tokens, [views, tokens, channels] each."""
        return self.join([branch(pixels) for branch, pixels in zip(self.branches(), pixel_values)])

    def branches(self) -> list[Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
        """What can run side by side, in channel order: pixel values → `PatchEncoder.parts`."""
        return [encoder.parts for encoder in self.towers]

    def join(self, parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The branches' results → features and tokens."""
        if self.config.token_strategy == "cls":
            features = torch.cat([cls_token for _, cls_token in parts], dim=-1)
        else:
            # [patches], or [patches, cls token], of all encoders; the cls token goes in front.
            joined = [torch.cat(values, dim=-1) for values in zip(*parts)]
            features = joined[0] if len(joined) == 1 else torch.cat(joined[::-1], dim=1)
        tokens = self.projector(features)
        return self._pooled(features), self._pooled(tokens)

    def _pooled(self, values: torch.Tensor) -> torch.Tensor:
        """Averages k × k neighbouring patches; a cls token in front stays as it is."""
        k = self.config.pool
        if k == 1:
            return values
        rows, columns = self.patch_grid
        in_front = values.shape[1] - rows * columns
        patches = values[:, in_front:].unflatten(1, (rows // k, k, columns // k, k)).mean((2, 4)).flatten(1, 2)
        return torch.cat([values[:, :in_front], patches], dim=1)


def empty_network(config: TokenizerConfig) -> TokenizerNetwork:
    """The network on the meta device: shapes without memory. ValueError if its parts do not go together."""
    with on_meta():
        return TokenizerNetwork(config).eval().requires_grad_(False)
