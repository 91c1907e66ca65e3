"""π0, π0.5, π0-FAST and SmolVLA as LeRobot publishes them: ``config.json`` with a ``type``, ``model.safetensors``.

Also π0 and π0.5 as openpi's converter to PyTorch writes them (no ``type``). The tower and the connector behind it are
read, and brought to timm's names: q, k and v, which transformers keep apart, are one tensor there. What the tensors'
shapes do not say, the number of attention heads, is SigLIP's.

Sources: LeRobot's ``policies/{pi0,pi05,pi0_fast,smolvla}``, transformers' ``paligemma``, ``siglip`` and ``smolvlm``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint, listing
from vla_perception.tokenizer.checkpoints.files import StoredTensor, read_json, stored_tensors
from vla_perception.tokenizer.checkpoints.tensor_names import is_head, unwrapped
from vla_perception.tokenizer.config import MAX_IMAGE_SIZE, MAX_PATCHES, MAX_WIDTH, TokenizerConfig
from vla_perception.tokenizer.presets import PRESETS, siglip_of_transformers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Family:
    """How the policies of one kind name their tensors; all patterns are for names without ``model.`` in front.

    Attributes:
        tower, connector: what stands before a tensor of the vision tower, and of the connector's linear layer.
        others: parts that have no bearing on visual tokens.
        projector: the connector, one of `PROJECTORS`.
        resize: how the policy's own code resizes images.
        size: of the input where ``config.json`` has no ``size_key``.
    """

    tower: str
    connector: str
    others: str
    projector: str
    resize: str
    size_key: str
    size: int


#: Newer transformers leave out ``vision_model.``, older ones ``model.`` behind ``paligemma.``.
_PI = _Family(
    tower=r"(paligemma_with_expert\.)?paligemma\.(model\.)?vision_tower\.(vision_model\.)?",
    connector=r"(paligemma_with_expert\.)?paligemma\.(model\.)?multi_modal_projector\.linear\.",
    others=r"(paligemma_with_expert\.)?(paligemma\.((model\.)?language_model|lm_head)|gemma_expert)\."
    r"|(state_proj|action_in_proj|action_out_proj|(action_)?time_mlp_in|(action_)?time_mlp_out|proprio_history_proj)\.",
    projector="linear",
    resize="resize_with_pad_torch",
    size_key="image_resolution",
    size=224,
)
_SMOLVLA = _Family(
    tower=r"vlm_with_expert\.vlm\.(model\.)?vision_model\.",
    connector=r"vlm_with_expert\.vlm\.(model\.)?connector\.modality_projection\.proj\.",
    others=r"vlm_with_expert\.(vlm\.((model\.)?text_model|lm_head)|lm_expert)\."
    r"|(state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out)\.",
    projector="pixel-shuffle-linear",
    resize="resize_with_pad_top_left",
    size_key="resize_imgs_with_padding",
    size=512,
)
_FAMILIES: Mapping[str, _Family] = {"pi0": _PI, "pi05": _PI, "pi0_fast": _PI, "smolvla": _SMOLVLA}
#: Normalisation as LeRobot kept it in its models before 0.4; of states and actions.
_NORMALIZATION = r"(normalize_inputs|normalize_targets|unnormalize_outputs)\."
#: Position tables and pooling heads that no policy runs.
_UNUSED_IN_TOWER = r"embeddings\.position_ids|head\..+"

#: Names in a tower of transformers' → timm's; the last three are joined in this order.
_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "self_attn.out_proj": "attn.proj",
}
_JOINED = tuple(f"self_attn.{part}_proj" for part in "qkv")
_ENDS = {"embeddings.patch_embedding": "patch_embed.proj", "post_layernorm": "norm"}
_POSITIONS = "embeddings.position_embedding.weight"
#: (width, patch size) → timm's architecture, its blocks, heads and width of the MLP.
_TOWERS = {
    (1152, 14): ("vit_so400m_patch14_siglip_224", 27, 16, 4304),
    (768, 16): ("vit_base_patch16_siglip_512", 12, 12, 3072),
}


def is_policy(config: Mapping[str, object]) -> bool:
    """Whether ``config.json`` is that of a policy which is read here: by its ``type``, or as openpi writes it."""
    kind = config.get("type")
    return isinstance(kind, str) and kind in _FAMILIES or _is_openpi(config)


def _is_openpi(config: Mapping[str, object]) -> bool:
    return "type" not in config and {"paligemma_variant", "action_horizon"} <= set(config)


def is_vision(name: str) -> bool:
    """Whether a tensor has to be looked at in a policy of any of these kinds: all but those that are known not to matter."""
    name = _bare(name)
    beside = "|".join((_PI.others, _SMOLVLA.others, _NORMALIZATION))
    return not is_head(name) and re.match(beside, name) is None


def is_known(name: str) -> bool:
    """Whether such a tensor is one of a vision tower or connector."""
    return any(re.match(f"{family.tower}|{family.connector}", _bare(name)) for family in (_PI, _SMOLVLA))


def refuse_unknown(where: object, names: Iterable[str]) -> None:
    """Raises a CheckpointError about tensors that are neither vision nor known to have no bearing on it; nothing if none."""
    names = list(names)
    if names:
        raise CheckpointError(
            f"{where}: {listing('tensors that belong to no known part of such a policy', names)}. Tokens may depend on them; "
            "where they have no bearing on vision, save the policy without them"
        )


def refuse_adapter(where: object, names: Iterable[str], cure: str) -> None:
    """Raises a CheckpointError, with the cure, if an adapter changes a policy's vision part; nothing if it does not.

    Args:
        names: of the adapter's tensors, as in the policy. LeRobot's own adapters are for the action expert alone.
    """
    changed = sorted(name for name in names if is_vision(name))
    if changed:
        raise CheckpointError(
            f"{where}: {listing('tensors that change the vision tower or its connector, or may do so', changed)}. "
            f"Adapters are not added to the vision of LeRobot's policies, whose query, key and value are one tensor here; {cure}"
        )


def _bare(name: str) -> str:
    return unwrapped(unwrapped(name).removeprefix("base_model.model.")).removeprefix("model.")


def refuse_orbax(directory: Path) -> None:
    """Raises a CheckpointError if this is openpi's own checkpoint, with how to convert it; nothing if it is not."""
    params = directory if directory.name == "params" else directory / "params"
    if any((params / name).exists() for name in ("_METADATA", "_sharding", "manifest.ocdbt", "ocdbt.process_0")):
        raise CheckpointError(
            f"{directory} is openpi's own checkpoint (orbax, for JAX), which takes JAX to read. Convert it in openpi's "
            "environment, `uv run examples/convert_jax_model_to_pytorch.py --checkpoint_dir "
            f"{params.parent} --config_name CONFIG --output_path FOLDER`, and give FOLDER as the model; or take the same model "
            "as LeRobot publishes it (lerobot/pi0_base, lerobot/pi05_base)"
        )


