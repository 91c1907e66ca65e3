"""The whole flow: pictures → pixel values → both encoders → concatenated features → projected tokens."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vla_perception.tokenizer.checkpoint import (
    WeightsDigest,
    fingerprint,
    merged,
)
from vla_perception.tokenizer.encoders import PatchEncoder
from vla_perception.tokenizer.layouts import open_checkpoint
from vla_perception.tokenizer.preprocess import Preprocessor, source_to_grid
from vla_perception.tokenizer.presets import PRESETS, ModelConfig
from vla_perception.tokenizer.projector import Projector

log = logging.getLogger(__name__)

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TokenizerOutput:
    """What the encoders and the projector computed.

    Attributes:
        tokens: [views, tokens, channels] in the compute dtype, on the tokenizer's device.
        features: [views, tokens, encoder channels], before the projector; None unless asked for.
        grid: (rows, columns); tokens run row by row.
    """

    tokens: torch.Tensor
    features: torch.Tensor | None
    grid: tuple[int, int]


class _Network(nn.Module):
    """Encoders, concatenation along channels, projector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({encoder.name: PatchEncoder(encoder) for encoder in config.encoders})
        grids = {name: encoder.grid for name, encoder in self.encoders.items()}
        if len(set(grids.values())) != 1:
            listed = ", ".join(f"{name} {rows} × {columns}" for name, (rows, columns) in grids.items())
            raise ValueError(
                f"model {config.name!r}: the encoders' grids differ ({listed}); features are joined position by "
                "position, so choose image sizes that give the same number of patches"
            )
        channels = sum(encoder.channels for encoder in self.encoders.values())
        self.projector = Projector(config.projector, channels, config.output_channels)

    def canonical_tensors(self) -> dict[str, str]:
        """Canonical tensor name → name in this module's state dict."""
        names = {}
        for name in self.state_dict():
            if name.startswith("encoders."):
                names[re.sub(r"^encoders\.([^.]+)\.vit\.", r"\1.", name)] = name
            else:
                names[name] = name
        return names

    def forward(self, pixel_values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """One [views, 3, side, side] per encoder → features and tokens, [views, tokens, channels] each."""
        features = torch.cat(
            [encoder(pixels) for encoder, pixels in zip(self.encoders.values(), pixel_values)], dim=-1
        )
        return features, self.projector(features)


class VisualTokenizer:
    """Pictures → the visual tokens of a dual-encoder (DINOv2 + SigLIP) vision-language-action model.

    Computes what OpenVLA's vision backbone and projector compute (Kim et al., 2024, after Karamcheti et al.,
    "Prismatic VLMs", 2024). Use `from_checkpoint`, `from_preset` or `load` to make one.

    Attributes:
        config: the model's configuration.
        model: its name.
        weights: ``"checkpoint"`` or ``"random"``.
        device, compute_dtype: where and in what precision encoders and projector run.
        grid: (rows, columns) of tokens.
        channels: width of a token; `feature_channels` is the width before the projector.
        fingerprint: SHA-256 (hex) over the tensors as stored and the preprocessing, the same on every machine
            and whatever `device` and `compute_dtype` are.
    """

    def __init__(
        self, config: ModelConfig, network: _Network, *, weights: str, weights_digest: str, compute_dtype: str
    ) -> None:
        self.config = config
        self.model = config.name
        self.weights = weights
        self.compute_dtype = compute_dtype
        self.device = next(network.parameters()).device
        self._dtype = COMPUTE_DTYPES[compute_dtype]
        self._network = network
        self._preprocessor = Preprocessor(config.encoders)
        self._towers: list[PatchEncoder] = list(network.encoders.values())  # type: ignore[arg-type]
        self.grid: tuple[int, int] = self._towers[0].grid
        self.feature_channels: int = sum(encoder.channels for encoder in self._towers)
        self.channels: int = network.projector.channels
        self.fingerprint = fingerprint(
            weights_digest,
            {"pool": 1, "preprocessing": config.preprocessing(), "prepare": [], "token_strategy": "patch"},
        )

    @classmethod
    def load(
        cls, model: str | os.PathLike, *, device: str = "cpu", compute_dtype: str = "float32", seed: int = 0
    ) -> VisualTokenizer:
        """A checkpoint directory, or a preset's name for random weights.

        Raises:
            ValueError: neither of the two, or a wrong device or dtype; CheckpointError for unusable files.
        """
        if str(model) in PRESETS and not Path(model).is_dir():
            return cls.from_preset(str(model), seed=seed, device=device, compute_dtype=compute_dtype)
        if not Path(model).expanduser().exists():
            raise ValueError(
                f"{str(model)!r} is neither a checkpoint directory nor a preset ({', '.join(PRESETS)}); "
                "give the path of a checkpoint's folder"
            )
        return cls.from_checkpoint(model, device=device, compute_dtype=compute_dtype)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, *, device: str = "cpu", compute_dtype: str = "float32"
    ) -> VisualTokenizer:
        """Vision backbone and projector of a checkpoint directory as OpenVLA publishes it.

        Only their tensors are read; host memory grows by them in the compute dtype, and little more.

        Raises:
            CheckpointError: files are missing, damaged, or do not fit; lists the tensors at fault.
        """
        target, dtype = _check_device(device), _check_dtype(compute_dtype)
        checkpoint = open_checkpoint(path)
        network = _empty_network(checkpoint.config)
        names = network.canonical_tensors()
        shapes = {name: tuple(network.state_dict()[inner].shape) for name, inner in names.items()}
        checkpoint.check(shapes, _is_unused(network))

        cache = checkpoint.digest_cache(names)
        known = cache.read_text().strip() if cache is not None and cache.is_file() else ""
        digest = None if re.fullmatch("[0-9a-f]{64}", known) else WeightsDigest()
        _fill(network, names, checkpoint.read(names), digest, target, dtype)
        if digest is not None:
            known = digest.hexdigest()
        if digest is not None and cache is not None:
            try:
                cache.parent.mkdir(parents=True, exist_ok=True)
                partial = cache.with_name(f"{cache.name}.{os.getpid()}")
                partial.write_text(known)
                partial.replace(cache)
            except OSError as error:
                log.warning("the fingerprint is computed again next time: cannot write %s (%s)", cache, error)
        return cls(checkpoint.config, network, weights="checkpoint", weights_digest=known, compute_dtype=compute_dtype)

    @classmethod
    def from_preset(
        cls, name: str, *, weights: str = "random", seed: int = 0, device: str = "cpu", compute_dtype: str = "float32"
    ) -> VisualTokenizer:
        """The architecture of a preset with random weights: right shapes and costs, meaningless tokens.

        Weights are drawn with NumPy's PCG64, so they are the same on every machine (torch's seeded draws
        differ between CPU types).
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        if weights != "random":
            raise ValueError(f"presets have random weights only, not {weights!r}; use from_checkpoint for trained ones")
        target, dtype = _check_device(device), _check_dtype(compute_dtype)
        config = PRESETS[name]
        network = _empty_network(config)
        names = network.canonical_tensors()
        shapes = {canonical: tuple(network.state_dict()[inner].shape) for canonical, inner in names.items()}
        digest = WeightsDigest()
        drawn = ((canonical, {"": random_weight(canonical, shapes[canonical], seed)}) for canonical in sorted(names))
        _fill(network, names, drawn, digest, target, dtype)
        return cls(
            config, network, weights="random", weights_digest=digest.hexdigest(), compute_dtype=compute_dtype
        )

    @property
    def tokens_per_view(self) -> int:
        return self.grid[0] * self.grid[1]

    def preprocess(self, images: Sequence[np.ndarray] | np.ndarray) -> list[torch.Tensor]:
        """uint8 RGB [height, width, 3] pictures of any sizes → per encoder float32 [views, 3, side, side], on the CPU.

        Bit-identical to OpenVLA's image processor. ValueError for anything else.
        """
        return self._preprocessor(images)

    @torch.inference_mode()
    def encode(self, pixel_values: Sequence[torch.Tensor], features: bool = False) -> TokenizerOutput:
        """What `preprocess` gave → tokens; `features` also returns what went into the projector."""
        if len(pixel_values) != len(self._towers):
            raise ValueError(f"{len(self._towers)} tensors are needed, one per encoder, got {len(pixel_values)}")
        inputs = [pixels.to(self.device, self._dtype, non_blocking=True) for pixels in pixel_values]
        joined, tokens = self._network(inputs)
        return TokenizerOutput(tokens, joined if features else None, self.grid)

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray, features: bool = False) -> TokenizerOutput:
        """`preprocess` and `encode` in one."""
        return self.encode(self.preprocess(images), features)

    def warm_up(self, views: int = 1) -> None:
        """Runs once on black pictures, so that the first real frame does not pay for set-up."""
        self([np.zeros((480, 640, 3), np.uint8)] * views)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def affine(self, height: int, width: int) -> tuple[float, ...]:
        """Map from a source picture's pixels to the token grid: six floats, a row-major 2 × 3 matrix.

        (x, y, 1), where pixel i covers [i, i + 1), goes to (column, row), where token j covers [j, j + 1).
        """
        return source_to_grid(height, width, self.config.encoders[0], self._towers[0].patch_size)

    def metadata(self) -> dict:
        """What the token message says about the model (docs/wire_format.md)."""
        encoders, start = [], 0
        for config, tower in zip(self.config.encoders, self._towers):
            encoders.append(
                {
                    "name": config.name,
                    "timm_id": config.timm_id,
                    "layer": tower.layer,
                    "channels": [start, start + tower.channels],
                    "image_size": config.image_size,
                    "patch_size": tower.patch_size,
                }
            )
            start += tower.channels
        return {
            "model": self.model,
            "weights": self.weights,
            "fingerprint": self.fingerprint,
            "compute_dtype": self.compute_dtype,
            "grid": list(self.grid),
            "token_strategy": "patch",
            "pool": 1,
            "encoders": encoders,
            "projector": self.config.projector,
        }


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """float32 noise for a tensor, scaled by its role so that activations keep their size through the network."""
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


def _empty_network(config: ModelConfig) -> _Network:
    with torch.device("meta"):
        return _Network(config).eval().requires_grad_(False)


def _is_unused(network: _Network) -> Callable[[str], bool]:
    """Tells the tensors of the last block, final norm and pooling head, which patch tokens do not need."""
    patterns = [
        rf"{re.escape(name)}\.(blocks\.{tower.layer + 1}\.|norm\.|fc_norm\.|attn_pool\.)"
        for name, tower in network.encoders.items()
    ]
    return re.compile("|".join(patterns)).match  # type: ignore[return-value]


def _fill(
    network: _Network,
    names: dict[str, str],
    tensors: Iterator[tuple[str, dict[str, torch.Tensor]]],
    digest: WeightsDigest | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    state = {}
    for name, parts in tensors:
        if digest is not None:
            for part, tensor in parts.items():
                digest.add(name + part, tensor)
        # A copy in any case: the source may be a mapped file that somebody replaces later.
        state[names[name]] = merged(parts).to(device, dtype, copy=True)
    network.load_state_dict(state, assign=True)
    network.requires_grad_(False)


def _check_dtype(name: str) -> torch.dtype:
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"unknown compute dtype {name!r}; choose one of {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); choose cpu, cuda or cuda:N") from error
    return device
