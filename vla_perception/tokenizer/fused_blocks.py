"""Encoders on a GPU with fewer and better kernels: modules that take the places of timm's and keep their weights.

The names in the state dict stay the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from vla_perception.tokenizer.dependent_launches import attempt
from vla_perception.tokenizer.encoder import PatchEncoder
from vla_perception.tokenizer.timm_import import GELU, Attention, Block, GELUTanh, LayerScale, Mlp

#: Relative L2 between a block with these kernels and timm's. A right one is below a fifth of it.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class _Pending(NamedTuple):
    """``values + delta * gamma`` that is still to be added; without gamma for 1, without delta for 0."""

    values: torch.Tensor
    delta: torch.Tensor | None
    gamma: torch.Tensor | None


class FusedBlock(nn.Module):
    """timm's block with Triton's kernels: each residual sum, with LayerScale, and the layer norm behind it are one.

    The block's last sum is left to the block behind it, which does it in the kernel of its first layer norm.

    Args:
        hand_on: whether such a block follows; else the sum is done here.
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    attn: Any  # timm's Attention
    mlp: Any  # timm's Mlp
    ls1: nn.Module
    ls2: nn.Module

    def __init__(self, block: Any, hand_on: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self._hand_on = hand_on

    def forward(self, values: torch.Tensor | _Pending) -> torch.Tensor | _Pending:
        """[views, tokens, channels] → the same."""
        from vla_perception.tokenizer import triton_kernels

        pending = values if isinstance(values, _Pending) else _Pending(values, None, None)
        values, normal = triton_kernels.add_layer_norm(*pending, self.norm1)
        values, normal = triton_kernels.add_layer_norm(values, self._attend(normal), _gamma(self.ls1), self.norm2)
        delta = self.mlp.fc2(triton_kernels.gelu(self.mlp.fc1(normal), is_tanh(self.mlp.act)))
        pending = _Pending(values, delta, _gamma(self.ls2))
        return pending if self._hand_on else _sum(pending)

    def _attend(self, values: torch.Tensor) -> torch.Tensor:
        from vla_perception.tokenizer import triton_kernels

        if values.dtype == torch.float32:  # tensor cores would round to TF32
            return self.attn(values)
        attended = triton_kernels.attention(self.attn.qkv(values), self.attn.num_heads, self.attn.scale)
        return self.attn.proj(attended)


def _gamma(scale: nn.Module) -> torch.Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _sum(pending: _Pending) -> torch.Tensor:
    values, delta, gamma = pending
    if delta is None:
        return values
    return values + delta if gamma is None else torch.addcmul(values, delta, gamma)


class ScaledBlock(nn.Module):
    """timm's block with LayerScale, its scaling and residual sum one operation: 46 kernels fewer in `openvla-7b`."""

    ls1: LayerScale
    ls2: LayerScale

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def forward(self, values: torch.Tensor, **attention: object) -> torch.Tensor:
        values = torch.addcmul(values, self.attn(self.norm1(values), **attention), self.ls1.gamma)
        return torch.addcmul(values, self.mlp(self.norm2(values)), self.ls2.gamma)


class PatchProduct(nn.Module):
    """A convolution whose stride is its kernel, as the matrix product that it is.

    Its inner dimension (588 for patches of 14 × 14) is padded with zeros to a multiple of 8, which cuBLAS has fast
    kernels for.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        missing = -self.weight[0].numel() % 8
        # Here and not when it is first used, which may be in a capture, or on another thread's stream.
        self._padded = functional.pad(self.weight.detach().flatten(1), (0, missing)) if missing else None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[views, 3, height, width] → [views, channels, rows, columns]; what no whole patch covers is not seen."""
        side = self.weight.shape[-1]
        rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
        pixels = pixels[:, :, : rows * side, : columns * side]
        patches = pixels.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5)
        length = self.weight[0].numel()
        if self._padded is None or torch.compiler.is_compiling():  # Inductor pads by itself
            return functional.linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        rows_of_product = patches.new_zeros(*patches.shape[:3], self._padded.shape[1])
        rows_of_product[..., :length].unflatten(3, patches.shape[3:]).copy_(patches)
        return functional.linear(rows_of_product, self._padded, self.bias).permute(0, 3, 1, 2)


