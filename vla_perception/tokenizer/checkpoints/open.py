"""From a model's name to its checkpoint: the one place that distinguishes the kinds of names.

| name | kind | who reads it |
| --- | --- | --- |
| a preset's, and no folder is called so | ``preset`` | presets.py; random weights, so there is no checkpoint |
| path of a folder or file here | ``path`` | `open_checkpoint`, which distinguishes the layouts |
| ``org/name``, ``org/name@revision`` | ``hub`` | hub.py makes it a folder here |
| ``timm:NAME…``, ``hf-hub:…``, ``local-dir:…``, a name that timm knows | ``timm`` | timm_encoders.py |

PyTorch and the readers are imported where a name asks for them: `check_model` needs neither.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.paths import exists, is_directory, local_path
from vla_perception.tokenizer.config import TokenizerConfig
from vla_perception.tokenizer.image_transforms import parse_chains
from vla_perception.tokenizer.presets import PRESETS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint
    from vla_perception.tokenizer.config import TokenizerOptions

log = logging.getLogger(__name__)


def is_preset(model: str | os.PathLike) -> bool:
    """Whether `model` is a preset's name, and no folder here is called so."""
    return str(model) in PRESETS and not is_directory(Path(model))


def kind_of(model: str | os.PathLike) -> str:
    """What `model` is the name of: ``preset``, ``path``, ``hub`` or ``timm``.

    Raises:
        CheckpointError: none of these.
    """
    if is_preset(model):
        return "preset"
    if exists(local_path(model)):
        return "path"
    from vla_perception.tokenizer.checkpoints import hub, timm_encoders

    if hub.is_id(str(model)):
        return "hub"
    if timm_encoders.is_name(str(model)):
        return "timm"
    raise CheckpointError(_no_model(str(model)))


def check_model(model: str, adapter: str | os.PathLike | None = None, **options: Unpack[TokenizerOptions]) -> None:
    """What can be known to be wrong of a model and its options without reading any of it: no PyTorch is needed.

    Args:
        model, adapter, options: as `VisualTokenizer.load` takes them.

    Raises:
        ValueError: what loading would raise, or there is no such file or folder.
    """
    if is_preset(model):
        if adapter is not None:
            raise ValueError(f"{model} is a preset with random weights; an adapter needs the checkpoint it is for")
        PRESETS[model].with_options(trained=False, **options)
        return
    path = local_path(model)
    like_a_path = model.startswith(("/", "./", "../", "~")) or path.suffix in (".pt", ".safetensors")
    if not exists(path) and (like_a_path or model.count("/") > 1):  # a Hugging Face id has one
        raise ValueError(_no_model(model))
    if adapter not in (None, "none") and not is_directory(local_path(adapter)):
        raise ValueError(f"there is no adapter at {str(adapter)!r}; give the folder that holds adapter_config.json")
    parse_chains(options.get("image_transforms", ()), [224])  # whatever the size will be


def open_model(
    model: str | os.PathLike, adapter: str | os.PathLike | None = None, image_size: int | Sequence[int] | None = None
) -> tuple[Checkpoint, bool]:
    """Whatever a user calls a trained model: a path, a Hugging Face id, or the names of timm's encoders.

    Returns:
        The checkpoint, and whether its image size can be chosen (and has been, by `image_size`).

    Raises:
        CheckpointError: it is none of that, or something is amiss with it.
    """
    from vla_perception.tokenizer.checkpoints import hub, timm_encoders

    kind = kind_of(model)
    if kind == "preset":
        raise CheckpointError(
            f"{str(model)!r} is the name of a preset, which has random weights and no checkpoint: `VisualTokenizer.load` "
            "and `from_preset` take it; for trained weights give a checkpoint's folder or a Hugging Face id (org/name)"
        )
    if kind == "path":
        return open_checkpoint(model, adapter), False
    if kind == "hub":
        return open_checkpoint(hub.fetch(str(model)), adapter), False
    if adapter is not None:
        raise CheckpointError("an adapter is added to a checkpoint, not to timm's encoders")
    return timm_encoders.open_encoders(str(model), image_size), True


def read_config(model: str, **options: Unpack[TokenizerOptions]) -> TokenizerConfig:
    """The configuration of whatever `VisualTokenizer.load` takes, with a user's options; reads no weights.

    Of a Hugging Face id its configuration files are fetched, of a checkpoint the headers are read.

    Raises:
        ValueError: no such model, or options that make no sense; CheckpointError for unusable files.
    """
    kind = kind_of(model)
    if kind == "preset":
        return PRESETS[model].with_options(trained=False, **options)
    from vla_perception.tokenizer.checkpoints import hub, lerobot, openvla, timm_encoders
    from vla_perception.tokenizer.checkpoints.files import read_json

    if kind == "timm":
        config = timm_encoders.read_config(model, options.pop("image_size", None))
    elif kind == "hub":
        folder = hub.fetch_configuration(model)
        of_policy = lerobot.is_policy(read_json(folder / "config.json"))
        config = lerobot.read_config(folder) if of_policy else openvla.read_config(folder)
    else:
        config = open_checkpoint(model).config
    return config.with_options(trained=True, **options)