def check_config(config: Mapping[str, object], where: object) -> None:
    """Raises a CheckpointError, with the reason, for a policy whose tokens do not follow from one image alone."""
    if config.get("use_visual_memory"):
        raise CheckpointError(
            f"{where} has use_visual_memory: true. Its tower mixes in the frames before (MEM), so the tokens of an image do "
            "not follow from that image alone, and a tokenizer that sees one frame at a time cannot give them; use a policy "
            "that was trained without visual memory, or run vision inside the policy"
        )
    mapping = config.get("normalization_mapping")
    visual = mapping.get("VISUAL", "IDENTITY") if isinstance(mapping, Mapping) else "IDENTITY"
    if visual != "IDENTITY":
        raise CheckpointError(
            f"{where} normalizes images by {visual!r:.100} (normalization_mapping, VISUAL) before the policy scales them to "
            "-1 … 1, which is not done here; only IDENTITY, LeRobot's default for these policies, is"
        )


def open_policy(directory: Path) -> Checkpoint:
    """A policy's directory → its vision part.

    Raises:
        CheckpointError: it is not read (see `check_config`), tensors are missing or unexpected, …; says what to do.
    """
    file = directory / "config.json"
    settings = read_json(file)
    check_config(settings, file)
    family = _PI if _is_openpi(settings) else _FAMILIES[str(settings["type"])]
    resize, size = _resize(settings, family, file)
    tower, connector = _parts(directory, family)
    overrides, timm_id, grid = _architecture(directory, tower, size)
    encoders = siglip_of_transformers(timm_id, size, resize, overrides)
    name = encoders[0].name
    tensors = {f"{name}.{key}": value for key, value in _timm_tensors(directory, tower, family, grid).items()}
    tensors |= {f"projector.fc1.{key}": value for key, value in connector.items()}
    width, shuffle = _connector(directory, connector, tower, family)
    config = TokenizerConfig(directory.resolve().name, encoders, family.projector, width, pixel_shuffle=shuffle)
    return Checkpoint(directory, config, tensors, notes=_views(settings), of_lerobot=True)


