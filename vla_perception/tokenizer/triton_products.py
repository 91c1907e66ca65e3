"""A linear layer, with GELU behind it or without, as one Triton kernel: where it beats cuBLAS and a kernel for GELU.

The blocks are larger than cuBLAS's for as few rows, so that the layer takes half of the device and leaves the other half
to the other encoder. To be imported only where Triton is installed; ``TRITON_INTERPRET=1`` runs it on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from vla_perception.tokenizer import triton_kernels

#: For each layer of a block (rows, columns and depth of a block, warps, stages of loads that run ahead); None for cuBLAS.
Blocks = tuple[int, int, int, int, int]
CUBLAS: dict[str, Blocks | None] = {"qkv": None, "proj": None, "fc1": None, "fc2": None}
#: Up to so many rows, tokens of all views, the first; above the second.
FEW_ROWS = 512
BLOCKS_OF_FEW_ROWS, BLOCKS_OF_MANY_ROWS = CUBLAS, CUBLAS
#: Of the rows, how many more may be computed because blocks are whole: DINOv2's 261 rows are 384 in blocks of 128.
MAX_WASTE = 0.125


@triton.jit
def _linear_kernel(
    values, weight, bias, result, rows, columns, depth,
    with_gelu: tl.constexpr, dependent: tl.constexpr,
    block_rows: tl.constexpr, block_columns: tl.constexpr, block_depth: tl.constexpr,
):  # fmt: skip
    # Programs that read the same weights are neighbours, and run at the same time.
    count = tl.cdiv(rows, block_rows)
    row = (tl.program_id(0) % count) * block_rows
    column = (tl.program_id(0) // count) * block_columns
    at = column + tl.arange(0, block_columns)
    shift = tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)
    if dependent:
        tl.extra.cuda.gdc_wait()
    summed = tl.zeros([block_rows, block_columns], tl.float32)
    for first in range(0, depth, block_depth):  # what lies outside is read as 0
        left = values.load([row, first])
        right = weight.load([column, first])
        summed = tl.dot(left, tl.trans(right), summed)
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    summed += shift[None, :]
    if with_gelu:
        summed = summed * 0.5 * (1.0 + tl.erf(summed * 0.7071067811865476))
    result.store([row, column], summed.to(bias.dtype.element_ty))


def linear(values: torch.Tensor, layer: torch.nn.Linear, name: str, gelu: bool = False) -> torch.Tensor:
    """[..., channels] → `layer` of it, [..., out_features]; with exact GELU behind it if wanted.

    Args:
        name: of the layer in its block, a key of the tables of blocks.
    """
    rows = values.numel() // values.shape[-1]
    blocks = (BLOCKS_OF_FEW_ROWS if rows <= FEW_ROWS else BLOCKS_OF_MANY_ROWS)[name]
    # Tensor cores would round float32; descriptors take rows of multiples of 16 bytes.
    odd = values.dtype == torch.float32 or layer.in_features % 8 or layer.out_features % 8
    if blocks is None or odd or -rows % blocks[0] > MAX_WASTE * rows:
        values = functional.linear(values, layer.weight, layer.bias)
        return triton_kernels.gelu(values) if gelu else values
    return product(values, layer.weight, layer.bias, blocks, gelu)


def product(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, blocks: Blocks, gelu: bool) -> torch.Tensor:
    """``values @ weight.T + bias`` in blocks, in float16 or bfloat16: summed, and GELU computed, in float32."""
    block_rows, block_columns, block_depth, warps, stages = blocks
    flat = values.contiguous().flatten(0, -2)
    (rows, depth), columns = flat.shape, weight.shape[0]
    result = flat.new_empty(rows, columns)
    grid = (triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns),)
    _linear_kernel[grid](
        TensorDescriptor.from_tensor(flat, [block_rows, block_depth]),
        TensorDescriptor.from_tensor(weight, [block_columns, block_depth]),
        bias, TensorDescriptor.from_tensor(result, [block_rows, block_columns]), rows, columns, depth, gelu,
        triton_kernels.dependent_launches(), block_rows, block_columns, block_depth,
        num_warps=warps, num_stages=stages, **triton_kernels.launch_options(),
    )  # fmt: skip
    return result.unflatten(0, values.shape[:-1])
