"""``compute_dtype: float8``: encoders whose linear layers multiply in float8 (e4m3), on CUDA.

The weights and inputs of the four linear layers of every block, `qkv`, `proj`, `fc1` and `fc2`, are quantized: weights
once, with a scale per output channel; inputs in every call, with a scale per token (float8_kernels.py). A scale is the
row's largest absolute value over 448, the largest of e4m3. Products are summed in float32. Everything else is bfloat16 as
in ``compute_dtype: bfloat16``: patch embedding, residual stream, attention, layer norms, projector, tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vla_perception.tokenizer.dependent_launches import attempt
from vla_perception.tokenizer.encoder import PatchEncoder
from vla_perception.tokenizer.fused_blocks import FusedBlock, _gamma, _is_plain, _on, _Pending, _sum, is_tanh

#: Hopper's tensor cores sum faster with some 14 bits; the error is a tenth of float8's own rounding.
FAST_ACCUMULATION = True
#: Bound on the relative L2 between a block and timm's; that of a correct block is below half of it.
_TOLERANCE = 0.1


class Float8Linear(nn.Module):
    """`nn.Linear` computed by `torch._scaled_mm`.

    Attributes:
        weight: [out, in], float8.
        scale: [1, out], float32: the factor of each row of `weight`.
        bias: [out] in the dtype of the results, or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias
        self._dtype = linear.weight.dtype

    def forward(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float8 [rows, in] and its scales, float32 [rows, 1] → [rows, out]."""
        return torch._scaled_mm(
            values,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=self._dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, channels] → float8 (e4m3) of that shape, and scales, float32 [rows, 1]."""
    values = values.float()
    scales = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (values / scales).to(torch.float8_e4m3fn), scales


class Float8Block(FusedBlock):
    """`FusedBlock` with the linear layers in float8. It takes over the modules of `block`, which is of no use then."""

    def __init__(self, block: Any, hand_on: bool) -> None:
        super().__init__(block, hand_on)
        for parent, name in _linears(self):
            setattr(parent, name, Float8Linear(getattr(parent, name)))

    def forward(self, values: torch.Tensor | _Pending) -> torch.Tensor | _Pending:
        """[views, tokens, channels] → the same."""
        from vla_perception.tokenizer import float8_kernels, triton_kernels

        pending = values if isinstance(values, _Pending) else _Pending(values, None, None)
        attn, mlp = self.attn, self.mlp
        values, normal = float8_kernels.add_layer_norm(*pending, self.norm1)
        projected = attn.qkv(*normal).view(*values.shape[:2], -1)
        attended = float8_kernels.quantize(triton_kernels.attention(projected, attn.num_heads, attn.scale))
        delta = attn.proj(*attended).view_as(values)
        values, normal = float8_kernels.add_layer_norm(values, delta, _gamma(self.ls1), self.norm2)
        delta = mlp.fc2(*float8_kernels.gelu(mlp.fc1(*normal), is_tanh(mlp.act))).view_as(values)
        pending = _Pending(values, delta, _gamma(self.ls2))
        return pending if self._hand_on else _sum(pending)


def _linears(block: Any) -> list[tuple[nn.Module, str]]:
    return [(block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")]


def quantize_encoders(network: nn.Module) -> None:
    """Replaces every block by a `Float8Block`, one after the other, and frees its weights.

    Compares the first block of each encoder with timm's, so that kernels that do not work here give no tokens.

    Raises:
        ValueError: an encoder's blocks differ in kind from OpenVLA's, or the kernels do not run or compute other values. The
            network is of no use then.
    """
    for encoder in (module for module in network.modules() if isinstance(module, PatchEncoder)):
        blocks: Any = encoder.vit.blocks
        name = encoder.config.name
        if not all(map(_is_plain, blocks)):
            raise ValueError(f"compute_dtype float8 does not know the blocks of encoder {name}; choose bfloat16")
        widths = {width for parent, layer in _linears(blocks[0]) for width in getattr(parent, layer).weight.shape}
        if any(width % 16 for width in widths):
            raise ValueError(
                f"compute_dtype float8 needs widths that are multiples of 16, and those of encoder {name} are "
                f"{', '.join(map(str, sorted(widths)))}; choose bfloat16"
            )
        # With a cls token the layer that gives the patch features is not the last one.
        last = {encoder.layer, len(blocks) - 1}
        try:
            with _on(blocks[0].norm1.weight.device):
                error = _replace(encoder, last)
        except Exception as failure:  # whatever a compiler or cuBLAS may raise
            text = next(iter(str(failure).splitlines()), "")
            raise ValueError(
                f"compute_dtype float8 does not run here, encoder {name}: {type(failure).__name__}: {text[:300]}; "
                "choose bfloat16"
            ) from failure
        if not error < _TOLERANCE:
            raise ValueError(
                f"compute_dtype float8 gives wrong values here, encoder {name}: relative L2 of a block {error:.1e}; "
                "choose bfloat16"
            )


@torch.inference_mode()
def _replace(encoder: PatchEncoder, last: set[int]) -> float:
    """Replaces an encoder's blocks; returns the relative L2 between the first block's results before and after."""
    blocks: Any = encoder.vit.blocks
    weight = blocks[0].norm1.weight
    rows, columns = encoder.grid
    shape = (1, rows * columns + encoder.vit.num_prefix_tokens, weight.shape[0])
    noise = torch.arange(math.prod(shape), device=weight.device, dtype=torch.float32).sin().view(shape).to(weight.dtype)
    expected = blocks[0](noise).double()
    for index, block in enumerate(blocks):
        with torch.inference_mode(False):  # weights are ordinary tensors, also within the caller's own graphs
            blocks[index] = Float8Block(block, hand_on=index not in last)
    found = attempt(lambda: blocks[0](noise))
    found = (_sum(found) if isinstance(found, _Pending) else found).double()
    return float((found - expected).norm() / expected.norm())
