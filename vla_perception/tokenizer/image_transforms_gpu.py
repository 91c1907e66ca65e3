"""Steps of image_transforms.py on a GPU, with the same bits as there: those that are arithmetic alone, which have a `Step.size`.

``jpeg`` and ``center_crop_pil`` are done by libraries and stay on the host; ``rotate180`` and ``crop`` cost nothing there.
Needs Triton: PyTorch does not say whether it fuses a product with a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vla_perception.tokenizer import image_transform_kernels as kernels
from vla_perception.tokenizer.image_transforms import Step, crop_samples, lanczos3_taps
from vla_perception.tokenizer.preprocess_kernels import UNROLL

#: (uint8 source, table of views) → uint8 [views, size, size, 3].
Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class DeviceSteps:
    """A chain of steps for images of one size; `run` only launches kernels on the current stream.

    Args:
        steps: each with a `Step.size`.
        image_size: (height, width) of the images.
        places: of the images in the outputs of what follows.

    Attributes:
        image_size: what the last step makes of it.
        views: table for what `run` returns, int64 [views, VIEW_COLUMNS]; see `preprocess_kernels`.
    """

    def __init__(
        self, steps: Sequence[Step], image_size: tuple[int, int], places: Sequence[int], device: torch.device
    ) -> None:
        self._runs: list[tuple[Run, torch.Tensor]] = []
        for step in steps:
            make = {"lanczos3": _lanczos3, "center_crop_tf": _center_crop}[step.name]
            row = step.size * 3
            table = [(index * step.size * row, row, 3, 1, place) for index, place in enumerate(places)]
            self.views = torch.tensor(table, dtype=torch.int64, device="cpu").to(device)
            self._runs.append((make(image_size, step.size, device), self.views))
            image_size = (step.size, step.size)
        self.image_size = image_size

    def run(self, source: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Images as they lie in uint8 `source`, by the table `views` → uint8 [views, size, size, 3]."""
        for run, after in self._runs:
            source, views = run(source, views), after
        return source


def _lanczos3(image_size: tuple[int, int], size: int, device: torch.device) -> Run:
    taps: list[tuple[torch.Tensor, torch.Tensor]] = []
    for length in image_size:
        first, weights = lanczos3_taps(length, size)
        # Taps of weight 0 at the end: they add 0 to a sum.
        weights = np.pad(weights.T, ((0, -weights.shape[1] % UNROLL), (0, 0)))
        starts, values = torch.from_numpy(first.astype(np.int32)), torch.from_numpy(np.ascontiguousarray(weights))
        taps.append((starts.to(device), values.to(device)))
    return lambda source, views: kernels.lanczos3(source, views, image_size, taps[0], taps[1])


def _center_crop(image_size: tuple[int, int], size: int, device: torch.device) -> Run:
    samples = []
    for length in image_size:
        before, after, part = crop_samples(length, size)
        arrays = before.astype(np.int32), after.astype(np.int32), part
        samples.append(tuple(torch.from_numpy(array).to(device) for array in arrays))
    return lambda source, views: kernels.center_crop(source, views, *samples)
