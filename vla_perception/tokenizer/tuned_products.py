"""The encoders' matrix products by those of cuBLASLt's proposals that ``vla-perception tune`` found fastest on this GPU.

What it found lies in a file of the cache folder, which holds numbers and no code: a choice is looked up among the proposals
that cuBLASLt makes now, has to be the same kernel as when it was tuned, and has to give the product that PyTorch gives.
Nothing is tuned at a start, so last bits change only when that command has run, and `use` says which choices are in use.

The file, ``tuned_products/KEY.json``, is for one device, PyTorch, cuBLASLt, precision and set of layers, for several numbers
of views, and is written and read by its owner alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vla_perception.tokenizer import cublaslt
from vla_perception.tokenizer.checkpoints import CheckpointError
from vla_perception.tokenizer.checkpoints.files import parse_json
from vla_perception.tokenizer.checkpoints.paths import cache_directory
from vla_perception.tokenizer.cublaslt import Choice, Configuration, CublasLt, CublasLtError, Product
from vla_perception.tokenizer.network import TokenizerNetwork

log = logging.getLogger(__name__)

#: Precisions whose products are tuned → relative L2 between a proposal's result and PyTorch's; rounding gives a quarter.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Of each block.
_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
#: Numbers of views that are tuned, at most: a product is tried on as many rows as it is for.
MAX_VIEWS = 64
#: Bytes of a file; that of a model takes some 2 KB per number of views.
_MAX_BYTES = 1 << 18

#: Number of views → group's name → choice; PyTorch's own products compute the groups that are missing.
Choices = Mapping[int, Mapping[str, Choice]]


class TunedLinear(nn.Module):
    """`nn.Linear` that computes some numbers of rows by a product of `products`, all others as PyTorch does."""

    def __init__(self, linear: nn.Linear, products: dict[int, Product]) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.products = products

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        product = self.products.get(values.numel() // self.in_features)
        if product is None or values.dtype != self.weight.dtype:  # as under a caller's autocast
            return functional.linear(values, self.weight, self.bias)
        return product(values, self.weight, self.bias)


@dataclass(frozen=True)
class Group:
    """The layers of one encoder that multiply alike, one of each block.

    Attributes:
        name: encoder and layer, ``siglip mlp.fc2``.
        tokens: rows that one view has.
        products: number of rows → what computes it in all these layers.
    """

    name: str
    tokens: int
    layers: list[TunedLinear]
    products: dict[int, Product]

    def shape(self) -> list:
        """What decides on the proposals."""
        layer = self.layers[0]
        return [self.name, self.tokens, layer.out_features, layer.in_features, layer.bias is not None]


def groups_of(network: TokenizerNetwork) -> list[Group]:
    """The groups of a network. Replaces the linear layers of the encoders' blocks by `TunedLinear` where that is not done yet.

    The names in the state dict stay the same. Other layers than `nn.Linear` are left.
    """
    groups = []
    for name, encoder in zip(network.encoders, network.towers):
        rows, columns = encoder.grid
        for path in _LAYERS:
            part, attribute = path.split(".")
            parents = [getattr(block, part, None) for block in encoder.vit.blocks]
            layers: list[Any] = [getattr(parent, attribute, None) for parent in parents]
            if {type(layer) for layer in layers} == {nn.Linear}:
                products: dict[int, Product] = {}
                layers = [TunedLinear(layer, products) for layer in layers]
                for parent, layer in zip(parents, layers):
                    setattr(parent, attribute, layer)
            if all(isinstance(layer, TunedLinear) for layer in layers):
                tokens = rows * columns + encoder.vit.num_prefix_tokens
                groups.append(Group(f"{name} {path}", tokens, layers, layers[0].products))
    return groups


def clear(network: TokenizerNetwork, views: int) -> None:
    """Leaves the products of so many views to PyTorch again. Graphs that were captured before keep theirs."""
    for group in groups_of(network):
        group.products.pop(views * group.tokens, None)


@torch.no_grad()
def gives_the_product(product: Product, layer: TunedLinear, rows: int) -> bool:
    """Whether a proposal computes what PyTorch does, within rounding, and twice the same bits."""
    weight, bias = layer.weight, layer.bias
    noise = torch.arange(rows * layer.in_features, device=weight.device, dtype=torch.float32).sin_()
    values = noise.view(rows, layer.in_features).to(weight.dtype)
    expected = functional.linear(values, weight, bias)
    found, again = (product(values, weight, bias) for _ in range(2))
    # Of the difference in 16 bits, which is exact where both are close: whole results in float64 would take 100 MB.
    difference, size = (torch.linalg.vector_norm(part, dtype=torch.float32) for part in (found - expected, expected))
    error = float(difference / size)
    return error < TOLERANCES[weight.dtype] and torch.equal(found, again)


def use(network: TokenizerNetwork) -> str:
    """Puts the products that were tuned for such a network on this machine to use, if there are any.

    Returns:
        which choices are in use, for `Runtime.kernels`; empty if none is. The log says which are not, and why.
    """
    try:
        if not any(folder().iterdir()):
            return ""
    except (OSError, CheckpointError):  # there is no such folder, or no home for one
        return ""
    weight = next(network.parameters())
    try:
        lt = cublaslt.open_library(weight.device)
        groups = groups_of(network)
        if not groups:
            return ""
        key = key_of(lt, groups)
        file = file_of(key)
        chosen = read(file, key)
    except (OSError, CublasLtError, CheckpointError) as error:
        log.warning("tuned products are not used: %s", error)
        return ""
    used: dict[int, dict[str, Choice]] = {}
    for views, by_name in chosen.items():
        for group in groups:
            if group.name not in by_name:
                continue
            if reason := _put_to_use(lt, group, views, by_name[group.name]):
                log.warning("the tuned product of %s for %d view(s) is not used: %s", group.name, views, reason)
            else:
                used.setdefault(views, {})[group.name] = by_name[group.name]
    if not used:
        return ""
    text = f"tuned products {digest(used)} for {', '.join(map(str, sorted(used)))} view(s)"
    log.info("%s of %s; `vla-perception tune --forget` removes them", text, file)
    return text


def _put_to_use(lt: CublasLt, group: Group, views: int, choice: Choice) -> str:
    """Why the choice cannot be used; empty if it is in use from now on."""
    rows, layer = views * group.tokens, group.layers[0]
    try:
        product = lt.product(rows, layer.weight, layer.bias, choice)
        if product is None:
            return "cuBLASLt proposes another one in its place; run vla-perception tune again"
        if not gives_the_product(product, layer, rows):
            return "it gives other values than PyTorch's; run vla-perception tune again"
    except (CublasLtError, torch.cuda.OutOfMemoryError) as error:
        return _reason(error)
    group.products[rows] = product
    return ""


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def digest(chosen: Choices) -> str:
    """A short name of choices: equal ones have the same, others another one."""
    return hashlib.sha256(_canonical(_as_json(chosen))).hexdigest()[:12]


# --- the file


def folder() -> Path:
    """Where the files lie. CheckpointError where there is no home directory."""
    return cache_directory() / "tuned_products"


def key_of(lt: CublasLt, groups: list[Group]) -> dict:
    """What tuned products depend on; there must be a group."""
    weight = groups[0].layers[0].weight
    return {
        "device": torch.cuda.get_device_name(weight.device),
        "compute_capability": list(torch.cuda.get_device_capability(weight.device)),
        "torch": torch.__version__,
        "cublaslt": lt.version,
        "compute_dtype": str(weight.dtype).removeprefix("torch."),
        "layers": [group.shape() for group in groups],
    }


def file_of(key: dict) -> Path:
    """The file for a key. CheckpointError where there is no home directory."""
    return folder() / f"{hashlib.sha256(_canonical(key)).hexdigest()[:32]}.json"


def read(file: Path, key: dict) -> dict[int, dict[str, Choice]]:
    """What was written for that key; empty if nothing was.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is damaged, is of another key, or others may have written it.
    """
    try:
        # Neither a link nor a pipe is followed.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    with open(descriptor, "rb") as stream:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise CheckpointError(f"{file} is not a file that its user alone can write: remove it")
        text = stream.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise CheckpointError(f"{file} is longer than {_MAX_BYTES} bytes: remove it")
    content = parse_json(text, str(file))
    if content.get("key") != key:
        raise CheckpointError(f"{file} is not of this device, these versions and layers: remove it")
    try:
        return {
            _number(int(views), 1, MAX_VIEWS): {str(name): _choice(given) for name, given in by_name.items()}
            for views, by_name in content["views"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error}): remove it") from error


def write(file: Path, key: dict, chosen: Choices) -> None:
    """Replaces the file at once: who reads it meanwhile sees the old one or the new one. OSError if it cannot be written."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"key": key, "views": _as_json(chosen)}, indent=1) + "\n"
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=file.parent)  # for its owner alone
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def forget() -> int:
    """Removes all files; returns their number. OSError if one cannot be removed."""
    files = sorted(folder().glob("*.json"))
    for file in files:
        file.unlink()
    return len(files)


def _as_json(chosen: Choices) -> dict:
    return {
        str(views): {name: asdict(choice) for name, choice in sorted(by_name.items())}
        for views, by_name in sorted(chosen.items())
    }


def _choice(given: Mapping[str, Any]) -> Choice:
    """TypeError or ValueError for anything but what `_as_json` makes."""
    configuration = Configuration(**{name: _number(value) for name, value in given["configuration"].items()})
    numbers = {name: _number(value) for name, value in given.items() if name != "configuration"}
    return Choice(**numbers, configuration=configuration)


def _number(value: object, least: int = -(2**31), most: int = 2**32 - 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:100]} is not such a number")
    return value


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
