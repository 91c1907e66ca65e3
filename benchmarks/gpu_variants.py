"""Other ways to compute the encoders on a GPU, for benchmarks/gpu.py: context managers that put them in force."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn import functional

from vla_perception.tokenizer import cuda_graphs
from vla_perception.tokenizer.cuda_graphs import CudaGraphs

#: (rows, keys, warps, stages) of Triton's attention to compare with the one that is in use.
ATTENTION_BLOCKS = ((64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 8, 2), (64, 128, 4, 1), (128, 64, 8, 2), (32, 64, 4, 2))
#: Of `triton_products`, for the layer with GELU behind it, of one view and of several.
GELU_BLOCKS = {
    1: ((128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4)),
    4: ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
}
#: For all layers of a block, of one view and of several: what is wide is cut into larger blocks than what is deep.
_WIDE, _DEEP = (128, 128, 64, 8, 4), (64, 64, 128, 4, 4)
ALL_BLOCKS = {
    1: {"qkv": _WIDE, "proj": _DEEP, "fc1": _WIDE, "fc2": _DEEP},
    4: {"qkv": _WIDE, "proj": (128, 64, 64, 4, 4), "fc1": _WIDE, "fc2": (128, 64, 64, 4, 4)},
}
#: Of the device's multiprocessors.
SHARES = (0.35, 0.5, 0.65, 0.8)

Change = tuple[str, contextlib.AbstractContextManager]


def changes(views: int) -> Iterator[Change]:
    """What is tried for one view, or for several, which get less."""
    from vla_perception.tokenizer import triton_kernels, triton_products

    few = views == 1
    kind = 1 if few else 4

    def products(waste: float, **blocks: object) -> contextlib.AbstractContextManager:
        table = triton_products.CUBLAS | blocks
        return replaced(triton_products, BLOCKS_OF_FEW_ROWS=table, BLOCKS_OF_MANY_ROWS=table, MAX_WASTE=waste)

    def share(part: float) -> contextlib.AbstractContextManager:
        return replaced(cuda_graphs, PRODUCT_SHARE=part, PRODUCT_SHARE_VIEWS=views)

    def dependent() -> contextlib.AbstractContextManager:
        return replaced(triton_kernels, DEPENDENT_LAUNCHES=True)

    yield "as it is", contextlib.nullcontext()
    yield "dependent launches", dependent()
    for part in SHARES:
        yield f"products for {part} of the device", share(part)
    for blocks in GELU_BLOCKS[kind]:
        yield f"fc1 with GELU {blocks}, little waste", products(0.125, fc1=blocks)
        yield f"fc1 with GELU {blocks}", products(1.0, fc1=blocks)
    yield "all products by Triton", products(1.0, **ALL_BLOCKS[kind])
    yield "all by Triton, dependent launches", both(products(1.0, **ALL_BLOCKS[kind]), dependent())
    yield "0.5 of the device, dependent launches", both(share(0.5), dependent())
    yield "tanh's GELU by cuBLASLt: another function", replaced(triton_products, linear=_tanh_linear)
    yield "one stream", _one_stream()
    yield "PyTorch's kernels", pytorchs(add_layer_norm=add_layer_norm, gelu=functional.gelu, attention=attention)
    if not few:
        return
    yield "PyTorch's sum and layer norm", pytorchs(add_layer_norm=add_layer_norm)
    yield "PyTorch's GELU", pytorchs(gelu=functional.gelu)
    yield "PyTorch's attention", pytorchs(attention=attention)
    for blocks in ATTENTION_BLOCKS[:2]:
        yield f"attention {blocks}", pytorchs(ATTENTION_BLOCKS=blocks)


def add_layer_norm(values, delta, gamma, norm):
    """PyTorch's operations for `triton_kernels.add_layer_norm`."""
    if delta is not None:
        values = values + delta if gamma is None else torch.addcmul(values, delta, gamma)
    return values, functional.layer_norm(values, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def attention(projected, heads, scale):
    """PyTorch's operations for `triton_kernels.attention`, as timm has them."""
    views, tokens, channels = projected.shape
    query, key, value = projected.view(views, tokens, 3, heads, channels // 3 // heads).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)


def _tanh_linear(values, layer, name, gelu=False):
    """What `triton_products.linear` would be if GELU's approximation were good enough: the most that fusing could gain."""
    if not gelu:
        return layer(values)
    flat = torch._addmm_activation(layer.bias, values.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return flat.unflatten(0, values.shape[:-1])


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


@contextlib.contextmanager
def both(one: contextlib.AbstractContextManager, other: contextlib.AbstractContextManager) -> Iterator[None]:
    with one, other:
        yield


def _one_stream() -> contextlib.AbstractContextManager:
    def run(self: CudaGraphs, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._join([branch(pixels) for branch, pixels in zip(self._branches, inputs)])

    return replaced(CudaGraphs, _run_side_by_side=run)
