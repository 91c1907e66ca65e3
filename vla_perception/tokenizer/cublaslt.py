"""cuBLASLt's own proposals for a matrix product, by ctypes on the library that PyTorch has loaded.

PyTorch takes the first proposal. The others compute the same product with other tiles, in other times, and with
other last bits where they sum in another order. Numbers below are those of ``cublasLt.h``, the same in CUDA 11.8 to 13.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: cudaDataType of what is multiplied.
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_FLOAT32, _FLOAT32 = 68, 0
#: Attributes of a product's description.
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER, _MULTIPROCESSORS, _BIAS_TYPE = 3, 7, 8, 15, 26
_EPILOGUE_BIAS = 4
_MAX_WORKSPACE = 1  # attribute of a preference
_NOT_SUPPORTED = 15  # status: there is no proposal
#: Bytes of memory that a product may use beside its result.
_WORKSPACE_BYTES = 32 << 20
#: Proposals to ask for at once; cuBLASLt was seen to give 8 at most.
_ASKED = 64
#: Bytes that what is multiplied has to be aligned to, as cuBLASLt assumes; PyTorch aligns memory to 512.
_ALIGNMENT = 256
_FUNCTIONS = (
    "cublasLtCreate",
    "cublasLtGetVersion",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoConfigGetAttribute",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
)
_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


class CublasLtError(RuntimeError):
    """cuBLASLt is not there, or cannot do it; says what. `status` is what a function returned, 0 where none did."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Configuration:
    """What a proposal computes with, by cuBLASLt's own numbers; `workspace` in bytes."""

    algorithm: int
    tile: int
    split_k: int
    reduction: int
    swizzle: int
    custom: int
    stages: int
    inner_shape: int
    cluster_shape: int
    workspace: int


#: Of each field of `Configuration` but the last, in the order of cublasLtMatmulAlgoConfigAttributes_t.
_FIELD_TYPES = (*[ctypes.c_int32, ctypes.c_uint32] * 2, *[ctypes.c_uint32] * 3, *[ctypes.c_uint16] * 2)


@dataclass(frozen=True)
class Choice:
    """One proposal: the number `index` for so many of the device's multiprocessors (0: all), with its configuration then."""

    multiprocessors: int
    index: int
    configuration: Configuration