def open_checkpoint(path: str | os.PathLike, adapter: str | os.PathLike | None = None) -> Checkpoint:
    """Recognises the layout of a directory or ``.pt`` file, reads its configuration and the tensors' headers.

    Args:
        adapter: directory of a LoRA adapter to add; ``"none"`` ignores one that lies in ``lora_adapter/``; None
            uses that one where the weights beside it are without it.

    Raises:
        CheckpointError: nothing that is known, or something is amiss with it; the message says what.
    """
    from vla_perception.tokenizer.checkpoints import film, lora, prismatic

    directory, conditioned = local_path(path), None
    if directory.is_file():
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
        if (directory / "adapter_config.json").is_file():
            _refuse_half_of_film(directory)
            base = _open_base(directory)
            checkpoint = lora.with_adapter(base, directory)
            checkpoint = replace(checkpoint, config=replace(checkpoint.config, name=directory.resolve().name))
        else:
            checkpoint, adapter = _open_directory(directory, adapter)
        conditioned = film.film_file(directory)
    if adapter is not None and str(adapter) != "none":
        if conditioned is None:
            _refuse_half_of_film(local_path(adapter))
        checkpoint = lora.with_adapter(checkpoint, local_path(adapter), of_film=conditioned is not None)
    return film.with_film(checkpoint, conditioned) if conditioned else checkpoint


def _open_directory(directory: Path, adapter: str | os.PathLike | None) -> tuple[Checkpoint, str | os.PathLike | None]:
    """A directory with a ``config.json``, and the adapter that is still to be added to it."""
    from vla_perception.tokenizer.checkpoints import lerobot, openvla, prismatic, refused
    from vla_perception.tokenizer.checkpoints.files import read_json

    beside = directory / "lora_adapter"
    held = (beside / "adapter_config.json").is_file() and adapter is None
    weights = any(directory.glob("*.safetensors")) or (directory / "model.safetensors.index.json").is_file()
    if held and not weights:
        # OpenVLA-OFT without merging: the directory has the processor and the heads, the base model the weights.
        base = _open_base(beside)
        return replace(base, path=directory, config=replace(base.config, name=directory.resolve().name)), beside
    lerobot.refuse_orbax(directory)
    config = read_json(directory / "config.json")
    refused.refuse(config, directory / "config.json")
    if lerobot.is_policy(config):
        return lerobot.open_policy(directory), adapter
    if "timm_model_ids" not in config and ("model" in config or "vla" in config):
        return prismatic.open_run(directory), adapter
    checkpoint = openvla.open_directory(directory)
    return checkpoint, beside if held and _lacks_adapter(checkpoint, beside) else adapter


def _refuse_half_of_film(adapter: Path) -> None:
    from vla_perception.tokenizer.checkpoints import film

    if film.film_file(adapter.parent):
        raise CheckpointError(
            f"{adapter} is the adapter of an OpenVLA-OFT checkpoint with FiLM; give the folder above it, which holds the "
            "encoders' own file, as the model"
        )


def _open_base(directory: Path) -> Checkpoint:
    """The model that an adapter was trained on: a directory here, or fetched from the hub, which is said before.

    Naming an adapter asks for its base model, so fetching it is right; that another place than the user named is asked
    for must not pass unseen.
    """
    from vla_perception.tokenizer.checkpoints import hub
    from vla_perception.tokenizer.checkpoints.files import read_json

    settings = read_json(directory / "adapter_config.json")
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{directory / 'adapter_config.json'} does not name its base model; give it as the model")
    for candidate in (local_path(named), directory / named, directory.parent / named):
        if is_directory(candidate) and candidate.resolve() != directory.resolve():
            return _not_an_adapter(candidate, directory)
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
    import torch

    from vla_perception.tokenizer.checkpoints import film, lora
    from vla_perception.tokenizer.checkpoints.files import read_json

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
        adapted, _ = lora.read_adapter(base, directory, of_film=film.film_file(directory.parent) is not None)
        name = min(adapted, default=None, key=lambda name: (math.prod(base.tensors[name].shape), name))
        if name is None or name not in checkpoint.tensors:
            return False
        return torch.equal(base.tensors[name].get(), checkpoint.tensors[name].get())
    except (KeyError, OSError) as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _no_model(model: str) -> str:
    return (
        f"no checkpoint directory at {model!r}, and it is neither a preset ({', '.join(PRESETS)}), nor a Hugging Face id "
        "(org/name), nor an encoder that timm knows; give the path of a checkpoint's folder"
    )
