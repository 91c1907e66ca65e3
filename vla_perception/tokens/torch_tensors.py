"""torch tensors → arrays on the host, for `VisualTokens.from_torch` and the node; torch is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def queue_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host. From a GPU the copy goes to pinned memory and is only queued: wait for the current stream."""
    import torch

    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A boolean on their device, without waiting for it: whether they hold neither NaN nor infinity."""
    import torch

    # One pass over each; `isfinite` takes five and as many temporary tensors. NaN is the least and the largest of what it
    # is among (torch.aminmax).
    return torch.stack([bound for tensor in tensors for bound in torch.aminmax(tensor)]).isfinite().all()


def to_words(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of the host as an array of the same memory, where it is contiguous; bfloat16 as its uint16 words."""
    import torch

    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()
