"""Other ways to compute the encoders on a GPU, for benchmarks/gpu.py: context managers that put them in force."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn import functional

from vla_perception.tokenizer import dependent_launches
from vla_perception.tokenizer.cuda_graphs import CudaGraphs

#: (rows, keys, warps, stages) of Triton's attention to compare with the one that is in use.
ATTENTION_BLOCKS = ((64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 8, 2), (64, 128, 4, 1), (128, 64, 8, 2), (32, 64, 4, 2))

Change = tuple[str, contextlib.AbstractContextManager]


def changes(views: int) -> Iterator[Change]:
    """What is tried for one view, or for several, which get less."""
    yield "as it is", contextlib.nullcontext()
    yield "without dependent launches", replaced(dependent_launches, WANTED=False)
    yield "one stream", _one_stream()
    yield "PyTorch's kernels", pytorchs(add_layer_norm=add_layer_norm, gelu=gelu, attention=attention)
    if views > 1:
        return
    yield "PyTorch's sum and layer norm", pytorchs(add_layer_norm=add_layer_norm)
    yield "PyTorch's GELU", pytorchs(gelu=gelu)
    yield "PyTorch's attention", pytorchs(attention=attention)
    for elements in (256, 512):
        yield f"sum and layer norm, {elements} elements a warp", pytorchs(ELEMENTS_PER_WARP=elements)
    for blocks in ATTENTION_BLOCKS[:2]:
        yield f"attention {blocks}", pytorchs(ATTENTION_BLOCKS=blocks)


def add_layer_norm(values, delta, gamma, norm):
    """PyTorch's operations for `triton_kernels.add_layer_norm`."""
    if delta is not None:
        values = values + delta if gamma is None else torch.addcmul(values, delta, gamma)
    return values, functional.layer_norm(values, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def gelu(values, tanh=False):
    """PyTorch's operation for `triton_kernels.gelu`."""
    return functional.gelu(values, approximate="tanh" if tanh else "none")


def attention(projected, heads, scale):
    """PyTorch's operations for `triton_kernels.attention`, as timm has them."""
    views, tokens, channels = projected.shape
    query, key, value = projected.view(views, tokens, 3, heads, channels // 3 // heads).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def replaced(module: object, **others: object) -> Iterator[None]:
    """Other functions and constants in a module."""
    before = {name: getattr(module, name) for name in others}
    for name, value in others.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def pytorchs(**others: object) -> contextlib.AbstractContextManager:
    """Other functions and constants in `triton_kernels`."""
    from vla_perception.tokenizer import triton_kernels

    return replaced(triton_kernels, **others)


def _one_stream() -> contextlib.AbstractContextManager:
    def run(self: CudaGraphs, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._join([branch(pixels) for branch, pixels in zip(self._branches, inputs)])

    return replaced(CudaGraphs, _run_side_by_side=run)
