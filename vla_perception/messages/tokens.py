"""VisualTokens ↔ token message: the wire format ``vla_tokens/1`` (docs/wire_format.md).

A token message is a ``sensor_msgs/CompressedImage`` whose data is one safetensors file. Parsing it executes
nothing and trusts nothing: every offset and shape is checked against the bytes that are there. Needs NumPy;
torch only for `VisualTokens.from_torch` and `VisualTokens.torch`, ml_dtypes only for
`VisualTokens.numpy` on bfloat16, ROS only for `to_message`.
"""

from __future__ import annotations

import array
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from sensor_msgs.msg import CompressedImage

SCHEMA = "vla_tokens/1"
FORMAT = f"safetensors; {SCHEMA}"
_ANY_VERSION = "safetensors; vla_tokens/"
_METADATA_KEY = "vla_tokens"
#: dtype name → safetensors' name and the NumPy dtype of the stored words (NumPy has no bfloat16).
_DTYPES = {
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype("<u2")),
}
_MODEL_KEYS = (
    "model", "weights", "fingerprint", "compute_dtype", "grid", "token_strategy", "pool", "encoders", "projector",
)  # fmt: skip


class TokenFormatError(ValueError):
    """A message that is not a valid ``vla_tokens/1`` message; the text says what is wrong with it."""


