"""What people have on disk → `Checkpoint`: OpenVLA's directories, OpenVLA-OFT's, LoRA adapters, Prismatic's ``.pt``.

An OpenVLA directory has ``config.json``, ``preprocessor_config.json``, one or several safetensors files, and
``model.safetensors.index.json`` where there are several. Only the tensors of the vision backbone and the projector
are read; files with nothing but the language model's are not opened.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vla_perception.tokenizer.checkpoints.adapters import read_adapter, with_adapter
from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint
from vla_perception.tokenizer.checkpoints.files import (
    CheckpointError,
    SafetensorsFile,
    StoredTensor,
    exists,
    is_directory,
    local_path,
    read_json,
)
from vla_perception.tokenizer.checkpoints.model_args import checked_model_args
from vla_perception.tokenizer.presets import (
    MAX_IMAGE_SIZE,
    MAX_WIDTH,
    EncoderConfig,
    ModelConfig,
    encoder_name,
    no_model,
)
from vla_perception.tokenizer.tensor_names import canonical_name, is_head, is_vision, refuse_unknown, unwrapped

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
_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def open_model(
    model: str | os.PathLike, adapter: str | os.PathLike | None = None, image_size: int | Sequence[int] | None = None
) -> tuple[Checkpoint, bool]:
    """Whatever a user calls a trained model: a path, a Hugging Face id, or the names of timm's encoders.

    Returns:
        The checkpoint, and whether its image size can be chosen (and has been, by `image_size`).

    Raises:
        CheckpointError: it is none of that, or something is amiss with it.
    """
    from vla_perception.tokenizer.checkpoints import hub
    from vla_perception.tokenizer.checkpoints import timm_encoders as pretrained

    if exists(local_path(model)):
        return open_checkpoint(model, adapter), False
    if hub.is_id(str(model)):
        return open_checkpoint(hub.fetch(str(model)), adapter), False
    if not pretrained.is_name(str(model)):
        raise CheckpointError(no_model(str(model)))
    if adapter is not None:
        raise CheckpointError("an adapter is added to a checkpoint, not to timm's encoders")
    return pretrained.open_encoders(str(model), image_size), True


def open_checkpoint(path: str | os.PathLike, adapter: str | os.PathLike | None = None) -> Checkpoint:
    """Recognises the layout of a directory or ``.pt`` file, reads its configuration and the tensors' headers.

    Args:
        adapter: directory of a LoRA adapter to add; ``"none"`` ignores one that lies in ``lora_adapter/``; None
            uses that one where the weights beside it are without it.

    Raises:
        CheckpointError: nothing that is known, or something is amiss with it; the message says what.
    """
    directory = local_path(path)
    if directory.is_file():
        from vla_perception.tokenizer.checkpoints import prismatic

        if directory.suffix != ".pt":
            raise CheckpointError(
                f"{directory} is a file; give the folder that holds config.json and the weights, or Prismatic's .pt"
            )
        checkpoint = prismatic.open_run(directory)
    elif not directory.is_dir():
        raise CheckpointError(
            f"no checkpoint directory at {directory}; give the folder that holds config.json, "
            "preprocessor_config.json and the safetensors files"
        )
    else:
        _refuse_film(directory)
        if (directory / "adapter_config.json").is_file():
            _refuse_film(directory.parent)
            base = _open_base(directory)
            checkpoint = with_adapter(base, directory)
            checkpoint = replace(checkpoint, config=replace(checkpoint.config, name=directory.resolve().name))
        else:
            checkpoint, adapter = _open_directory(directory, adapter)
    if adapter is not None and str(adapter) != "none":
        checkpoint = with_adapter(checkpoint, local_path(adapter))
    return checkpoint


def _open_directory(directory: Path, adapter: str | os.PathLike | None) -> tuple[Checkpoint, str | os.PathLike | None]:
    """A directory with a ``config.json``, and the adapter that is still to be added to it."""
    beside = directory / "lora_adapter"
    held = (beside / "adapter_config.json").is_file() and adapter is None
    weights = any(directory.glob("*.safetensors")) or (directory / "model.safetensors.index.json").is_file()
    if held and not weights:
        # OpenVLA-OFT without merging: the directory has the processor and the heads, the base model the weights.
        base = _open_base(beside)
        return replace(base, path=directory, config=replace(base.config, name=directory.resolve().name)), beside
    config = read_json(directory / "config.json")
    if "timm_model_ids" not in config and ("model" in config or "vla" in config):
        from vla_perception.tokenizer.checkpoints import prismatic

        return prismatic.open_run(directory), adapter
    checkpoint = _open_openvla(directory)
    return checkpoint, beside if held and _lacks_adapter(checkpoint, beside) else adapter


def _refuse_film(directory: Path) -> None:
    found = sorted(directory.glob("vision_backbone--*_checkpoint.pt"))
    if found:
        raise CheckpointError(
            f"{directory} is an OpenVLA-OFT checkpoint with FiLM ({found[0].name}): there the instruction's mean "
            "embedding modulates every block of the encoders, so images alone do not determine the tokens. Such a "
            "model cannot be served by a tokenizer that sees no instruction; use one that was trained without "
            "--use_film"
        )


def _open_openvla(directory: Path) -> Checkpoint:
    config = read_config(directory)
    tensors, unknown, heads = {}, [], set()
    for stored in _stored_tensors(directory):
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


def _open_base(directory: Path) -> Checkpoint:
    """The model that an adapter was trained on: a directory here, or fetched from the hub, which is said before.

    Naming an adapter asks for its base model, so fetching it is right; that another place than the user named is asked
    for must not pass unseen.
    """
    settings = read_json(directory / "adapter_config.json")
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{directory / 'adapter_config.json'} does not name its base model; give it as the model")
    for candidate in (local_path(named), directory / named, directory.parent / named):
        if is_directory(candidate) and candidate.resolve() != directory.resolve():
            return _not_an_adapter(candidate, directory)
    from vla_perception.tokenizer.checkpoints import hub

    wanted = f"{named}@{revision}" if isinstance(revision, str) and revision and "@" not in named else named
    if not hub.is_id(wanted):
        raise CheckpointError(
            f"the adapter {directory} was trained on {named!r:.200}, which is not here; give the base model's directory as "
            "the model and this one as the adapter"
        )
    note = f"the base model {wanted} is the one that {directory.name}'s adapter_config.json names, from the hub"
    log.warning(
        "%s: it is fetched unless it lies in the cache. To decide on it yourself give it as the model and %s as the "
        "adapter; HF_HUB_OFFLINE=1 keeps everything from being fetched",
        note,
        directory,
    )
    base = _not_an_adapter(hub.fetch(wanted), directory)
    return replace(base, notes=(*base.notes, note))


def _not_an_adapter(base: Path, adapter: Path) -> Checkpoint:
    if (base / "adapter_config.json").is_file():
        raise CheckpointError(
            f"the adapter {adapter} was trained on {base}, which is an adapter, too; merge that one into its base model with "
            "peft's merge_and_unload, and give the merged model as the model"
        )
    return open_checkpoint(base, "none")


def _lacks_adapter(checkpoint: Checkpoint, directory: Path) -> bool:
    """Whether weights beside ``lora_adapter/`` are the base model's own, so that the adapter is still to be added.

    OpenVLA-OFT writes merged weights there, and that is assumed where the base model is not at hand to compare with.
    """
    try:
        named = local_path(str(read_json(directory / "adapter_config.json").get("base_model_name_or_path", "")))
        if not named.is_absolute():
            named = directory / named
        if not is_directory(named):
            log.info("%s: the weights beside lora_adapter/ are taken as merged, as OpenVLA-OFT writes them", directory)
            return False
        if named.resolve() == Path(checkpoint.path).resolve():
            return True
        base = _not_an_adapter(named, directory)
        adapted, _ = read_adapter(base, directory)
        name = min(adapted, default=None, key=lambda name: (math.prod(base.tensors[name].shape), name))
        if name is None or name not in checkpoint.tensors:
            return False
        return torch.equal(base.tensors[name].get(), checkpoint.tensors[name].get())
    except (KeyError, OSError) as error:
        raise CheckpointError(f"{directory}: {error}") from error


def read_config(directory: Path) -> ModelConfig:
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
        return ModelConfig(directory.resolve().name, encoders, projector, width)
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
    strategy = preprocessor.get("image_resize_strategy", config.get("image_resize_strategy"))
    fill = None
    if preprocessor.get("tvf_do_letterbox"):
        strategy = "letterbox"
    elif preprocessor.get("tvf_resize_params"):
        target = preprocessor["tvf_resize_params"][index]["size"]
        strategy = "resize-naive" if isinstance(target, (list, tuple)) and len(target) == 2 else "resize-crop"
    if strategy == "letterbox":
        # The released processor pads for every encoder with the first one's mean.
        fill = preprocessor.get("tvf_letterbox_fill") or [int(value * 255) for value in preprocessor["means"][0]]
    interpolation = _INTERPOLATIONS[preprocessor.get("interpolations", ["bicubic"] * (index + 1))[index]]
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


def _stored_tensors(directory: Path) -> Iterator[StoredTensor]:
    """Every tensor of the checkpoint; files with nothing but the language model's are not opened."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; download it again")
        wanted: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise CheckpointError(f"{index}: {name[:200]!r} is in no file; download it again")
            if is_vision(name):
                wanted.setdefault(file, []).append(name)
        for file, names in sorted(wanted.items()):
            if Path(file).name != file:
                raise CheckpointError(f"{index} names {file!r}; a plain file name beside it is needed")
            held = SafetensorsFile(directory / file).tensors
            # A name that the file lacks is reported as missing, together with the others.
            yield from (held[name] for name in names if name in held)
        return
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory} has no .safetensors file; weights are read from safetensors, never from a pickle"
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{directory} has {len(files)} safetensors files and no model.safetensors.index.json; download the index"
        )
    yield from SafetensorsFile(files[0]).tensors.values()