def read_config(directory: Path) -> TokenizerConfig:
    """The configuration of a policy's directory that may lack the weights: then its tower is taken to be the published one."""
    if (directory / "model.safetensors").is_file():
        return open_policy(directory).config
    settings = read_json(directory / "config.json")
    check_config(settings, directory / "config.json")
    family = _PI if _is_openpi(settings) else _FAMILIES[str(settings["type"])]
    resize, size = _resize(settings, family, directory / "config.json")
    preset = PRESETS["smolvla" if family is _SMOLVLA else "pi05"]
    encoder = replace(preset.encoders[0], image_size=size, resize_strategy=resize)
    return replace(preset, name=directory.resolve().name, encoders=(encoder,))


def _resize(settings: Mapping[str, object], family: _Family, file: Path) -> tuple[str, int]:
    """How images are resized, and the side of the square."""
    if _is_openpi(settings):  # whose server resizes as its client does
        return "resize_with_pad_pil", family.size
    if family is _PI and "image_resolution" not in settings and "resize_imgs_with_padding" in settings:
        return "resize_with_pad_top_left", _side(settings, "resize_imgs_with_padding", 224, file)  # before LeRobot 0.4
    return family.resize, _side(settings, family.size_key, family.size, file)


def _side(settings: Mapping[str, object], key: str, default: int, file: Path) -> int:
    """Side of the square that images are resized to, in pixels."""
    value = settings.get(key, [default, default])
    if value is None:
        raise CheckpointError(
            f"{file}: {key} is null, so images of every size go into the tower as they are, and the number of tokens depends on "
            "the camera; only policies that resize to one square are read"
        )
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_IMAGE_SIZE for side in sides):
        raise CheckpointError(f"{file}: {key} {value!r:.100} must be two whole numbers from 1 to {MAX_IMAGE_SIZE}")
    if sides[0] != sides[1]:
        raise CheckpointError(f"{file}: {key} {value!r:.100} is not a square, and only squares are encoded")
    return sides[0]


def _views(settings: Mapping[str, object]) -> tuple[str, ...]:
    """What the user has to know to name cameras in the policy's order."""
    features = settings.get("input_features")
    if not isinstance(features, Mapping):
        return ()
    names = [
        str(key).removeprefix("observation.images.").removeprefix("observation.")[:100]
        for key, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("type") == "VISUAL"
    ]
    return (f"the policy takes its views in this order: {', '.join(names)}",) if names else ()


