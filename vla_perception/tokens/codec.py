"""Bytes ↔ metadata and arrays of the wire format ``vla_tokens/1`` (docs/wire_format.md): layout, limits, errors.

A token message's data is one safetensors file. Parsing it executes nothing and trusts nothing: every type, offset and
shape is checked against the bytes that are there, in time and memory that the message's size bounds. What the metadata
means is in `visual_tokens`. Needs NumPy.
"""

from __future__ import annotations

import array
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SCHEMA = "vla_tokens/1"
FORMAT = f"safetensors; {SCHEMA}"
#: What `FORMAT` begins with in every version of the schema.
FORMAT_OF_ANY_VERSION = "safetensors; vla_tokens/"
METADATA_KEY = "vla_tokens"
#: The entry in what `vla-perception tokenize IMAGE … --out FILE` writes instead: tokens without stamps.
IMAGE_FILES_KEY = "vla_perception"
#: dtype name → safetensors' name and the NumPy dtype of the stored words (NumPy has no bfloat16).
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype("<u2")),
}
#: dtype name → words of infinity; those of NaN are larger.
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
#: Bytes. Real headers have some kilobytes. Parsed JSON takes up to 20 times its bytes, and that while the policy waits.
MAX_HEADER = 2**20
#: Characters of a name.
MAX_TEXT = 1000
#: No image and no grid is that large.
_MAX_COORDINATE = 1e9


class TokenFormatError(ValueError):
    """A message that is not a valid ``vla_tokens/1`` message; the text says what is wrong with it."""

    def __init__(self, text: str) -> None:
        # It may quote an untrusted message, and goes into logs.
        super().__init__(text if len(text) <= 500 else f"{text[:500]}…")


@dataclass(frozen=True)
class Contents:
    """What a token file holds, its layout checked; the metadata's values are not.

    Attributes:
        metadata: the entry ``vla_tokens``.
        tensors: ``tokens`` and maybe ``features``, read-only views of the file's bytes.
        dtype: theirs: ``float32``, ``float16`` or ``bfloat16`` (held as its uint16 words).
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    dtype: str


def header_bytes(metadata: Mapping[str, object], tensors: Mapping[str, np.ndarray], dtype: str) -> bytes:
    """What stands before the tensors in a token file. The same metadata, shapes and dtype give the same bytes."""
    # Written here rather than by safetensors: its Python interface for raw 16-bit words changed between
    # releases, and this copies megabytes once instead of thrice. The tests read it back with safetensors.
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: _json({"schema": SCHEMA, **metadata})}}
    end = 0
    for name in sorted(tensors):
        values = tensors[name]
        start, end = end, end + values.nbytes
        header[name] = {"data_offsets": [start, end], "dtype": DTYPES[dtype][0], "shape": list(values.shape)}
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)  # the payload starts aligned
    return len(text).to_bytes(8, "little") + text


def payload_parts(tensors: Mapping[str, np.ndarray]) -> list[memoryview]:
    """The tensors as they follow `header_bytes`, not copied, so that one copy puts them in place."""
    return [np.ascontiguousarray(tensors[name]).data.cast("B") for name in sorted(tensors)]


def read(data: bytes | bytearray | memoryview | np.ndarray | array.array) -> Contents:
    """Reads the bytes of a token file; TokenFormatError if its layout is wrong, or not of this schema."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    header, payload = split(view.cast("B").toreadonly())
    metadata = metadata_of(header)
    if "tokens" not in header:
        raise TokenFormatError("there is no tensor named 'tokens'")
    check_layout(header, len(payload))
    tokens, dtype = tensor(header["tokens"], payload, "tokens")
    tensors = {"tokens": tokens}
    if "features" in header:
        tensors["features"], feature_dtype = tensor(header["features"], payload, "features")
        if feature_dtype != dtype:
            raise TokenFormatError(f"tokens are {dtype} but features {feature_dtype}")
    return Contents(metadata, tensors, dtype)


def is_finite(words: np.ndarray, dtype: str) -> bool:
    """Whether stored words of `dtype` hold neither NaN nor infinity."""
    # Words are compared, a fraction of the cost of np.isfinite on 16 bits: as integers, NaN and infinity are the
    # largest ones of either sign.
    infinity = _INFINITY[dtype]
    unsigned, signed = (np.uint16, np.int16) if words.itemsize == 2 else (np.uint32, np.int32)
    sign = 2 ** (8 * words.itemsize - 1)
    return bool(words.view(signed).max() < infinity and words.view(unsigned).max() < sign + infinity)


def float32(words: np.ndarray, dtype: str) -> np.ndarray:
    """Stored words of `dtype` as float32: exact, and a copy unless they are float32 already."""
    if dtype == "bfloat16":
        # bfloat16 is the upper half of float32.
        return (words.astype(np.uint32) << 16).view(np.float32)
    return words.astype(np.float32, copy=False)


def typed(words: np.ndarray, dtype: str) -> np.ndarray:
    """Stored words of `dtype` without a copy; those of bfloat16 as ml_dtypes' bfloat16, which this imports."""
    if dtype != "bfloat16":
        return words
    import ml_dtypes

    return words.view(ml_dtypes.bfloat16)


# safetensors

#: Sorted and compact, so that the same content gives the same bytes; NaN and infinity are not JSON.
_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def split(data: memoryview) -> tuple[dict, memoryview]:
    """safetensors: 8 bytes little-endian header length, header (JSON), payload."""
    if len(data) < 8:
        raise TokenFormatError(f"{len(data)} bytes are too few for a safetensors header")
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise TokenFormatError(f"the header claims {length} bytes, the message holds {len(data)}: truncated?")
    if length > MAX_HEADER:
        raise TokenFormatError(f"the header has {length} bytes, more than {MAX_HEADER}: this is not a token message")
    try:
        text = str(data[8 : 8 + length], "utf-8")
    except UnicodeDecodeError:
        raise TokenFormatError("the safetensors header is not UTF-8") from None
    return parse_object(text, "the safetensors header"), data[8 + length :]


