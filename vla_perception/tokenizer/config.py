"""A tokenizer's configuration: encoders and what their input looks like, projector, and the options that a user has.

Sources: the public configuration of ``openvla/openvla-7b`` and prismatic-vlms' ``DinoSigLIPViTBackbone``
(Karamcheti et al., "Prismatic VLMs", 2024; Kim et al., "OpenVLA", 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypedDict

from vla_perception.fingerprint_inputs import SPELLED_IN_FINGERPRINTS, Triple, spelled_in_fingerprint
from vla_perception.options import PROJECTORS, RESIZE_STRATEGIES, RESIZE_WITH_PAD, TOKEN_STRATEGIES
from vla_perception.tokenizer.image_transforms import parse_chains, split_resize

HALF: Triple = (0.5, 0.5, 0.5)

#: Interpolations by PIL's names → PIL's numbers.
INTERPOLATIONS = MappingProxyType({"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5})

#: Strategies whose result is float32 from -1 to 1 and was never rounded to 8 bits (tokenizer/resize_with_pad.py).
FLOAT_RESIZES = RESIZE_WITH_PAD[1:]

#: Side of an image in pixels that no vision transformer of today comes near.
MAX_IMAGE_SIZE = 4096
#: Patches of an image: every one is as wide as the encoder in each of its steps. 4096 pixels in patches of 14 are 85 264.
MAX_PATCHES = 1 << 17
#: Width of a language model that none comes near.
MAX_WIDTH = 1 << 20


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
        layer: block whose output is taken, counted from the end: -2 in Prismatic's models, -1 where all blocks run.
        final_norm: whether the tower's final norm follows that block.
        film: length of the condition that modulates every block (film.py); 0 without FiLM.
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
    layer: int = -2
    final_norm: bool = False
    film: int = 0

    def __post_init__(self) -> None:
        if self.layer not in (-2, -1):
            raise ValueError(f"encoder {self.name!r}: layer {self.layer!r} is neither -2 nor -1")
        if self.resize_strategy not in RESIZE_STRATEGIES:
            raise ValueError(
                f"encoder {self.name!r}: unknown resize strategy {self.resize_strategy!r}; "
                f"choose one of {', '.join(RESIZE_STRATEGIES)}"
            )
        if not 0 < self.image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"encoder {self.name!r}: image size {self.image_size} is not within 1 to {MAX_IMAGE_SIZE}")
        statistics = (*self.mean, *self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, statistics)) or min(self.std) <= 0:
            raise ValueError(
                f"encoder {self.name!r}: mean and std must be three finite numbers each, std above 0, got "
                f"{self.mean!r:.200} and {self.std!r:.200}"
            )
        if self.resize_strategy in FLOAT_RESIZES and (self.mean, self.std) != (HALF, HALF):
            raise ValueError(
                f"encoder {self.name!r}: {self.resize_strategy} gives pixels from -1 to 1, and this encoder was trained on "
                f"others (mean {self.mean}, std {self.std}); take resize_with_pad_pil"
            )
        if self.interpolation not in range(6):
            raise ValueError(f"encoder {self.name!r}: interpolation {self.interpolation!r} is not one of PIL's 0 to 5")
        fill = self.letterbox_fill
        if fill is not None and (len(fill) != 3 or not all(0 <= value <= 255 for value in fill)):
            raise ValueError(f"encoder {self.name!r}: letterbox_fill {fill!r:.200} is not three values from 0 to 255")

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB fill of the letterbox, 0–255."""
        if self.letterbox_fill is not None:
            return self.letterbox_fill
        return tuple(int(value * 255) for value in self.mean)  # type: ignore[return-value]

    @property
    def geometry(self) -> tuple:
        """What decides the resized uint8 image; encoders that share it share one resize."""
        fill = self.fill if self.resize_strategy == "letterbox" else None
        return (self.image_size, self.resize_strategy, self.interpolation, fill)

    def preprocessing(self) -> dict:
        """What changes pixel values, and what is made of them beside the weights, for the fingerprint."""
        # Only where it is not Prismatic's: the fingerprints of those models were taken before there was a choice.
        end = {} if (self.layer, self.final_norm) == (-2, False) else {"layer": [self.layer, self.final_norm]}
        film = {"film": self.film} if self.film else {}
        return (
            end
            | film
            | {
                "architecture": [self.timm_id.split(".")[0], dict(self.overrides)],
                "encoder": self.name,
                "image_size": self.image_size,
                "interpolation": self.interpolation,
                "letterbox_fill": list(self.fill) if self.resize_strategy == "letterbox" else None,
                "mean": list(self.mean),
                "resize_strategy": self.resize_strategy,
                "std": list(self.std),
            }
        )


