"""Prismatic's native run directories: ``config.json`` and ``checkpoints/*.pt`` (prismatic-vlms, OpenVLA, MiniVLA).

The ``.pt`` holds ``["model"]["vision_backbone"]`` and ``["model"]["projector"]``. Where the vision backbone was
frozen in training it is absent: then the weights are timm's pretrained ones, at which it was frozen.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from vla_perception.options import RESIZE_STRATEGIES
from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint, listing
from vla_perception.tokenizer.checkpoints.files import PickledTensors, StoredTensor, read_json
from vla_perception.tokenizer.checkpoints.tensor_names import unwrapped
from vla_perception.tokenizer.config import TokenizerConfig
from vla_perception.tokenizer.presets import PRISMATIC_BACKBONES, prismatic_encoders

log = logging.getLogger(__name__)


def open_run(path: Path) -> Checkpoint:
    """A run directory, or one ``.pt`` file within its ``checkpoints/``.

    Raises:
        CheckpointError: several ``.pt`` files and none is the latest, an unknown vision backbone, unexpected keys, …
    """
    file = path if path.is_file() else _newest(path)
    run = next((folder for folder in (file.parent.parent, file.parent) if (folder / "config.json").is_file()), None)
    if run is None:
        raise CheckpointError(f"{file}: no config.json in its folder or the one above; keep the run directory whole")
    backbone, strategy = _settings(run)
    if backbone not in PRISMATIC_BACKBONES:
        raise CheckpointError(
            f"{run / 'config.json'}: the vision backbone {backbone!r} is not known; "
            f"supported are {', '.join(PRISMATIC_BACKBONES)}"
        )
    encoders = prismatic_encoders(backbone, strategy)
    state = PickledTensors(file)
    projector = _projector(state.part("model", "projector"), file)
    vision = state.part("model", "vision_backbone")
    prefixes = (
        {"featurizer.": encoders[0].name}
        if len(encoders) == 1
        else {f"{short}_featurizer.": encoder.name for short, encoder in zip(("dino", "siglip"), encoders)}
    )

    def canonical(name: str) -> str | None:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        return None if prefix is None else f"{prefixes[prefix]}.{name.removeprefix(prefix)}"

    tensors = _renamed(vision, canonical, file)
    grids: dict[str, tuple[int, int, int]] = {}
    notes: tuple[str, ...] = ()
    if not vision:
        from vla_perception.tokenizer.checkpoints import timm_encoders

        for encoder in encoders:
            part = timm_encoders.read(encoder.timm_id, encoder.image_size)
            tensors |= part.named(encoder.name)
            grids |= part.grids(encoder.name)
        names = " and ".join(encoder.timm_id for encoder in encoders)
        notes = (f"{file.name} holds no vision backbone, as it was frozen in training: timm's pretrained {names}",)
        log.warning("%s", notes[0])
    kinds = {1: "linear", 2: "gelu-mlp", 3: "fused-gelu-mlp"}
    layers = sum(name.endswith(".weight") for name in projector)
    if layers not in kinds:
        raise CheckpointError(f"{file}: a projector of {layers} layers is not known")
    shape = projector[f"projector.fc{layers}.weight"].shape
    if len(shape) != 2:
        raise CheckpointError(f"{file}: the projector's last layer has the shape {list(shape)}")
    config = TokenizerConfig(run.resolve().name, encoders, kinds[layers], shape[0])
    return Checkpoint(file, config, tensors | projector, position_grids=grids, notes=notes)


def _newest(run: Path) -> Path:
    files = sorted([*run.glob("checkpoints/*.pt"), *run.glob("*.pt")])
    if not files:
        raise CheckpointError(f"{run}: no checkpoints/*.pt beside its config.json; the download is incomplete")
    latest = [file for file in files if file.name == "latest-checkpoint.pt"]
    if len(files) > 1 and not latest:
        raise CheckpointError(
            f"{run} has several checkpoints ({', '.join(file.name for file in files[:8])}); give one of them as the model"
        )
    return (latest or files)[0]


def _settings(run: Path) -> tuple[str, str]:
    """(vision backbone, resize strategy) from a run's ``config.json``: a Prismatic VLM's, or a VLA's trained on one."""
    file = run / "config.json"
    config = read_json(file)
    model, vla = config.get("model"), config.get("vla")
    if isinstance(model, dict) and isinstance(model.get("vision_backbone_id"), str):
        strategy = model.get("image_resize_strategy", "resize-naive")
        if strategy not in RESIZE_STRATEGIES:
            raise CheckpointError(f"{file}: unknown image_resize_strategy {strategy!r}")
        return model["vision_backbone_id"], strategy
    base = vla.get("base_vlm") if isinstance(vla, dict) else None
    if not isinstance(base, str):
        raise CheckpointError(f"{file} names neither model.vision_backbone_id nor vla.base_vlm")
    # prism-dinosiglip-224px+7b, prism-qwen25-extra-dinosiglip-224px+0_5b, siglip-224px+7b, …
    match = re.search(r"(?:^|[-/])(dinosiglip|siglip|dinov2)-(224|384)px", base)
    if match is None:
        raise CheckpointError(f"{file}: the base model {base!r} says nothing about its vision backbone")
    family, size = match.groups()
    suffix = "-384px" if size == "384" else ""
    backbones = {
        "dinosiglip": f"dinosiglip-vit-so-{size}px",
        "siglip": f"siglip-vit-so400m{suffix}",
        "dinov2": f"dinov2-vit-l{suffix}",
    }
    crop = re.search(r"(resize-naive|resize-crop|letterbox)", base)
    # All VLAs were trained on the -224px and -384px models, which squeeze the image.
    return backbones[family], crop.group(1) if crop else "resize-naive"


def _projector(stored: dict[str, StoredTensor], file: Path) -> dict[str, StoredTensor]:
    """``projector.0``, ``.2``, ``.4`` (or one ``projector`` alone) → ``fc1``, ``fc2``, ``fc3``."""
    if not stored:
        raise CheckpointError(f"{file} holds no model.projector; is it a checkpoint of prismatic-vlms?")

    def canonical(name: str) -> str | None:
        match = re.fullmatch(r"projector(?:\.([024]))?\.(weight|bias)", name)
        return None if match is None else f"projector.fc{int(match.group(1) or 0) // 2 + 1}.{match.group(2)}"

    return _renamed(stored, canonical, file)


def _renamed(
    stored: dict[str, StoredTensor], canonical: Callable[[str], str | None], file: Path
) -> dict[str, StoredTensor]:
    """The tensors by their canonical names; CheckpointError that lists those that have none."""
    named = [(canonical(unwrapped(name)), name) for name in stored]
    unexpected = [name for known, name in named if known is None]
    if unexpected:
        raise CheckpointError(f"{file}: {listing('tensors that belong to no known part', unexpected)}")
    if len(dict(named)) < len(named):
        raise CheckpointError(f"{file}: {len(named) - len(dict(named))} tensors are there twice, in different wrappers")
    return {known: stored[name] for known, name in named}  # type: ignore[misc]
