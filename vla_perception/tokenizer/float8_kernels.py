"""What quantizes activations to float8 (e4m3), as Triton kernels: each row of channels by a separate scale.

One program computes one row, so a row's largest value is known where its values are. Sums are in float32, and what
float8 is made of has not been rounded before. Conditions as in triton_kernels.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vla_perception.tokenizer.triton_kernels import gelu_of

#: e4m3, whose largest value is 448. Without negative zeros and infinities, as NVIDIA's tensor cores have it.
FLOAT8 = torch.float8_e4m3fn
#: Elements of a row per warp.
_ELEMENTS_PER_WARP = 512


class Quantized(NamedTuple):
    """Rows of float8 and what each is to be multiplied by.

    Attributes:
        values: [rows, channels], float8.
        scales: [rows, 1], float32.
    """

    values: torch.Tensor
    scales: torch.Tensor


@triton.jit
def _store_quantized(row, at, inside, quantized, scales):
    # Never 0 / 0. NaN and infinity stay visible: the quotients are NaN, or the scale is infinite.
    largest = tl.maximum(tl.max(tl.abs(row), 0), 1e-30)
    tl.store(quantized + at, (row * (448.0 / largest)).to(quantized.dtype.element_ty), mask=inside)
    tl.store(scales + tl.program_id(0), largest / 448.0)


@triton.jit
def _add_layer_norm_kernel(
    values,
    delta,
    gamma,
    weight,
    bias,
    total,
    quantized,
    scales,
    epsilon,
    channels: tl.constexpr,
    has_delta: tl.constexpr,
    has_gamma: tl.constexpr,
    block: tl.constexpr,
):
    columns = tl.arange(0, block)
    inside = columns < channels
    at = tl.program_id(0).to(tl.int64) * channels + columns
    row = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        step = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if has_gamma:
            step *= tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
        # Normalized is what the residual stream holds, rounded.
        rounded = (row + step).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        row = rounded.to(tl.float32)
    centred = tl.where(inside, row - tl.sum(row, 0) / channels, 0.0)
    variance = tl.sum(centred * centred, 0) / channels
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    normal = centred * (1.0 / tl.sqrt(variance + epsilon)) * scale + shift
    _store_quantized(normal, at, inside, quantized, scales)


@triton.jit
def _quantize_kernel(
    values, quantized, scales, channels: tl.constexpr, gelu: tl.constexpr, tanh: tl.constexpr, block: tl.constexpr
):
    columns = tl.arange(0, block)
    inside = columns < channels
    at = tl.program_id(0).to(tl.int64) * channels + columns
    row = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if gelu:
        row = gelu_of(row, tanh)
    _store_quantized(row, at, inside, quantized, scales)


def add_layer_norm(
    values: torch.Tensor,
    delta: torch.Tensor | None,
    gamma: torch.Tensor | None,
    norm: torch.nn.LayerNorm,
) -> tuple[torch.Tensor, Quantized]:
    """``values + delta * gamma``, and its layer norm quantized; arguments as `triton_kernels.add_layer_norm` has them."""
    values = values.contiguous()
    channels = values.shape[-1]
    normal = _empty(values)
    total = values if delta is None else torch.empty_like(values)
    delta = values if delta is None else delta.contiguous()
    block, warps = _sizes(channels)
    _add_layer_norm_kernel[(len(normal.scales),)](
        values,
        delta,
        values if gamma is None else gamma,
        norm.weight,
        norm.bias,
        total,
        *normal,
        norm.eps,
        channels,
        total is not values,
        gamma is not None,
        block,
        num_warps=warps,
    )
    return total, normal


def quantize(values: torch.Tensor) -> Quantized:
    """Rows as they are: [..., channels] → [rows, channels]."""
    return _quantize(values, gelu=False)


def gelu(values: torch.Tensor, tanh: bool = False) -> Quantized:
    """GELU, exact by the error function or approximated by tanh: [..., channels] → [rows, channels]."""
    return _quantize(values, gelu=True, tanh=tanh)


def _quantize(values: torch.Tensor, gelu: bool, tanh: bool = False) -> Quantized:
    values = values.contiguous()
    channels = values.shape[-1]
    result = _empty(values)
    block, warps = _sizes(channels)
    _quantize_kernel[(len(result.scales),)](values, *result, channels, gelu, tanh, block, num_warps=warps)
    return result


def _empty(values: torch.Tensor) -> Quantized:
    rows, channels = values.numel() // values.shape[-1], values.shape[-1]
    return Quantized(values.new_empty(rows, channels, dtype=FLOAT8), values.new_empty(rows, 1, dtype=torch.float32))


def _sizes(channels: int) -> tuple[int, int]:
    """Elements of a program, and its warps."""
    block = triton.next_power_of_2(channels)
    return block, max(1, min(8, block // _ELEMENTS_PER_WARP))