@dataclass(frozen=True)
class View:
    """Where the tokens of one view come from.

    Attributes:
        camera: its name in the tokenizer's configuration.
        frame_id, stamp_ns: the image's header; nanoseconds since the epoch of its clock.
        height, width: size of the source image in pixels.
        affine: six floats, row-major 2 × 3: source pixel (x, y, 1) → (column, row) on the grid. Pixel i covers
            [i, i + 1), token j covers [j, j + 1).
        valid: false where no image could be had and the tokens are to be ignored.
    """

    camera: str
    frame_id: str
    stamp_ns: int
    height: int
    width: int
    affine: tuple[float, ...]
    valid: bool = True


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of one or several views, with what is needed to trust and place them.

    Attributes:
        data: [views, tokens, channels]; bfloat16 is held as its uint16 words, see `numpy`, `float32`, `torch`.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        views: one `View` per leading index.
        sequence: counts up by one per message; a gap is a lost message.
        grid: (rows, columns); tokens run row by row.
        fingerprint: identifies weights and preprocessing.
        features: [views, tokens, encoder channels] before the projector, like `data`, or None.
    """

    data: np.ndarray
    dtype: str
    views: tuple[View, ...]
    sequence: int
    model: str
    weights: str
    fingerprint: str
    compute_dtype: str
    grid: tuple[int, int]
    token_strategy: str
    pool: int
    encoders: tuple[Mapping[str, object], ...]
    projector: str
    features: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise TokenFormatError(f"unknown token dtype {self.dtype!r}; one of {', '.join(_DTYPES)} is needed")
        word = _DTYPES[self.dtype][1]
        for name, values in (("tokens", self.data), ("features", self.features)):
            if values is None:
                continue
            if values.ndim != 3 or 0 in values.shape or values.dtype != word:
                raise TokenFormatError(
                    f"{name} must be a non-empty [views, tokens, channels] array of {word} for {self.dtype}, "
                    f"got {list(values.shape)} of {values.dtype}"
                )
            if values.shape[:2] != self.data.shape[:2]:
                raise TokenFormatError(
                    f"features {list(values.shape)} do not go with tokens {list(self.data.shape)}"
                )
        if len(self.views) != self.data.shape[0]:
            raise TokenFormatError(f"{self.data.shape[0]} views of tokens, but {len(self.views)} are described")
        if self.token_strategy != "cls" and self._patch_count != self.grid[0] * self.grid[1]:
            raise TokenFormatError(
                f"{self.data.shape[1]} tokens per view do not fill a grid of {self.grid[0]} × {self.grid[1]}"
            )

    @property
    def _patch_count(self) -> int:
        """Tokens per view that lie on the grid; ``cls+patch`` puts the summary in front."""
        return self.data.shape[1] - (1 if self.token_strategy == "cls+patch" else 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(views, tokens per view, channels)."""
        return self.data.shape  # type: ignore[return-value]

    @property
    def stamp_ns(self) -> int:
        """The first view's stamp, which is also the message's."""
        return self.views[0].stamp_ns

    @property
    def stamps_ns(self) -> tuple[int, ...]:
        """Every view's stamp, nanoseconds since the epoch of its clock."""
        return tuple(view.stamp_ns for view in self.views)

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(view.camera for view in self.views)

    @property
    def valid(self) -> tuple[bool, ...]:
        """For every view whether there was an image; the tokens of a view without one are to be ignored."""
        return tuple(view.valid for view in self.views)

    def age(self, now_ns: int) -> float:
        """Seconds from the oldest valid view's stamp to `now_ns`; infinite if no view is valid."""
        stamps = [view.stamp_ns for view in self.views if view.valid]
        return (now_ns - min(stamps)) / 1e9 if stamps else math.inf

    @classmethod
    def from_torch(
        cls,
        tokens: torch.Tensor,
        *,
        sequence: int,
        views: Sequence[View],
        features: torch.Tensor | None = None,
        **model: object,
    ) -> VisualTokens:
        """Tokens [views, tokens, channels] in the dtype that they are to have, from any device.

        Args:
            model: `VisualTokenizer.metadata()`.
        """
        dtype = str(tokens.dtype).removeprefix("torch.")
        return cls(
            data=_torch_words(tokens),
            dtype=dtype,
            views=tuple(views),
            sequence=sequence,
            features=None if features is None else _torch_words(features.to(tokens.dtype)),
            **_model_fields(model),  # type: ignore[arg-type]
        )

    def numpy(self) -> np.ndarray:
        """[views, tokens, channels] without a copy; bfloat16 as ml_dtypes' bfloat16. Read-only where received."""
        if self.dtype != "bfloat16":
            return self.data
        import ml_dtypes

        return self.data.view(ml_dtypes.bfloat16)

    def float32(self) -> np.ndarray:
        """[views, tokens, channels] as float32: exact, and a copy unless the tokens are float32 already."""
        return _float32(self.data, self.dtype)

    def features_float32(self) -> np.ndarray:
        """[views, tokens, encoder channels] as float32; ValueError if the message carries none."""
        if self.features is None:
            raise ValueError("this message carries no features; set the tokenizer's publish_features parameter")
        return _float32(self.features, self.dtype)

    def torch(self, device: str = "cpu") -> torch.Tensor:
        """[views, tokens, channels] as a torch tensor in `dtype` on `device`, a copy of its own."""
        import torch

        # A received array is read-only, which torch does not know: hence a copy.
        words = torch.from_numpy(self.data.view(np.int16 if self.data.itemsize == 2 else np.int32).copy())
        return words.view(getattr(torch, self.dtype)).to(device)

    def view(self, camera: str) -> VisualTokens:
        """The part of one camera, with one view. KeyError with the names that exist."""
        if camera not in self.cameras:
            raise KeyError(f"no camera {camera!r} among {', '.join(self.cameras)}")
        index = self.cameras.index(camera)
        return replace(
            self,
            data=self.data[index : index + 1],
            views=(self.views[index],),
            features=None if self.features is None else self.features[index : index + 1],
        )

    def encoder_channels(self, name: str) -> slice:
        """Channels of one encoder, within `features` (and within tokens where there is no projector)."""
        for encoder in self.encoders:
            if encoder["name"] == name:
                start, stop = encoder["channels"]  # type: ignore[misc]
                return slice(start, stop)
        raise KeyError(f"no encoder {name!r} among {', '.join(str(e['name']) for e in self.encoders)}")

    def encoder(self, name: str) -> np.ndarray:
        """What one encoder saw, [views, tokens, its channels], like `numpy`: a slice of the features.

        Raises:
            KeyError: there is no such encoder.
            ValueError: behind a projector the encoders are mixed, and the message carries no features.
        """
        channels = self.encoder_channels(name)
        if self.features is not None:
            return replace(self, data=self.features, features=None).numpy()[..., channels]
        if self.projector == "none":
            return self.numpy()[..., channels]
        raise ValueError(
            "the projector has mixed the encoders' channels and this message carries no features; set the "
            "tokenizer's publish_features parameter"
        )

    def on_grid(self, values: np.ndarray | None = None) -> np.ndarray:
        """Patch tokens (or `values`, [views, tokens, …]) as [views, rows, columns, …]: a view, not a copy."""
        values = self.numpy() if values is None else values
        if self.token_strategy == "cls":
            raise ValueError("summary tokens have no place on the grid (token_strategy cls)")
        patches = values[:, values.shape[1] - self._patch_count :]
        return patches.reshape(values.shape[0], *self.grid, *values.shape[2:])

    def token_at(self, x: float, y: float, view: int = 0) -> int | None:
        """Index of the token that sees the source pixel (x, y); None if no token does (cropped, or beyond the grid)."""
        a, b, c, d, e, f = self.views[view].affine
        source = self.views[view]
        column, row = math.floor(a * x + b * y + c), math.floor(d * x + e * y + f)
        inside = 0 <= x < source.width and 0 <= y < source.height
        if not inside or not (0 <= row < self.grid[0] and 0 <= column < self.grid[1]):
            return None
        return self.shape[1] - self._patch_count + row * self.grid[1] + column

    def region(self, token: int, view: int = 0) -> tuple[tuple[float, float], ...]:
        """The four corners (x, y) of a token's patch in the source picture, in pixels, clockwise from its first.

        They may lie outside the picture where padding was added. ValueError for a token that is no patch.
        """
        position = token - (self.shape[1] - self._patch_count)
        if self.token_strategy == "cls" or not 0 <= position < self._patch_count:
            raise ValueError(f"token {token} is not on the grid of {self.grid[0]} × {self.grid[1]}")
        row, column = divmod(position, self.grid[1])
        a, b, c, d, e, f = self.views[view].affine
        determinant = a * e - b * d
        corners = ((column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1))
        return tuple(
            ((e * (u - c) - b * (v - f)) / determinant, (a * (v - f) - d * (u - c)) / determinant) for u, v in corners
        )

    def to_bytes(self) -> bytes:
        """One safetensors file; the same content gives the same bytes."""
        return b"".join(self.to_parts())

    def to_parts(self) -> list[bytes | memoryview]:
        """The pieces of `to_bytes` in their order; the tensors are not copied, so that one copy puts them in place."""
        metadata = {
            "schema": SCHEMA,
            "sequence": self.sequence,
            **{key: getattr(self, key) for key in _MODEL_KEYS},
            "encoders": [dict(encoder) for encoder in self.encoders],
            "views": [
                {
                    "camera": view.camera,
                    "frame_id": view.frame_id,
                    "stamp": {"sec": view.stamp_ns // 10**9, "nanosec": view.stamp_ns % 10**9},
                    "height": view.height,
                    "width": view.width,
                    "affine": list(view.affine),
                    "valid": view.valid,
                }
                for view in self.views
            ],
        }
        # Written here rather than by safetensors: its Python interface for raw 16-bit words changed between
        # releases, and this copies megabytes once instead of thrice. The tests read it back with safetensors.
        header: dict[str, object] = {"__metadata__": {_METADATA_KEY: _json(metadata)}}
        parts, end = [], 0
        for name, values in (("features", self.features), ("tokens", self.data)):
            if values is None:
                continue
            values = np.ascontiguousarray(values)
            start, end = end, end + values.nbytes
            header[name] = {
                "data_offsets": [start, end],
                "dtype": _DTYPES[self.dtype][0],
                "shape": list(values.shape),
            }
            parts.append(memoryview(values).cast("B"))
        text = _json(header).encode()
        text += b" " * (-len(text) % 8)  # the payload starts aligned
        return [len(text).to_bytes(8, "little"), text, *parts]

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview | np.ndarray | array.array) -> VisualTokens:
        """Reads what `to_bytes` wrote; arrays are read-only views of `data`. TokenFormatError if it is amiss."""
        header, payload = _split(memoryview(data).cast("B").toreadonly())
        try:
            metadata = json.loads(header["__metadata__"][_METADATA_KEY])
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFormatError(f"no readable {_METADATA_KEY!r} entry in the safetensors metadata") from error
        if not isinstance(metadata, dict) or metadata.get("schema") != SCHEMA:
            schema = metadata.get("schema") if isinstance(metadata, dict) else None
            raise TokenFormatError(f"schema {schema!r} is not {SCHEMA!r}, the one this version reads; see FORMAT")
        if "tokens" not in header:
            raise TokenFormatError("there is no tensor named 'tokens'")
        tokens, dtype = _tensor(header["tokens"], payload, "tokens")
        features = None
        if "features" in header:
            features, feature_dtype = _tensor(header["features"], payload, "features")
            if feature_dtype != dtype:
                raise TokenFormatError(f"tokens are {dtype} but features {feature_dtype}")
        try:
            views = tuple(
                View(
                    camera=str(view["camera"]),
                    frame_id=str(view["frame_id"]),
                    stamp_ns=int(view["stamp"]["sec"]) * 10**9 + int(view["stamp"]["nanosec"]),
                    height=int(view["height"]),
                    width=int(view["width"]),
                    affine=_affine(view["affine"]),
                    valid=bool(view["valid"]),
                )
                for view in metadata["views"]
            )
            return cls(
                data=tokens,
                dtype=dtype,
                views=views,
                sequence=int(metadata["sequence"]),
                features=features,
                **_model_fields(metadata),  # type: ignore[arg-type]
            )
        except (KeyError, TypeError, IndexError, OverflowError) as error:
            raise TokenFormatError(f"the {_METADATA_KEY!r} entry lacks or garbles {error}") from error
        except ValueError as error:
            raise TokenFormatError(str(error)) from error


