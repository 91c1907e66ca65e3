"""Loading the model of a node, in a thread: the node answers meanwhile, and can end. And giving its memory back.

torch is imported here and not before, so that a node is up at once and says what it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from vla_perception import startup
from vla_perception.images import decode
from vla_perception.nodes.visual_tokenizer.parameters import TokenizerParameters

if TYPE_CHECKING:
    from rclpy.impl.rcutils_logger import RcutilsLogger

    from vla_perception.tokenizer import VisualTokenizer


class BrokenImportError(RuntimeError):
    """PyTorch's import broke off, as without memory; it cannot begin again in this process."""


def load_tokenizer(
    parameters: TokenizerParameters, logger: RcutilsLogger, cancelled: threading.Event
) -> VisualTokenizer | None:
    """The model, loaded and warmed up for the node's cameras; None if `cancelled` is set meanwhile.

    Raises:
        ValueError: what is wrong with the model or its options, as a sentence.
        BrokenImportError: only another process can load it.
        Exception: whatever else loading raised.
    """
    begun = time.monotonic()
    logger.info(
        f"loading {parameters.model} (device {parameters.device}, compute_dtype {parameters.compute_dtype}), "
        f"{len(parameters.subscribed_cameras)} camera(s)"
    )
    # Read by OpenMP when torch is imported. Threads that spin while they wait make encoding four times as long where
    # something else needs the cores (measured: 2 cores, load 6, two views of `tiny-random`).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result: list[VisualTokenizer | BaseException] = []
    finished = threading.Event()

    def load() -> None:
        try:
            result.append(_load(parameters, logger))
        except ImportError as error:
            result.append(ValueError(f"{error}; run `pip install '.[tokenizer]'` in vla_perception's sources"))
        except BaseException as error:
            result.append(error)
        finished.set()

    # Reading 15 GB cannot be interrupted, but it can be left behind.
    threading.Thread(target=load, name="load", daemon=True).start()
    while not finished.wait(0.05):
        if cancelled.is_set():
            return None
    tokenizer = result[0]
    if isinstance(tokenizer, BaseException):
        raise tokenizer
    _log_what_was_loaded(tokenizer, logger, time.monotonic() - begun)
    return tokenizer


def _load(parameters: TokenizerParameters, logger: RcutilsLogger) -> VisualTokenizer:
    begun = time.monotonic()

    def log_duration(phase: str) -> None:
        nonlocal begun
        now = time.monotonic()
        logger.info(f"{phase} took {now - begun:.1f} s")
        begun = now

    _check(parameters)
    VisualTokenizer = _import_tokenizer()
    log_duration("importing PyTorch and timm")
    tokenizer = VisualTokenizer.load(
        parameters.model,
        device=parameters.device,
        compute_dtype=parameters.compute_dtype,
        runtime=parameters.runtime,
        **parameters.model_options(),
    )
    log_duration("loading the model")
    cameras = parameters.subscribed_cameras
    tokenizer.warm_up(len(cameras), cameras=cameras, empty_view=len(cameras) < len(parameters.cameras))
    log_duration("warming up")
    return tokenizer


def _import_tokenizer() -> type[VisualTokenizer]:
    try:
        with startup.imports():
            from vla_perception.tokenizer.runtime import limit_threads
            from vla_perception.tokenizer.tokenizer import VisualTokenizer
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) or (isinstance(error, ImportError) and "torch" not in str(error)):
            raise  # a package is missing, or too old
        # Without memory it breaks off anywhere: a library that cannot be mapped is an OSError.
        raise BrokenImportError(
            f"PyTorch could not be imported, and only a new process can try again: {type(error).__name__}: {error}"
        ) from error
    limit_threads()
    return VisualTokenizer


def _check(parameters: TokenizerParameters) -> None:
    """What can be checked before PyTorch is imported, which takes seconds. ValueError says what is wrong."""
    from vla_perception.tokenizer.checkpoints.open import check_model
    from vla_perception.tokenizer.image_transforms import parse_chains

    check_model(parameters.model, **parameters.model_options())
    unknown_cameras = set(parse_chains(parameters.image_transforms, [224])) - {"", *parameters.cameras}
    if unknown_cameras:
        raise ValueError(
            f"image_transforms names {', '.join(sorted(unknown_cameras))}, which is not among the cameras "
            f"({', '.join(parameters.cameras)})"
        )
    try:
        decode.warm_up()
    except ImportError as error:
        if parameters.image_transport == "compressed":
            raise ValueError(f"image_transport compressed: {error}") from error


def _log_what_was_loaded(tokenizer: VisualTokenizer, logger: RcutilsLogger, seconds: float) -> None:
    if tokenizer.weights == "random":
        logger.warning(
            f"{tokenizer.model} has random weights: the tokens mean nothing to a policy. Set `model` to a checkpoint's "
            "directory or Hugging Face id for real ones"
        )
    for note in tokenizer.notes:
        logger.info(note)
    logger.info(
        f"ready after {seconds:.1f} s: {tokenizer.model} ({tokenizer.weights} weights), {tokenizer.tokens_per_view} "
        f"tokens × {tokenizer.channels} channels per view, fingerprint {tokenizer.fingerprint[:12]}, "
        f"runtime {tokenizer.runtime} on {tokenizer.device} in {tokenizer.compute_dtype}, kernels {tokenizer.kernels}"
    )


def freeze_loaded_objects() -> None:
    """A full garbage collection over torch's and the model's objects stalls all threads for 0.1 to 0.2 s."""
    gc.collect()
    gc.freeze()
    trim_memory()


def release_memory() -> None:
    """Gives memory back, the device's too, when nothing refers to the model any more."""
    gc.unfreeze()
    gc.collect()
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a device that failed, or older torches after a failed capture
            torch.cuda.empty_cache()
    trim_memory()


def trim_memory() -> None:
    """Gives the system what glibc keeps of freed memory, in some milliseconds.

    It keeps a small model's size at the end of a heap, and whatever lies below a block that is still used. All of it is
    given back where there is one heap (executables.py).
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
