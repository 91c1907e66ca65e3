"""The steps ``lanczos3`` and ``center_crop_tf`` of image_transforms.py as Triton kernels, with the same bits.

They are sums of float32 products, so the order of operations decides about bits: it is that of image_transforms.py, which is
TensorFlow's, and no product may be fused with the sum that follows (`_EXACT`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vla_perception.tokenizer.preprocess_kernels import UNROLL, VIEW_COLUMNS, jit

#: As Triton and ptxas call it: multiply, round, add, round.
_EXACT = {"enable_fp_fusion": False}
#: (rows, columns) of output that one program computes.
BLOCK = (4, 32)
_POINTERS = [
    "source",
    "views",
    "first",
    "weights",
    "between",
    "output",
    "left",
    "right",
    "across",
    "top",
    "bottom",
    "down",
]


@jit(["height", "width", "size", "taps"], _POINTERS[:5])
def _lanczos3_down(
    source,
    views,
    first,
    weights,
    between,
    height,
    width,
    size,
    taps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    VIEW: tl.constexpr,
):
    """Bytes at `source` → float32 `between` [views, 3, size, width]; the grid is (columns, rows, views)."""
    view = tl.program_id(2)
    begin = source + tl.load(views + view * VIEW)
    row_stride = tl.load(views + view * VIEW + 1).to(tl.int32)
    pixel_stride = tl.load(views + view * VIEW + 2)
    channel_stride = tl.load(views + view * VIEW + 3).to(tl.int32)
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (y < size) & (x < width)
    column = begin + x * pixel_stride
    source_y = tl.load(first + y, mask=y < size, other=0)
    red = tl.zeros((ROWS, COLUMNS), tl.float32)
    green = tl.zeros((ROWS, COLUMNS), tl.float32)
    blue = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin_tap in range(0, taps, STEP):
        for step in tl.static_range(STEP):
            tap = begin_tap + step
            weight = tl.load(weights + tap * size + y, mask=y < size, other=0.0)
            pixel = column + tl.minimum(source_y + tap, height - 1) * row_stride
            red += tl.load(pixel, mask=inside, other=0).to(tl.float32) * weight
            green += tl.load(pixel + channel_stride, mask=inside, other=0).to(tl.float32) * weight
            blue += tl.load(pixel + 2 * channel_stride, mask=inside, other=0).to(tl.float32) * weight
    plane = size * width
    at = between + view * 3 * plane + y * width + x
    tl.store(at, red, mask=inside)
    tl.store(at + plane, green, mask=inside)
    tl.store(at + 2 * plane, blue, mask=inside)


@jit(["width", "size", "taps"], _POINTERS[2:6])
def _lanczos3_across(
    between,
    first,
    weights,
    output,
    width,
    size,
    taps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """float32 `between` [views, 3, size, width] → uint8 `output` [views, size, size, 3]; grid (columns, rows, 3 × views)."""
    plane = tl.program_id(2)
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (y < size) & (x < size)
    row = between + plane * size * width + y * width
    source_x = tl.load(first + x, mask=x < size, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin_tap in range(0, taps, STEP):
        for step in tl.static_range(STEP):
            tap = begin_tap + step
            weight = tl.load(weights + tap * size + x, mask=x < size, other=0.0)
            total += tl.load(row + tl.minimum(source_x + tap, width - 1), mask=inside, other=0.0) * weight
    # 1.5 × 2²³ leaves no bit for fractions, so the sum is rounded to a whole number, half to even.
    level = tl.minimum(tl.maximum((total + 12582912.0) - 12582912.0, 0.0), 255.0)
    at = output + (plane // 3) * size * size * 3 + (y * size + x) * 3 + plane % 3
    tl.store(at, level.to(tl.int32).to(tl.uint8), mask=inside)


@jit(["size"], _POINTERS)
def _center_crop(
    source,
    views,
    left,
    right,
    across,
    top,
    bottom,
    down,
    output,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VIEW: tl.constexpr,
):
    """Bytes at `source` → uint8 `output` [views, size, size, 3]; the grid is (columns, rows, 3 × views)."""
    view = tl.program_id(2) // 3
    channel = tl.program_id(2) % 3
    row_stride = tl.load(views + view * VIEW + 1)
    pixel_stride = tl.load(views + view * VIEW + 2)
    begin = source + tl.load(views + view * VIEW) + channel * tl.load(views + view * VIEW + 3)
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (y < size) & (x < size)
    above = begin + tl.load(top + y, mask=y < size, other=0) * row_stride
    below = begin + tl.load(bottom + y, mask=y < size, other=0) * row_stride
    before = tl.load(left + x, mask=x < size, other=0) * pixel_stride
    after = tl.load(right + x, mask=x < size, other=0) * pixel_stride
    part_x = tl.load(across + x, mask=x < size, other=0.0)
    part_y = tl.load(down + y, mask=y < size, other=0.0)
    level = 0.00392156862745098  # 1 / 255
    corner = tl.load(above + before, mask=inside, other=0).to(tl.float32) * level
    upper = corner + (tl.load(above + after, mask=inside, other=0).to(tl.float32) * level - corner) * part_x
    corner = tl.load(below + before, mask=inside, other=0).to(tl.float32) * level
    lower = corner + (tl.load(below + after, mask=inside, other=0).to(tl.float32) * level - corner) * part_x
    mixed = upper + (lower - upper) * part_y
    value = tl.minimum(tl.maximum(mixed, 0.0), 1.0) * 255.5
    at = output + view * size * size * 3 + (y * size + x) * 3 + channel
    tl.store(at, value.to(tl.int32).to(tl.uint8), mask=inside)


def lanczos3(
    source: torch.Tensor,
    views: torch.Tensor,
    image_size: tuple[int, int],
    down: tuple[torch.Tensor, torch.Tensor],
    across: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Images of (height, width) as they lie in `source` → uint8 [views, size, size, 3].

    Args:
        views: as in `preprocess_kernels.along_rows`.
        down, across: int32 first row or column [size], float32 weights [taps, size], a multiple of `UNROLL` taps.
    """
    height, width = image_size
    size = len(down[0])
    between = torch.empty((len(views), 3, size, width), dtype=torch.float32, device=source.device)
    output = torch.empty((len(views), size, size, 3), dtype=torch.uint8, device=source.device)
    rows, columns = BLOCK
    grid = (triton.cdiv(width, columns), triton.cdiv(size, rows), len(views))
    _lanczos3_down[grid](
        source,
        views,
        *down,
        between,
        height,
        width,
        size,
        len(down[1]),
        ROWS=rows,
        COLUMNS=columns,
        STEP=UNROLL,
        VIEW=VIEW_COLUMNS,
        num_warps=4,
        **_EXACT,
    )
    grid = (triton.cdiv(size, columns), triton.cdiv(size, rows), 3 * len(views))
    _lanczos3_across[grid](
        between,
        *across,
        output,
        width,
        size,
        len(across[1]),
        ROWS=rows,
        COLUMNS=columns,
        STEP=UNROLL,
        num_warps=4,
        **_EXACT,
    )
    return output


def center_crop(
    source: torch.Tensor, views: torch.Tensor, down: tuple[torch.Tensor, ...], across: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Images as they lie in `source` → uint8 [views, size, size, 3].

    Args:
        down, across: int32 index before, int32 index after, float32 weight of the latter, [size] each.
    """
    size = len(down[0])
    output = torch.empty((len(views), size, size, 3), dtype=torch.uint8, device=source.device)
    rows, columns = BLOCK
    grid = (triton.cdiv(size, columns), triton.cdiv(size, rows), 3 * len(views))
    _center_crop[grid](
        source,
        views,
        *across,
        *down,
        output,
        size,
        ROWS=rows,
        COLUMNS=columns,
        VIEW=VIEW_COLUMNS,
        num_warps=4,
        **_EXACT,
    )
    return output