def is_token_message(message: CompressedImage) -> bool:
    """Whether a CompressedImage carries tokens (of any schema version) rather than a picture."""
    return message.format.startswith(_ANY_VERSION)


def to_message(tokens: VisualTokens, stamp_ns: int | None = None, frame_id: str | None = None) -> CompressedImage:
    """The token message; its header is the first view's unless given."""
    from sensor_msgs.msg import CompressedImage

    message = CompressedImage()
    stamp_ns = tokens.stamp_ns if stamp_ns is None else stamp_ns
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    message.header.frame_id = tokens.views[0].frame_id if frame_id is None else frame_id
    message.format = FORMAT
    # rclpy takes an array.array as it is; it would check bytes or NumPy arrays element by element.
    data = array.array("B")
    for part in tokens.to_parts():
        data.frombytes(part)
    message.data = data
    return message


def from_message(message: CompressedImage) -> VisualTokens:
    """The tokens of a message, as read-only views of its data.

    Raises:
        TokenFormatError: it carries a picture, another schema version, or damaged bytes.
    """
    if message.format != FORMAT:
        advice = (
            "it was written by another version of vla_perception; use the same one on both sides"
            if is_token_message(message)
            else "it is no token message; subscribe to the tokenizer's `tokens` topic"
        )
        raise TokenFormatError(f"format {message.format!r} is not {FORMAT!r}: {advice}")
    return VisualTokens.from_bytes(message.data)


