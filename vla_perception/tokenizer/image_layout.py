"""How the bytes of an image lie in memory, so that they can be sent to a device as they are.

A camera's image reaches `preprocess` as a NumPy view: channels reversed (bgr8), a channel left out (bgra8), one channel
three times (mono8), rows padded (`step`), upside down (``rotate180``), a part of a larger image (``crop``).
Rearranging those bytes costs NumPy some 1 ms for 640 × 480 and 10 ms for 1920 × 1080; copying the memory under the view costs
hundredths, and a device reads any strides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: (Bytes from pixel to pixel, from channel to channel) → `sensor_msgs`' name for it.
_ENCODINGS = {(3, 1): "rgb8", (3, -1): "bgr8", (4, 1): "rgba8", (4, -1): "bgra8", (1, 0): "mono8"}
#: Bytes sent per byte needed, up to which the gaps between rows (padding, what `crop` cut off) are sent along.
_MAX_GAPS = 1.5


class Layout(NamedTuple):
    """Where the sample (row, column, channel) of an RGB image lies: ``offset + row * strides[0] + …``.

    Attributes:
        height, width: of the image, in pixels.
        offset: byte of the first sample of the image within the memory that is sent.
        strides: bytes to the next row, column and channel; negative where they run backwards, 0 where all channels are one.
        nbytes: length of the memory that is sent.
    """

    height: int
    width: int
    offset: int
    strides: tuple[int, int, int]
    nbytes: int

    @property
    def kind(self) -> str:
        """``1280x720 bgr8``, for people; what decoding a JPEG gives is named alike."""
        _, pixel, channel = self.strides
        encoding = _ENCODINGS.get((abs(pixel), channel), f"with strides {self.strides}")
        return f"{self.width}x{self.height} {encoding}"


def memory_of(image: np.ndarray) -> tuple[Layout, np.ndarray]:
    """uint8 [height, width, 3] → its layout, and the memory to be sent: uint8 [bytes], or [rows, bytes of a row].

    The second is a view wherever the image fills the memory that it spans well enough, with gaps between rows at most;
    otherwise a copy, [height, width, 3] in order.
    """
    height, width, _ = image.shape
    flips = tuple(-1 if stride < 0 else 1 for stride in image.strides)
    forward = image[:: flips[0], :: flips[1], :: flips[2]]
    row, pixel, channel = forward.strides
    spans = [step * (count - 1) for step, count in zip(forward.strides, forward.shape)]
    nbytes = sum(spans) + 1
    row_bytes = spans[1] + spans[2] + 1
    samples = height * width * (3 if channel else 1)
    if nbytes <= _MAX_GAPS * samples:  # as it is, whatever comes first in memory: rows, columns or channels
        memory = np.lib.stride_tricks.as_strided(forward, (nbytes,), (1,))
    elif row_bytes <= _MAX_GAPS * width * (3 if channel else 1) and row >= row_bytes:  # without the gaps between rows
        memory = np.lib.stride_tricks.as_strided(forward, (height, row_bytes), (row, 1))
        row, spans[0], nbytes = row_bytes, row_bytes * (height - 1), row_bytes * height
    else:
        memory = np.empty((height, width, 3), np.uint8)
        for index in range(3):  # channel by channel NumPy is several times as fast
            memory[:, :, index] = image[:, :, index]
        return Layout(height, width, 0, (3 * width, 3, 1), memory.size), memory.reshape(-1)
    strides = (row * flips[0], pixel * flips[1], channel * flips[2])
    offset = sum(span for span, flip in zip(spans, flips) if flip < 0)
    return Layout(height, width, offset, strides, nbytes), memory
