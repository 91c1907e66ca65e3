"""`LocalTokenizer`: visual tokens computed in the policy's own process; `tokenize`: those of one image per camera.

Needs torch and the tokenizer (`vla_perception.tokenizer`), and no ROS.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vla_perception.tokens.buffer import TokenBuffer
from vla_perception.tokens.torch_tensors import all_finite
from vla_perception.tokens.view import View
from vla_perception.tokens.visual_tokens import VisualTokens

if TYPE_CHECKING:
    import numpy as np

    from vla_perception.tokenizer import VisualTokenizer


class LocalTokenizer(TokenBuffer):
    """Visual tokens computed in this process, read like those of a `TokenSubscriber`.

    A policy can so begin with the tokenizer inside, and move it to a node by changing the one line that makes its
    source of tokens.

    Args:
        tokenizer: a `VisualTokenizer`.
        capture: gives the latest image of every camera, ``{"front": uint8 [height, width, 3] RGB, …}``, in the order
            in which tokens are wanted. `wait` and `request` call it and encode what it gives.
        token_dtype: of the tokens; the tokenizer's compute dtype where not given.
        features: keep what went into the projector, too.
        callback: called with every message, by the thread that encodes it.
        history, expect_fingerprint: as for `TokenBuffer`.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        capture: Callable[[], Mapping[str, np.ndarray]] | None = None,
        *,
        token_dtype: str | None = None,
        features: bool = False,
        callback: Callable[[VisualTokens], None] | None = None,
        history: int = 1,
        expect_fingerprint: str | Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(history, expect_fingerprint)
        self._tokenizer = tokenizer
        self._capture = capture
        self._dtype = token_dtype
        self._features = features
        self._callback = callback
        self._encoding = threading.Lock()
        self._sequence = 0

    def set_condition(self, vector: np.ndarray | Sequence[float], name: str = "") -> str:
        """As `TokenSubscriber.set_condition`, for the tokenizer of this process."""
        digest = self._tokenizer.set_condition(vector)
        self.expect_condition(digest)
        return digest

    def encode(self, images: Mapping[str, np.ndarray], stamp_ns: int | None = None) -> VisualTokens:
        """Encodes one image per camera and makes the result the latest message. Raises like `latest`."""
        with self._encoding:
            self._raise_if_closed()
            tokens = tokenize(
                self._tokenizer,
                images,
                stamp_ns=stamp_ns,
                sequence=self._sequence,
                token_dtype=self._dtype,
                features=self._features,
            )
            self._sequence += 1
            if self.push(tokens) is None:
                self._raise_if_rejected()
        if self._callback is not None:
            self._callback(tokens)
        return tokens

    def wait(self, timeout_sec: float | None = None) -> VisualTokens:
        """Captures and encodes; without `capture`, waits for another thread's `encode`."""
        return super().wait(timeout_sec) if self._capture is None else self.encode(self._capture())

    def request(self, timeout_sec: float = 5.0) -> VisualTokens:
        """Captures and encodes."""
        return self.wait(timeout_sec)


def tokenize(
    tokenizer: VisualTokenizer,
    images: Mapping[str, np.ndarray],
    *,
    stamp_ns: int | None = None,
    sequence: int = 0,
    token_dtype: str | None = None,
    features: bool = False,
) -> VisualTokens:
    """The same `VisualTokens` that the node would publish for these images.

    Args:
        images: camera → uint8 [height, width, 3] RGB, in the order in which views are wanted.
        stamp_ns: when they were taken, nanoseconds since the epoch; now, where not given.
        token_dtype: of the tokens; the tokenizer's compute dtype where not given.

    Raises:
        TokenFormatError: NaN or infinity came out, as with a dtype that is too narrow for the model.
    """
    import torch

    stamp_ns = time.time_ns() if stamp_ns is None else stamp_ns
    views = [_view(tokenizer, camera, image, stamp_ns) for camera, image in images.items()]
    output = tokenizer(list(images.values()), features=features, cameras=list(images))
    dtype = getattr(torch, token_dtype) if token_dtype else output.tokens.dtype
    parts = [part.to(dtype) for part in (output.tokens, output.features) if part is not None]
    # A GPU is faster at it; which view is at fault is only asked where one is.
    finite = all_finite(parts) if parts[0].is_cuda else None
    tokens = VisualTokens.from_torch(
        parts[0],
        sequence=sequence,
        views=views,
        features=parts[1] if features else None,
        condition=output.condition,
        **tokenizer.metadata(),
    )
    if finite is None or not finite:
        tokens.check_finite()
    return tokens


def _view(tokenizer: VisualTokenizer, camera: str, image: np.ndarray, stamp_ns: int) -> View:
    height, width = image.shape[:2]
    return View(
        camera=camera,
        frame_id=camera,
        stamp_ns=stamp_ns,
        height=height,
        width=width,
        affine=tokenizer.affine(height, width, camera),
        roi=tokenizer.roi(height, width, camera),
    )
