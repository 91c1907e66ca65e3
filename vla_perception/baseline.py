"""The baseline: tokens as OpenVLA's own code computes them, to compare with in speed and in values.

PIL and torchvision prepare the image once for every encoder, both timm towers run with all their blocks, one after the
other, operation by operation, and the projector follows. It has the weights of a tokenizer and gets the same images. The
towers' last blocks, whose results are not used, are in no tokenizer: the baseline's get random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torchvision.transforms import functional as transforms

from vla_perception.tokenizer import VisualTokenizer
from vla_perception.tokenizer.config import EncoderConfig
from vla_perception.tokenizer.fused_blocks import patches_as_products
from vla_perception.tokenizer.preprocess import letterbox_padding
from vla_perception.tokenizer.projector import Projector
from vla_perception.tokenizer.weights import random_weight

#: Relative L2 distance of tokens from the baseline in float32 that rounding accounts for (docs/performance.md).
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "float8": 1.4e-1}
#: The lowest cosine of a token with its own in float32, where that has a bound, too.
LOWEST_COSINES = {"float8": 0.99}

#: Called with the name of a stage as it ends.
Mark = Callable[[str], None]


class ReferenceModel:
    """The baseline, with the weights of `tokenizer`, which must not have run yet: running may repack them.

    Args:
        exact: keep cuDNN from computing float32 convolutions in TF32, as it does unless configured otherwise.

    Raises:
        ValueError: a model that OpenVLA's code does not compute: π0's, SmolVLA's, and those with FiLM.
    """

    def __init__(self, tokenizer: VisualTokenizer, dtype: torch.dtype, exact: bool = False) -> None:
        config, network = tokenizer.config, tokenizer.network
        if any((encoder.layer, encoder.final_norm, encoder.film) != (-2, False, 0) for encoder in config.encoders):
            raise ValueError(
                f"there is no baseline for {tokenizer.model}: the baseline is OpenVLA's own code, which takes the "
                "second-to-last block of each encoder, without FiLM; measure openvla-7b or another model of Prismatic's"
            )
        self._device, self._dtype = tokenizer.device, dtype
        self._encoders = config.encoders
        with torch.device("meta"):
            self._projector = Projector(config.projector, tokenizer.feature_channels, config.output_channels)
        self._projector.load_state_dict(self._cast(network.projector.state_dict()), assign=True)
        self._towers: list[Any] = []  # timm's, whose attributes nn.Module's type does not know
        for encoder, own in zip(config.encoders, network.towers):
            name = encoder.timm_id.split(".")[0]
            with torch.device("meta"):
                overrides: dict[str, Any] = dict(encoder.overrides)
                tower = timm.create_model(
                    name, pretrained=False, num_classes=0, img_size=encoder.image_size, **overrides
                ).eval()
            weights = own.vit.state_dict()
            for missing in tower.state_dict().keys() - weights.keys():
                weights[missing] = random_weight(missing, tuple(tower.state_dict()[missing].shape), seed=1)
            tower.load_state_dict(self._cast(weights), assign=True)
            if exact:
                patches_as_products(tower)
            self._towers.append(tower)

    def preprocess(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """``PrismaticImageProcessor`` of openvla → per encoder float32 [views, 3, side, side] on the device."""
        pixel_values: list[list[torch.Tensor]] = [[] for _ in self._encoders]
        for image in map(Image.fromarray, images):
            for config, values in zip(self._encoders, pixel_values):
                values.append(_torchvision_pixels(image, config))
        return [torch.stack(values).to(self._device) for values in pixel_values]

    @torch.inference_mode()
    def encode(self, pixel_values: Sequence[torch.Tensor], mark: Mark = lambda stage: None) -> torch.Tensor:
        """→ tokens [views, tokens, channels]; calls `mark` with the name of each stage as it ends."""
        parts = []
        for config, tower, pixels in zip(self._encoders, self._towers, pixel_values):
            wanted = len(tower.blocks) - 2
            parts += tower.get_intermediate_layers(pixels.to(self._device, self._dtype), n={wanted})
            mark(config.name)
        tokens = self._projector(torch.cat(parts, dim=2))
        mark("project")
        return tokens

    def _cast(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self._device, self._dtype) for name, value in weights.items()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Relative L2 over everything, and the lowest cosine of any token."""
    cosines = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    return float((found - expected).norm() / expected.norm()), float(cosines.min())


def _torchvision_pixels(image: Image.Image, config: EncoderConfig) -> torch.Tensor:
    side = config.image_size
    if config.resize_strategy == "letterbox":
        top, left = letterbox_padding(image.height, image.width)
        image = transforms.pad(image, [left, top, left, top], fill=config.fill)
    target = [side, side] if config.resize_strategy == "resize-naive" else side
    image = transforms.resize(image, target, interpolation=config.interpolation, antialias=True)
    image = transforms.center_crop(image, [side, side])
    return transforms.normalize(transforms.to_tensor(image), config.mean, config.std)
