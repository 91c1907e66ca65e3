"""The whole flow: images → transformed → pixel values → both encoders → concatenated features → projected tokens."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vla_perception.fingerprint_inputs import fingerprint
from vla_perception.options import tokens_per_view
from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.open import check_model, is_preset, open_model
from vla_perception.tokenizer.config import TokenizerConfig
from vla_perception.tokenizer.devices import TORCH_DTYPES, Placement, place, without_autocast
from vla_perception.tokenizer.film import Condition
from vla_perception.tokenizer.image_inputs import ImageLike, as_images
from vla_perception.tokenizer.image_transforms import ImageTransforms, Step, compose
from vla_perception.tokenizer.network import TokenizerNetwork, empty_network
from vla_perception.tokenizer.pil_taps import FILTERS
from vla_perception.tokenizer.preprocess import Preprocessor, source_to_grid
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor, UploadedImages
from vla_perception.tokenizer.presets import PRESETS
from vla_perception.tokenizer.runtime import make_runtime
from vla_perception.tokenizer.weights import draw_random, load_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vla_perception.tokenizer.config import TokenizerOptions

log = logging.getLogger(__name__)

#: Images, and of each the steps of its transforms that are left to `_preprocessor`.
_Transformed = tuple[Sequence[np.ndarray], Sequence[tuple[Step, ...]] | None]


@dataclass(frozen=True)
class TokenizerOutput:
    """What the encoders and the projector computed.

    Attributes:
        tokens: [views, tokens, channels] in the compute dtype, on the tokenizer's device. Constants to autograd: a head
            can be trained on them.
        features: [views, tokens, encoder channels], before the projector; None unless asked for.
        condition: digest (hex) of the condition that they were computed with; None for models without FiLM.
    """

    tokens: torch.Tensor
    features: torch.Tensor | None
    condition: str | None = None


class VisualTokenizer:
    """Images → the visual tokens of a dual-encoder (DINOv2 + SigLIP) vision-language-action model.

    Computes what OpenVLA's vision backbone and projector compute (Kim et al., 2024, after Karamcheti et al.,
    "Prismatic VLMs", 2024). Use `load`, `from_checkpoint` or `from_preset` to make one.

    All three take the same options, by keyword; `TokenizerConfig.with_options` has their meaning: ``encoders``,
    ``token_strategy``, ``projector``, ``pool``, ``image_size``, ``image_transforms``.

    Attributes:
        config: the model's configuration, options included.
        model: its name.
        weights: ``"checkpoint"`` or ``"random"``.
        notes: sentences for the user about where the weights come from.
        device, compute_dtype: where and in what precision encoders and projector run; never ``auto``. ``float8``:
            float8.py has what is float8 and what is bfloat16.
        network: encoders and projector. The runtime may change its modules when it first runs.
        grid: (rows, columns) of patch tokens, after pixel shuffle and pooling.
        channels: width of a token; `feature_channels` is the width before the projector.
        weights_digest: SHA-256 (hex) over the tensors as stored.
        fingerprint: SHA-256 (hex) over that and the settings that change tokens, the same on every
            machine and whatever `device` and `compute_dtype` are.
    """

    def __init__(
        self,
        config: TokenizerConfig,
        network: TokenizerNetwork,
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
        self._dtype = TORCH_DTYPES[compute_dtype]
        self.network = network
        with without_autocast(self.device):
            self._runtime = make_runtime(runtime, network, self.device, self._dtype, compute_dtype == "float8")
        self._condition = Condition(network, config.film, self.device, self._dtype)
        self._transforms = ImageTransforms(config.image_transforms)
        on_device = self.device.type == "cuda" and all(encoder.interpolation in FILTERS for encoder in config.encoders)
        self._preprocessor = (
            DevicePreprocessor(config.encoders, self.device) if on_device else Preprocessor(config.encoders)
        )
        self._towers = network.towers
        rows, columns = network.patch_grid
        self.grid: tuple[int, int] = (rows // config.patches_per_side, columns // config.patches_per_side)
        self.feature_channels = network.feature_channels
        self.channels = network.channels
        self.weights_digest = weights_digest
        self.fingerprint = fingerprint({"settings": config.settings(), "weights": weights_digest})

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
        **options: Unpack[TokenizerOptions],
    ) -> VisualTokenizer:
        """A preset's name for random weights (drawn from `seed`), or anything that `from_checkpoint` takes.

        Args:
            device, compute_dtype: see `devices.place`; what ``auto`` came to is in the attributes, and in the log.
            runtime: how the network runs on the device, one of `runtime.RUNTIMES`.

        Raises:
            ValueError: neither of the two, a wrong device, dtype or runtime, options that make no sense;
                CheckpointError for unusable files.
        """
        if is_preset(model):
            check_model(str(model), adapter, **options)
            return cls.from_preset(
                str(model), seed=seed, device=device, compute_dtype=compute_dtype, runtime=runtime, **options
            )
        return cls.from_checkpoint(
            model, adapter=adapter, device=device, compute_dtype=compute_dtype, runtime=runtime, **options
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
        **options: Unpack[TokenizerOptions],
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
            ValueError: options that make no sense; says why.
        """
        placement = _place(device, compute_dtype)
        checkpoint, resizable = open_model(model, adapter, options.get("image_size"))
        if resizable:  # its position embeddings are resampled already
            options.pop("image_size", None)
        config = checkpoint.config.with_options(trained=True, **options)
        try:
            network = empty_network(config)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        digest = load_checkpoint(network, checkpoint, placement)
        return cls(
            config,
            network,
            weights="checkpoint",
            weights_digest=digest,
            compute_dtype=placement.compute_dtype,
            runtime=runtime,
            notes=checkpoint.notes,
        )

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int = 0,
        device: str = "auto",
        compute_dtype: str = "auto",
        runtime: str = "auto",
        **options: Unpack[TokenizerOptions],
    ) -> VisualTokenizer:
        """The architecture of a preset with random weights: right shapes and costs, meaningless tokens.

        Weights are drawn with NumPy's PCG64, so they are the same on every machine (torch's seeded draws
        differ between CPU types).
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        placement = _place(device, compute_dtype)
        config = PRESETS[name].with_options(trained=False, **options)
        network = empty_network(config)
        digest = draw_random(network, seed, placement)
        return cls(
            config,
            network,
            weights="random",
            weights_digest=digest,
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
        """What computes between the matrix products: ``pytorch``, or ``triton``, with a reason where the first had to; and
        which tuned products are in use, if any: with others, last bits can be others.
        """
        return self._runtime.kernels

    @property
    def tokens_per_view(self) -> int:
        """Tokens of one view."""
        return tokens_per_view(self.config.token_strategy, self.grid[0] * self.grid[1])

    def preprocess(
        self, images: ImageLike | Sequence[ImageLike], cameras: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """Images of any sizes → per encoder float32 [views, 3, side, side].

        Transformed as the configuration says, then bit-identical to OpenVLA's image processor. On the CPU, or on the GPU
        that encodes; there it may still be being computed on the current stream.

        Args:
            images: one, several, or a batch: uint8 arrays [height, width, 3] RGB, uint8 tensors (channels first or
                last), Pillow's images, paths of image files.
            cameras: which camera each image comes from; needed where images are transformed differently per camera.

        Raises:
            ValueError: no such images (floats, for one), or one that cannot be transformed (smaller than its crop).
        """
        return self._preprocessor(*self._transformed(as_images(images), cameras))

    def prepare(
        self, images: ImageLike | Sequence[ImageLike], cameras: Sequence[str] | None = None
    ) -> UploadedImages | list[torch.Tensor]:
        """What can be done for images before the encoders are free; `encode` does the rest.

        On a GPU they are uploaded on the current stream, and `encode`, on any stream, computes pixel values and tokens in
        one CUDA graph. On a CPU it is `preprocess`. Arguments and errors are those of `preprocess`.
        """
        images, steps = self._transformed(as_images(images), cameras)
        if not isinstance(self._preprocessor, DevicePreprocessor):
            return self._preprocessor(images, steps)
        return UploadedImages(self._preprocessor.plan(images, steps), images, cameras)

    def _transformed(self, images: Sequence[np.ndarray], cameras: Sequence[str] | None) -> _Transformed:
        if cameras is not None and len(cameras) != len(images):
            raise ValueError(f"{len(images)} images need as many cameras, got {list(cameras)}")
        if not self._transforms:
            return images, None
        named: Sequence[str | None] = cameras or [None] * len(images)
        if isinstance(self._preprocessor, DevicePreprocessor) and self._preprocessor.does_steps:
            return self._transforms.images_on_host(images, named)
        return self._transforms.images(images, named), None

    def encode(self, pixel_values: UploadedImages | Sequence[torch.Tensor], features: bool = False) -> TokenizerOutput:
        """What `preprocess` or `prepare` gave → tokens; `features` also returns what went into the projector, pooled alike."""
        with self._computing() as condition:
            self._need_condition(condition)
            if isinstance(pixel_values, UploadedImages):
                found = self._of_uploaded(pixel_values, features)
            else:
                found = self._encoded(pixel_values, features)
        return _output(*found, condition)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[str | None]:
        """In the compute dtype, whatever a caller's autocast is, and by one condition; yields its digest."""
        with self._condition.held() as condition, torch.inference_mode(), without_autocast(self.device):
            yield condition

    def encode_empty(self, features: bool = False) -> TokenizerOutput:
        """Of one view without an image: pixel values of -1, as LeRobot and openpi have it for a missing camera."""
        return self.encode(self._empty_view(), features)

    def _empty_view(self) -> list[torch.Tensor]:
        sizes = [encoder.image_size for encoder in self.config.encoders]
        return [torch.full((1, 3, size, size), -1.0, device="cpu") for size in sizes]

    @property
    def condition_channels(self) -> int:
        """Length of the condition that `set_condition` takes; 0 for models without FiLM, which take none."""
        return self._condition.channels

    @property
    def condition(self) -> str | None:
        """Digest (hex) of the condition that is set; None before the first one, and for models without FiLM."""
        return self._condition.digest

    def set_condition(self, vector: np.ndarray | Sequence[float]) -> str:
        """What modulates the encoders beside the image, for models with FiLM: the mean of an instruction's embeddings.

        Scale and shift of all blocks are computed here, once. It may be called while other threads encode: what they have
        begun is finished with the condition from before.

        Args:
            vector: [condition_channels].

        Returns:
            its digest (hex), which tokens of that condition carry.

        Raises:
            ValueError: a model without FiLM, or no such vector of finite numbers.
        """
        return self._condition.set(vector)

    def _need_condition(self, condition: str | None) -> None:
        if self._condition.channels and condition is None:
            raise ValueError(
                f"{self.model} has FiLM: its tokens depend on the instruction, too. Call set_condition with the mean of the "
                f"instruction's embeddings ({self._condition.channels} numbers) first"
            )

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        features: bool = False,
        cameras: Sequence[str] | None = None,
    ) -> TokenizerOutput:
        """`preprocess` and `encode` in one: on a GPU, one CUDA graph, captured in the first call with images of such sizes."""
        transformed = self._transformed(as_images(images), cameras)
        with self._computing() as condition:
            self._need_condition(condition)
            found = self._tokens(transformed, features, cameras)
        return _output(*found, condition)

    def _encoded(
        self, pixel_values: Sequence[torch.Tensor], features: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Features, if asked for, and tokens."""
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
        return joined if features else None, tokens

    def _tokens(
        self, transformed: _Transformed, features: bool, cameras: Sequence[str] | None, announced: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        images, steps = transformed
        if isinstance(self._preprocessor, DevicePreprocessor):
            plan = self._preprocessor.plan(images, steps)
            upload = functools.partial(plan.upload, images)
            found = self._runtime.from_images(plan, upload, features, cameras=cameras, announced=announced)
            return found or self._encoded(plan.pixel_values(plan.upload(images)), features)
        return self._encoded(self._preprocessor(images, steps), features)

    def _of_uploaded(self, images: UploadedImages, features: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        plan, source = images.plan, images.memory()
        found = self._runtime.from_images(
            plan, lambda memory: memory.copy_(source, non_blocking=True), features, cameras=images.cameras
        )
        return found or self._encoded(plan.pixel_values(source), features)

    def warm_up(
        self,
        views: int = 1,
        size: tuple[int, int] = (480, 640),
        cameras: Sequence[str] | None = None,
        empty_view: bool = False,
    ) -> None:
        """Runs some times on black images, so that the first real frame does not pay for set-up.

        Weights are packed, code is compiled, and the CUDA graphs for this number of views are captured here. Images of
        other sizes take some milliseconds more at their first time, in which PIL's weights for them are computed, and
        on a GPU some 0.1 s more, in which a graph for that size and encoding (bgr8, mono8, ...) is captured; the log
        says so. This may be called for several sizes and numbers of views.

        Args:
            size: (height, width) of the RGB images that `__call__` or `prepare` will get.
            cameras: that they come from, as for `preprocess`.
            empty_view: whether `encode_empty` will be called, too, which is another number of views.
        """
        images = [np.zeros((*size, 3), np.uint8)] * views
        with self._computing():
            self._encoded(self._preprocessor(images), features=False)
            if empty_view and views > 1 and self.runtime in ("graph", "compile"):
                self._encoded(self._empty_view(), features=False)
        if self.device.type == "cuda":
            transformed: _Transformed = (images, None)
            with contextlib.suppress(ValueError):  # such images cannot be transformed: too small, or of unknown cameras
                transformed = self._transformed(images, cameras)
            with self._computing():
                self._tokens(transformed, features=False, cameras=cameras, announced=True)
            # Not the whole device: another thread may be capturing a graph.
            torch.cuda.current_stream(self.device).synchronize()

    def affine(self, height: int, width: int, camera: str | None = None) -> tuple[float, ...]:
        """Map from a source image's pixels to the token grid: six floats, a row-major 2 × 3 matrix.

        (x, y, 1), where pixel i covers [i, i + 1), goes to (column, row), where token j covers [j, j + 1).

        Raises:
            ValueError: an image of that size cannot be transformed.
        """
        affine, height, width = self._transforms.affine(height, width, camera)
        to_patches = source_to_grid(height, width, self.config.encoders[0], self._towers[0].patch_size)
        return tuple(value / self.config.patches_per_side for value in compose(to_patches, affine))

    def roi(self, height: int, width: int, camera: str | None = None) -> tuple[float, ...] | None:
        """(left, top, right, bottom) of what the image transforms leave of a source image, in pixels; None: all of it."""
        (a, _, c, _, e, f), new_height, new_width = self._transforms.affine(height, width, camera)
        # Every step keeps the axes, so the transformed image's corners are those of what was left.
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
                    **({"final_norm": True} if config.final_norm else {}),
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
            **({"pixel_shuffle": shuffle} if (shuffle := self.config.patches_per_side // self.config.pool) > 1 else {}),
        }


def _output(features: torch.Tensor | None, tokens: torch.Tensor, condition: str | None) -> TokenizerOutput:
    """Tensors that autograd may save for a backward pass, unless the caller is in inference mode too."""

    def usable(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor

    return TokenizerOutput(usable(tokens), None if features is None else usable(features), condition)


def _place(device: str, compute_dtype: str) -> Placement:
    placement = place(device, compute_dtype)
    log.info("computes on %s", placement)
    for warning in placement.warnings:
        log.warning("%s", warning)
    return placement
