"""What lies between a transformer block's matrix products, as Triton kernels.

Each rounds where PyTorch's operations round in the same place, so results differ in last bits alone: sums in float32,
stored in the tensors' dtype. All tensors are contiguous and on one device, which is the current one. To be imported
only where Triton is installed; ``TRITON_INTERPRET=1`` runs the kernels on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vla_perception.tokenizer.dependent_launches import launch_options

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # an older Triton compiles no kernel that names what it lacks, also where that is not called

    @triton.jit
    def gdc_wait():
        pass


#: Elements of a row per warp of `add_layer_norm`.
ELEMENTS_PER_WARP = 1024
#: Elements per program of `gelu`.
_GELU_BLOCK = 1024
#: Queries and keys that a program of `attention` holds at a time, warps, and stages of loads that run ahead.
ATTENTION_BLOCKS = (64, 64, 4, 3)


@triton.jit
def _add_layer_norm_kernel(
    values,
    delta,
    gamma,
    weight,
    bias,
    total,
    normal,
    epsilon,
    channels: tl.constexpr,
    has_delta: tl.constexpr,
    has_gamma: tl.constexpr,
    block: tl.constexpr,
    dependent: tl.constexpr,
):
    columns = tl.arange(0, block)
    inside = columns < channels
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if has_gamma:
        factor = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
    if dependent:  # all above are weights, which the kernel right in front of this one does not write
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * channels + columns
    row = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        step = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if has_gamma:
            step *= factor
        # Normalized is what the residual stream holds, rounded.
        rounded = (row + step).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        row = rounded.to(tl.float32)
    centred = tl.where(inside, row - tl.sum(row, 0) / channels, 0.0)
    variance = tl.sum(centred * centred, 0) / channels
    result = centred * (1.0 / tl.sqrt(variance + epsilon)) * scale + shift
    tl.store(normal + at, result.to(normal.dtype.element_ty), mask=inside)


def add_layer_norm(
    values: torch.Tensor,
    delta: torch.Tensor | None,
    gamma: torch.Tensor | None,
    norm: torch.nn.LayerNorm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``values + delta * gamma`` and its layer norm over the last dimension, [..., channels] each.

    Args:
        values, delta: [..., channels]; without `delta` the sum is `values`.
        gamma: [channels]; None for 1.
        norm: with weight and bias. Neither these nor `gamma` may be what the kernel right in front has written.
    """
    values = values.contiguous()
    channels = values.shape[-1]
    normal = torch.empty_like(values)
    total = values if delta is None else torch.empty_like(values)
    delta = values if delta is None else delta.contiguous()
    block = triton.next_power_of_2(channels)
    _add_layer_norm_kernel[(values.numel() // channels,)](
        values,
        delta,
        values if gamma is None else gamma,
        norm.weight,
        norm.bias,
        total,
        normal,
        norm.eps,
        channels,
        total is not values,
        gamma is not None,
        block,
        num_warps=max(1, min(8, block // ELEMENTS_PER_WARP)),
        **launch_options(),
    )
    return total, normal


@triton.jit
def gelu_of(x, tanh: tl.constexpr):
    """GELU of float32 values: by the error function, or its approximation by tanh (PaliGemma's and SmolVLM's SigLIP)."""
    if tanh:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(u) = 1 - 2 / (exp(2 u) + 1); the exponent overflows to infinity, which gives 1.
        x = x * 0.5 * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    else:
        x = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _gelu_kernel(values, result, length, tanh: tl.constexpr, block: tl.constexpr, dependent: tl.constexpr):
    if dependent:
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < length
    x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    x = gelu_of(x, tanh)
    tl.store(result + at, x.to(result.dtype.element_ty), mask=inside)


def gelu(values: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    """GELU, exact by the error function, or approximated by tanh."""
    values = values.contiguous()
    result = torch.empty_like(values)
    length = values.numel()
    grid = (triton.cdiv(length, _GELU_BLOCK),)
    _gelu_kernel[grid](values, result, length, tanh, _GELU_BLOCK, **launch_options())
    return result


@triton.jit
def _attention_kernel(
    projected,
    result,
    tokens,
    scale,
    heads: tl.constexpr,
    width: tl.constexpr,
    most: tl.constexpr,
    rest: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
    dependent: tl.constexpr,
):
    if dependent:
        gdc_wait()
    # FlashAttention's online softmax: one program holds `rows` queries of one head and goes through all keys. A head is
    # `most` channels, a power of 2, and what is left of it: 72 are 64 and 16, of which 8 are zeros, and not 128.
    head = tl.program_id(1) % heads
    stride: tl.constexpr = 3 * heads * width  # from one token to the next
    view = (tl.program_id(1) // heads).to(tl.int64) * tokens
    start = projected + view * stride + head * width
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    row_there = (row < tokens)[:, None]
    column = tl.arange(0, most)[None, :]
    query = tl.load(start + row[:, None] * stride + column, mask=row_there, other=0.0)
    summed = tl.zeros([rows, most], tl.float32)
    if rest:
        column_rest = most + tl.arange(0, rest)[None, :]
        in_width = column_rest < width
        query_rest = tl.load(start + row[:, None] * stride + column_rest, mask=row_there & in_width, other=0.0)
        summed_rest = tl.zeros([rows, rest], tl.float32)
    highest = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    for first in range(0, tokens, keys):
        other = first + tl.arange(0, keys)
        there = (other < tokens)[:, None]
        key_at = start + heads * width + other[:, None] * stride
        value_at = key_at + heads * width
        score = tl.dot(query, tl.trans(tl.load(key_at + column, mask=there, other=0.0)))
        if rest:
            key_rest = tl.load(key_at + column_rest, mask=there & in_width, other=0.0)
            score = tl.dot(query_rest, tl.trans(key_rest), score)
        score = tl.where((other < tokens)[None, :], score * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(highest - higher)
        value = tl.load(value_at + column, mask=there, other=0.0)
        rounded = share.to(value.dtype)
        summed = summed * fade[:, None] + tl.dot(rounded, value)
        if rest:
            value_rest = tl.load(value_at + column_rest, mask=there & in_width, other=0.0)
            summed_rest = summed_rest * fade[:, None] + tl.dot(rounded, value_rest)
        weight = weight * fade + tl.sum(share, 1)
        highest = higher
    out = result + (view + row[:, None]) * (heads * width) + head * width
    kind = result.dtype.element_ty
    tl.store(out + column, (summed / weight[:, None]).to(kind), mask=row_there)
    if rest:
        tl.store(out + column_rest, (summed_rest / weight[:, None]).to(kind), mask=row_there & in_width)


def attention(projected: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """Softmax attention of every token over all tokens of its view.

    Args:
        projected: [views, tokens, 3 · heads · width], float16 or bfloat16: queries, keys and values, of all heads each,
            as one linear layer gives them. width is 16 to 128.

    Returns:
        [views, tokens, heads · width].
    """
    projected = projected.contiguous()
    views, tokens, channels = projected.shape
    width = channels // (3 * heads)
    result = projected.new_empty(views, tokens, heads * width)
    rows, keys, warps, stages = ATTENTION_BLOCKS
    most = 1 << (width.bit_length() - 1)
    _attention_kernel[(triton.cdiv(tokens, rows), views * heads)](
        projected,
        result,
        tokens,
        scale * 1.4426950408889634,  # exp2 is what the hardware has
        heads,
        width,
        most,
        max(16, triton.next_power_of_2(width - most)) if width > most else 0,
        rows,
        keys,
        num_warps=warps,
        num_stages=stages,
        **launch_options(),
    )
    return result
