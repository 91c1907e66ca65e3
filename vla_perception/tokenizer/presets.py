"""Presets as data: which encoders, which preprocessing, which projector; and Prismatic's vision backbones.

Sources: the public configuration of ``openvla/openvla-7b`` and prismatic-vlms' ``DinoSigLIPViTBackbone``
(Karamcheti et al., "Prismatic VLMs", 2024; Kim et al., "OpenVLA", 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vla_perception.fingerprint_inputs import (
    IMAGENET_MEAN,
    IMAGENET_MEAN_BF16,
    IMAGENET_STD,
    IMAGENET_STD_BF16,
)
from vla_perception.tokenizer.config import (
    HALF,
    INTERPOLATIONS,
    EncoderConfig,
    TokenizerConfig,
)

#: Prismatic's names of its vision backbones → (encoder, timm model, pixels), in channel order. The tags are those
#: that prismatic-vlms was trained with: what timm takes for SigLIP without a tag is SigLIP 2 by now.
_DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
PRISMATIC_BACKBONES: Mapping[str, tuple[tuple[str, str, int], ...]] = MappingProxyType(
    {
        "dinosiglip-vit-so-224px": (
            ("dinov2", _DINOV2, 224),
            ("siglip", "vit_so400m_patch14_siglip_224.webli", 224),
        ),
        "dinosiglip-vit-so-384px": (
            ("dinov2", _DINOV2, 384),
            ("siglip", "vit_so400m_patch14_siglip_384.webli", 384),
        ),
        "dinov2-vit-l": (("dinov2", _DINOV2, 224),),
        "dinov2-vit-l-384px": (("dinov2", _DINOV2, 384),),
        "siglip-vit-so400m": (("siglip", "vit_so400m_patch14_siglip_224.webli", 224),),
        "siglip-vit-so400m-384px": (("siglip", "vit_so400m_patch14_siglip_384.webli", 384),),
        "siglip-vit-b16-224px": (("siglip", "vit_base_patch16_siglip_224.webli", 224),),
        "siglip-vit-b16-256px": (("siglip", "vit_base_patch16_siglip_256.webli", 256),),
        "siglip-vit-b16-384px": (("siglip", "vit_base_patch16_siglip_384.webli", 384),),
    }
)


def prismatic_encoders(backbone: str, resize_strategy: str = "resize-naive") -> tuple[EncoderConfig, ...]:
    """The encoders of one of `PRISMATIC_BACKBONES`, with the exact statistics that prismatic-vlms uses."""
    return tuple(
        EncoderConfig(
            name,
            timm_id,
            size,
            IMAGENET_MEAN if name == "dinov2" else HALF,
            IMAGENET_STD if name == "dinov2" else HALF,
            resize_strategy,
        )
        for name, timm_id, size in PRISMATIC_BACKBONES[backbone]
    )


def _openvla_encoders() -> tuple[EncoderConfig, ...]:
    return (
        EncoderConfig("dinov2", "vit_large_patch14_reg4_dinov2.lvd142m", 224, IMAGENET_MEAN_BF16, IMAGENET_STD_BF16),
        EncoderConfig("siglip", "vit_so400m_patch14_siglip_224", 224, HALF, HALF),
    )


def siglip_of_transformers(
    timm_id: str, image_size: int, resize_strategy: str, overrides: Mapping[str, object] = MappingProxyType({})
) -> tuple[EncoderConfig, ...]:
    """SigLIP as PaliGemma and SmolVLM use it: all blocks and the final norm, tanh GELU, no pooling head."""
    return (
        EncoderConfig(
            "siglip",
            timm_id,
            image_size,
            HALF,
            HALF,
            resize_strategy,
            interpolation=INTERPOLATIONS["bilinear"],
            overrides={"act_layer": "gelu_tanh", "global_pool": "", **overrides},
            layer=-1,
            final_norm=True,
        ),
    )


def _paligemma(name: str) -> TokenizerConfig:
    encoders = siglip_of_transformers("vit_so400m_patch14_siglip_224", 224, "resize_with_pad_torch")
    return TokenizerConfig(name, encoders, "linear", 2048)


PRESETS: Mapping[str, TokenizerConfig] = MappingProxyType(
    {
        config.name: config
        for config in (
            TokenizerConfig("openvla-7b", _openvla_encoders(), "fused-gelu-mlp", 4096),
            TokenizerConfig("minivla", _openvla_encoders(), "fused-gelu-mlp", 896),
            TokenizerConfig(
                "prism-dinosiglip-224px", prismatic_encoders("dinosiglip-vit-so-224px"), "fused-gelu-mlp", 4096
            ),
            TokenizerConfig(
                "prism-dinosiglip-384px", prismatic_encoders("dinosiglip-vit-so-384px"), "fused-gelu-mlp", 4096
            ),
            TokenizerConfig("dinov2-vit-l", prismatic_encoders("dinov2-vit-l"), "gelu-mlp", 4096),
            TokenizerConfig("siglip-vit-so400m", prismatic_encoders("siglip-vit-so400m"), "gelu-mlp", 4096),
            TokenizerConfig("siglip-vit-so400m-384px", prismatic_encoders("siglip-vit-so400m-384px"), "gelu-mlp", 4096),
            TokenizerConfig(
                "base",
                (
                    EncoderConfig("dinov2", "vit_base_patch14_reg4_dinov2", 196, IMAGENET_MEAN, IMAGENET_STD),
                    EncoderConfig("siglip", "vit_base_patch16_siglip_224", 224, HALF, HALF),
                ),
                "fused-gelu-mlp",
                4096,
            ),
            _paligemma("pi0"),
            _paligemma("pi05"),
            TokenizerConfig(
                "smolvla",
                siglip_of_transformers("vit_base_patch16_siglip_512", 512, "resize_with_pad_top_left"),
                "pixel-shuffle-linear",
                960,
                pixel_shuffle=4,
            ),
            # Both families on one 14 × 14 grid, shallow and narrow enough for two cameras on two CPU cores.
            TokenizerConfig(
                "tiny-random",
                (
                    EncoderConfig(
                        "dinov2",
                        "vit_small_patch14_reg4_dinov2",
                        196,
                        IMAGENET_MEAN,
                        IMAGENET_STD,
                        overrides={"depth": 3},
                    ),
                    EncoderConfig(
                        "siglip",
                        "vit_base_patch16_siglip_224",
                        224,
                        HALF,
                        HALF,
                        overrides={"depth": 3, "embed_dim": 384, "num_heads": 6},
                    ),
                ),
                "fused-gelu-mlp",
                256,
            ),
        )
    }
)
