"""``vla-perception tune``: finds the fastest of cuBLASLt's products for a model on this GPU, and keeps them for later starts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vla_perception.baseline import TOLERANCES, distance
from vla_perception.startup import Progress
from vla_perception.tokenizer import VisualTokenizer, cublaslt, tuned_products
from vla_perception.tokenizer.cublaslt import Choice, CublasLt, CublasLtError
from vla_perception.tokenizer.devices import Placement, place
from vla_perception.tokenizer.network import TokenizerNetwork
from vla_perception.tokenizer.product_search import Found, GraphTimer, Search
from vla_perception.tokenizer.runtime import limit_threads


def run(
    model: str,
    *,
    device: str = "auto",
    compute_dtype: str = "auto",
    views: Sequence[int] = (1,),
    seconds: float = 60.0,
    **options: object,
) -> None:
    """Searches for every number of views, prints times before and after, and writes what was found after each.

    Args:
        device, compute_dtype, options: as `VisualTokenizer.load` takes them.
        seconds: of searching, for each number of views.

    Raises:
        ValueError: there is nothing to tune here, or tokens come too far from those before: says what to do.
        OSError: the file cannot be written.
    """
    limit_threads()
    if max(views) > tuned_products.MAX_VIEWS:
        raise ValueError(f"at most {tuned_products.MAX_VIEWS} views can be tuned, not {max(views)}")
    placement = place(device, compute_dtype)
    lt = _library(placement)
    progress = Progress()
    progress(f"loading {model}", begins=True)
    choices: dict[str, Any] = {"device": str(placement.device), "compute_dtype": placement.compute_dtype, **options}
    tokenizer = VisualTokenizer.load(model, runtime="graph", **choices)
    groups = tuned_products.groups_of(tokenizer.network)
    if not groups:
        raise ValueError(f"{tokenizer.model} has no encoder whose products can be tuned")
    key = tuned_products.key_of(lt, groups)
    file = tuned_products.file_of(key)
    chosen = _read(file, key)
    _write_something_into(file.parent)
    print(f"{tokenizer.model}, {key['device']}, {tokenizer.compute_dtype}, torch {key['torch']}", flush=True)
    try:
        for number in views:
            found, error = tune(lt, tokenizer.network, number, seconds, progress)
            progress.clear()
            # Read again: another process may have written for other numbers of views meanwhile.
            chosen = _read(file, key) | {number: found.choices}
            tuned_products.write(file, key, chosen)
            print(
                f"{number} view(s): one replay {found.before_us:.1f} → {found.after_us:.1f} µs, {len(found.choices)} of "
                f"{len(groups)} products changed after {found.tried} tries; tokens' relative L2 to before {error:.1e}",
                flush=True,
            )
    except RuntimeError as failure:
        raise ValueError(f"tuning failed: {failure}") from failure
    finally:
        progress.clear()
    if not any(chosen.values()):
        print(f"{file}: nothing faster was found, so nothing changes")
        return
    print(f"{file}: tuned products {tuned_products.digest(chosen)}, used by runtime graph from the next start on")


def forget() -> None:
    """Removes what was found, for all models and devices."""
    print(f"{tuned_products.forget()} file(s) of tuned products removed from {tuned_products.folder()}")


def tune(
    lt: CublasLt, network: TokenizerNetwork, views: int, seconds: float, progress: Progress
) -> tuple[Found, float]:
    """Searches for one number of views; returns what was found, and how far tokens are from those before (relative L2).

    Raises:
        ValueError: tokens are too far from those before, or not the same bits twice.
        RuntimeError: the network cannot be captured, or the device fails.
    """
    tuned_products.clear(network, views)
    timer = GraphTimer(network, views)
    groups = tuned_products.groups_of(network)
    with torch.cuda.device(groups[0].layers[0].weight.device), torch.inference_mode():
        before = timer.tokens()
        found = Search(lt, groups, views, timer, lambda text: progress(text, begins=True)).run(seconds)
        after, again = timer.tokens(), timer.tokens()
    error, _ = distance(after.double(), before.double())
    limit = TOLERANCES[str(before.dtype).removeprefix("torch.")]
    if error < limit and torch.equal(after, again):
        return found, error
    tuned_products.clear(network, views)
    if error < limit:
        raise ValueError(f"tokens of {views} view(s) would not have the same bits twice: nothing is kept for them")
    raise ValueError(
        f"tokens of {views} view(s) would come {error:.1e} (relative L2) from those before, where rounding accounts for "
        f"{limit:g}: nothing is kept for them"
    )


def _library(placement: Placement) -> CublasLt:
    """ValueError if there is nothing to tune."""
    if placement.device.type != "cuda":
        raise ValueError(f"tune needs an NVIDIA GPU, and this would be {placement}")
    if placement.compute_dtype == "float8" or placement.dtype not in tuned_products.TOLERANCES:
        raise ValueError(f"tune knows bfloat16 and float16, not {placement.compute_dtype}; choose one of them")
    try:
        return cublaslt.open_library(placement.device)
    except CublasLtError as error:
        raise ValueError(f"products cannot be tuned here: {error}") from error


def _write_something_into(folder: Path) -> None:
    """OSError before the search, if nothing could be written after it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _read(file: Path, key: dict) -> dict[int, dict[str, Choice]]:
    """What is there for other numbers of views; nothing of a file that is of no use."""
    try:
        return tuned_products.read(file, key)
    except ValueError:
        return {}