class _Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class CublasLt:
    """The library with a handle for one device.

    Args:
        library: as ctypes has loaded it.

    Attributes:
        version: as cuBLASLt says it, 130001 for 13.0.1.

    Raises:
        CublasLtError: it lacks functions, or gives no handle.
    """

    def __init__(self, library: Any, device: torch.device) -> None:
        missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
        if missing:
            raise CublasLtError(f"this cuBLASLt has no {', '.join(missing)}")
        library.cublasLtGetVersion.restype = ctypes.c_size_t
        self.version: int = library.cublasLtGetVersion()
        self._library = library
        self.handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            self.call("cublasLtCreate", ctypes.byref(self.handle))
        count = torch.cuda.get_device_properties(device).multi_processor_count
        # For all of the device, for half of it and for three quarters, since another encoder's products use the rest.
        self._targets = (0, count // 2, count * 8 // 11)
        self._problems: dict[tuple, _Problem] = {}
        #: held while a description has one layer's bias
        self.lock = threading.Lock()

    def call(self, name: str, *arguments: object) -> None:
        """Calls a function; CublasLtError if it returns a status other than success."""
        if status := getattr(self._library, name)(*arguments):
            raise CublasLtError(f"{name} ended with status {status}", status)

    def proposals(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> list[Product]:
        """All different ones for [rows, in] by `weight` [out, in].

        Raises:
            CublasLtError: cuBLASLt cannot be asked for such a product.
        """
        found: dict[Configuration, Product] = {}
        for multiprocessors in self._targets:
            for product in self._problem(rows, weight, bias, multiprocessors).products:
                found.setdefault(product.choice.configuration, product)
        return list(found.values())

    def first_for_parts(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[int, Product]:
        """Multiprocessors of a part of the device → the first proposal for it, which may be one for the whole device, too.

        Raises:
            CublasLtError: cuBLASLt cannot be asked for such a product.
        """
        problems = {part: self._problem(rows, weight, bias, part) for part in self._targets[1:]}
        return {part: problem.products[0] for part, problem in problems.items() if problem.products}

    def product(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None, choice: Choice) -> Product | None:
        """The proposal that was chosen; None if this cuBLASLt proposes another one in its place, or for no such part.

        Raises:
            CublasLtError: cuBLASLt cannot be asked for such a product.
        """
        if choice.multiprocessors not in self._targets:
            return None
        products = self._problem(rows, weight, bias, choice.multiprocessors).products
        return next((product for product in products if product.choice == choice), None)

    def _problem(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None, multiprocessors: int) -> _Problem:
        """Made once in a process, since cuBLASLt's descriptions are not freed."""
        key = (rows, *weight.shape, weight.dtype, bias is not None, multiprocessors)
        with self.lock:
            if key not in self._problems:
                self._problems[key] = _Problem(self, rows, weight, bias, multiprocessors)
            return self._problems[key]


class _Problem:
    """A product's description and its proposals. cuBLASLt counts columns first, so it is weightᵀ · values there."""

    def __init__(
        self, lt: CublasLt, rows: int, weight: torch.Tensor, bias: torch.Tensor | None, multiprocessors: int
    ) -> None:
        if weight.dtype not in _TYPES:
            raise CublasLtError(f"there are no proposals for {weight.dtype}")
        self._lt = lt
        out, width = weight.shape
        kind = _TYPES[weight.dtype]
        self.description = ctypes.c_void_p()
        lt.call("cublasLtMatmulDescCreate", ctypes.byref(self.description), _COMPUTE_FLOAT32, _FLOAT32)
        self._set(_TRANSPOSE_A, ctypes.c_int32(1))
        if multiprocessors:
            self._set(_MULTIPROCESSORS, ctypes.c_int32(multiprocessors))
        if bias is not None:
            self._set(_EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS))
            self._set(_BIAS_TYPE, ctypes.c_int32(kind))
            self.set_bias(bias)
        self.weight, self.values, self.result = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        for layout, height, columns in (
            (self.weight, width, out),
            (self.values, width, rows),
            (self.result, out, rows),
        ):
            size = ctypes.c_uint64(height), ctypes.c_uint64(columns), ctypes.c_int64(height)
            lt.call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), kind, *size)
        self.products = [
            Product(lt, self, result, Choice(multiprocessors, index, self._configuration(result)))
            for index, result in enumerate(self._ask())
            if result.status == 0
        ]

    def set_bias(self, bias: torch.Tensor) -> None:
        """Of the next product."""
        self._set(_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))

    def _set(self, number: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._lt.call("cublasLtMatmulDescSetAttribute", self.description, number, ctypes.byref(value), size)

    def _ask(self) -> list[_Result]:
        preference, limit = ctypes.c_void_p(), ctypes.c_size_t(_WORKSPACE_BYTES)
        self._lt.call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        size = ctypes.c_size_t(ctypes.sizeof(limit))
        self._lt.call("cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, ctypes.byref(limit), size)
        results, count = (_Result * _ASKED)(), ctypes.c_int()
        layouts = self.weight, self.values, self.result, self.result
        try:
            self._lt.call(
                "cublasLtMatmulAlgoGetHeuristic",
                *(self._lt.handle, self.description, *layouts, preference),
                *(_ASKED, results, ctypes.byref(count)),
            )
        except CublasLtError as error:
            if error.status != _NOT_SUPPORTED:
                raise
        return list(results[: count.value])

    def _configuration(self, result: _Result) -> Configuration:
        numbers: list[int] = []
        for number, kind in enumerate(_FIELD_TYPES):
            value, written = kind(), ctypes.c_size_t()
            size = ctypes.c_size_t(ctypes.sizeof(value))
            self._lt.call(
                "cublasLtMatmulAlgoConfigGetAttribute",
                *(ctypes.byref(result), number, ctypes.byref(value), size, ctypes.byref(written)),
            )
            numbers.append(value.value)
        numbers.append(result.workspace)
        return Configuration(*numbers)


class Product:
    """`torch.nn.functional.linear` by one proposal, for one number of rows.

    Attributes:
        choice: which proposal it is.
    """

    def __init__(self, lt: CublasLt, problem: _Problem, result: _Result, choice: Choice) -> None:
        self.choice = choice
        self._lt, self._problem, self._result = lt, problem, result

    def __call__(self, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., in], `weight` [out, in] and `bias` [out], all of one dtype on the handle's device → [..., out].

        Memory comes from PyTorch's allocator, so it may be part of a capture.

        Raises:
            CublasLtError: cuBLASLt refuses.
        """
        values = values.contiguous()
        if values.data_ptr() % _ALIGNMENT:
            values = values.clone()
        result = values.new_empty(*values.shape[:-1], weight.shape[0])
        size = self.choice.configuration.workspace
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=values.device)
        problem = self._problem
        weight_at, values_at, result_at = (ctypes.c_void_p(part.data_ptr()) for part in (weight, values, result))
        stream = torch.cuda.current_stream(values.device).cuda_stream
        with torch.cuda.device(values.device), self._lt.lock:
            if bias is not None:
                problem.set_bias(bias)
            self._lt.call(
                "cublasLtMatmul",
                *(self._lt.handle, problem.description),
                *(ctypes.byref(_ONE), weight_at, problem.weight, values_at, problem.values),
                *(ctypes.byref(_ZERO), result_at, problem.result, result_at, problem.result),
                *(ctypes.byref(self._result), ctypes.c_void_p(workspace.data_ptr()), ctypes.c_size_t(size)),
                ctypes.c_void_p(stream),
            )
        return result


@functools.cache
def open_library(device: torch.device) -> CublasLt:
    """For a CUDA device, once in a process.

    Raises:
        CublasLtError: PyTorch has no cuBLASLt of its own file (or none at all, as for AMD), or it cannot be used.
    """
    if torch.version.cuda is None:
        raise CublasLtError("this PyTorch has no cuBLASLt, which comes with CUDA")
    soname = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    for name in (*_mapped(), soname):
        try:
            return CublasLt(ctypes.CDLL(name), device)
        except OSError as error:
            reason = str(error)
    raise CublasLtError(f"cuBLASLt cannot be loaded: {reason}")


def _mapped(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The file that this process has mapped already."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    files = [line.split(maxsplit=5)[5] for line in lines if "/libcublasLt.so" in line]
    return files[:1]