def _parts(directory: Path, family: _Family) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors of tower and connector by the names that transformers gives them within."""
    tower: dict[str, StoredTensor] = {}
    connector: dict[str, StoredTensor] = {}
    unexpected = []
    for stored in stored_tensors(directory, is_vision):
        name = _bare(stored.name)
        for part, pattern in ((tower, family.tower), (connector, family.connector)):
            match = re.match(pattern, name)
            if match is None:
                continue
            inner = name[match.end() :]
            if inner in part:
                raise CheckpointError(
                    f"{directory}: {stored.name[:200]!r} and {part[inner].name[:200]!r} are one tensor"
                )
            part[inner] = stored
            break
        else:
            if is_vision(stored.name):
                unexpected.append(stored.name)
    refuse_unknown(directory, unexpected)
    return tower, connector


def _architecture(
    directory: Path, tower: Mapping[str, StoredTensor], size: int
) -> tuple[dict[str, object], str, tuple[int, int]]:
    """timm's arguments and name, and the side of the grid as trained and as run, from the tensors' shapes."""

    def shape(name: str, length: int) -> tuple[int, ...]:
        stored = tower.get(name)
        if stored is None or len(stored.shape) != length or not all(0 < side <= MAX_WIDTH for side in stored.shape):
            found = "is missing" if stored is None else f"has the shape {list(stored.shape)}"
            raise CheckpointError(
                f"{directory}: the vision tower's {name} {found}. Check that the download is complete, and that config.json "
                "belongs to these weights"
            )
        return stored.shape

    width, _, patch, _ = shape("embeddings.patch_embedding.weight", 4)
    if not 0 < size // patch <= MAX_PATCHES**0.5:
        raise CheckpointError(f"{directory}: images of {size} pixels cannot be cut into patches of {patch}")
    positions, _ = shape(_POSITIONS, 2)
    hidden, _ = shape("encoder.layers.0.mlp.fc1.weight", 2)
    blocks = 1 + max(int(match[1]) for name in tower if (match := re.match(r"encoder\.layers\.(\d{1,3})\.", name)))
    trained = int(positions**0.5)
    if trained * trained != positions:
        raise CheckpointError(f"{directory}: {positions} position embeddings lie on no square grid")
    # Of SigLIPs that are not published, heads of 72 (So400m) or 64 (B, L) channels.
    heads = width // 72 if width % 72 == 0 else max(1, width // 64)
    known = _TOWERS.get((width, patch))
    timm_id, *usual = known or ("vit_base_patch16_siglip_512", 0, 0, 0)
    overrides: dict[str, object] = {}
    if known is None:
        overrides |= {"embed_dim": width, "patch_size": patch}
    if usual != [blocks, heads, hidden]:
        # timm rounds width · mlp_ratio down.
        overrides |= {"depth": blocks, "num_heads": heads, "mlp_ratio": (hidden + 0.5) / width}
    return overrides, timm_id, (trained, size // patch)


def _timm_tensors(
    directory: Path, tower: Mapping[str, StoredTensor], family: _Family, grid: tuple[int, int]
) -> dict[str, StoredTensor]:
    """The tower's tensors by timm's names; what is missing is missing there, too."""
    found: dict[str, StoredTensor] = {}
    joined: dict[str, dict[str, StoredTensor]] = {}
    unexpected = []
    for name, stored in tower.items():
        module, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"encoder\.layers\.(\d{1,3})\.(.+)", module)
        if kind not in ("weight", "bias") or re.fullmatch(_UNUSED_IN_TOWER, name):
            known = re.fullmatch(_UNUSED_IN_TOWER, name) is not None
        elif name == _POSITIONS:
            known = True
            found["pos_embed"] = _positions(directory, stored, family, grid)
        elif layer is None:
            known = module in _ENDS
            if known:
                found[f"{_ENDS[module]}.{kind}"] = stored
        else:
            number, inner = int(layer[1]), layer[2]
            known = inner in _LAYER or inner in _JOINED
            if inner in _LAYER:
                found[f"blocks.{number}.{_LAYER[inner]}.{kind}"] = stored
            elif known:
                joined.setdefault(f"blocks.{number}.attn.qkv.{kind}", {})[inner] = stored
        if not known:
            unexpected.append(stored.name)
    if unexpected:
        raise CheckpointError(f"{directory}: {listing('unexpected tensors in the vision tower', unexpected)}")
    for name, parts in joined.items():
        lacking = [part for part in _JOINED if part not in parts]
        if lacking:
            there = next(iter(parts.values())).name
            raise CheckpointError(f"{directory}: {there[:200]!r} lacks {' and '.join(lacking)} beside it")
        found[name] = join([parts[part] for part in _JOINED])
    return found


def _positions(directory: Path, stored: StoredTensor, family: _Family, grid: tuple[int, int]) -> StoredTensor:
    """Position embeddings [positions, width] → [1, patches, width], as the model's own code looks them up."""
    trained, run = grid
    if family is _SMOLVLA:
        rows = smolvlm_positions(trained, run)
        if rows != list(range(trained)):
            picked = [row * trained + column for row in rows for column in rows]
            return _Derived([stored], (1, run * run, stored.shape[1]), picked).tensor()
    elif trained != run:
        raise CheckpointError(
            f"{directory}: its position embeddings are for {trained} × {trained} patches and the images of config.json have "
            f"{run} × {run}; PaliGemma's code takes no others either"
        )
    return _Derived([stored], (1, *stored.shape)).tensor()