def per_encoder(image_size: int | Sequence[int] | None, count: int) -> list[int]:
    """One image size per encoder of what a user gave; 0 where it is to be the model's own, as where nothing was given.

    Raises:
        ValueError: neither one size nor one for each, or no size that can be.
    """
    sizes = [0] if image_size is None else [image_size] if isinstance(image_size, int) else list(image_size) or [0]
    if len(sizes) not in (1, count) or not all(type(size) is int and 0 <= size <= MAX_IMAGE_SIZE for size in sizes):
        raise ValueError(
            f"image_size must be one or {count} whole numbers of pixels from 1 to {MAX_IMAGE_SIZE}, or 0 for the "
            f"model's own, got {image_size}"
        )
    return sizes * count if len(sizes) == 1 else sizes


def encoder_name(timm_id: str) -> str:
    """Short name of an encoder: its family where that is known, timm's name of the architecture otherwise."""
    return next((family for family in ("dinov2", "siglip", "clip") if family in timm_id), timm_id.split(".")[0])


class TokenizerOptions(TypedDict, total=False):
    """What a user chooses of a model, by keyword; `TokenizerConfig.with_options` has the meaning."""

    encoders: Sequence[str] | None
    token_strategy: str
    projector: str | None
    pool: int
    image_size: int | Sequence[int] | None
    image_transforms: Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class TokenizerConfig:
    """A whole tokenizer: encoders in channel order, projector, width of the language model.

    Attributes:
        name: what tokens are labelled with.
        encoders: in the order in which their channels are concatenated.
        projector: one of `PROJECTORS`.
        output_channels: width of a token, the language model's hidden size; ignored for ``none``.
        token_strategy: ``patch``: one token per patch; ``cls``: the cls token; ``cls+patch``: the cls token, then patches.
        pool: k: k × k neighbouring patch tokens are averaged into one, after the projector.
        image_transforms: what is done to images before they are resized, camera → steps; ``""`` is for cameras that are
            not named.
        pixel_shuffle: k: before the projector ``pixel-shuffle-linear``, k × k neighbouring patches become one vector.
    """

    name: str
    encoders: tuple[EncoderConfig, ...]
    projector: str
    output_channels: int
    token_strategy: str = "patch"
    pool: int = 1
    image_transforms: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    pixel_shuffle: int = 1

    def __post_init__(self) -> None:
        if not self.encoders:
            raise ValueError(f"model {self.name!r} has no encoder; give at least one")
        if len({encoder.name for encoder in self.encoders}) != len(self.encoders):
            raise ValueError(f"model {self.name!r}: encoder names must differ")
        if self.projector not in PROJECTORS:
            raise ValueError(
                f"model {self.name!r}: unknown projector {self.projector!r}; choose one of {', '.join(PROJECTORS)}"
            )
        if self.token_strategy not in TOKEN_STRATEGIES:
            raise ValueError(
                f"unknown token_strategy {self.token_strategy!r}; choose one of {', '.join(TOKEN_STRATEGIES)}"
            )
        if type(self.pool) is not int or self.pool < 1:
            raise ValueError(f"pool must be a whole number from 1 on, got {self.pool!r}")
        if self.pool > 1 and self.token_strategy == "cls":
            raise ValueError(
                f"pool {self.pool} averages neighbouring patches, and token_strategy cls has none; leave pool at 1"
            )
        if type(self.pixel_shuffle) is not int or self.pixel_shuffle < 1:
            raise ValueError(f"pixel_shuffle must be a whole number from 1 on, got {self.pixel_shuffle!r}")
        if self.projector == "pixel-shuffle-linear" and self.pixel_shuffle == 1:
            raise ValueError(f"model {self.name!r} shuffles no pixels; take projector linear")
        # timm's way to say that there is no pooling head, as in PaliGemma and SmolVLM.
        if self.cls_token and any(encoder.overrides.get("global_pool") == "" for encoder in self.encoders):
            raise ValueError(
                f"model {self.name!r} has no cls token, because its encoder comes without a pooling head; take token_strategy "
                "patch"
            )

    @property
    def cls_token(self) -> bool:
        """Whether the encoders' cls tokens are wanted."""
        return self.token_strategy != "patch"

    @property
    def film(self) -> int:
        """Length of the condition that modulates the encoders; 0 without FiLM."""
        return max(encoder.film for encoder in self.encoders)

    @property
    def patches_per_side(self) -> int:
        """k: a token stands for k × k patches, by pixel shuffle and pooling."""
        return self.pool * (self.pixel_shuffle if self.projector == "pixel-shuffle-linear" else 1)

    def joint_grid(self, grids: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """(rows, columns) of patches that all encoders share.

        Args:
            grids: encoder's name → its (rows, columns).

        Raises:
            ValueError: they differ, or `pool` or `pixel_shuffle` does not divide them.
        """
        if len(set(grids.values())) != 1:
            listed = ", ".join(f"{name} {rows} × {columns}" for name, (rows, columns) in grids.items())
            raise ValueError(
                f"model {self.name!r}: the encoders' grids differ ({listed}); features are joined position by "
                "position, so choose image sizes that give the same number of patches"
            )
        patches = rows, columns = next(iter(grids.values()))
        shuffle = self.patches_per_side // self.pool
        if rows % shuffle or columns % shuffle:
            raise ValueError(
                f"model {self.name!r}: {shuffle} × {shuffle} patches become one token, and its grid is {rows} × {columns}; "
                "choose an image size that gives a multiple"
            )
        rows, columns = rows // shuffle, columns // shuffle
        if rows % self.pool or columns % self.pool:
            fitting = ", ".join(str(k) for k in range(1, min(rows, columns) + 1) if rows % k == columns % k == 0)
            raise ValueError(
                f"pool {self.pool} does not divide the grid of {rows} × {columns}: patches at its edge would be lost; "
                f"choose one of {fitting}"
            )
        return patches

    def settings(self) -> dict:
        """What changes tokens beside the weights, for the fingerprint."""
        chains = {
            camera: [spelled_in_fingerprint(step) for step in steps] for camera, steps in self.image_transforms.items()
        }
        shuffle = {"pixel_shuffle": self.pixel_shuffle} if self.projector == "pixel-shuffle-linear" else {}
        return shuffle | {
            "pool": self.pool,
            "preprocessing": [encoder.preprocessing() for encoder in self.encoders],
            SPELLED_IN_FINGERPRINTS["image_transforms"]: chains.get("", []) if set(chains) <= {""} else chains,
            "projector": self.projector,
            "token_strategy": self.token_strategy,
        }

    def with_options(
        self,
        *,
        trained: bool,
        encoders: Sequence[str] | None = None,
        token_strategy: str = "patch",
        projector: str | None = None,
        pool: int = 1,
        image_size: int | Sequence[int] | None = None,
        image_transforms: Sequence[str] | Mapping[str, Sequence[str]] = (),
    ) -> TokenizerConfig:
        """This model with a user's options; ValueError with the reason where they make no sense.

        Args:
            trained: whether weights are given, so that projector and image sizes are what they are.
            encoders: names of those to keep; None or nothing keeps all.
            token_strategy, pool: see `TokenizerConfig`.
            projector: one of `PROJECTORS`; None for the model's own.
            image_size: side in pixels, one for all encoders or one for each; 0, None or nothing for the model's own.
            image_transforms: steps in their order, ``camera=step`` for one camera alone, or camera → steps.
        """
        kept = self._kept(encoders)
        own_sizes = [encoder.image_size for encoder in kept]
        sizes = [size or own for size, own in zip(per_encoder(image_size, len(kept)), own_sizes)]
        if trained and sizes != own_sizes:
            raise ValueError(
                f"{self.name} was trained at {', '.join(map(str, own_sizes))} pixels, and its position embeddings fit no "
                f"other; image_size {image_size} works for presets and timm encoders"
            )
        kept = tuple(replace(encoder, image_size=size) for encoder, size in zip(kept, sizes))
        own = self.projector
        chosen = projector or own
        if trained and chosen not in (own, "none"):
            reason = "has none" if own == "none" else f"has a {own} one"
            raise ValueError(
                f"{self.name} {reason}, so a {chosen} projector would have no trained weights; leave `projector` "
                "unset, or take none for features"
            )
        if trained and chosen != "none" and len(kept) != len(self.encoders):
            raise ValueError(
                f"the projector of {self.name} takes {' + '.join(encoder.name for encoder in self.encoders)}, and only "
                f"{' + '.join(encoder.name for encoder in kept)} is kept: it would not fit. Set projector to none for "
                "that encoder's features"
            )
        if chosen != "none" and self.output_channels <= 0:
            raise ValueError(f"{self.name} says nothing of a language model's width; projector must be none")
        chains, resize = split_resize(parse_chains(image_transforms, [encoder.image_size for encoder in kept]))
        if resize:
            kept = tuple(replace(encoder, resize_strategy=resize, interpolation=2) for encoder in kept)
        return replace(
            self, encoders=kept, projector=chosen, token_strategy=token_strategy, pool=pool, image_transforms=chains
        )

    def _kept(self, names: Sequence[str] | None) -> tuple[EncoderConfig, ...]:
        wanted = [names] if isinstance(names, str) else list(names or ())
        known = {encoder.name: encoder for encoder in self.encoders}
        for name in wanted:
            if name not in known:
                raise ValueError(f"{self.name} has no encoder {name!r}; it has {', '.join(known)}")
        return tuple(encoder for encoder in self.encoders if not wanted or encoder.name in wanted)


def projector_widths(kind: str, in_channels: int, out_channels: int, pixel_shuffle: int = 1) -> list[int]:
    """Channels before, between and after the layers of a projector, one of `PROJECTORS`."""
    return {
        "pixel-shuffle-linear": [pixel_shuffle**2 * in_channels, out_channels],
        "linear": [in_channels, out_channels],
        "gelu-mlp": [in_channels, out_channels, out_channels],
        "fused-gelu-mlp": [in_channels, 4 * in_channels, out_channels, out_channels],
        "none": [in_channels],
    }[kind]
