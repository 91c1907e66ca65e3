"""Views that the policy expects and the robot has no camera for: `none` among `cameras`.

LeRobot and openpi give such a view an image of -1 and mask it. Its tokens do not change, so they are computed once, and
take the view's place in every message, where `valid` is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vla_perception.options import NO_CAMERA
from vla_perception.tokens.view import View

if TYPE_CHECKING:
    import torch

    from vla_perception.tokenizer.tokenizer import TokenizerOutput, VisualTokenizer


class EmptyViews:
    """Puts what stands for missing cameras among the tokens and the views of those that are there.

    Args:
        cameras: as configured, in the order of the views.
    """

    def __init__(self, tokenizer: VisualTokenizer, cameras: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._places = [index for index, camera in enumerate(cameras) if camera == NO_CAMERA]
        self._computed: TokenizerOutput | None = None

    def add_tokens(self, output: TokenizerOutput) -> list[torch.Tensor]:
        """Tokens of all views, and features where `output` has them: [views, tokens, channels] each."""
        parts = [part for part in (output.tokens, output.features) if part is not None]
        if not self._places:
            return parts
        empty = self._computed
        if empty is None or empty.condition != output.condition or (empty.features is None and len(parts) > 1):
            empty = self._computed = self._tokenizer.encode_empty(features=len(parts) > 1)
            if empty.condition != output.condition:
                raise ValueError("the condition changed while a frame set was encoded")
        return [self._inserted(part, own) for part, own in zip(parts, (empty.tokens, empty.features))]

    def _inserted(self, part: torch.Tensor, empty: torch.Tensor | None) -> torch.Tensor:
        import torch

        assert empty is not None, "computed with the features"
        rows = list(part.split(1))
        for place in self._places:
            rows.insert(place, empty)
        return torch.cat(rows)

    def add_views(self, views: Sequence[View]) -> list[View]:
        """The views of all tokens; those of missing cameras have the first one's stamp, and are not valid."""
        result = list(views)
        if not self._places:
            return result
        side, (rows, columns) = self._tokenizer.config.encoders[0].image_size, self._tokenizer.grid
        for number, place in enumerate(self._places, start=1):
            result.insert(
                place,
                View(
                    camera=NO_CAMERA if number == 1 else f"{NO_CAMERA}_{number}",
                    frame_id="",
                    stamp_ns=views[0].stamp_ns,
                    height=side,
                    width=side,
                    affine=(columns / side, 0.0, 0.0, 0.0, rows / side, 0.0),
                    valid=False,
                ),
            )
        return result