def _json(value: object) -> str:
    """Sorted and compact, so that the same content gives the same bytes; NaN and infinity are no JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _model_fields(model: Mapping[str, object]) -> dict[str, object]:
    fields = {key: model[key] for key in _MODEL_KEYS}
    rows, columns = fields["grid"]  # type: ignore[misc]
    encoders = tuple(dict(encoder) for encoder in fields["encoders"])  # type: ignore[attr-defined]
    for encoder in encoders:
        start, stop = encoder["channels"]
        if not 0 <= int(start) < int(stop):
            raise ValueError(f"encoder {encoder.get('name')!r} has the channels {encoder['channels']}")
    return fields | {"grid": (int(rows), int(columns)), "pool": int(fields["pool"]), "encoders": encoders}  # type: ignore[call-overload]


def _torch_words(tensor: torch.Tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        # bfloat16 is the upper half of float32.
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _split(data: memoryview) -> tuple[dict, memoryview]:
    """safetensors: 8 bytes little-endian header length, header (JSON), payload."""
    if len(data) < 8:
        raise TokenFormatError(f"{len(data)} bytes are too few for a safetensors header")
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise TokenFormatError(f"the header claims {length} bytes, the message holds {len(data)}: truncated?")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise TokenFormatError("the safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise TokenFormatError("the safetensors header is not a JSON object")
    return header, data[8 + length :]


def _tensor(entry: object, payload: memoryview, name: str) -> tuple[np.ndarray, str]:
    try:
        stored, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        dtype, word = next((key, word) for key, (code, word) in _DTYPES.items() if code == stored)
        if not all(type(value) is int and value >= 0 for value in (*shape, start, stop)):
            raise ValueError
    except StopIteration:
        raise TokenFormatError(f"{name} is stored as {stored!r}; BF16, F16 or F32 is needed") from None
    except (KeyError, TypeError, ValueError) as error:
        raise TokenFormatError(f"the safetensors header describes {name} wrongly") from error
    if not start <= stop <= len(payload) or stop - start != math.prod(shape) * word.itemsize:
        raise TokenFormatError(
            f"{name} {shape} of {dtype} does not fit bytes {start}–{stop} of {len(payload)}: truncated?"
        )
    return np.frombuffer(payload[start:stop], word).reshape(shape), dtype


def _affine(values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 6 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a view's affine map must be six finite numbers, got {list(values)}")
    if numbers[0] * numbers[4] == numbers[1] * numbers[3]:
        raise ValueError(f"a view's affine map cannot be inverted: {list(values)}")
    return numbers