def patches_as_products(network: nn.Module) -> None:
    """Patch embeddings by cuBLAS: cuDNN would run float32 convolutions in TF32, and has no kernel for 3 channels."""
    replace_modules(network, nn.Conv2d, PatchProduct)


def scale_in_one(network: nn.Module) -> None:
    """LayerScale and residual sum as one operation, in the blocks that have it."""
    replace_modules(network, Block, lambda block: ScaledBlock(block) if isinstance(block.ls1, LayerScale) else block)


def fuse_blocks(network: nn.Module, dtype: torch.dtype) -> str:
    """`FusedBlock` in the place of every block that is as OpenVLA's encoders have them.

    Of each encoder one block is tried beside timm's first, so that a Triton that is missing, does not compile here or
    computes something else leaves that encoder as it is.

    Returns:
        why not, for the encoders whose blocks stay; empty if none does.
    """
    reasons = []
    for encoder in (module for module in network.modules() if isinstance(module, PatchEncoder)):
        blocks: Any = encoder.vit.blocks
        if not all(map(_is_plain, blocks)):
            reasons.append(f"{encoder.config.name}: its blocks are unusual")
            continue
        try:
            with _on(blocks[0].norm1.weight.device):
                attempt(functools.partial(_try, blocks[0], encoder, dtype))
        except Exception as error:  # whatever a compiler may raise
            text = next(iter(str(error).splitlines()), "")
            reasons.append(f"{encoder.config.name}: {type(error).__name__}: {text[:300]}")
            continue
        for index, block in enumerate(blocks):
            # With a cls token the layer that patch features are taken from is not the last one.
            blocks[index] = FusedBlock(block, hand_on=index not in (encoder.layer, len(blocks) - 1))
    return "; ".join(reasons)


def is_tanh(activation: nn.Module) -> bool:
    """Whether a GELU is the one that tanh approximates."""
    return type(activation) is GELUTanh or getattr(activation, "approximate", "none") == "tanh"


def _is_plain(block: nn.Module) -> bool:
    """Whether a block does what `FusedBlock` does: pre-norm, full attention, MLP with GELU."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    attention, mlp = block.attn, block.mlp
    nothing = [attention.q_norm, attention.k_norm, getattr(attention, "norm", nn.Identity()), mlp.norm]
    gelu = type(mlp.act) in (GELU, nn.GELU) and getattr(mlp.act, "approximate", "none") == "none" or is_tanh(mlp.act)
    return (
        gelu
        and all(isinstance(module, nn.Identity) for module in nothing)
        and getattr(attention, "gate", None) is None
        and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in (block.norm1, block.norm2))
        and attention.qkv.out_features == 3 * attention.proj.in_features
        and attention.proj.in_features // attention.num_heads <= 128
    )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes it the current device, which Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@torch.inference_mode()
def _try(block: Any, encoder: PatchEncoder, dtype: torch.dtype) -> None:
    """Compiles the kernels for the encoder's sizes. ValueError if they give something else than timm's block."""
    weight = block.norm1.weight
    rows, columns = encoder.grid
    shape = (1, rows * columns + encoder.vit.num_prefix_tokens, weight.shape[0])
    noise = torch.arange(math.prod(shape), device=weight.device, dtype=torch.float32).sin().view(shape).to(dtype)
    first = FusedBlock(block, hand_on=True)(noise)
    found, expected = FusedBlock(block, hand_on=False)(first).double(), block(block(noise)).double()
    error = float((found - expected).norm() / expected.norm())
    if not error < _TOLERANCES[dtype]:
        raise ValueError(f"Triton's kernels give other values than PyTorch's, relative L2 {error:.1e}")


def replace_modules(network: nn.Module, kind: type[nn.Module], replacement: Callable[[Any], nn.Module]) -> None:
    """Puts `replacement(module)` in the place of every module of exactly that kind, freeing one after the other."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, replacement(child))
