"""Weights for an empty network: which tensors of a checkpoint it reads and which it leaves, or random ones.

The digest of the weights is taken of the tensors as they are stored, on their way.
"""

from __future__ import annotations

import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint, WeightsDigest, merged
from vla_perception.tokenizer.devices import Placement, without_autocast
from vla_perception.tokenizer.network import TokenizerNetwork

log = logging.getLogger(__name__)


def load_checkpoint(network: TokenizerNetwork, checkpoint: Checkpoint, placement: Placement) -> str:
    """Fills the network with a checkpoint's tensors; returns their digest (hex).

    Raises:
        CheckpointError: tensors are missing, unexpected, or of the wrong shape or dtype; lists them.
    """
    names = network.canonical_tensors()
    checkpoint.check(_shapes(network), _is_unused(network, checkpoint))
    cache = checkpoint.digest_cache(names)
    known = _cached_digest(cache)
    digest = None if re.fullmatch("[0-9a-f]{64}", known) else WeightsDigest()
    with without_autocast(torch.device("cpu")):  # where LoRA is merged
        _fill(network, checkpoint.read(names), digest, placement.device, placement.dtype)
    checkpoint.check_unchanged()
    if digest is None:
        return known
    if cache is not None:
        _keep_digest(cache, digest.hexdigest())
    return digest.hexdigest()


def draw_random(network: TokenizerNetwork, seed: int, placement: Placement) -> str:
    """Fills the network with random weights, the same on every machine; returns their digest (hex)."""
    digest = WeightsDigest()
    drawn = ((name, {"": random_weight(name, shape, seed)}) for name, shape in sorted(_shapes(network).items()))
    _fill(network, drawn, digest, placement.device, placement.dtype)
    return digest.hexdigest()


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """float32 noise for a tensor, scaled by its role so that activations keep their size through the network.

    Drawn with NumPy's PCG64: torch's seeded draws differ between CPU types.
    """
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    noise = generator.random(int(np.prod(shape)), dtype=np.float32).reshape(shape) * 2 - 1
    if name.endswith("gamma"):
        noise = 0.1 + 0.05 * noise
    elif "norm" in name and name.endswith("weight"):
        noise = 1 + 0.1 * noise
    elif name.endswith("weight") and len(shape) > 1:
        noise *= np.float32(np.sqrt(3.0 / np.prod(shape[1:])))
    else:
        noise *= np.float32(0.02)
    return torch.from_numpy(noise)


def _shapes(network: TokenizerNetwork) -> dict[str, tuple[int, ...]]:
    """Canonical tensor name → shape of what the network needs."""
    state = network.state_dict()
    return {name: tuple(state[inner].shape) for name, inner in network.canonical_tensors().items()}


def _is_unused(network: TokenizerNetwork, checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Tells tensors that may be there and are not read: encoders and projector that were not chosen, and for patch
    tokens the last block, final norm and pooling head."""
    patterns = []
    built = {tower.config.name: tower for tower in network.towers}
    for config in checkpoint.config.encoders:
        name, tower = re.escape(config.name), built.get(config.name)
        if tower is None:
            patterns.append(rf"{name}\.")
        elif not network.config.cls_token:
            behind = [rf"blocks\.{tower.layer + 1}\."] if config.layer < -1 else []
            behind += ["fc_norm\\.", "attn_pool\\."] + ([] if config.final_norm else ["norm\\."])
            patterns.append(rf"{name}\.({'|'.join(behind)})")
    if network.config.projector != checkpoint.config.projector:
        patterns.append(r"projector\.")
    unused = re.compile("|".join(patterns) or r"(?!)")
    return lambda name: unused.match(name) is not None


def _fill(
    network: TokenizerNetwork,
    tensors: Iterable[tuple[str, dict[str, torch.Tensor]]],
    digest: WeightsDigest | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Takes (canonical name, parts as `Checkpoint.read` yields them), one tensor at a time."""
    names, state = network.canonical_tensors(), {}
    for name, parts in tensors:
        if digest is not None:
            for part, tensor in parts.items():
                digest.add(name + part, tensor)
        # A copy in any case: the source may be a mapped file that is replaced later. Contiguous, as kernels that take a
        # weight's address read it: a tensor of a .pt may be stored transposed.
        copied = merged(parts).to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        state[names[name]] = copied
        if copied.numel() and not all(map(math.isfinite, torch.aminmax(copied))):  # NaN is both
            raise CheckpointError(
                f"{name} has values that are not finite in {str(dtype).removeprefix('torch.')}, so every token would be NaN. "
                "The file is damaged, or training diverged; large values fit into float32 and bfloat16"
            )
    network.load_state_dict(state, assign=True)
    network.requires_grad_(False)


def _cached_digest(cache: Path | None) -> str:
    """What an earlier load computed; empty if there is nothing, or nothing that can be read."""
    try:
        return "" if cache is None else cache.read_text().strip()
    except (OSError, ValueError):
        return ""


def _keep_digest(cache: Path, digest: str) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_name(f"{cache.name}.{os.getpid()}")
        partial.write_text(digest)
        partial.replace(cache)
    except OSError as error:
        log.warning("the fingerprint is computed again next time: cannot write %s (%s)", cache, error)
