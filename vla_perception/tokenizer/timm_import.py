"""timm's vision transformers without the rest of timm: in half a second of processor time, where `import timm` takes five.

``import timm`` reads every model family, and two things that a tokenizer never uses bring in all of ``torch._dynamo``
(torchvision's RoI align; a decorator in a model family). Here the packages ``timm``, ``timm.models`` and ``timm.data``
are put into `sys.modules` before their ``__init__`` has run: it runs as soon as something is asked of them that only it
gives, so other code in the process finds the timm that it knows. `importlib.util.LazyLoader` does the same for modules,
but not for packages: their submodules could not be imported without running them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: Running a package's `__init__`, for one thread at a time; others wait for it.
_running = threading.RLock()
_executing: set[str] = set()


class _Deferred(ModuleType):
    """A module that is executed when an attribute is asked for that it does not have yet."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _running:
            _execute(self)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def __dir__(self) -> list[str]:
        with _running:
            _execute(self)
        return list(vars(self))


def _execute(module: ModuleType) -> None:
    """Runs a deferred module, after its parents, as an import would."""
    parent = sys.modules.get(module.__name__.rpartition(".")[0])
    if type(parent) is _Deferred:
        _execute(parent)
    if type(module) is not _Deferred or module.__name__ in _executing:
        return  # asked again while it runs, it has what it has by then
    _executing.add(module.__name__)
    try:
        if module.__spec__ is not None and module.__spec__.loader is not None:
            module.__spec__.loader.exec_module(module)
        module.__class__ = ModuleType  # type: ignore[assignment]  # a plain module from here on
    finally:
        _executing.discard(module.__name__)


def _defer(name: str) -> ModuleType:
    """Puts a module into `sys.modules` that is not executed yet."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Deferred
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if type(sys.modules.get(parent)) is _Deferred:
        setattr(sys.modules[parent], child, module)
    return module


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """In it, an import of ``torch._dynamo`` for one function that torchvision calls much later, or never, costs nothing."""
    names = ("torch._dynamo", "torch._dynamo.utils")
    if names[0] in sys.modules:
        yield
        return

    def is_compile_supported(device_type: str) -> bool:
        return importlib.import_module(names[1]).is_compile_supported(device_type)

    deferred = [_defer(name) for name in names]
    vars(deferred[1])["is_compile_supported"] = is_compile_supported
    try:
        yield
    finally:
        for name, module in zip(names, deferred):
            if type(module) is _Deferred and sys.modules.get(name) is module:
                del sys.modules[name]
        if "_dynamo" in vars(torch) and names[0] not in sys.modules:
            del torch._dynamo


def _import_timm() -> ModuleType:
    """timm, with its vision transformers imported."""
    if "timm" in sys.modules:
        return importlib.import_module("timm")
    try:
        package, _, data = (_defer(name) for name in ("timm", "timm.models", "timm.data"))
        vars(package)["__version__"] = importlib.import_module("timm.version").__version__
        constants = importlib.import_module("timm.data.constants")
        vars(data).update({name: value for name, value in vars(constants).items() if not name.startswith("_")})
        with _without_dynamo():
            for name in ("vision_transformer", "_factory", "_registry"):
                importlib.import_module(f"timm.models.{name}")
        return package
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise
        # Another timm than those that this was written for: all of it, in the ordinary way.
        for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
            del sys.modules[name]
        return importlib.import_module("timm")


def create_model(name: str, **settings: object) -> Any:  # its attributes are timm's, and none of nn.Module's
    """``timm.create_model``, a module; all of timm is imported only if `name` is none of its plain vision transformers.

    Raises:
        RuntimeError: timm does not know the name.
    """
    return _of("_factory", name).create_model(name, pretrained=False, **settings)


def is_model(name: str) -> bool:
    """``timm.is_model``."""
    return _of("_registry", name).is_model(name)


def get_pretrained_cfg(name: str) -> Any:
    """``timm.get_pretrained_cfg``: what is known of weights, by an architecture's name and tag; None if it has none."""
    return _of("_registry", name).get_pretrained_cfg(name)


def _of(module: str, model: str) -> ModuleType:
    """Where timm's public functions come from, if what has been imported by now knows the model; timm otherwise."""
    registry, wanted = (sys.modules.get(f"timm.models.{name}") for name in ("_registry", module))
    if registry is None or wanted is None or not registry.is_model(model.split(".")[0]):
        return timm
    return wanted


class _WithoutValues(TorchFunctionMode):
    """Leaves out what would give values to tensors that have none; one of these steps imports ``torch._dynamo``."""

    _STEPS = frozenset(
        [getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "zero_")]
        + [function for name, function in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")]
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self._STEPS and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """In it, modules are built on the meta device: shapes without memory, and without initialising anything."""
    with torch.device("meta"), _WithoutValues():
        yield


timm = _import_timm()
# After it, so that these imports find the deferred packages.
from timm.layers import GELU, Attention, GELUTanh, Mlp, resample_abs_pos_embed  # noqa: E402
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer  # noqa: E402

__all__ = [
    "GELU",
    "GELUTanh",
    "Attention",
    "Block",
    "LayerScale",
    "Mlp",
    "VisionTransformer",
    "create_model",
    "get_pretrained_cfg",
    "is_model",
    "on_meta",
    "resample_abs_pos_embed",
    "timm",
]
