"""One timm vision transformer → patch features on a grid, and its cls token where that is wanted.

Patch features as the model takes them, prefix tokens (class token, registers) sliced off: in Prismatic's the output of
the second-to-last block without the final norm, in PaliGemma's and SmolVLM's the last block's, normed. What lies behind,
a last block, final norm and pooling head, matters for the cls token alone and is not built otherwise. The cls token is the one vector that the encoder was trained to give for the image: DINOv2's
class token after the last block and norm, or what SigLIP's attention-pooling head makes of all patches there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vla_perception.tokenizer.checkpoints.model_args import check_architecture
from vla_perception.tokenizer.config import MAX_PATCHES, EncoderConfig
from vla_perception.tokenizer.film import FilmBlock
from vla_perception.tokenizer.timm_import import VisionTransformer, create_model, timm


class PatchEncoder(nn.Module):
    """Patch features of one encoder.

    Args:
        cls_token: build what the cls token takes, too.

    Attributes:
        grid: (rows, columns) of the patches; pixels beyond the last whole patch are not seen.
        channels: width of a feature.
        layer: index of the block whose output is taken, counted from 0.
        patch_size: side of a patch in pixels of the encoder's input.
    """

    def __init__(self, config: EncoderConfig, cls_token: bool = False) -> None:
        """Builds the module on the current default device; `torch.device("meta")` allocates nothing."""
        super().__init__()
        self.cls_token = cls_token
        self.config = config
        name = check_architecture(config.timm_id.split(".")[0], f"encoder {config.name!r}")
        try:
            vit = create_model(name, num_classes=0, img_size=config.image_size, **config.overrides)
        except Exception as error:  # timm's architectures refuse arguments in every way
            raise ValueError(
                f"timm {timm.__version__} cannot build the encoder {config.timm_id!r} at {config.image_size} pixels "
                f"with {dict(config.overrides)}: {error}"
            ) from error
        if not isinstance(vit, VisionTransformer):
            raise ValueError(f"{config.timm_id!r} is a {type(vit).__name__}; only plain vision transformers work here")
        if len(vit.blocks) < -config.layer:
            raise ValueError(f"{config.timm_id!r} has {len(vit.blocks)} blocks; the second-to-last is needed")
        if math.prod(vit.patch_embed.grid_size) > MAX_PATCHES:
            raise ValueError(
                f"{config.timm_id!r} at {config.image_size} pixels has {math.prod(vit.patch_embed.grid_size)} patches; "
                f"at most {MAX_PATCHES} are encoded"
            )
        self.layer = len(vit.blocks) + config.layer
        if not cls_token:
            vit.blocks = vit.blocks[: self.layer + 1]
            if not config.final_norm:
                vit.norm = nn.Identity()
            vit.fc_norm = nn.Identity()
            vit.attn_pool = None  # type: ignore[assignment]  # as timm has it where there is none
        elif not (vit.global_pool == "map" or (vit.global_pool == "token" and vit.has_class_token)):
            raise ValueError(
                f"{config.timm_id!r} was trained to give no cls token: it has neither a class token that is used nor an "
                f"attention-pooling head (its pooling is {vit.global_pool!r}); take token_strategy patch"
            )
        if config.film:
            blocks: Any = vit.blocks
            vit.blocks = nn.Sequential(*(FilmBlock(block, vit.embed_dim, config.film) for block in blocks))
        self.vit: Any = vit  # whose methods say that they return one of several types
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.channels: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self._prefix: int = vit.num_prefix_tokens

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[views, 3, side, side] → patch features, [views, rows * columns, channels]; needs no cls token."""
        return self.vit.forward_features(pixel_values)[:, self._prefix :]

    def forward_both(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[views, 3, side, side] → patch features, and the cls token [views, 1, channels]."""
        final, (patches,) = self.vit.forward_intermediates(
            pixel_values, indices=[self.layer], norm=self.config.final_norm, output_fmt="NLC"
        )
        # Without a classifier the head is pooling alone, and fc_norm where the architecture has one.
        return patches, self.vit.forward_head(final).unsqueeze(1)

    def parts(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[views, 3, side, side] → patch features, and the cls token where it is built."""
        return self.forward_both(pixel_values) if self.cls_token else (self(pixel_values),)
