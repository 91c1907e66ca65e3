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
        patch_grid: (rows, columns) of patches, before pixel shuffle and pooling.
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
        self.projector = Projector(
            config.projector, self.feature_channels, config.output_channels, config.pixel_shuffle
        )
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
        shuffle = self.config.patches_per_side // self.config.pool
        tokens = self.projector(features if shuffle == 1 else self._shuffled(features, shuffle))
        rows, columns = self.patch_grid
        return self._pooled(features, rows, columns), self._pooled(tokens, rows // shuffle, columns // shuffle)

    def _shuffled(self, features: torch.Tensor, k: int) -> torch.Tensor:
        """[views, rows * columns, channels] → [views, rows * columns / k², k² * channels]: k × k patches, row by row."""
        rows, columns = self.patch_grid
        blocks = features.unflatten(1, (rows // k, k, columns // k, k)).transpose(2, 3)
        return blocks.flatten(3).flatten(1, 2)

    def _pooled(self, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Averages k × k neighbours of the grid; a cls token in front stays as it is."""
        k = self.config.pool
        if k == 1:
            return values
        in_front = values.shape[1] - rows * columns
        patches = values[:, in_front:].unflatten(1, (rows // k, k, columns // k, k)).mean((2, 4)).flatten(1, 2)
        return torch.cat([values[:, :in_front], patches], dim=1)


def empty_network(config: TokenizerConfig) -> TokenizerNetwork:
    """The network on the meta device: shapes without memory. ValueError if its parts do not go together."""
    with on_meta():
        return TokenizerNetwork(config).eval().requires_grad_(False)
