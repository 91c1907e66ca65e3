"""PIL's resize and the normalization as two Triton kernels, bit-identical to `preprocess`.

PIL resizes 8-bit images in exact integer arithmetic (``Resample.c``): a pass along the rows and one along the columns, each
rounded and clipped to 8 bits. Each is one kernel here. The first reads the camera's bytes as they lie and pads for
``letterbox``; the second looks up the normalized values and writes them where the encoders read them. Between them lie
[views, 3, rows, side] bytes. Written for `device_preprocess`, which has the same sums in PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

_SIZES = ["height", "width", "top", "left", "rows_first", "rows", "side", "taps", "fill_r", "fill_g", "fill_b"]
#: Taps are padded to a multiple of this with weights of 0; that many loads are under way at a time.
UNROLL = 4
#: Columns of the table of views: where its image begins, bytes to the next row, pixel and channel, and its place in the
#: outputs.
VIEW_COLUMNS = 5
#: (rows, columns) of output that one program computes in either pass.
BLOCK_ALONG_ROWS, BLOCK_ALONG_COLUMNS = (4, 32), (4, 64)


def jit(sizes: list[str], pointers: list[str]) -> Callable[[Callable], Any]:
    """`triton.jit` of one variant for all sizes: compiling takes a second, and must not happen when another camera comes."""
    options = {"do_not_specialize": sizes, "do_not_specialize_on_alignment": pointers}
    # Without the second, which Triton 3.2 brought, there is a variant for the alignment of PyTorch's memory.
    known = inspect.signature(triton.jit).parameters
    return triton.jit(**{name: names for name, names in options.items() if name in known})


@jit(_SIZES, ["source", "views", "first", "weights", "output"])
def _along_rows(
    source,
    views,
    first,
    weights,
    output,
    height,
    width,
    top,
    left,
    rows_first,
    rows,
    side,
    taps,
    fill_r,
    fill_g,
    fill_b,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    VIEW: tl.constexpr,
):
    """Bytes at `source` → uint8 `output` [views, 3, rows, side]; the grid is (columns, rows, views)."""
    view = tl.program_id(2)
    offset = tl.load(views + view * VIEW)
    row_stride = tl.load(views + view * VIEW + 1)
    pixel_stride = tl.load(views + view * VIEW + 2).to(tl.int32)
    channel_stride = tl.load(views + view * VIEW + 3).to(tl.int32)
    # Of two dimensions from the start: a vector that is loaded and then broadcast goes through shared memory.
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    source_y = y + rows_first - top
    row_inside = (y < rows) & (source_y >= 0) & (source_y < height)
    line = source + offset + source_y * row_stride
    source_x = tl.load(first + x, mask=x < side, other=0) - left
    red = tl.full((ROWS, COLUMNS), 1 << 21, tl.int32)
    green = tl.full((ROWS, COLUMNS), 1 << 21, tl.int32)
    blue = tl.full((ROWS, COLUMNS), 1 << 21, tl.int32)
    for begin in range(0, taps, STEP):
        for step in tl.static_range(STEP):
            tap = begin + step
            weight = tl.load(weights + tap * side + x, mask=x < side, other=0)
            column = source_x + tap
            inside = row_inside & (column >= 0) & (column < width)
            pixel = line + column * pixel_stride
            red += tl.load(pixel, mask=inside, other=fill_r).to(tl.int32) * weight
            green += tl.load(pixel + channel_stride, mask=inside, other=fill_g).to(tl.int32) * weight
            blue += tl.load(pixel + 2 * channel_stride, mask=inside, other=fill_b).to(tl.int32) * weight
    plane = rows * side
    at = output + view * 3 * plane + y * side + x
    written = (y < rows) & (x < side)
    tl.store(at, tl.minimum(tl.maximum(red >> 22, 0), 255).to(tl.uint8), mask=written)
    tl.store(at + plane, tl.minimum(tl.maximum(green >> 22, 0), 255).to(tl.uint8), mask=written)
    tl.store(at + 2 * plane, tl.minimum(tl.maximum(blue >> 22, 0), 255).to(tl.uint8), mask=written)


@jit(
    ["rows_first", "rows", "side", "taps"],
    ["between", "views", "first", "weights", "table0", "output0", "table1", "output1"],
)
def _along_columns(
    between,
    views,
    first,
    weights,
    table0,
    output0,
    table1,
    output1,
    rows_first,
    rows,
    side,
    taps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    VIEW: tl.constexpr,
    BOTH: tl.constexpr,
):
    """uint8 `between` [views, 3, rows, side] → values of the tables in the outputs, [views, 3, side, side].

    The grid is (columns, rows, 3 × views).
    """
    plane = tl.program_id(2)
    channel = plane % 3
    place = tl.load(views + (plane // 3) * VIEW + 4)
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    source_y = tl.load(first + y, mask=y < side, other=0) - rows_first
    inside = (y < side) & (x < side)
    source = between + plane * rows * side + x
    total = tl.full((ROWS, COLUMNS), 1 << 21, tl.int32)
    for begin in range(0, taps, STEP):
        for step in tl.static_range(STEP):
            tap = begin + step
            weight = tl.load(weights + tap * side + y, mask=y < side, other=0)
            # What lies behind the last row has weight 0.
            row = tl.minimum(source_y + tap, rows - 1)
            total += tl.load(source + row * side, mask=inside, other=0).to(tl.int32) * weight
    level = tl.minimum(tl.maximum(total >> 22, 0), 255) + channel * 256
    at = (place * 3 + channel) * side * side + y * side + x
    tl.store(output0 + at, tl.load(table0 + level), mask=inside)
    if BOTH:
        tl.store(output1 + at, tl.load(table1 + level), mask=inside)


def along_rows(
    source: torch.Tensor,
    views: torch.Tensor,
    taps: tuple[torch.Tensor, torch.Tensor],
    size: tuple[int, int],
    padding: tuple[int, int],
    fill: tuple[int, int, int],
    rows: tuple[int, int],
) -> torch.Tensor:
    """Bytes as cameras send them → uint8 [views, 3, rows, side] planes, resized along the rows.

    Args:
        source: uint8 [bytes].
        views: int64 [views, VIEW_COLUMNS]; all images are of one size.
        taps: int32 first source column of every output column [side], in the padded image, and weights [taps, side].
        size: (height, width) of the images.
        padding: rows above, columns left of them in the padded image.
        fill: RGB of the padding.
        rows: (first, number) of the padded image's rows that the second pass reads.
    """
    first, weights = taps
    side = len(first)
    output = torch.empty((len(views), 3, rows[1], side), dtype=torch.uint8, device=source.device)
    block_rows, columns = BLOCK_ALONG_ROWS
    grid = (triton.cdiv(side, columns), triton.cdiv(rows[1], block_rows), len(views))
    _along_rows[grid](
        source,
        views,
        first,
        weights,
        output,
        *size,
        *padding,
        *rows,
        side,
        len(weights),
        *fill,
        ROWS=block_rows,
        COLUMNS=columns,
        STEP=UNROLL,
        VIEW=VIEW_COLUMNS,
        num_warps=4,
    )
    return output


def along_columns(
    between: torch.Tensor,
    views: torch.Tensor,
    taps: tuple[torch.Tensor, torch.Tensor],
    rows_first: int,
    tables: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> None:
    """What `along_rows` gave → normalized values in `outputs`, contiguous [all views, 3, side, side].

    Args:
        taps: int32 first source row of every output row [side], in the padded image, and weights [taps, side].
        rows_first: the padded image's row that `between` begins with.
        tables: [3, 256] per output and of its dtype; encoders that share a resize are written at once, two by two.
    """
    first, weights = taps
    side = len(first)
    block_rows, columns = BLOCK_ALONG_COLUMNS
    grid = (triton.cdiv(side, columns), triton.cdiv(side, block_rows), 3 * len(views))
    for index in range(0, len(outputs), 2):
        pair = list(zip(tables, outputs))[index : index + 2]
        (table0, output0), (table1, output1) = pair[0], pair[-1]
        _along_columns[grid](
            between,
            views,
            first,
            weights,
            table0,
            output0,
            table1,
            output1,
            rows_first,
            between.shape[2],
            side,
            len(weights),
            ROWS=block_rows,
            COLUMNS=columns,
            STEP=UNROLL,
            VIEW=VIEW_COLUMNS,
            BOTH=len(pair) == 2,
            num_warps=4,
        )
