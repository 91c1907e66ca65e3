"""How a tokenizer's network runs on its device; the numbers stay the same within rounding (docs/performance.md).

``eager``
    PyTorch, operation by operation.
``onednn``
    CPU: linear layers on oneDNN, whose weights are laid out once for the processor.
``graph``
    CUDA: the whole network is captured once per number of views and then launched as one graph; each encoder has a
    separate stream, so that the small products of one run on multiprocessors that the other leaves idle (cuda_graphs.py).
    Products that ``vla-perception tune`` has chosen are taken where there are any (tuned_products.py).
``compile``
    `torch.compile` fuses the operations between the matrix products; on CUDA the result is captured as for ``graph``.
``auto``
    ``graph`` on CUDA; on a CPU ``onednn`` where it is known to be faster, ``eager`` elsewhere. Never ``compile``: compiling
    takes half a minute or more at every start.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from vla_perception.cpu_quota import cpu_quota
from vla_perception.options import RUNTIMES
from vla_perception.tokenizer import tuned_products
from vla_perception.tokenizer.float8 import quantize_encoders
from vla_perception.tokenizer.fused_blocks import fuse_blocks, patches_as_products, replace_modules, scale_in_one
from vla_perception.tokenizer.network import TokenizerNetwork
from vla_perception.tokenizer.preprocess_gpu import PreprocessPlan

log = logging.getLogger(__name__)


class Runtime:
    """Runs the network unchanged: ``eager``.

    Attributes:
        name: the runtime in use, one of `RUNTIMES` without ``auto``.
        fallback: what does not run in the runtime that was requested, and why; empty if everything does.
        kernels: whose kernels run between the matrix products: ``triton``, or ``pytorch``, with the reason where ``triton``
            was wanted; and which tuned products are in use, if any (tuned_products.py).
    """

    def __init__(self, network: TokenizerNetwork, device: torch.device, dtype: torch.dtype) -> None:
        self.name = "eager"
        self.fallback = ""
        self.kernels = "pytorch"
        self._network = network
        self._device = device
        self._dtype = dtype

    def __call__(
        self, pixel_values: Sequence[torch.Tensor], features: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """One [views, 3, side, side] per encoder, of any dtype, anywhere → features and tokens on the device.

        The caller owns both: no later call writes into them. Features may be None if they are not requested. Call it in
        `torch.inference_mode`.
        """
        return self._run([pixels.to(self._device, self._dtype, non_blocking=True) for pixels in pixel_values])

    def from_images(
        self,
        plan: PreprocessPlan,
        fill: Callable[[torch.Tensor], object],
        features: bool = True,
        *,
        cameras: Sequence[str] | None = None,
        announced: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor] | None:
        """Preprocessing and network in one launch; None if the runtime cannot do that for these images.

        Args:
            fill: writes the images' memory into uint8 [plan.nbytes] on the device, on the current stream.
            cameras: of the images, for the log.
            announced: more such images are known to follow.
        """
        return None

    def _run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._network.join([branch(pixels) for branch, pixels in zip(self._network.branches(), inputs)])


class OneDnn(Runtime):
    """Linear layers with packed weights on a CPU. The first call packs the network's weights and frees the originals."""

    def __init__(self, network: TokenizerNetwork, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(network, device, dtype)
        self.name = "onednn"
        self._lock = threading.Lock()
        self._packed = False

    def __call__(
        self, pixel_values: Sequence[torch.Tensor], features: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        with self._lock:
            if not self._packed:
                replace_modules(self._network, nn.Linear, PackedLinear)
                self._packed = True
        return super().__call__(pixel_values, features)


class Compiled(Runtime):
    """Compiles each branch and the projector separately, for each number of views."""

    def __init__(self, network: TokenizerNetwork, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(network, device, dtype)
        self.name = "compile"
        self._branches = [torch.compile(branch, dynamic=False) for branch in network.branches()]
        self._join = torch.compile(network.join, dynamic=False)

    def _run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._join([branch(pixels) for branch, pixels in zip(self._branches, inputs)])


class PackedLinear(nn.Module):
    """`nn.Linear` on oneDNN, with the weight in the layout that oneDNN prefers on this processor.

    Inductor calls the same two operations when it freezes a model for a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(values, self._weight, self._bias, "none", [], "")


def make_runtime(
    name: str, network: TokenizerNetwork, device: torch.device, dtype: torch.dtype, in_float8: bool = False
) -> Runtime:
    """Makes the runtime called `name`, which may replace modules of the network.

    Args:
        in_float8: the encoders' blocks multiply in float8 (float8.py).

    Raises:
        ValueError: there is no such runtime, or it does not support this device or float8.
    """
    if name not in RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}; choose one of {', '.join(RUNTIMES)}")
    if name == "auto":
        on_cpu = "onednn" if device.type == "cpu" and onednn_gains(dtype) else "eager"
        name = "graph" if device.type == "cuda" else on_cpu
    if name == "graph" and device.type != "cuda":
        raise ValueError(f"runtime graph needs a CUDA device, not {device}; choose auto")
    if name == "onednn" and (device.type != "cpu" or not torch.backends.mkldnn.is_available()):
        raise ValueError(f"runtime onednn needs a CPU, and a PyTorch with oneDNN, not {device}; choose auto")
    if device.type != "cuda":
        return {"eager": Runtime, "onednn": OneDnn, "compile": Compiled}[name](network, device, dtype)
    if in_float8 and name == "compile":
        raise ValueError("runtime compile knows no compute_dtype float8; choose auto, graph or eager")
    patches_as_products(network)
    if in_float8:
        quantize_encoders(network)
        without = ""
    else:
        without = fuse_blocks(network, dtype) if name == "graph" else "not asked for"
    scale_in_one(network)
    if name == "eager":
        runtime = Runtime(network, device, dtype)
        runtime.kernels = "triton" if in_float8 else "pytorch"
        return runtime
    from vla_perception.tokenizer.cuda_graphs import CudaGraphs  # which builds on what is here

    runtime = CudaGraphs(network, device, dtype, compiled=name == "compile")
    if name == "graph":
        tuned = tuned_products.use(network) if dtype in tuned_products.TOLERANCES and not in_float8 else ""
        runtime.kernels = ", ".join(filter(None, (f"pytorch ({without})" if without else "triton", tuned)))
        if without:
            log.warning("PyTorch's kernels instead of Triton's, which is slower: %s", without)
    return runtime


def onednn_gains(dtype: torch.dtype) -> bool:
    """Whether packed weights are known to be faster on this processor.

    A rule and not a timing, with which the last bits of tokens could differ from one start to the next. Measured on AMD's
    Zen 4 with AVX-512, where PyTorch computes float32 products with MKL, whose fastest kernels are for Intel processors
    only: 1.3 to 1.6 times as fast in float32, 1.1 in bfloat16.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and _processor_vendor() == "AuthenticAMD"


def _processor_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def limit_threads() -> int:
    """Limits torch's threads to the cores of a CPU quota; returns how many it uses.

    torch takes the machine's number of cores. On a quota of 4 cores the kernel stops 64 threads for most of the time.
    Keeps a number that the user has set (``OMP_NUM_THREADS``). For programs: a library should not change a process's
    settings.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        quota = cpu_quota()
        if quota is not None and quota < torch.get_num_threads():
            torch.set_num_threads(max(1, math.ceil(quota)))
    return torch.get_num_threads()
