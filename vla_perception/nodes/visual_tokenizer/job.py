"""What the pipeline's threads hand on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vla_perception.nodes.visual_tokenizer.encode_request import Request
from vla_perception.synchronizer import FrameSet
from vla_perception.tokens import View, VisualTokens

if TYPE_CHECKING:
    import torch

    from vla_perception.tokenizer.preprocess_gpu import UploadedImages


@dataclass(eq=False)
class Job:
    """A frame set on its way through the threads. Times are seconds of the performance counter."""

    frames: FrameSet
    request: Request | None
    generation: int
    arrived: float  # when its last frame did, or when it was asked for
    views: list[View] = field(default_factory=list)
    prepared: UploadedImages | list[torch.Tensor] | None = None
    message: VisualTokens | None = None  # with the number that it has if nothing else is published before
    tokenizing: float = 0.0  # what preprocess and encode took
