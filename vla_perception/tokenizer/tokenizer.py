"""The whole flow: images → prepared → pixel values → both encoders → concatenated features → projected tokens."""

from __future__ import annotations

import contextlib
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

from vla_perception.tokenizer.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    WeightsDigest,
    fingerprint,
    merged,
)
from vla_perception.tokenizer.checkpoints.open import open_model
from vla_perception.tokenizer.devices import COMPUTE_DTYPES, Placement, place
from vla_perception.tokenizer.encoder import PatchEncoder
from vla_perception.tokenizer.image_transforms import Prepare, Step, compose
from vla_perception.tokenizer.preprocess import Preprocessor, source_to_grid
from vla_perception.tokenizer.preprocess_gpu import FILTERS, DevicePreprocessor
from vla_perception.tokenizer.presets import PRESETS, ModelConfig, check_model
from vla_perception.tokenizer.projector import Projector
from vla_perception.tokenizer.runtime import make_runtime
from vla_perception.tokenizer.timm_import import on_meta

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerOutput:
    """What the encoders and the projector computed.

    Attributes:
        tokens: [views, tokens, channels] in the compute dtype, on the tokenizer's device.
        features: [views, tokens, encoder channels], before the projector; None unless asked for.
        grid: (rows, columns); patch tokens run row by row.
    """

    tokens: torch.Tensor
    features: torch.Tensor | None
    grid: tuple[int, int]


