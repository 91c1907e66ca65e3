"""Checkpoints: their tensors, and the configurations of each layout beside tensors that stay as they are."""

from __future__ import annotations

import functools
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import film_checkpoints
import lerobot_checkpoints
import numpy as np
import torch
from engine import Target, scratch
from huggingface_hub import constants
from mutations import change_json, change_safetensors, change_zip
from safetensors.torch import save, save_file

from vla_perception.tokenizer import CheckpointError, VisualTokenizer
from vla_perception.tokenizer.checkpoints import hub, lerobot, timm_encoders
from vla_perception.tokenizer.checkpoints.checkpoint import Checkpoint
from vla_perception.tokenizer.checkpoints.files import PickledTensors, SafetensorsFile
from vla_perception.tokenizer.checkpoints.open import open_checkpoint
from vla_perception.tokenizer.film import Condition

TIMM = "test_vit3.r160_in1k"


def _small_tensors() -> dict[str, torch.Tensor]:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
    return {f"projector.{index}.weight": torch.arange(6).reshape(2, 3).to(kind) for index, kind in enumerate(kinds)}


def safetensors(data: bytes) -> None:
    path = scratch() / "x.safetensors"
    path.write_bytes(data)
    file = SafetensorsFile(path)
    for name, stored in file.tensors.items():
        if stored.dtype in ("F32", "F16", "BF16", "F64"):
            tensor = stored.get()
            assert tuple(tensor.shape) == stored.shape, name
            tensor.sum()


def safetensors_seeds() -> list[bytes]:
    return [save(_small_tensors()), save(_small_tensors(), metadata={"format": "pt"}), save({})]


def pickle(data: bytes) -> None:
    path = scratch() / "x.pt"
    path.write_bytes(data)
    file = PickledTensors(path)
    for keys in (("model", "projector"), ("model", "vision_backbone"), ("state_dict",), ()):
        for stored in file.part(*keys).values():
            assert tuple(stored.get().shape) == stored.shape
            stored.get().sum()


def pickle_seeds() -> list[bytes]:
    seeds = []
    parameter = {"projector.0.weight": torch.nn.Parameter(torch.ones(2, 3))}
    for tree in (
        {"model": {"projector": _small_tensors(), "vision_backbone": {}}},
        {"model": {"projector": parameter}},
    ):
        stream = io.BytesIO()
        torch.save(tree, stream)
        seeds.append(stream.getvalue())
    return seeds


# Configurations: the input is a JSON object of the files' contents by their names


def _folder(write: Callable[[Path], object], name: str) -> Path:
    folder = scratch() / name
    if not folder.exists():
        write(folder)
    return folder


def _seed(folder: Path, *files: str) -> bytes:
    return json.dumps({file: json.loads((folder / file).read_text()) for file in files}).encode()


def _place(folder: Path, files: tuple[str, ...], data: bytes) -> None:
    """Writes them; what is no such object stands in the first one as it is."""
    try:
        contents = json.loads(data)
        texts = {file: json.dumps(contents[file]) for file in files if file in contents}
    except (ValueError, TypeError, RecursionError):
        texts = {files[0]: data}
    for file in files:
        (folder / file).unlink(missing_ok=True)
        if file in texts:
            text = texts[file]
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def _describe(checkpoint: Checkpoint) -> None:
    """What a user's option and the command's `describe` do with it."""
    checkpoint.config.with_options(trained=True, pool=1)


@functools.cache
def _parts() -> tuple[list[torch.nn.Module], dict[str, torch.Tensor]]:
    models = checkpoints.towers()
    tensors = checkpoints.openvla_tensors(models, checkpoints.projector(sum(model.embed_dim for model in models)))
    return models, tensors


def _openvla() -> Path:
    return _folder(lambda folder: checkpoints.write(folder, _parts()[1]), "openvla")


OPENVLA = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")


def openvla(data: bytes) -> None:
    _place(_openvla(), OPENVLA, data)
    _describe(open_checkpoint(_openvla()))


def openvla_loaded(data: bytes) -> None:
    _place(_openvla(), OPENVLA, data)
    tokenizer = VisualTokenizer.from_checkpoint(_openvla(), device="cpu")
    tokens = tokenizer(np.zeros((20, 30, 3), np.uint8)).tokens
    assert torch.isfinite(tokens).all()


@functools.cache
def openvla_seeds() -> list[bytes]:
    return [_seed(_openvla(), *OPENVLA)]


