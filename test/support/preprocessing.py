"""What preprocessing is compared with: PIL and torchvision, composed as OpenVLA's processor composes them."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from vla_perception.fingerprint_inputs import (
    IMAGENET_MEAN,
    IMAGENET_MEAN_BF16,
    IMAGENET_STD,
    IMAGENET_STD_BF16,
)
from vla_perception.tokenizer.config import HALF, EncoderConfig

#: Images in test/data/image_transforms.npz.
IMAGES = ("astronaut", "coffee", "cat", "noise", "noise_enlarged", "noise_narrow", "noise_same")
SIZES = [(480, 640), (640, 480), (224, 224), (100, 37), (97, 223), (720, 1281), (225, 224), (31, 500), (1, 9)]
STATISTICS = [(IMAGENET_MEAN_BF16, IMAGENET_STD_BF16), (IMAGENET_MEAN, IMAGENET_STD), (HALF, HALF)]


def reference(image: np.ndarray, config: EncoderConfig) -> torch.Tensor:
    """PrismaticImageProcessor of openvla in torchvision's own operations on a PIL image."""
    image = Image.fromarray(image)
    side = config.image_size
    if config.resize_strategy == "letterbox":
        width, height = image.size
        longest = max(width, height)
        horizontal, vertical = int((longest - width) / 2), int((longest - height) / 2)
        fill = tuple(int(value * 255) for value in config.mean)
        image = functional.pad(image, [horizontal, vertical, horizontal, vertical], fill=fill)
    target = [side, side] if config.resize_strategy == "resize-naive" else side
    image = functional.resize(image, target, interpolation=functional.InterpolationMode.BICUBIC, antialias=True)
    image = functional.center_crop(image, [side, side])
    return functional.normalize(functional.to_tensor(image), config.mean, config.std)
