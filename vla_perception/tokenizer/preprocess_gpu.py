"""uint8 RGB images → each encoder's ``pixel_values`` on the device, bit-identical to `preprocess`.

An image crosses to the device once, as the bytes that the camera sent. PIL resizes 8-bit images in exact integer arithmetic
(``Resample.c``): weights of 22 fractional bits, one pass along the rows and one along the columns, each rounded and
clipped to 8 bits. So the same sums over the same weights give the same pixels on any device. They are int32 here, as
in PIL, and not matrix products: float64 is as exact and slow on most devices, and float32 in two halves is exact only
as long as TF32 is not allowed. On CUDA each pass is one Triton kernel (`preprocess_kernels`); where there is no Triton,
or it cannot compile, PyTorch does the same sums in some 20 kernels.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from vla_perception.tokenizer.config import FLOAT_RESIZES, EncoderConfig
from vla_perception.tokenizer.image_inputs import check_image
from vla_perception.tokenizer.image_layout import Layout, memory_of
from vla_perception.tokenizer.image_transforms import Step, parse_step
from vla_perception.tokenizer.pil_taps import PRECISION_BITS, square_taps
from vla_perception.tokenizer.preprocess import (
    Preprocessor,
    check_pillow,
    letterbox_padding,
    normalization_table,
    square_window,
)
from vla_perception.tokenizer.resize_with_pad import FloatResize
from vla_perception.tokenizer.upload import upload

if TYPE_CHECKING:
    from vla_perception.tokenizer.image_transforms_gpu import DeviceSteps

log = logging.getLogger(__name__)

#: Products of one pass that are in memory at a time, 4 bytes each.
_MAX_PRODUCTS = 1 << 25


@dataclass(frozen=True, eq=False)
class _Resize:
    """One resize of all images of one size, for the encoders that share it; tensors lie on the device.

    Attributes:
        encoders: their indices.
        views: int64 [views, VIEW_COLUMNS] of `preprocess_kernels`: layouts, and places in the outputs.
        across, down: taps of the two passes, (int32 first index [side], int32 weights [taps, side]).
        rows: (first, number) of the padded image's rows that the second pass reads.
    """

    encoders: tuple[int, ...]
    views: torch.Tensor
    across: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    size: tuple[int, int]
    padding: tuple[int, int]
    fill: tuple[int, int, int]
    rows: tuple[int, int]


class PreprocessPlan:
    """How images of certain sizes and layouts in memory become pixel values; made by `DevicePreprocessor.plan`.

    Two steps, so that the second can be a part of a CUDA graph:

        plan = preprocessor.plan(images)            # cached; the same one for images of equal sizes and layouts
        source = plan.upload(images)                # or plan.upload(images, into=static_source)
        plan.run(source, outputs)                   # kernels only

    `run` launches kernels on the current stream and nothing else: it does not wait for the device, copies nothing from the
    host, and what memory it takes comes from torch's allocator, so in a capture from the graph's own pool. A graph that holds
    it reads the same `source` and writes the same `outputs` at every replay, and needs the plan as long as it lives. Plans
    are read only: any number of threads may use one.

    Attributes:
        key: sizes and layouts of the images, and their steps. A graph is for one value of this, and holds on to its plan:
            the kernels read the plan's tensors at every replay.
        nbytes: length of the source.
        outputs: shape of each output, [views, 3, side, side] per encoder.
        capturable: whether `run` can be a part of a CUDA graph; not without the kernels.
    """

    def __init__(
        self,
        owner: DevicePreprocessor,
        layouts: tuple[Layout, ...],
        steps: tuple[tuple[Step, ...], ...],
        kernels: ModuleType | None,
    ) -> None:
        self.layouts = layouts
        self.key = (layouts, steps)
        self.capturable = kernels is not None
        self.nbytes = sum(layout.nbytes for layout in layouts)
        self.outputs = [(len(layouts), 3, config.image_size, config.image_size) for config in owner.encoders]
        self._owner = owner
        self._kernels = kernels
        self._starts = np.cumsum([0, *(layout.nbytes for layout in layouts)]).tolist()
        groups: dict[tuple[int, int, tuple[Step, ...]], list[int]] = {}
        for view, (layout, chain) in enumerate(zip(layouts, steps)):
            groups.setdefault((layout.height, layout.width, chain), []).append(view)
        self._groups = [((height, width), views) for (height, width, _), views in groups.items()]
        self._stages: list[tuple[DeviceSteps | None, torch.Tensor, list[_Resize]]] = []
        #: per group, of the encoders that are fed in float32
        self._float_resizes: list[list[tuple[tuple[int, ...], FloatResize]]] = []
        for (height, width, chain), views in groups.items():
            image_size = (height, width)
            if kernels:
                table = self._view_table(views)
                prepared = owner.make_steps(chain, image_size, views) if chain else None
                image_size, read = (prepared.image_size, prepared.views) if prepared else (image_size, table)
                resizes = [owner.make_resize(sharing, image_size, read) for sharing in owner.sharing]
                self._stages.append((prepared, table, resizes))
            self._float_resizes.append(
                [(sharing, owner.make_float_resize(sharing, image_size)) for sharing in owner.float_sharing]
            )

    def _view_table(self, views: Sequence[int]) -> torch.Tensor:
        rows = [(self._starts[view] + self.layouts[view].offset, *self.layouts[view].strides, view) for view in views]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").to(self._owner.device)

    def upload(self, images: Sequence[np.ndarray], into: torch.Tensor | None = None) -> torch.Tensor:
        """The images' memory → uint8 [nbytes] on the device, `into` if that is given.

        `images` are not needed any more when it returns; on a GPU the copy to the device may still be running on the current
        stream.

        Args:
            images: of the sizes and layouts that the plan was made for; ValueError if not.
        """
        if len(images) != len(self.layouts):
            raise ValueError(f"the plan is for {len(self.layouts)} images, got {len(images)}")
        memories = []
        for image, layout in zip(images, self.layouts):
            actual, memory = memory_of(image)
            if actual != layout:
                raise ValueError(f"the plan is for an image of {layout}, got {actual}; make a plan for these images")
            memories.append(memory)
        if into is None:
            into = torch.empty(self.nbytes, dtype=torch.uint8, device=self._owner.device)
        upload(memories, into)
        return into

    def run(self, source: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        """What `upload` gave → normalized pixel values, rounded to the dtype of each output.

        Args:
            outputs: contiguous, one per encoder, shaped as `self.outputs`, of float32, bfloat16 or float16.
        """
        tables = [self._owner.tables[index][output.dtype] for index, output in enumerate(outputs)]
        if self._kernels is None:
            self._run_in_torch(source, tables, outputs)
            return
        with _current(source.device):
            for group, (images, (steps, _, resizes)) in enumerate(zip(self.prepare(source), self._stages)):
                if self._float_resizes[group]:
                    self._run_in_float(
                        group, self._planes(source, group) if steps is None else images.permute(0, 3, 1, 2), outputs
                    )
                for resize in resizes:
                    between = self._kernels.along_rows(
                        images, resize.views, resize.across, resize.size, resize.padding, resize.fill, resize.rows
                    )
                    chosen = [(tables[index], outputs[index]) for index in resize.encoders]
                    self._kernels.along_columns(
                        between, resize.views, resize.down, resize.rows[0], *(list(part) for part in zip(*chosen))
                    )

    def pixel_values(self, source: torch.Tensor) -> list[torch.Tensor]:
        """What `upload` gave → per encoder float32 [views, 3, side, side]."""
        outputs = [torch.empty(shape, dtype=torch.float32, device=source.device) for shape in self.outputs]
        self.run(source, outputs)
        return outputs

    def prepare(self, source: torch.Tensor) -> list[torch.Tensor]:
        """What the steps make of the images: per group of equal size and steps uint8 [views, size, size, 3].

        `source` as it is where there are none.
        """
        with _current(source.device):
            return [steps.run(source, views) if steps else source for steps, views, _ in self._stages]

    def _run_in_torch(
        self, source: torch.Tensor, tables: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        owner = self._owner
        for group, (_, views) in enumerate(self._groups):
            planes = self._planes(source, group)
            self._run_in_float(group, planes, outputs)
            for sharing in owner.sharing:
                levels = owner.resize(planes, owner.encoders[sharing[0]]).long()
                for index in sharing:
                    self._put(views, tables[index][owner.channels, levels], outputs[index])

    def _run_in_float(self, group: int, planes: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        """The outputs of encoders that are fed in float32; `planes` are uint8 [views, 3, height, width]."""
        for sharing, resize in self._float_resizes[group]:
            values = resize(planes)
            for index in sharing:
                self._put(self._groups[group][1], values, outputs[index])

    def _put(self, views: Sequence[int], values: torch.Tensor, output: torch.Tensor) -> None:
        if len(views) == len(self.layouts):
            output.copy_(values)
            return
        for view, value in zip(views, values):
            output[view].copy_(value)

    def _planes(self, source: torch.Tensor, group: int) -> torch.Tensor:
        """uint8 [views, 3, height, width] of a group: a view of `source` for one image, a copy for several."""
        (height, width), views = self._groups[group]
        parts = []
        for view in views:
            layout = self.layouts[view]
            counts = (3, height, width)
            strides = (layout.strides[2], *layout.strides[:2])
            first = layout.offset + sum(step * (count - 1) for step, count in zip(strides, counts) if step < 0)
            forward = source.as_strided(counts, [abs(step) for step in strides], self._starts[view] + first)
            backward = [dim for dim, step in enumerate(strides) if step < 0]
            parts.append(forward.flip(backward) if backward else forward)
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)


class UploadedImages:
    """Images on their way to the GPU, as cameras sent them, to be used on any stream."""

    def __init__(
        self, plan: PreprocessPlan, images: Sequence[np.ndarray], cameras: Sequence[str] | None = None
    ) -> None:
        self.plan = plan
        self.cameras = cameras
        self._memory = plan.upload(images)
        self._uploaded = torch.cuda.Event()
        self._uploaded.record(torch.cuda.current_stream(self._memory.device))

    def memory(self) -> torch.Tensor:
        """uint8 [plan.nbytes], for the current stream, which waits for the upload."""
        stream = torch.cuda.current_stream(self._memory.device)
        stream.wait_event(self._uploaded)
        if self._memory.is_cuda:  # else the stream of the upload could be given it again before this one has read it
            self._memory.record_stream(stream)
        return self._memory


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


class DevicePreprocessor:
    """Images → one tensor per encoder, computed on `device`; the same values as `preprocess.Preprocessor`.

    Args:
        encoders: in the order in which tensors are returned; their interpolations must be among `FILTERS`.
        kernels: whether Triton's are used where they can be.

    Attributes:
        fallback: why Triton's kernels are not used on a GPU; empty if they are, and on a CPU.

    Raises:
        ImportError: see `check_pillow`; what is accepted must not depend on the device.
    """

    def __init__(self, encoders: Sequence[EncoderConfig], device: torch.device, kernels: bool = True) -> None:
        check_pillow()
        self.encoders = tuple(encoders)
        self.device = device
        geometries = [config.geometry for config in encoders]
        #: Encoders that share a resize, by their indices.
        self.sharing = [
            tuple(index for index, other in enumerate(geometries) if other == geometry)
            for geometry in dict.fromkeys(geometries)
            if geometry[1] not in FLOAT_RESIZES
        ]
        self.float_sharing = [
            tuple(index for index, other in enumerate(geometries) if other == geometry)
            for geometry in dict.fromkeys(geometries)
            if geometry[1] in FLOAT_RESIZES
        ]
        # Rounded once, here: a table's value in the encoders' dtype is what casting the float32 one would give.
        self.tables = [
            {
                dtype: torch.from_numpy(normalization_table(config)).to(dtype).to(device)
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
            }
            for config in encoders
        ]
        self._fills = {
            config.fill: torch.tensor(config.fill, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
            for config in encoders
            if config.resize_strategy == "letterbox"
        }
        self.channels = torch.arange(3, device="cpu").to(device).view(3, 1, 1)
        # Cameras have few sizes; with many sizes the weights are computed again.
        self._taps = functools.lru_cache(maxsize=64)(self._make_taps)
        self._kernel_taps = functools.lru_cache(maxsize=64)(self._make_kernel_taps)
        self._plan = functools.lru_cache(maxsize=16)(self._make_plan)
        self.fallback = ""
        self._kernels: ModuleType | None = None
        if device.type == "cuda" and kernels:
            self._use_kernels()

    def __call__(
        self, images: Sequence[np.ndarray], steps: Sequence[tuple[Step, ...]] | None = None
    ) -> list[torch.Tensor]:
        """uint8 [height, width, 3] images of any sizes → per encoder float32 [views, 3, side, side].

        Arguments are those of `plan`. On a GPU the result may still be being computed on the current stream; `images` are
        no longer needed.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3:
            images = [images]
        plan = self.plan(images, steps)
        return plan.pixel_values(plan.upload(images))

    def plan(self, images: Sequence[np.ndarray], steps: Sequence[tuple[Step, ...]] | None = None) -> PreprocessPlan:
        """The plan for uint8 [height, width, 3] images of these sizes and layouts; their content does not matter.

        Cached; for new sizes it computes weights and copies them to the device, which takes some milliseconds.

        Args:
            steps: what is left of each image's transforms (`ImageTransforms.images_on_host`), where `does_steps`.

        Raises:
            ValueError: no such images, or one of 2 GiB and more.
        """
        if len(images) == 0:
            raise ValueError("no image given; pass at least one uint8 [height, width, 3] array")
        layouts = tuple(memory_of(check_image(image))[0] for image in images)
        for layout in layouts:
            if layout.nbytes >= 1 << 31:  # the kernels compute places within an image in 32 bits
                raise ValueError(
                    f"an image of {layout.width} × {layout.height} pixels takes {layout.nbytes} bytes; a GPU preprocesses "
                    "images of less than 2 GiB: scale it down, or use device cpu"
                )
        return self._plan(layouts, tuple(steps or [()] * len(images)))

    def _make_plan(self, layouts: tuple[Layout, ...], steps: tuple[tuple[Step, ...], ...]) -> PreprocessPlan:
        return PreprocessPlan(self, layouts, steps, self._kernels)

    @functools.cached_property
    def does_steps(self) -> bool:
        """Whether steps with a `Step.size` can be left to `plan`: where the kernels are used, and these compile, too."""
        if self._kernels is None:
            return False
        image = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
        chain = tuple(parse_step(text) for text in ("lanczos3:28", "center_crop_tf:24"))
        expected = functools.reduce(lambda prepared, step: step.run(prepared), chain, image)
        try:
            plan = self.plan([image], [chain])
            prepared = plan.prepare(plan.upload([image]))[0]
            if not np.array_equal(prepared.cpu().numpy(), expected[None]):
                raise ArithmeticError("their values are not TensorFlow's on this device")
        except Exception as error:
            log.warning(
                "images are transformed on the host, which is slower: no Triton kernels for it: %s", _reason(error)
            )
            return False
        return True

    def make_steps(self, chain: tuple[Step, ...], image_size: tuple[int, int], views: Sequence[int]) -> DeviceSteps:
        from vla_perception.tokenizer.image_transforms_gpu import DeviceSteps

        return DeviceSteps(chain, image_size, views, self.device)

    def _use_kernels(self) -> None:
        """Takes the kernels if they compile here and give PIL's values; says why not in `fallback`."""
        image = np.random.default_rng(0).integers(0, 256, (45, 60, 4), dtype=np.uint8)[::-1, :, 2::-1]
        try:
            from vla_perception.tokenizer import preprocess_kernels

            self._kernels = preprocess_kernels
            for config, got, expected in zip(self.encoders, self([image]), Preprocessor(self.encoders)([image])):
                # Those in float32 are PyTorch's operations on any device, and need no Triton.
                if config.resize_strategy not in FLOAT_RESIZES and not torch.equal(got.cpu(), expected):
                    raise ArithmeticError("their values are not PIL's on this device")
        except Exception as error:
            self._kernels = None
            self.fallback = _reason(error)
            log.warning("preprocessing without Triton's kernels, which is slower: %s", self.fallback)
        self._plan.cache_clear()

    def make_resize(self, sharing: tuple[int, ...], size: tuple[int, int], views: torch.Tensor) -> _Resize:
        """What the kernels need for the encoders of these indices, which share a resize, and images of (height, width)."""
        config = self.encoders[sharing[0]]
        height, width = size
        top, left, fill = 0, 0, (0, 0, 0)
        if config.resize_strategy == "letterbox":
            (top, left), fill = letterbox_padding(height, width), config.fill
        padded_height, padded_width = height + 2 * top, width + 2 * left
        (new_height, new_width), (y, x) = square_window(padded_height, padded_width, config)
        across, _ = self._kernel_taps(padded_width, new_width, config.interpolation, config.image_size, x)
        down, rows = self._kernel_taps(padded_height, new_height, config.interpolation, config.image_size, y)
        return _Resize(sharing, views, across, down, size, (top, left), fill, rows)

    def make_float_resize(self, sharing: tuple[int, ...], size: tuple[int, int]) -> FloatResize:
        """The resize in float32 that the encoders of these indices share, for images of (height, width)."""
        config = self.encoders[sharing[0]]
        return FloatResize(config.resize_strategy, *size, config.image_size, self.device)

    def _make_kernel_taps(
        self, length: int, target: int, interpolation: int, side: int, offset: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
        """First index and weights of the square's `side` pixels (`square_taps`); (first, number) read."""
        indices, weights = square_taps(length, target, interpolation, side, offset)
        padding = -weights.shape[1] % 4
        weights = np.pad(weights.T, ((0, padding), (0, 0)))
        first = indices[:, 0].astype(np.int32)
        starts, values = (torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in (first, weights))
        return (starts, values), (int(indices.min()), int(indices.max() - indices.min()) + 1)

    def resize(self, planes: torch.Tensor, config: EncoderConfig) -> torch.Tensor:
        """uint8 [views, 3, height, width] → uint8 [views, 3, image_size, image_size] by the encoder's strategy."""
        height, width = planes.shape[2:]
        if config.resize_strategy == "letterbox":
            top, left = letterbox_padding(height, width)
            padded = self._fills[config.fill].expand(len(planes), 3, height + 2 * top, width + 2 * left).contiguous()
            padded[:, :, top : top + height, left : left + width] = planes
            planes, height, width = padded, height + 2 * top, width + 2 * left
        (new_height, new_width), (y, x) = square_window(height, width, config)
        for dim, target, offset in ((3, new_width, x), (2, new_height, y)):
            planes = self._resample(planes, dim, target, offset, config)
        return planes

    def _make_taps(
        self, dim: int, length: int, target: int, interpolation: int, side: int, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Taps of the square's `side` pixels (`square_taps`), on the device.

        Indices are flat; weights are [taps, side] along the columns, [side, taps, 1] along the rows.
        """
        indices, weights = map(torch.from_numpy, square_taps(length, target, interpolation, side, offset))
        if dim == 3:  # the taps come before the columns, so that neighbouring sums read neighbouring bytes
            indices, weights = indices.T, weights.T
        else:
            weights = weights[:, :, None]
        return indices.reshape(-1).to(self.device), weights.contiguous().to(self.device)

    def _resample(
        self, planes: torch.Tensor, dim: int, target: int, offset: int, config: EncoderConfig
    ) -> torch.Tensor:
        """One pass of PIL's resize, and of the centre crop, along dimension 2 or 3 of uint8 planes."""
        length, side = planes.shape[dim], config.image_size
        if length == target and 0 <= offset <= target - side:
            return planes.narrow(dim, offset, side)
        indices, weights = self._taps(dim, length, target, config.interpolation, side, offset)
        taps = len(indices) // side
        other = 5 - dim
        step = max(1, _MAX_PRODUCTS // (planes.shape[0] * 3 * side * taps))
        passes = []
        for part in planes.split(step, other):
            picked = part.index_select(dim, indices)
            picked = picked.unflatten(dim, (taps, side) if dim == 3 else (side, taps))
            sums = (picked * weights).sum(3, dtype=torch.int32)
            passes.append(sums.add_(1 << (PRECISION_BITS - 1)).bitwise_right_shift_(PRECISION_BITS).clamp_(0, 255))
        return (passes[0] if len(passes) == 1 else torch.cat(passes, other)).to(torch.uint8)
