"""Layers and parameters of a vision transformer by arithmetic, for the presets' encoders also without PyTorch and timm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vla_perception.tokenizer.config import EncoderConfig

if TYPE_CHECKING:
    from vla_perception.tokenizer.encoder import PatchEncoder


@dataclass(frozen=True)
class Layer:
    """A layer with weights, ``inputs → outputs`` for each of `count` vectors of an image."""

    count: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Vit:
    """What a vision transformer as the tokenizer builds it consists of.

    Attributes:
        grid: (rows, columns) of patches.
        patch_size: side of a patch in pixels.
        channels: width of a feature.
        blocks: those that run.
        heads: of attention.
        prefix_tokens: class token and registers.
        parameters: numbers in all of it.
        layers: those with weights that are multiplied for each image; FiLM's are when the instruction changes.
        latents: tokens of an attention-pooling head; 0 without one.
    """

    grid: tuple[int, int]
    patch_size: int
    channels: int
    blocks: int
    heads: int
    prefix_tokens: int
    parameters: int
    layers: tuple[Layer, ...]
    latents: int


@dataclass(frozen=True)
class _Architecture:
    """timm's arguments of an architecture: DINOv2's with LayerScale, class token and registers, or SigLIP's."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    prefix_tokens: int = 0
    layer_scale: bool = False
    pooling_head: bool = False


def _dinov2(patch_size: int, embed_dim: int, depth: int, num_heads: int) -> _Architecture:
    return _Architecture(patch_size, embed_dim, depth, num_heads, prefix_tokens=5, layer_scale=True)


def _siglip(patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> _Architecture:
    return _Architecture(patch_size, embed_dim, depth, num_heads, mlp_ratio, pooling_head=True)


#: The presets' architectures by timm's name; test_describe.py compares with timm.
_ARCHITECTURES: Mapping[str, _Architecture] = MappingProxyType(
    {
        "vit_small_patch14_reg4_dinov2": _dinov2(14, 384, 12, 6),
        "vit_base_patch14_reg4_dinov2": _dinov2(14, 768, 12, 12),
        "vit_large_patch14_reg4_dinov2": _dinov2(14, 1024, 24, 16),
        "vit_base_patch16_siglip_224": _siglip(16, 768, 12, 12),
        "vit_base_patch16_siglip_512": _siglip(16, 768, 12, 12),
        "vit_so400m_patch14_siglip_224": _siglip(14, 1152, 27, 16, 3.7362),
        "vit_so400m_patch14_siglip_384": _siglip(14, 1152, 27, 16, 3.7362),
    }
)


def by_name(encoder: EncoderConfig, cls_token: bool) -> Vit | None:
    """The encoder of a preset; None for others, which have to be built.

    Args:
        cls_token: with what only the cls token takes: last block, final norm, pooling head.
    """
    architecture = _ARCHITECTURES.get(encoder.timm_id.split(".")[0])
    known = {"depth", "embed_dim", "num_heads"}
    # A GELU has no parameters, and without cls token nothing is pooled.
    harmless = {"act_layer"} | (set() if cls_token else {"global_pool"})
    if (
        architecture is None
        or not set(encoder.overrides) <= known | harmless
        or encoder.image_size < architecture.patch_size
    ):
        return None
    values: dict[str, Any] = {name: encoder.overrides.get(name, getattr(architecture, name)) for name in known}
    width, patch = values["embed_dim"], architecture.patch_size
    blocks = values["depth"] if cls_token else values["depth"] + encoder.layer + 1
    hidden = int(width * architecture.mlp_ratio)
    rows = columns = encoder.image_size // patch
    tokens = rows * columns + architecture.prefix_tokens
    layers = [Layer(rows * columns, 3 * patch * patch, width)]
    layers += [
        Layer(tokens, width, 3 * width),
        Layer(tokens, width, width),
        Layer(tokens, width, hidden),
        Layer(tokens, hidden, width),
    ] * blocks
    pooled = cls_token and architecture.pooling_head
    if pooled:
        layers += [Layer(1, width, width), Layer(tokens, width, 2 * width), Layer(1, width, width)]
        layers += [Layer(1, width, hidden), Layer(1, hidden, width)]
    parameters = sum(layer.inputs * layer.outputs + layer.outputs for layer in layers)
    parameters += (rows * columns + architecture.prefix_tokens) * width  # positions, class token, registers
    parameters += blocks * (4 + 2 * architecture.layer_scale) * width  # two norms, two LayerScales
    if cls_token or encoder.final_norm:
        parameters += 2 * width  # the final norm
    if pooled:
        parameters += 3 * width  # latent and norm
    if encoder.film:
        parameters += blocks * 2 * (encoder.film + 1) * width  # scale and shift
    return Vit(
        (rows, columns),
        patch,
        width,
        blocks,
        values["num_heads"],
        architecture.prefix_tokens,
        parameters,
        tuple(layers),
        int(pooled),
    )


def of_module(tower: PatchEncoder) -> Vit:
    """The same of any encoder that has been built, be it on the meta device."""
    from torch import nn

    from vla_perception.tokenizer.film import FilmLinear

    vit: Any = tower.vit
    rows, columns = tower.grid
    tokens = rows * columns + vit.num_prefix_tokens
    latents = 0 if vit.attn_pool is None else vit.attn_pool.latent_len

    def layers() -> Iterator[Layer]:
        for name, module in vit.named_modules():
            if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and name.startswith("patch_embed.")):
                count = rows * columns
            elif isinstance(module, nn.Linear) and not isinstance(module, FilmLinear):
                count = latents if name.startswith("attn_pool.") and not name.endswith(".kv") else tokens
            else:
                continue
            yield Layer(count, module.weight[0].numel(), module.weight.shape[0])

    parameters = sum(parameter.numel() for parameter in vit.parameters())
    return Vit(
        (rows, columns),
        tower.patch_size,
        tower.channels,
        len(vit.blocks),
        vit.blocks[0].attn.num_heads,
        vit.num_prefix_tokens,
        parameters,
        tuple(layers()),
        latents,
    )