class _Network(nn.Module):
    """Encoders, concatenation along channels, projector, pooling."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict(
            {encoder.name: PatchEncoder(encoder, summary=config.summary) for encoder in config.encoders}
        )
        self.patch_grid = config.joint_grid({name: encoder.grid for name, encoder in self.encoders.items()})
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
        return self.join([branch(pixels) for branch, pixels in zip(self.branches(), pixel_values)])

    def branches(self) -> list[Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
        """What can run side by side, in the order of the encoders: pixel values → `PatchEncoder.parts`."""
        return [encoder.parts for encoder in self.encoders.values()]

    def join(self, parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The branches' results → features and tokens."""
        if self.config.token_strategy == "cls":
            features = torch.cat([summary for _, summary in parts], dim=-1)
        else:
            # [patches], or [patches, summary], of all encoders; the summary goes in front.
            joined = [torch.cat(values, dim=-1) for values in zip(*parts)]
            features = joined[0] if len(joined) == 1 else torch.cat(joined[::-1], dim=1)
        tokens = self.projector(features)
        return self._pooled(features), self._pooled(tokens)

    def _pooled(self, values: torch.Tensor) -> torch.Tensor:
        """Averages k × k neighbouring patches; a summary in front stays as it is."""
        k = self.config.pool
        if k == 1:
            return values
        rows, columns = self.patch_grid
        in_front = values.shape[1] - rows * columns
        patches = values[:, in_front:].unflatten(1, (rows // k, k, columns // k, k)).mean((2, 4)).flatten(1, 2)
        return torch.cat([values[:, :in_front], patches], dim=1)


class VisualTokenizer:
    """Images → the visual tokens of a dual-encoder (DINOv2 + SigLIP) vision-language-action model.

    Computes what OpenVLA's vision backbone and projector compute (Kim et al., 2024, after Karamcheti et al.,
    "Prismatic VLMs", 2024). Use `load`, `from_checkpoint` or `from_preset` to make one.

    All three take the same choices, by keyword; `ModelConfig.choose` has their meaning: ``encoders``,
    ``token_strategy``, ``projector``, ``pool``, ``image_size``, ``prepare``.

    Attributes:
        config: the model's configuration, choices included.
        model: its name.
        weights: ``"checkpoint"`` or ``"random"``.
        notes: sentences for the user about where the weights come from.
        device, compute_dtype: where and in what precision encoders and projector run; never ``auto``. ``float8``:
            float8.py has what is float8 and what is bfloat16.
        network: encoders and projector. The runtime may change its modules when it first runs.
        grid: (rows, columns) of patch tokens, after pooling.
        channels: width of a token; `feature_channels` is the width before the projector.
        weights_digest: SHA-256 (hex) over the tensors as stored.
        fingerprint: SHA-256 (hex) over that and the settings that change tokens, the same on every
            machine and whatever `device` and `compute_dtype` are.
    """

    def __init__(
        self,
        config: ModelConfig,
        network: _Network,
        *,
        weights: str,
        weights_digest: str,
        compute_dtype: str,
        runtime: str = "auto",
        notes: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.model = config.name
        self.weights = weights
        self.notes = tuple(notes)
        self.compute_dtype = compute_dtype
        self.device = next(network.parameters()).device
        self._dtype = COMPUTE_DTYPES[compute_dtype]
        self.network = network
        self._runtime = make_runtime(runtime, network, self.device, self._dtype, compute_dtype == "float8")
        self._prepare = Prepare(config.prepare)
        on_device = self.device.type == "cuda" and all(encoder.interpolation in FILTERS for encoder in config.encoders)
        self._preprocessor = (
            DevicePreprocessor(config.encoders, self.device) if on_device else Preprocessor(config.encoders)
        )
        self._towers: list[PatchEncoder] = list(network.encoders.values())  # type: ignore[arg-type]
        rows, columns = network.patch_grid
        self.grid: tuple[int, int] = (rows // config.pool, columns // config.pool)
        self.feature_channels: int = sum(encoder.channels for encoder in self._towers)
        self.channels: int = network.projector.channels
        self.weights_digest = weights_digest
        self.fingerprint = fingerprint(weights_digest, config.settings())

    @classmethod
    def load(
        cls,
        model: str | os.PathLike,
        *,
        device: str = "auto",
        compute_dtype: str = "auto",
        runtime: str = "auto",
        seed: int = 0,
        adapter: str | os.PathLike | None = None,
        **choices: object,
    ) -> VisualTokenizer:
        """A preset's name for random weights (drawn from `seed`), or anything that `from_checkpoint` takes.

        Args:
            device, compute_dtype: see `devices.place`; what ``auto`` came to is in the attributes, and in the log.
            runtime: how the network runs on the device, one of `runtime.RUNTIMES`.

        Raises:
            ValueError: neither of the two, a wrong device, dtype or runtime, choices that make no sense;
                CheckpointError for unusable files.
        """
        if str(model) in PRESETS and not Path(model).is_dir():
            check_model(str(model), adapter, **choices)
            return cls.from_preset(
                str(model), seed=seed, device=device, compute_dtype=compute_dtype, runtime=runtime, **choices
            )
        return cls.from_checkpoint(
            model, adapter=adapter, device=device, compute_dtype=compute_dtype, runtime=runtime, **choices
        )

    @classmethod
    def from_checkpoint(
        cls,
        model: str | os.PathLike,
        *,
        adapter: str | os.PathLike | None = None,
        device: str = "auto",
        compute_dtype: str = "auto",
        runtime: str = "auto",
        **choices: object,
    ) -> VisualTokenizer:
        """Vision backbone and projector of what people have on disk (docs/models.md).

        Only their tensors are read; host memory grows by them in the compute dtype, and little more.

        Args:
            model: directory as OpenVLA or OpenVLA-OFT publishes it; LoRA adapter that names its base model;
                Prismatic's run directory or ``.pt``; Hugging Face id, ``org/name[@revision]``; timm's encoders,
                ``timm:NAME[@SIZE][=FILE][+…]``.
            adapter: directory of a LoRA adapter (peft) to add; ``"none"`` leaves out one that lies in ``lora_adapter/``.

        Raises:
            CheckpointError: files are missing, damaged, or do not fit; lists the tensors at fault.
            ValueError: choices that make no sense; says why.
        """
        placement = _place(device, compute_dtype)
        checkpoint, resizable = open_model(model, adapter, choices.get("image_size"))
        if resizable:  # its position embeddings are resampled already
            choices.pop("image_size", None)
        config = checkpoint.config.choose(trained=True, **choices)
        try:
            network = empty_network(config)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        names = network.canonical_tensors()
        state = network.state_dict()
        shapes = {name: tuple(state[inner].shape) for name, inner in names.items()}
        checkpoint.check(shapes, _is_unused(network, checkpoint))

        cache = checkpoint.digest_cache(names)
        known = _cached_digest(cache)
        digest = None if re.fullmatch("[0-9a-f]{64}", known) else WeightsDigest()
        _fill(network, names, checkpoint.read(names), digest, placement.device, placement.dtype)
        checkpoint.check_unchanged()
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
        return cls(
            config,
            network,
            weights="checkpoint",
            weights_digest=known,
            compute_dtype=placement.compute_dtype,
            runtime=runtime,
            notes=checkpoint.notes,
        )

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        weights: str = "random",
        seed: int = 0,
        device: str = "auto",
        compute_dtype: str = "auto",
        runtime: str = "auto",
        **choices: object,
    ) -> VisualTokenizer:
        """The architecture of a preset with random weights: right shapes and costs, meaningless tokens.

        Weights are drawn with NumPy's PCG64, so they are the same on every machine (torch's seeded draws
        differ between CPU types).
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        if weights != "random":
            raise ValueError(f"presets have random weights only, not {weights!r}; use from_checkpoint for trained ones")
        placement = _place(device, compute_dtype)
        config = PRESETS[name].choose(trained=False, **choices)
        network = empty_network(config)
        names = network.canonical_tensors()
        state = network.state_dict()
        shapes = {canonical: tuple(state[inner].shape) for canonical, inner in names.items()}
        digest = WeightsDigest()
        drawn = ((canonical, {"": random_weight(canonical, shapes[canonical], seed)}) for canonical in sorted(names))
        _fill(network, names, drawn, digest, placement.device, placement.dtype)
        return cls(
            config,
            network,
            weights="random",
            weights_digest=digest.hexdigest(),
            compute_dtype=placement.compute_dtype,
            runtime=runtime,
        )

    @property
    def runtime(self) -> str:
        """How the network runs, one of `runtime.RUNTIMES`; ``eager`` also where no CUDA graph could be captured.

        ``graph`` with a `runtime_fallback`: there is a graph, and what that names runs without one.
        """
        return self._runtime.name

    @property
    def runtime_fallback(self) -> str:
        """What does not run as was asked for, and why: all of it, or some numbers of views or sizes. Empty if all does."""
        return self._runtime.fallback

    @property
    def kernels(self) -> str:
        """What computes between the matrix products: ``pytorch``, or ``triton``, with a reason where the first had to."""
        return self._runtime.kernels

    @property
    def tokens_per_view(self) -> int:
        patches = self.grid[0] * self.grid[1]
        return {"patch": patches, "cls": 1, "cls+patch": 1 + patches}[self.config.token_strategy]

    def preprocess(
        self, images: Sequence[np.ndarray] | np.ndarray, cameras: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """uint8 RGB [height, width, 3] images of any sizes → per encoder float32 [views, 3, side, side].

        Prepared as the configuration says, then bit-identical to OpenVLA's image processor. On the CPU, or on the GPU
        that encodes; there it may still be being computed on the current stream.

        Args:
            cameras: which camera each image comes from; needed where images are prepared differently per camera.

        Raises:
            ValueError: no such images, or one that cannot be prepared (smaller than its region of interest).
        """
        return self._preprocessor(*self._prepared(images, cameras))

    def _prepared(
        self, images: Sequence[np.ndarray] | np.ndarray, cameras: Sequence[str] | None
    ) -> tuple[Sequence[np.ndarray], Sequence[tuple[Step, ...]] | None]:
        """Arguments of `_preprocessor`: images, and what of their preparation is left to it."""
        if isinstance(images, np.ndarray) and images.ndim == 3:
            images = [images]
        if cameras is not None and len(cameras) != len(images):
            raise ValueError(f"{len(images)} images need as many cameras, got {list(cameras)}")
        if not self._prepare:
            return images, None
        cameras = cameras or [None] * len(images)
        if isinstance(self._preprocessor, DevicePreprocessor) and self._preprocessor.does_steps:
            return self._prepare.begin(images, cameras)
        return self._prepare.images(images, cameras), None

    @torch.inference_mode()
    def encode(self, pixel_values: Sequence[torch.Tensor], features: bool = False) -> TokenizerOutput:
        """What `preprocess` gave → tokens; `features` also returns what went into the projector, pooled alike."""
        if len(pixel_values) != len(self._towers):
            raise ValueError(f"{len(self._towers)} tensors are needed, one per encoder, got {len(pixel_values)}")
        for encoder, pixels in zip(self.config.encoders, pixel_values):
            needed = [len(pixel_values[0]), 3, encoder.image_size, encoder.image_size]
            if list(pixels.shape) != needed or not needed[0]:
                raise ValueError(
                    f"encoder {encoder.name} takes pixel values [views, 3, {encoder.image_size}, {encoder.image_size}], "
                    f"at least one view and as many as the others, got {list(pixels.shape)}; `preprocess` makes them"
                )
        joined, tokens = self._runtime(pixel_values, features)
        return TokenizerOutput(tokens, joined if features else None, self.grid)

    @torch.inference_mode()
    def __call__(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        features: bool = False,
        cameras: Sequence[str] | None = None,
    ) -> TokenizerOutput:
        """`preprocess` and `encode` in one: on a GPU, one CUDA graph from the second call with such sizes on."""
        return self._tokens(*self._prepared(images, cameras), features)

    def _tokens(
        self, images: Sequence[np.ndarray], steps: Sequence[tuple[Step, ...]] | None, features: bool
    ) -> TokenizerOutput:
        if isinstance(self._preprocessor, DevicePreprocessor):
            found = self._runtime.from_images(self._preprocessor.plan(images, steps), images, features)
            if found is not None:
                return TokenizerOutput(found[1], found[0], self.grid)
        return self.encode(self._preprocessor(images, steps), features)

    def warm_up(self, views: int = 1, size: tuple[int, int] = (480, 640), cameras: Sequence[str] | None = None) -> None:
        """Runs some times on black images, so that the first real frame does not pay for set-up.

        Weights are packed, code is compiled, and the CUDA graphs for this number of views are captured here. Images of
        other sizes take some milliseconds more at their first time, in which PIL's weights for them are computed;
        encodings (bgr8, mono8, ...) make no difference.

        Args:
            size: (height, width) of the images that `__call__` will get.
            cameras: that they come from, as for `preprocess`.
        """
        images = [np.zeros((*size, 3), np.uint8)] * views
        self.encode(self._preprocessor(images))
        if self.device.type == "cuda":
            prepared: tuple = (images, None)
            with contextlib.suppress(ValueError):  # such images cannot be prepared: too small, or of unknown cameras
                prepared = self._prepared(images, cameras)
            with torch.inference_mode():
                for _ in range(2):  # a graph with preprocessing is captured at the second time
                    self._tokens(*prepared, features=False)
            # Not the whole device: somebody else may be capturing a graph.
            torch.cuda.current_stream(self.device).synchronize()

    def affine(self, height: int, width: int, camera: str | None = None) -> tuple[float, ...]:
        """Map from a source image's pixels to the token grid: six floats, a row-major 2 × 3 matrix.

        (x, y, 1), where pixel i covers [i, i + 1), goes to (column, row), where token j covers [j, j + 1).

        Raises:
            ValueError: an image of that size cannot be prepared.
        """
        prepared, height, width = self._prepare.affine(height, width, camera)
        to_patches = source_to_grid(height, width, self.config.encoders[0], self._towers[0].patch_size)
        return tuple(value / self.config.pool for value in compose(to_patches, prepared))

    def seen(self, height: int, width: int, camera: str | None = None) -> tuple[float, ...] | None:
        """(left, top, right, bottom) of what `prepare` leaves of a source image, in pixels; None: all of it."""
        (a, _, c, _, e, f), new_height, new_width = self._prepare.affine(height, width, camera)
        # Every step keeps the axes, so the prepared image's corners are those of what was left.
        (left, right), (top, bottom) = sorted((-c / a, (new_width - c) / a)), sorted((-f / e, (new_height - f) / e))
        part = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
        whole = (0.0, 0.0, float(width), float(height))
        return None if all(abs(edge - end) < 1e-6 for edge, end in zip(part, whole)) else part

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
        inputs = {"settings": self.config.settings(), "weights": self.weights_digest}
        # Of a preset as it is there is nothing to tell: no policy was trained on random weights.
        as_it_is = self.weights == "random" and self.config == PRESETS.get(self.model)
        return {
            "model": self.model,
            "weights": self.weights,
            "fingerprint": self.fingerprint,
            **({} if as_it_is else {"fingerprint_inputs": inputs}),
            "compute_dtype": self.compute_dtype,
            "grid": list(self.grid),
            "token_strategy": self.config.token_strategy,
            "pool": self.config.pool,
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


def empty_network(config: ModelConfig) -> _Network:
    """Encoders and projector on the meta device: shapes without memory. ValueError if they do not go together."""
    with on_meta():
        return _Network(config).eval().requires_grad_(False)


def _is_unused(network: _Network, checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Tells tensors that may be there and are not read: encoders and projector that were not chosen, and for patch
    tokens the last block, final norm and pooling head."""
    patterns = []
    for config in checkpoint.config.encoders:
        name, tower = re.escape(config.name), network.encoders[config.name] if config.name in network.encoders else None
        if tower is None:
            patterns.append(rf"{name}\.")
        elif not network.config.summary:
            patterns.append(rf"{name}\.(blocks\.{tower.layer + 1}\.|norm\.|fc_norm\.|attn_pool\.)")
    if network.config.projector != checkpoint.config.projector:
        patterns.append(r"projector\.")
    return re.compile("|".join(patterns) or r"(?!)").match  # type: ignore[return-value]


def _cached_digest(cache: Path | None) -> str:
    """What an earlier load computed; empty if there is nothing, or nothing that can be read."""
    try:
        return "" if cache is None else cache.read_text().strip()
    except (OSError, ValueError):
        return ""


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


def _place(device: str, compute_dtype: str) -> Placement:
    placement = place(device, compute_dtype)
    log.info("computes on %s", placement)
    for warning in placement.warnings:
        log.warning("%s", warning)
    return placement
