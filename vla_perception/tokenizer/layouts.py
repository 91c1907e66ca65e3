"""What people have on disk → `Checkpoint`: OpenVLA's directories, OpenVLA-OFT's, LoRA adapters, Prismatic's ``.pt``.

An OpenVLA directory has ``config.json``, ``preprocessor_config.json``, one or several safetensors files, and
``model.safetensors.index.json`` where there are several. Only the tensors of the vision backbone and the projector
are read; files with nothing but the language model's are not opened.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vla_perception.tokenizer.checkpoint import Adapter, Checkpoint, listing
from vla_perception.tokenizer.files import (
    CheckpointError,
    SafetensorsFile,
    StoredTensor,
    file_errors,
    read_json,
)
from vla_perception.tokenizer.model_args import checked_model_args
from vla_perception.tokenizer.presets import (
    MAX_IMAGE_SIZE,
    MAX_WIDTH,
    EncoderConfig,
    ModelConfig,
    encoder_name,
    no_model,
)

log = logging.getLogger(__name__)

_ENCODER_PREFIXES = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
_PROJECTOR_PREFIX = "projector."
_LANGUAGE_MODEL_PREFIX = "language_model."
_INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
#: peft's wrapping of a model's names.
_PEFT_PREFIX = "base_model.model."


def open_model(
    model: str | os.PathLike, adapter: str | os.PathLike | None = None, image_size: int | Sequence[int] | None = None
) -> tuple[Checkpoint, bool]:
    """Whatever a user calls a trained model: a path, a Hugging Face id, or the names of timm's encoders.

    Returns:
        The checkpoint, and whether its image size can be chosen (and has been, by `image_size`).

    Raises:
        CheckpointError: it is none of that, or something is amiss with it.
    """
    from vla_perception.tokenizer import hub, pretrained

    if Path(model).expanduser().exists():
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
    directory = Path(path).expanduser()
    if directory.is_file():
        from vla_perception.tokenizer import prismatic

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
            base = open_checkpoint(_base_of(directory), "none")
            checkpoint = with_adapter(base, directory)
            checkpoint = replace(checkpoint, config=replace(checkpoint.config, name=directory.resolve().name))
        else:
            checkpoint, adapter = _open_directory(directory, adapter)
    if adapter is not None and str(adapter) != "none":
        checkpoint = with_adapter(checkpoint, Path(adapter).expanduser())
    return checkpoint


def _open_directory(directory: Path, adapter: str | os.PathLike | None) -> tuple[Checkpoint, str | os.PathLike | None]:
    """A directory with a ``config.json``, and the adapter that is still to be added to it."""
    beside = directory / "lora_adapter"
    held = (beside / "adapter_config.json").is_file() and adapter is None
    weights = any(directory.glob("*.safetensors")) or (directory / "model.safetensors.index.json").is_file()
    if held and not weights:
        # OpenVLA-OFT without merging: the directory has the processor and the heads, the base model the weights.
        base = open_checkpoint(_base_of(beside), "none")
        return replace(base, path=directory, config=replace(base.config, name=directory.resolve().name)), beside
    config = read_json(directory / "config.json")
    if "timm_model_ids" not in config and ("model" in config or "vla" in config):
        from vla_perception.tokenizer import prismatic

        return prismatic.open_run(directory), adapter
    checkpoint = _open_openvla(directory)
    return checkpoint, beside if held and _lacks_adapter(checkpoint, beside) else adapter


def _refuse_film(directory: Path) -> None:
    found = sorted(directory.glob("vision_backbone--*_checkpoint.pt"))
    if found:
        raise CheckpointError(
            f"{directory} is an OpenVLA-OFT checkpoint with FiLM ({found[0].name}): there the instruction's mean "
            "embedding modulates every block of the encoders, so pictures alone do not determine the tokens. Such a "
            "model cannot be served by a tokenizer that sees no instruction; use one that was trained without "
            "--use_film"
        )


def _open_openvla(directory: Path) -> Checkpoint:
    config = read_config(directory)
    tensors, surplus = {}, []
    for stored in _stored_tensors(directory):
        canonical = _canonical_name(stored.name, config)
        if canonical is not None:
            tensors[canonical] = stored
        elif not stored.name.startswith(_LANGUAGE_MODEL_PREFIX):
            surplus.append(stored.name)
    if surplus:
        raise CheckpointError(f"{directory}: {listing('tensors that belong to no known part', surplus)}")
    return Checkpoint(directory, config, tensors)


def _base_of(directory: Path) -> Path:
    """The directory of the model that an adapter was trained on."""
    settings = read_json(directory / "adapter_config.json")
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{directory / 'adapter_config.json'} does not name its base model; give it as the model")
    for candidate in (Path(named).expanduser(), directory / named, directory.parent / named):
        if candidate.is_dir() and candidate.resolve() != directory.resolve():
            return candidate
    from vla_perception.tokenizer import hub

    if hub.is_id(named):
        return hub.fetch(named)
    raise CheckpointError(
        f"the adapter {directory} was trained on {named!r}, which is not here; give the base model's directory as the "
        "model and this one as the adapter"
    )


def _lacks_adapter(checkpoint: Checkpoint, directory: Path) -> bool:
    """Whether weights beside ``lora_adapter/`` are the base model's own, so that the adapter is still to be added.

    OpenVLA-OFT writes merged weights there, and that is assumed where the base model is not at hand to compare with.
    """
    try:
        named = Path(str(read_json(directory / "adapter_config.json").get("base_model_name_or_path", ""))).expanduser()
        if not named.is_absolute():
            named = directory / named
        if not named.is_dir():
            log.info("%s: the weights beside lora_adapter/ are taken as merged, as OpenVLA-OFT writes them", directory)
            return False
        if named.resolve() == Path(checkpoint.path).resolve():
            return True
        base = open_checkpoint(named, "none")
        adapted = with_adapter(base, directory).adapters
        name = min(adapted, default=None, key=lambda name: (math.prod(base.tensors[name].shape), name))
        if name is None or name not in checkpoint.tensors:
            return False
        return torch.equal(base.tensors[name].get(), checkpoint.tensors[name].get())
    except (KeyError, OSError) as error:
        raise CheckpointError(f"{directory}: {error}") from error


def with_adapter(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """A checkpoint and peft's LoRA adapter for it (``adapter_config.json``, ``adapter_model.safetensors``).

    What the adapter changes in the language model is left out. CheckpointError for other kinds than plain LoRA.
    """
    settings = read_json(directory / "adapter_config.json")
    if settings.get("peft_type") != "LORA" or settings.get("use_dora") or settings.get("fan_in_fan_out"):
        raise CheckpointError(
            f"{directory}: only plain LoRA can be added (peft_type LORA without use_dora and fan_in_fan_out), not "
            f"{settings.get('peft_type')!r}; merge it with peft's merge_and_unload and save the model"
        )
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; an adapter is read from safetensors, never from a pickle")
    tensors, adapters, surplus = dict(checkpoint.tensors), {}, []
    pairs: dict[str, dict[str, StoredTensor]] = {}
    with file_errors(file):
        stored_tensors = SafetensorsFile(file).tensors
    for stored in stored_tensors.values():
        name = stored.name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
        if name.startswith(_LANGUAGE_MODEL_PREFIX):
            continue
        low_rank = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        module = low_rank.group(1) if low_rank else ""
        canonical = _canonical_name(f"{module}.weight" if low_rank else name, checkpoint.config)
        if canonical is None or canonical not in checkpoint.tensors:
            surplus.append(stored.name)
        elif low_rank:
            pairs.setdefault(canonical, {"module": module})[low_rank.group(2)] = stored  # type: ignore[dict-item]
        else:
            tensors[canonical] = stored
    odd = [name for name, pair in pairs.items() if len(pair) != 3]
    if surplus or odd:
        parts = [listing("tensors that fit no part", surplus)] * bool(surplus)
        parts += [listing("tensors with one half of a pair", odd)] * bool(odd)
        raise CheckpointError(f"{directory} does not fit {checkpoint.path}: {'; '.join(parts)}")
    try:
        for name, pair in pairs.items():
            scale = _lora_scale(settings, str(pair["module"]), pair["A"].shape[0])
            adapters[name] = Adapter(pair["A"], pair["B"], scale)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError, re.error) as error:
        raise CheckpointError(f"{directory / 'adapter_config.json'}: {error!r}") from error
    return replace(checkpoint, tensors=tensors, adapters=adapters)


def _lora_scale(settings: Mapping, module: str, rank: int) -> float:
    """peft's factor before B A; `alpha_pattern` names modules by the end of their path."""
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.search(r"[^\w.-]", pattern):
            raise ValueError(f"alpha_pattern {pattern!r} is a regular expression; only names are read")
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
            break
    scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"lora_alpha {alpha!r} is no number that can be used")
    return scale


def read_config(directory: Path) -> ModelConfig:
    """Vision settings from ``config.json`` and ``preprocessor_config.json``.

    The ``tvf_*`` entries are what OpenVLA's processor really uses, so where they are there, they are in force
    over ``means``, ``stds`` and ``image_resize_strategy``.
    """
    config = read_json(directory / "config.json")
    preprocessor = read_json(directory / "preprocessor_config.json")
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
            raise CheckpointError(f"{directory / 'config.json'}: image_sizes {sizes!r:.200} are not within 1 to {MAX_IMAGE_SIZE}")
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
            raise CheckpointError(f"{directory / 'config.json'}: hidden_size {width!r:.200} is not within 1 to {MAX_WIDTH}")
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


def _canonical_name(name: str, config: ModelConfig) -> str | None:
    if name.startswith(_PROJECTOR_PREFIX):
        return name
    for encoder, prefix in zip(config.encoders, _ENCODER_PREFIXES):
        if name.startswith(prefix):
            # OpenVLA renamed LayerScale's `gamma`, which transformers would otherwise rewrite on loading.
            return f"{encoder.name}." + name[len(prefix) :].replace("scale_factor", "gamma")
    return None


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
            if not name.startswith(_LANGUAGE_MODEL_PREFIX):
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
