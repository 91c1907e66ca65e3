"""OpenVLA's and OpenVLA-OFT's checkpoint directories, as they are published.

Such a directory has ``config.json``, ``preprocessor_config.json``, one or several safetensors files, and
``model.safetensors.index.json`` where there are several. Only the tensors of the vision backbone and the projector are
read; files with nothing but the language model's are not opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint
from vla_perception.tokenizer.checkpoints.files import StoredTensor, read_json, stored_tensors
from vla_perception.tokenizer.checkpoints.model_args import checked_model_args
from vla_perception.tokenizer.checkpoints.tensor_names import (
    canonical_name,
    is_head,
    is_vision,
    refuse_unknown,
    unwrapped,
)
from vla_perception.tokenizer.config import (
    INTERPOLATIONS,
    MAX_IMAGE_SIZE,
    MAX_WIDTH,
    EncoderConfig,
    TokenizerConfig,
    encoder_name,
)

log = logging.getLogger(__name__)

#: What is read of an image processor's configuration.
_PREPROCESSING = (
    "input_sizes",
    "image_resize_strategy",
    "interpolations",
    "means",
    "stds",
    "tvf_resize_params",
    "tvf_crop_params",
    "tvf_normalize_params",
    "tvf_do_letterbox",
    "tvf_letterbox_fill",
)


def open_directory(directory: Path) -> Checkpoint:
    config = read_config(directory)
    tensors: dict[str, StoredTensor] = {}
    unknown: list[str] = []
    heads: set[str] = set()
    for stored in stored_tensors(directory, is_vision):
        canonical = canonical_name(stored.name, config)
        if canonical in tensors:
            raise CheckpointError(
                f"{directory}: {stored.name[:200]!r} and {tensors[canonical].name[:200]!r} are one tensor"
            )
        if canonical is not None:
            tensors[canonical] = stored
        elif is_vision(stored.name):
            unknown.append(stored.name)
        elif is_head(stored.name):
            heads.add(unwrapped(stored.name).partition(".")[0])
    refuse_unknown(directory, unknown)
    if heads:
        log.info("%s: not read, as it has no bearing on visual tokens: %s", directory, ", ".join(sorted(heads)))
    return Checkpoint(directory, config, tensors)


def read_config(directory: Path) -> TokenizerConfig:
    """Vision settings from ``config.json`` and ``preprocessor_config.json``.

    The ``tvf_*`` entries are what OpenVLA's processor really uses, so where they are there, they are in force
    over ``means``, ``stds`` and ``image_resize_strategy``.
    """
    config = read_json(directory / "config.json")
    preprocessor = _preprocessor(directory)
    try:
        timm_ids = config["timm_model_ids"]
        sizes = config["image_sizes"]
        count = len(timm_ids)
        if count not in (1, 2) or len(sizes) != count or not all(isinstance(timm_id, str) for timm_id in timm_ids):
            raise CheckpointError(
                f"{directory / 'config.json'}: one or two timm_model_ids with as many image_sizes are supported, "
                f"got {timm_ids!r:.200} and {sizes!r:.200}"
            )
        if not all(type(size) is int and 0 < size <= MAX_IMAGE_SIZE for size in sizes):
            raise CheckpointError(
                f"{directory / 'config.json'}: image_sizes {sizes!r:.200} are not within 1 to {MAX_IMAGE_SIZE}"
            )
        activations = config.get("timm_override_act_layers") or [None] * count
        encoders = tuple(
            _encoder_config(timm_ids[i], int(sizes[i]), activations[i], config, preprocessor, i) for i in range(count)
        )
        projector = "fused-gelu-mlp" if count == 2 else "gelu-mlp"
        if str(config.get("arch_specifier", "")).endswith("linear"):
            projector = "linear"
        # openvla-7b's own file leaves the width out: it is what transformers' LlamaConfig has by default.
        width = config.get("text_config", {}).get("hidden_size", 4096)
        if type(width) is not int or not 0 < width <= MAX_WIDTH:
            raise CheckpointError(
                f"{directory / 'config.json'}: hidden_size {width!r:.200} is not within 1 to {MAX_WIDTH}"
            )
        return TokenizerConfig(directory.resolve().name, encoders, projector, width)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{directory}: config.json or preprocessor_config.json has no entry {error}; "
            "is this an OpenVLA checkpoint directory?"
        ) from error
    except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{directory}: config.json or preprocessor_config.json: {error}") from error


def _preprocessor(directory: Path) -> dict:
    """The image processor's entries: ``preprocessor_config.json``, or ``processor_config.json`` as transformers 5 writes.

    Where both are there and differ, which one counts depends on transformers' version: refused.
    """
    old, new = directory / "preprocessor_config.json", directory / "processor_config.json"
    nested = read_json(new).get("image_processor") if new.is_file() else None
    if nested is None:
        return read_json(old)
    if not isinstance(nested, dict):
        raise CheckpointError(f"{new}: image_processor must be an object")
    if not old.is_file():
        return nested
    entries = read_json(old)
    differing = [key for key in _PREPROCESSING if entries.get(key) != nested.get(key)]
    if differing:
        raise CheckpointError(
            f"{old.name} and {new.name} in {directory} differ in {', '.join(differing)}: transformers 4 reads the first, "
            "transformers 5 the second. Remove the one that the model was not trained with"
        )
    return entries


def _encoder_config(
    timm_id: str, size: int, activation: str | None, config: dict, preprocessor: dict, index: int
) -> EncoderConfig:
    if list(preprocessor.get("input_sizes", [[3, size, size]] * (index + 1))[index][-2:]) != [size, size]:
        raise CheckpointError(
            f"config.json says {size} pixels for {timm_id}, preprocessor_config.json {preprocessor['input_sizes']}"
        )
    strategy = str(preprocessor.get("image_resize_strategy", config.get("image_resize_strategy")))
    fill = None
    if preprocessor.get("tvf_do_letterbox"):
        strategy = "letterbox"
    elif preprocessor.get("tvf_resize_params"):
        target = preprocessor["tvf_resize_params"][index]["size"]
        strategy = "resize-naive" if isinstance(target, (list, tuple)) and len(target) == 2 else "resize-crop"
    if strategy == "letterbox":
        # The released processor pads for every encoder with the first one's mean.
        fill = preprocessor.get("tvf_letterbox_fill") or [int(value * 255) for value in preprocessor["means"][0]]
    interpolation = INTERPOLATIONS[preprocessor.get("interpolations", ["bicubic"] * (index + 1))[index]]
    if preprocessor.get("tvf_resize_params"):
        resize = preprocessor["tvf_resize_params"][index]
        interpolation = int(resize.get("interpolation", interpolation))
        target = resize["size"]
        if {size} != set(target if isinstance(target, (list, tuple)) else [target]):
            raise CheckpointError(f"tvf_resize_params resizes to {target}, the encoder {timm_id} takes {size} pixels")
    if preprocessor.get("tvf_crop_params"):
        crop = preprocessor["tvf_crop_params"][index]["output_size"]
        if {size} != set(crop if isinstance(crop, (list, tuple)) else [crop]):
            raise CheckpointError(f"tvf_crop_params crops to {crop}, the encoder {timm_id} takes {size} pixels")
    if preprocessor.get("tvf_normalize_params"):
        mean, std = (preprocessor["tvf_normalize_params"][index][key] for key in ("mean", "std"))
    else:
        mean, std = preprocessor["means"][index], preprocessor["stds"][index]
    return EncoderConfig(
        name=encoder_name(timm_id),
        timm_id=timm_id,
        image_size=size,
        mean=_triple(mean),
        std=_triple(std),
        resize_strategy=strategy,
        letterbox_fill=None if fill is None else tuple(int(value) for value in fill),  # type: ignore[arg-type]
        interpolation=interpolation,
        overrides=checked_model_args({"act_layer": activation or None}, "config.json: timm_override_act_layers"),
    )


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