def metadata_of(header: Mapping[str, Any]) -> dict:
    """The entry ``vla_tokens`` of a header; TokenFormatError if there is none, or of another schema."""
    entry = header.get("__metadata__")
    text = entry.get(METADATA_KEY) if isinstance(entry, dict) else None
    if isinstance(entry, dict) and IMAGE_FILES_KEY in entry:
        raise TokenFormatError(
            "it holds the tokens of image files, without stamps (vla-perception tokenize IMAGE --out FILE): "
            "safetensors.torch.load_file reads it"
        )
    if not isinstance(text, str):
        raise TokenFormatError(
            f"no {METADATA_KEY!r} entry in the safetensors metadata: these are no tokens of this package"
        )
    metadata = parse_object(text, f"the {METADATA_KEY!r} entry")
    if metadata.get("schema") != SCHEMA:
        raise TokenFormatError(
            f"schema {metadata.get('schema')!r} is not {SCHEMA!r}, the one this version reads; see FORMAT"
        )
    return metadata


def parse_object(text: str, what: str) -> dict:
    """A JSON object; TokenFormatError for anything else, and for what JSON readers read differently."""
    try:
        value = _DECODER.decode(text)
    except TokenFormatError:
        raise
    except (ValueError, RecursionError):
        raise TokenFormatError(f"{what} is not JSON") from None
    if not isinstance(value, dict):
        raise TokenFormatError(f"{what} is not a JSON object")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise TokenFormatError("a JSON object has a key twice")
    return value


def _reject_constant(name: str) -> float:
    raise TokenFormatError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_reject_constant)


def check_layout(header: Mapping[str, Any], size: int) -> None:
    """Every byte of the payload belongs to one tensor, as safetensors demands: none can pass for another."""
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = entry["data_offsets"]
            spans.append((whole_number(start), whole_number(stop)))
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFormatError(f"the safetensors header describes {name!r} wrongly") from error
    end = 0
    for start, stop in sorted(spans):
        if start != end or stop < start:
            raise TokenFormatError(f"the tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != size:
        raise TokenFormatError(f"the tensors take {end} bytes, and there are {size}: truncated?")


def tensor(entry: Mapping[str, Any], payload: memoryview, name: str) -> tuple[np.ndarray, str]:
    """A tensor of tokens, its layout checked by `check_layout`: its words, and the name of its dtype."""
    start, stop = entry["data_offsets"]
    try:
        stored, shape = entry["dtype"], [whole_number(length) for length in entry["shape"]]
    except (KeyError, TypeError, ValueError) as error:
        raise TokenFormatError(f"the safetensors header describes {name} wrongly") from error
    found = [(dtype, word) for dtype, (code, word) in DTYPES.items() if code == stored]
    if not found:
        raise TokenFormatError(f"{name} is stored as {brief(stored)}; BF16, F16 or F32 is needed")
    ((dtype, word),) = found
    if stop - start != math.prod(shape) * word.itemsize:
        raise TokenFormatError(f"{name} {shape} of {dtype} does not fit its {stop - start} bytes")
    try:
        return np.frombuffer(payload[start:stop], word).reshape(shape), dtype
    except ValueError as error:  # more dimensions or, of no values, larger ones than NumPy has
        raise TokenFormatError(f"{name} of {len(shape)} dimensions cannot be read: {error}") from error


# Values of the metadata


def whole_number(value: object, start: int = 0, stop: int = 2**32) -> int:
    """An integer from `start` to below `stop`; ValueError for anything else, and for true and false."""
    if type(value) is not int or not start <= value < stop:
        raise ValueError(f"{brief(value)} is not a whole number from {start} to {stop - 1}")
    return value


def boolean(value: object) -> bool:
    """True or false; ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{brief(value)} is neither true nor false")
    return value


def string(value: object) -> str:
    """A string of at most `MAX_TEXT` characters that can be encoded in UTF-8; ValueError for anything else."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{brief(value)} is not a string of at most {MAX_TEXT} characters")
    value.encode()  # raises for half a surrogate pair
    return value


def affine_map(values: object) -> tuple[float, ...]:
    """Six numbers of a 2 × 3 matrix that can be inverted; ValueError for anything else."""
    a, b, c, d, e, f = _numbers(values, 6, "a view's affine map")
    if abs(a * e - b * d) < 1 / _MAX_COORDINATE**2:
        raise ValueError(f"a view's affine map cannot be inverted: {brief(values)}")
    return a, b, c, d, e, f


def rectangle(values: object) -> tuple[float, ...]:
    """Left, top, right, bottom; ValueError for anything else."""
    left, top, right, bottom = _numbers(values, 4, "a view's region of interest (seen)")
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f"a view's region of interest (seen) must be left, top, right, bottom, got {brief(values)}")
    return left, top, right, bottom


def _numbers(values: object, count: int, what: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"{what} must be {count} numbers, got {brief(values)}")
    for value in values:
        if type(value) not in (int, float) or not -_MAX_COORDINATE < value < _MAX_COORDINATE:
            raise ValueError(f"{what} must be {count} finite numbers, got {brief(values)}")
    return tuple(map(float, values))


def brief(value: object) -> str:
    """The value as an error message quotes it, shortened."""
    text = repr(value) if not isinstance(value, int) or -(2**64) < value < 2**64 else "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}…"
