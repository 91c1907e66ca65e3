"""Prepared images of a frame set → the message with their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vla_perception.tokens import View, VisualTokens
from vla_perception.tokens.torch_tensors import all_finite, queue_to_host

if TYPE_CHECKING:
    import torch

    from vla_perception.nodes.visual_tokenizer.empty_views import EmptyViews
    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokenizer.preprocess_gpu import UploadedImages


def encode(
    prepared: UploadedImages | Sequence[torch.Tensor],
    views: Sequence[View],
    tokenizer: VisualTokenizer,
    empty_views: EmptyViews,
    *,
    dtype: str,
    features: bool,
    sequence: int,
    when_queued: Callable[[], None],
) -> VisualTokens | None:
    """The message, its tensors on the host; None if they are not all finite.

    Args:
        prepared: what `VisualTokenizer.prepare` made of the views' images.
        views: those of cameras that have an image.
        empty_views: those of the others.
        dtype: of the message's tensors.
        features: whether it carries features, too.
        sequence: its number.
        when_queued: called when a GPU has all of its work, and this thread is about to wait for it.
    """
    import torch

    output = tokenizer.encode(prepared, features=features)
    parts = [part.to(getattr(torch, dtype)) for part in empty_views.add_tokens(output)]
    # All is queued, and what is not the device's is done, before the one wait for it; copies go to pinned memory.
    finite, *on_host = [queue_to_host(part) for part in (all_finite(parts), *parts)]
    message = VisualTokens.from_torch(
        on_host[0],
        sequence=sequence,
        views=empty_views.add_views(views),
        features=on_host[1] if len(on_host) > 1 else None,
        condition=output.condition,
        **tokenizer.metadata(),
    )
    message.to_parts()  # keeps the header that it makes
    if parts[0].is_cuda:
        when_queued()
        torch.cuda.current_stream(parts[0].device).synchronize()
    return message if finite else None