def _adapter() -> Path:
    def write(folder: Path) -> None:
        base = checkpoints.write(scratch() / "base", _parts()[1])
        folder.mkdir()
        weight = _parts()[1]["projector.fc2.weight"]
        module = "base_model.model.projector.fc2"
        save_file(
            {
                f"{module}.lora_A.weight": torch.ones(4, weight.shape[1]),
                f"{module}.lora_B.weight": torch.ones(weight.shape[0], 4),
            },
            folder / "adapter_model.safetensors",
        )
        settings = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "bias": "none",
            "use_dora": False,
            "alpha_pattern": {},
        }
        settings |= {"base_model_name_or_path": str(base), "rank_pattern": {}, "target_modules": ["fc2"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    return _folder(write, "adapter")


def adapter(data: bytes) -> None:
    _place(_adapter(), ("adapter_config.json",), data)
    _describe(open_checkpoint(_adapter()))


@functools.cache
def adapter_seeds() -> list[bytes]:
    return [_seed(_adapter(), "adapter_config.json")]


def _prismatic() -> Path:
    def write(folder: Path) -> None:
        (folder / "checkpoints").mkdir(parents=True)
        projector = {f"projector.{layer}.weight": torch.zeros(8, 8) for layer in (0, 2, 4)}
        projector |= {f"projector.{layer}.bias": torch.zeros(8) for layer in (0, 2, 4)}
        torch.save({"model": {"projector": projector}}, folder / "checkpoints" / "latest-checkpoint.pt")
        settings = {"vision_backbone_id": "dinosiglip-vit-so-224px", "image_resize_strategy": "letterbox"}
        (folder / "config.json").write_text(json.dumps({"model": settings}))

    return _folder(write, "prismatic")


def prismatic(data: bytes) -> None:
    _place(_prismatic(), ("config.json",), data)
    open_checkpoint(_prismatic())


@functools.cache
def prismatic_seeds() -> list[bytes]:
    other = {"config.json": {"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}}}
    return [_seed(_prismatic(), "config.json"), json.dumps(other).encode()]


def _timm() -> Path:
    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(checkpoints.towers((TIMM,), (160,))[0].state_dict(), folder / "model.safetensors")
        statistics = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 160, 160], "interpolation": "bicubic"}
        settings = {"architecture": "test_vit3", "pretrained_cfg": {"tag": "r160_in1k", **statistics}}
        settings["model_args"] = {"qkv_bias": True, "act_layer": "gelu", "depth": 9, "mlp_ratio": 2.0}
        (folder / "config.json").write_text(json.dumps(settings))

    return _folder(write, "timm")


def timm(data: bytes) -> None:
    _place(_timm(), ("config.json",), data)
    timm_encoders.open_encoders(f"local-dir:{_timm()}")


@functools.cache
def timm_seeds() -> list[bytes]:
    return [_seed(_timm(), "config.json")]


def _lerobot(kind: str) -> Path:
    return _folder(lambda folder: lerobot_checkpoints.written(folder, kind), kind)


def lerobot_config(data: bytes) -> None:
    kind = "smolvla" if b"resize_imgs_with_padding" in data else "pi05"
    folder = _lerobot(kind)
    _place(folder, ("config.json",), data)
    _describe(open_checkpoint(folder))
    bare = scratch() / "bare"  # what is read of a policy on the hub before its weights are fetched
    bare.mkdir(exist_ok=True)
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    lerobot.read_config(bare)


@functools.cache
def lerobot_config_seeds() -> list[bytes]:
    return [_seed(_lerobot(kind), "config.json") for kind in ("pi05", "smolvla")]


def lerobot_tensors(data: bytes) -> None:
    """Names and shapes, of which the architecture is made: the input is a safetensors header, its bytes are zeros."""
    folder = scratch() / "policy"
    if not folder.exists():
        folder.mkdir()
        _place(folder, ("config.json",), lerobot_config_seeds()[0])
    path = folder / "model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    try:
        header = json.loads(data)
        end = max(int(entry["data_offsets"][1]) for entry in header.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
        end = 0
    with path.open("r+b") as file:
        file.truncate(8 + len(data) + min(max(end, 0), 1 << 24))  # a hole, which takes no room
    _describe(open_checkpoint(folder))


@functools.cache
def lerobot_tensors_seeds() -> list[bytes]:
    content = (_lerobot("pi05") / "model.safetensors").read_bytes()
    return [content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip()]


def hub_repository(data: bytes) -> None:
    """A repository of the hub as its cache has it: the input is as OpenVLA's. Checked and planned, but nothing copied."""
    commit = "0" * 40
    cache = Path(constants.HF_HUB_CACHE) / "models--a--b"
    snapshot = cache / "snapshots" / commit
    if not snapshot.exists():
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        snapshot.mkdir(parents=True)
        for file in _openvla().glob("*.safetensors"):
            (snapshot / file.name).symlink_to(file)
    _place(snapshot, OPENVLA, data)
    names = hub._names(hub.fetch_configuration("a/b"))
    files = dict.fromkeys(path.name for path in snapshot.iterdir())
    shards = hub._shards("a/b", commit, files, names)
    header, pieces = hub._plan(hub._sources("a/b", commit, shards), {"repository": "a/b"}, names, needed=True)
    assert len(header) < 1 << 20 and all(start <= stop for piece in pieces for start, stop in piece.spans)


# OpenVLA-OFT with FiLM


def film_tensors(data: bytes) -> None:
    """Names and shapes of the encoders' state: the input is a JSON object, the values are zeros."""
    folder = _film()
    try:
        shapes = {str(name): tuple(map(int, shape)) for name, shape in json.loads(data).items()}
        sound = all(
            min(shape, default=1) >= 0 and math.prod(max(size, 1) for size in shape) <= 1 << 16
            for shape in shapes.values()
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        sound = False
    if sound:
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / FILM)
        _describe(open_checkpoint(folder))


FILM = "vision_backbone--1_checkpoint.pt"


def _film() -> Path:
    return _folder(lambda folder: shutil.copytree(_openvla(), folder), "film")


@functools.cache
def film_tensors_seeds() -> list[bytes]:
    _place(_openvla(), OPENVLA, openvla_seeds()[0])
    few = {name: value for name, value in film_checkpoints.film_state().items() if ".blocks.1." in name}
    return [json.dumps({name: list(value.shape) for name, value in few.items()}).encode()]


_CONDITIONS = (np.float32, np.float64, np.float16, np.int64, np.uint8)


def condition(data: bytes) -> None:
    """A vector from a policy: of a dtype that the first byte chooses, of any length, with any bits."""
    kind = np.dtype(_CONDITIONS[data[0] % len(_CONDITIONS)] if data else np.float32)
    payload = data[1:]
    vector = np.frombuffer(payload[: len(payload) // kind.itemsize * kind.itemsize], kind)
    held = Condition(torch.nn.Module(), 6, torch.device("cpu"), torch.float32)
    assert re.fullmatch("[0-9a-f]{8,64}", held.set(vector)), held.digest
    assert held.set(vector.tolist()) == held.digest


def condition_seeds() -> list[bytes]:
    return [bytes([index]) + np.arange(6).astype(kind).tobytes() for index, kind in enumerate(_CONDITIONS)]


_ERRORS = (CheckpointError,)
TARGETS = [
    Target("safetensors", safetensors, safetensors_seeds, _ERRORS, (change_safetensors,), max_bytes=8192),
    Target("pt", pickle, pickle_seeds, _ERRORS, (change_zip,)),
    Target("openvla_config", openvla, openvla_seeds, _ERRORS, (change_json,)),
    Target(
        "openvla_load", openvla_loaded, openvla_seeds, _ERRORS, (change_json,), cpu_sec=4.0, memory_mib=256, cost=20
    ),
    Target("hub_repository", hub_repository, openvla_seeds, _ERRORS, (change_json,), cost=2),
    Target("adapter_config", adapter, adapter_seeds, _ERRORS, (change_json,), cost=2),
    Target("prismatic_config", prismatic, prismatic_seeds, _ERRORS, (change_json,), cost=2),
    Target("timm_config", timm, timm_seeds, _ERRORS, (change_json,), cost=4),
    Target("lerobot_config", lerobot_config, lerobot_config_seeds, _ERRORS, (change_json,)),
    Target("film_tensors", film_tensors, film_tensors_seeds, _ERRORS, (change_json,), cost=2),
    Target("condition", condition, condition_seeds, (ValueError,), max_bytes=256),
    Target("lerobot_tensors", lerobot_tensors, lerobot_tensors_seeds, _ERRORS, (change_json,)),
]
