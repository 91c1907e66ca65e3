"""How far tokens in float8 are from float32's, without a GPU: float8.py's arithmetic emulated in PyTorch.

    python benchmarks/float8_error.py --model openvla-7b

Linear layers of the blocks quantize as `compute_dtype: float8` does, and multiply what comes of it in float32; all else
runs in bfloat16. What a GPU adds are sums in another order, and shorter ones.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vla_perception.tokenizer import VisualTokenizer
from vla_perception.tokenizer.encoder import PatchEncoder
from vla_perception.tokenizer.float8 import quantize_rows


class EmulatedLinear(nn.Module):
    """Quantizes weight and input, and multiplies both dequantized, in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = dequantized(linear.weight), linear.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(dequantized(values), self.weight, bias).to(values.dtype)


def dequantized(values: torch.Tensor) -> torch.Tensor:
    """float32 of what float8 keeps of it."""
    quantized, scales = quantize_rows(values)
    return quantized.float() * scales


def emulate(network: nn.Module) -> None:
    for encoder in (module for module in network.modules() if isinstance(module, PatchEncoder)):
        for block in encoder.vit.blocks:
            for parent, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
                setattr(parent, name, EmulatedLinear(getattr(parent, name)))


def distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Relative L2 over everything, and the lowest cosine of any token."""
    found, expected = found.double(), expected.double()
    lowest = functional.cosine_similarity(found, expected, dim=-1).min()
    return float((found - expected).norm() / expected.norm()), float(lowest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openvla-7b", help="a preset or checkpoint (default: %(default)s)")
    options = parser.parse_args()
    images = list(np.random.default_rng(0).integers(0, 256, (1, 480, 640, 3), dtype=np.uint8))
    results = {}
    for label in ("float32", "bfloat16", "float8"):
        dtype = "float32" if label == "float32" else "bfloat16"
        tokenizer = VisualTokenizer.load(options.model, device="cpu", compute_dtype=dtype, runtime="eager")
        if label == "float8":
            emulate(tokenizer.network)
        output = tokenizer(images, features=True)
        results[label] = output.tokens, output.features
        if label != "float32":
            for what, found, expected in zip(("tokens", "features"), results[label], results["float32"]):
                difference, cosine = distance(found, expected)
                print(
                    f"{tokenizer.model} ({tokenizer.weights} weights), {label}, {what}: relative L2 {difference:.2e}, "
                    f"lowest cosine of a token {cosine:.5f}",
                    flush=True,
                )
        del tokenizer


if __name__ == "__main__":
    main()