def smolvlm_positions(trained: int, run: int) -> list[int]:
    """Row (or column) of the trained grid whose embedding each of `run` patches gets.

    As SmolVLMVisionEmbeddings buckets them, in the same float32 operations: rounding moves some, where `run` is `trained`
    and no power of 2 as well.
    """
    float32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever a caller's defaults are
    boundaries = torch.arange(1 / trained, 1.0, 1 / trained, **float32)
    step = 1.0 / torch.tensor([run], **float32)
    coordinates = (torch.arange(run, **float32) * step).clamp(max=1.0 - 1e-6)
    return torch.bucketize(coordinates, boundaries, right=True).tolist()


def _connector(
    directory: Path, connector: Mapping[str, StoredTensor], tower: Mapping[str, StoredTensor], family: _Family
) -> tuple[int, int]:
    """(channels out, side of the pixel shuffle), from the shape of the linear layer."""
    weight = connector.get("weight")
    if weight is None or len(weight.shape) != 2 or not all(0 < side <= MAX_WIDTH for side in weight.shape):
        found = "is missing" if weight is None else f"has the shape {list(weight.shape)}"
        raise CheckpointError(f"{directory}: the connector's linear layer {found}; the download is incomplete")
    out, inputs = weight.shape
    width = tower["embeddings.patch_embedding.weight"].shape[0]
    if family.projector == "linear":
        return out, 1
    shuffle = int((inputs / width) ** 0.5)
    if shuffle < 2 or shuffle * shuffle * width != inputs:
        raise CheckpointError(
            f"{directory}: a connector that takes {inputs} channels is no pixel shuffle of {width} of the tower"
        )
    return out, shuffle


def join(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Tensors one below the other, as one; CheckpointError if they do not fit."""
    shapes = {part.shape[1:] for part in parts if part.shape}
    if len({part.dtype for part in parts}) > 1 or len(shapes) != 1 or not all(part.shape for part in parts):
        described = ", ".join(f"{part.name[:200]} {part.dtype} {list(part.shape)}" for part in parts)
        raise CheckpointError(f"tensors that belong together differ in shape or dtype: {described}")
    return _Derived(parts, (sum(part.shape[0] for part in parts), *parts[0].shape[1:])).tensor()


class _Derived:
    """A tensor made of stored ones when it is asked for: joined, rows picked, another shape."""

    def __init__(self, parts: Sequence[StoredTensor], shape: tuple[int, ...], rows: Sequence[int] = ()) -> None:
        self.path = parts[0].source.path
        self._parts, self._shape, self._rows = parts, shape, rows

    def tensor(self) -> StoredTensor:
        name = " + ".join(part.name for part in self._parts) + f" as {list(self._shape)}"
        return StoredTensor(self, name, self._shape, self._parts[0].dtype)

    def get(self, name: str) -> torch.Tensor:
        tensors = [part.get() for part in self._parts]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (tensor[list(self._rows)] if self._rows else tensor).reshape(self._shape)

    def check_unchanged(self) -> None:
        for part in self._parts:
            part.source.check_unchanged()
