"""Chooses device and precision where the user gives ``auto``, and checks those that the user names.

``device: auto`` is the first CUDA device on which an operation succeeds, otherwise the CPU; ``compute_dtype: auto`` is
bfloat16 on CUDA (float16 before Ampere) and float32 on a CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

#: Name → dtype of weights and results; for ``float8`` that of everything but the encoders' linear layers (float8.py).
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,
}
#: Lowest compute capability of CUDA devices that multiply bfloat16 (Ampere).
_BFLOAT16_CAPABILITY = (8, 0)
#: The same for float8 (Ada, then Hopper).
_FLOAT8_CAPABILITY = (8, 9)
#: NVIDIA's driver makes these files: with one of them a machine has a GPU, whatever PyTorch says. The second is Jetson's.
_DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvhost-ctrl-gpu"))


@dataclass(frozen=True)
class Placement:
    """The device and the precision of a tokenizer.

    Attributes:
        device: a device on which an operation has succeeded.
        compute_dtype: a key of `TORCH_DTYPES`.
        reason: why these were chosen, as part of a sentence.
        warnings: sentences about what this choice costs, or why a GPU is not used.
    """

    device: torch.device
    compute_dtype: str
    reason: str
    warnings: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.compute_dtype]

    def __str__(self) -> str:
        return f"{self.device} in {self.compute_dtype}: {self.reason}"


def place(device: str = "auto", compute_dtype: str = "auto") -> Placement:
    """Chooses device and precision from what a user gives; runs a short operation on the device.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or another device of PyTorch's.
        compute_dtype: ``auto``, or a key of `TORCH_DTYPES`. ``auto`` is bfloat16 on CUDA from compute capability 8.0
            (Ampere) on, float16 before, and float32 on a CPU; never float8.

    Raises:
        ValueError: the precision is unknown or not supported by the device, or the device does not work; says why.
    """
    if compute_dtype != "auto" and compute_dtype not in TORCH_DTYPES:
        raise ValueError(f"unknown compute dtype {compute_dtype!r}; choose one of auto, {', '.join(TORCH_DTYPES)}")
    if device == "auto":
        target, reason, warnings = _first_that_works()
    else:
        target, reason, warnings = _checked(device), "as asked for", []
    if compute_dtype == "float8" and (without := float8_unavailable_reason(target)):
        raise ValueError(without)
    chosen = compute_dtype
    if target.type == "cuda":
        capability = torch.cuda.get_device_capability(target)
        reason = f"{torch.cuda.get_device_name(target)}, compute capability {'.'.join(map(str, capability))}, {reason}"
        half = "bfloat16" if capability >= _BFLOAT16_CAPABILITY else "float16"
        if compute_dtype == "auto":
            chosen = half
        elif compute_dtype == "float32":
            warnings.append(
                f"compute_dtype float32 on {target} takes some 4 to 6 times as long as {half} (an estimate) and twice "
                f"the memory; auto or {half} is what models are evaluated in"
            )
        elif compute_dtype == "bfloat16" and half != "bfloat16":
            warnings.append(
                f"compute_dtype bfloat16 is slow on {target}, which has no instructions for it (compute capability 8.0 "
                "has); take auto or float16"
            )
    elif compute_dtype == "auto":
        chosen = "float32"
    return Placement(target, chosen, reason, tuple(warnings))


def float8_unavailable_reason(device: torch.device) -> str:
    """Why this device cannot compute in float8, and what to do, in one sentence; empty if it can."""
    instead = "choose auto or bfloat16"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"compute_dtype float8 needs an NVIDIA GPU of compute capability 8.9 or more, not {device}; {instead}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLOAT8_CAPABILITY:
        number = ".".join(map(str, capability))
        return f"compute_dtype float8 needs compute capability 8.9 or more, and {device} has {number}; {instead}"
    if importlib.util.find_spec("triton") is None:
        return f"compute_dtype float8 needs Triton, which is not installed: pip install triton, or {instead}"
    return ""


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """What is computed in it on such a device is in the dtypes of its tensors, whatever a caller's autocast is."""
    if not torch.amp.is_autocast_available(device.type):  # meta: nothing is computed there
        return contextlib.nullcontext()
    if not torch.is_autocast_enabled(device.type):  # most callers have none, and disabling it asks for the device
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _first_that_works() -> tuple[torch.device, str, list[str]]:
    """The device for ``auto``, the reason for it, and warnings if the machine has a GPU that is not used."""
    failures = []
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        count, failures = 0, [_first_line(error)]
    for index in range(count):
        device = torch.device("cuda", index)
        try:
            _operate(device)
        except (RuntimeError, AssertionError) as error:
            failures.append(f"{device}: {_first_line(error)}")
            continue
        reason = "the first CUDA device that works" if failures else "a CUDA device that works"
        return device, reason, [f"not used: {failure}" for failure in failures]
    because = "; ".join(failures) or "PyTorch finds no CUDA device"
    if count or any(file.exists() for file in _DRIVER_FILES):
        warning = f"this machine has a GPU that cannot be used, so tokens are computed on the CPU, slowly: {because}"
        return torch.device("cpu"), "no CUDA device works", [warning]
    return torch.device("cpu"), f"no CUDA device ({because})", []


def _checked(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            torch.cuda.init()
            device = torch.device("cuda", torch.cuda.current_device())
        _operate(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({_first_line(error)}); choose auto, cpu, cuda or cuda:N"
        ) from error
    return device


def _operate(device: torch.device) -> None:
    """Allocates, computes and reads back; fails if the driver is too old, a kernel is missing or memory is short."""
    if torch.ones(2, device=device).sum().item() != 2.0:
        raise RuntimeError("it computes 1 + 1 wrong")


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line[:300].rstrip(".")
