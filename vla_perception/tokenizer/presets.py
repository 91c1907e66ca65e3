"""Model configurations as data: which encoders, which preprocessing, which projector.

Sources: the public configuration of ``openvla/openvla-7b`` and prismatic-vlms' ``DinoSigLIPViTBackbone``
(Karamcheti et al., "Prismatic VLMs", 2024; Kim et al., "OpenVLA", 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
#: The released OpenVLA processor went through bfloat16, so these are what the models were run with.
IMAGENET_MEAN_BF16: Triple = (0.484375, 0.455078125, 0.40625)
IMAGENET_STD_BF16: Triple = (0.228515625, 0.2236328125, 0.224609375)
HALF: Triple = (0.5, 0.5, 0.5)

#: Side of a picture in pixels that no vision transformer of today comes near.
MAX_IMAGE_SIZE = 4096
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
PROJECTORS = ("linear", "gelu-mlp", "fused-gelu-mlp", "none")


@dataclass(frozen=True)
class EncoderConfig:
    """One vision transformer and what its input looks like.

    Attributes:
        name: short name, ``dinov2`` or ``siglip``; unique within a model.
        timm_id: timm model name, e.g. ``vit_so400m_patch14_siglip_224``.
        image_size: side of the square input, in pixels.
        mean, std: per-channel statistics on the 0–1 scale.
        resize_strategy: one of `RESIZE_STRATEGIES`.
        letterbox_fill: RGB fill (0–255) for ``letterbox``; ``int(mean * 255)`` where not given.
        interpolation: PIL's resampling number; 3 is bicubic, which every released model uses.
        overrides: keyword arguments for ``timm.create_model`` (``depth``, ``act_layer``, …).
    """

    name: str
    timm_id: str
    image_size: int
    mean: Triple
    std: Triple
    resize_strategy: str = "resize-naive"
    letterbox_fill: tuple[int, int, int] | None = None
    interpolation: int = 3
    overrides: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.resize_strategy not in RESIZE_STRATEGIES:
            raise ValueError(
                f"encoder {self.name!r}: unknown resize strategy {self.resize_strategy!r}; "
                f"choose one of {', '.join(RESIZE_STRATEGIES)}"
            )
        if self.image_size <= 0 or min(self.std) <= 0:
            raise ValueError(f"encoder {self.name!r}: image size and std must be positive")

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB fill of the letterbox, 0–255."""
        if self.letterbox_fill is not None:
            return self.letterbox_fill
        return tuple(int(value * 255) for value in self.mean)  # type: ignore[return-value]

    @property
    def geometry(self) -> tuple:
        """What decides the resized uint8 picture; encoders that share it share one resize."""
        fill = self.fill if self.resize_strategy == "letterbox" else None
        return (self.image_size, self.resize_strategy, self.interpolation, fill)

    def preprocessing(self) -> dict:
        """The settings that change pixel values, for the fingerprint."""
        return {
            "encoder": self.name,
            "image_size": self.image_size,
            "interpolation": self.interpolation,
            "letterbox_fill": list(self.fill) if self.resize_strategy == "letterbox" else None,
            "mean": list(self.mean),
            "resize_strategy": self.resize_strategy,
            "std": list(self.std),
        }


def encoder_name(timm_id: str) -> str:
    """Short name of an encoder: its family where that is known, timm's name of the architecture otherwise."""
    return next((family for family in ("dinov2", "siglip", "clip") if family in timm_id), timm_id.split(".")[0])


@dataclass(frozen=True)
class ModelConfig:
    """A whole tokenizer: encoders in channel order, projector, width of the language model.

    Attributes:
        name: what tokens are labelled with.
        encoders: in the order in which their channels are concatenated.
        projector: one of `PROJECTORS`.
        output_channels: width of a token, the language model's hidden size; ignored for ``none``.
    """

    name: str
    encoders: tuple[EncoderConfig, ...]
    projector: str
    output_channels: int

    def __post_init__(self) -> None:
        if not self.encoders:
            raise ValueError(f"model {self.name!r} has no encoder; give at least one")
        if len({encoder.name for encoder in self.encoders}) != len(self.encoders):
            raise ValueError(f"model {self.name!r}: encoder names must differ")
        if self.projector not in PROJECTORS:
            raise ValueError(
                f"model {self.name!r}: unknown projector {self.projector!r}; choose one of {', '.join(PROJECTORS)}"
            )

    def preprocessing(self) -> list[dict]:
        return [encoder.preprocessing() for encoder in self.encoders]


def _openvla_encoders() -> tuple[EncoderConfig, ...]:
    return (
        EncoderConfig("dinov2", "vit_large_patch14_reg4_dinov2.lvd142m", 224, IMAGENET_MEAN_BF16, IMAGENET_STD_BF16),
        EncoderConfig("siglip", "vit_so400m_patch14_siglip_224", 224, HALF, HALF),
    )


PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        config.name: config
        for config in (
            ModelConfig("openvla-7b", _openvla_encoders(), "fused-gelu-mlp", 4096),
            ModelConfig("minivla", _openvla_encoders(), "fused-gelu-mlp", 896),
            ModelConfig(
                "base",
                (
                    EncoderConfig("dinov2", "vit_base_patch14_reg4_dinov2", 196, IMAGENET_MEAN, IMAGENET_STD),
                    EncoderConfig("siglip", "vit_base_patch16_siglip_224", 224, HALF, HALF),
                ),
                "fused-gelu-mlp",
                4096,
            ),
            # Both families on one 14 × 14 grid, shallow and narrow enough for two cameras on two CPU cores.
            ModelConfig(
                "small",
                (
                    EncoderConfig(
                        "dinov2", "vit_small_patch14_reg4_dinov2", 196, IMAGENET_MEAN, IMAGENET_STD,
                        overrides={"depth": 3},
                    ),
                    EncoderConfig(
                        "siglip", "vit_base_patch16_siglip_224", 224, HALF, HALF,
                        overrides={"depth": 3, "embed_dim": 384, "num_heads": 6},
                    ),
                ),
                "fused-gelu-mlp",
                256,
            ),
        )
    }
)
