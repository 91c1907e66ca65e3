"""A frame set's messages → images and views."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_perception import kept_threads
from vla_perception.synchronizer import Frame, FrameSet
from vla_perception.tokens import View

if TYPE_CHECKING:
    from vla_perception.tokenizer import VisualTokenizer


class FrameDecoder:
    """Decodes the images of a frame set; several JPEG or PNG images side by side.

    Args:
        decode: an image message, and the most pixels that it may have → uint8 RGB [height, width, 3]; ValueError where
            it is not a readable image. Called by several threads.
        tokenizer: what the images are for.
        cameras: how many there are.
    """

    def __init__(self, decode: Callable[[Any, int], np.ndarray], tokenizer: VisualTokenizer, cameras: int) -> None:
        self._decode, self._tokenizer = decode, tokenizer
        self._threads = kept_threads.start("decoder", max(1, cameras - 1))

    def decode(self, frames: FrameSet, max_pixels: int) -> tuple[list[np.ndarray], list[View], dict[Frame, str]]:
        """Images and views of the frames that can be used, and of the others why they cannot."""
        calls: list[Callable[[], np.ndarray]] = [partial(self._decode, frame.image, max_pixels) for frame in frames]
        # Those of CompressedImage have a format. Other images are views of the message, which take no time.
        compressed = [index for index, frame in enumerate(frames) if hasattr(frame.image, "format")]
        # This thread decodes one of them: it would only wait meanwhile.
        for index in compressed[1:]:
            calls[index] = self._threads.submit(calls[index]).result
        images, views, reasons = [], [], {}
        for frame, call in zip(frames, calls):
            try:
                image = call()
                views.append(self._view(frame, image))
                images.append(image)
            except Exception as error:
                reasons[frame] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return images, views, reasons

    def _view(self, frame: Frame, image: np.ndarray) -> View:
        """ValueError where an image of this size cannot be transformed."""
        height, width = image.shape[:2]
        return View(
            camera=frame.camera,
            frame_id=frame.image.header.frame_id,
            stamp_ns=frame.stamp_ns,
            height=height,
            width=width,
            affine=self._tokenizer.affine(height, width, frame.camera),
            roi=self._tokenizer.roi(height, width, frame.camera),
        )

    def close(self) -> None:
        """Ends the threads when they have done what they were given, without waiting for that."""
        self._threads.shutdown(wait=False)
