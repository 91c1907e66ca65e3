"""VisualTokens ↔ token message: the wire format ``vla_tokens/1`` (docs/wire_format.md).

A token message is a ``sensor_msgs/CompressedImage`` whose data is one safetensors file. Parsing it executes
nothing and trusts nothing: every type, offset and shape is checked against the bytes that are there, in time and
memory that the message's size bounds. Needs NumPy;
torch only for `VisualTokens.from_torch` and `VisualTokens.torch`, ml_dtypes only for
`VisualTokens.numpy` on bfloat16, ROS only for `to_message`.
"""

from __future__ import annotations

import array
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from vla_perception.byte_array import byte_array
from vla_perception.options import TOKEN_STRATEGIES
from vla_perception.tokens.fingerprint import checked_inputs

if TYPE_CHECKING:
    import torch
    from sensor_msgs.msg import CompressedImage
    from std_msgs.msg import Header

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
#: dtype name → words of infinity; those of NaN are larger.
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
#: Real headers have some kilobytes. Parsed JSON takes up to 20 times its bytes, and that while the policy waits.
_MAX_HEADER = 2**20
#: Characters of a name.
_MAX_TEXT = 1000
#: No image and no grid is that large.
_FAR = 1e9
#: Pixels.
_WITHIN_PIXEL = 1e-6
#: A token map's indices take 8 bytes per pixel.
_MAX_MAP_PIXELS = 2**26
_MODEL_KEYS = (
    "model",
    "weights",
    "fingerprint",
    "compute_dtype",
    "grid",
    "token_strategy",
    "pool",
    "encoders",
    "projector",
)


class TokenFormatError(ValueError):
    """A message that is not a valid ``vla_tokens/1`` message; the text says what is wrong with it."""

    def __init__(self, text: str) -> None:
        # It may quote a stranger's message, and goes into logs.
        super().__init__(text if len(text) <= 500 else f"{text[:500]}…")


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
        roi: region of interest (left, top, right, bottom) in pixels: the part of the source image that was left for the
            encoders when it was cropped; None: all of it. The message calls it ``seen``.

    Raises:
        ValueError: a name of more than 1000 characters, or a stamp beyond the 32 bits that a message has for seconds.
    """

    camera: str
    frame_id: str
    stamp_ns: int
    height: int
    width: int
    affine: tuple[float, ...]
    valid: bool = True
    roi: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _text(self.camera)
        _text(self.frame_id)
        if not -(2**31) <= self.stamp_ns // 10**9 < 2**31:
            raise ValueError(f"a stamp of {_brief(self.stamp_ns)} ns is beyond what a message can hold")

    def patch_at(self, x: np.ndarray | float, y: np.ndarray | float, grid: tuple[int, int]) -> np.ndarray:
        """Index on the grid, row by row, of the patch that sees each position of the source image; −1 where none does.

        No patch sees what was cropped away (by `roi` or by the resize), nor what lies outside the image or the grid.
        Positions on the border between patches belong to the patch to the right of and below it in the source image,
        whichever way the image was turned.

        Args:
            x, y: pixels of the source image; pixel i covers [i, i + 1), its centre is i + 0.5. Arrays broadcast, and
                x [width] with y [height, 1] costs least.
            grid: (rows, columns), `VisualTokens.grid`. A cls token before it is not counted.

        Returns:
            intp, of the shape that x and y broadcast to.
        """
        a, b, c, d, e, f = self.affine
        left, top, right, bottom = self.roi or (0, 0, self.width, self.height)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        inside_x, inside_y = x + _WITHIN_PIXEL, y + _WITHIN_PIXEL
        # Without a quarter turn a column depends on x alone and a row on y alone: then these stay one-dimensional.
        with np.errstate(invalid="ignore"):
            column = np.floor(a * inside_x + b * inside_y + c if b else a * inside_x + c)
            row = np.floor(d * inside_x + e * inside_y + f if d else e * inside_y + f)
        # Cropped pixels may have a place on the grid, where a letterbox puts its padding: hence the roi.
        column_seen = (column >= 0) & (column < grid[1]) & (left <= x) & (x < right)
        row_seen = (row >= 0) & (row < grid[0]) & (top <= y) & (y < bottom)
        nowhere = -grid[0] * grid[1]
        start = np.where(row_seen, row * grid[1], nowhere).astype(np.intp)
        return np.maximum(start + np.where(column_seen, column, nowhere).astype(np.intp), -1)


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
        fingerprint_inputs: what the fingerprint is the hash of, ``settings`` and ``weights`` (a digest); None where the
            message does not say.
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
    fingerprint_inputs: Mapping[str, object] | None = field(default=None, repr=False)
    #: `data`, and the tensor on a GPU that it is a copy of: for `torch`, while `data` is still that one.
    _source: tuple[np.ndarray, torch.Tensor] | None = field(default=None, repr=False, compare=False)

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
                raise TokenFormatError(f"features {list(values.shape)} do not go with tokens {list(self.data.shape)}")
        if len(self.views) != self.data.shape[0]:
            raise TokenFormatError(f"{self.data.shape[0]} views of tokens, but {len(self.views)} are described")
        if not re.fullmatch("[0-9a-f]{64}", self.fingerprint):
            raise TokenFormatError(f"fingerprint {self.fingerprint!r} is not 64 hexadecimal digits")
        if len(set(self.cameras)) != len(self.cameras):
            raise TokenFormatError(f"two views have the same camera: {', '.join(map(repr, self.cameras))}")
        if self.token_strategy not in TOKEN_STRATEGIES:
            raise TokenFormatError(
                f"unknown token_strategy {self.token_strategy!r}; one of {', '.join(TOKEN_STRATEGIES)} is needed"
            )
        if min(self.grid) < 1 or self.shape[1] != self._summaries + self._patches:
            raise TokenFormatError(
                f"{self.shape[1]} tokens per view do not fill a grid of {self.grid[0]} × {self.grid[1]} "
                f"(token_strategy {self.token_strategy})"
            )
        width = 0
        for encoder in self.encoders:
            start, stop = encoder["channels"]  # type: ignore[misc]
            if not width == start < stop:
                raise TokenFormatError(
                    f"encoder {encoder['name']!r} has the channels {start}–{stop}, where the one before it ends at {width}"
                )
            width = stop
        for name, values in (("tokens", self.data if self.projector == "none" else None), ("features", self.features)):
            if values is not None and values.shape[2] != width:
                raise TokenFormatError(f"{name} have {values.shape[2]} channels, but the encoders fill {width}")

    @property
    def _summaries(self) -> int:
        """Tokens per view that stand before the grid."""
        return 0 if self.token_strategy == "patch" else 1

    @property
    def _patches(self) -> int:
        """Tokens per view that lie on the grid."""
        return 0 if self.token_strategy == "cls" else self.grid[0] * self.grid[1]

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

        From a GPU, they are copied to the host once, and `torch` still gives them there.

        Args:
            model: `VisualTokenizer.metadata()`.
        """
        dtype = str(tokens.dtype).removeprefix("torch.")
        on_host = [queue_to_host(part.detach().to(tokens.dtype)) for part in (tokens, features) if part is not None]
        if tokens.is_cuda:
            import torch

            torch.cuda.current_stream(tokens.device).synchronize()
        words = [_torch_words(part) for part in on_host]
        return cls(
            data=words[0],
            dtype=dtype,
            views=tuple(views),
            sequence=sequence,
            features=words[1] if len(words) > 1 else None,
            _source=(words[0], tokens.detach()) if tokens.is_cuda else None,
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

        if self._source is not None and self._source[0] is self.data:
            target = torch.device(device)
            if target.type == "cuda" and target.index is None:
                target = torch.device("cuda", torch.cuda.current_device())
            if self._source[1].device == target:
                return self._source[1].clone()
        # A received array is read-only, which torch does not know: hence a copy.
        words = torch.from_numpy(self.data.view(np.int16 if self.data.itemsize == 2 else np.int32).copy())
        return words.view(getattr(torch, self.dtype)).to(device)

    def select(self, camera: str) -> VisualTokens:
        """The part of one camera, with one view. KeyError with the names that exist."""
        if camera not in self.cameras:
            raise KeyError(f"no camera {camera!r} among {', '.join(self.cameras)}")
        index = self.cameras.index(camera)
        data = self.data[index : index + 1]
        on_device = self._source is not None and self._source[0] is self.data
        return replace(
            self,
            data=data,
            _source=(data, self._source[1][index : index + 1]) if on_device else None,
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

    def as_grid(self, values: np.ndarray | None = None) -> np.ndarray:
        """Patch tokens (or `values`, [views, tokens, …]) as [views, rows, columns, …]: a view, not a copy."""
        values = self.numpy() if values is None else values
        self._need_patches()
        return values[:, self._summaries :].reshape(values.shape[0], *self.grid, *values.shape[2:])

    def token_at(self, x: float, y: float, view: int = 0) -> int | None:
        """Index of the token that sees the source pixel (x, y); None if no token does (cropped, or beyond the grid).

        Pixel i covers [i, i + 1). ValueError with ``cls``, whose only token sees everything.
        """
        self._need_patches()
        patch = int(self.views[view].patch_at(x, y, self.grid))
        return None if patch < 0 else self._summaries + patch

    def token_map(self, view: int = 0) -> np.ndarray:
        """Index of the token that sees each pixel's centre of the source image; −1 where no token does.

        For pixels of a scaled image, or a few rows at a time, see `View.patch_at`.

        Returns:
            intp [height, width].

        Raises:
            ValueError: with ``cls``, whose only token sees everything; or the message claims more than 2**26 pixels.
        """
        self._need_patches()
        source = self.views[view]
        if source.height * source.width > _MAX_MAP_PIXELS:
            raise ValueError(
                f"a token map of {source.height} × {source.width} pixels is too large; ask View.patch_at for parts of it"
            )
        x, y = np.arange(source.width) + 0.5, np.arange(source.height)[:, None] + 0.5
        patches = source.patch_at(x, y, self.grid)
        patches[patches >= 0] += self._summaries
        return patches

    def patch_corners(self, token: int, view: int = 0) -> tuple[tuple[float, float], ...]:
        """The four corners (x, y) of a token's patch in the source image, in pixels, clockwise from its first.

        They may lie outside the image where padding was added. ValueError for a token that is no patch.
        """
        position = token - self._summaries
        if not 0 <= position < self._patches:
            raise ValueError(f"token {token} is not on the grid of {self.grid[0]} × {self.grid[1]}")
        row, column = divmod(position, self.grid[1])
        a, b, c, d, e, f = self.views[view].affine
        determinant = a * e - b * d
        corners = ((column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1))
        return tuple(
            ((e * (u - c) - b * (v - f)) / determinant, (a * (v - f) - d * (u - c)) / determinant) for u, v in corners
        )

    def _need_patches(self) -> None:
        if not self._patches:
            raise ValueError("a summary token has no place on the grid (token_strategy cls)")

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
            **({} if self.fingerprint_inputs is None else {"fingerprint_inputs": self.fingerprint_inputs}),
            "views": [
                {
                    "camera": view.camera,
                    "frame_id": view.frame_id,
                    "stamp": {"sec": view.stamp_ns // 10**9, "nanosec": view.stamp_ns % 10**9},
                    "height": view.height,
                    "width": view.width,
                    "affine": list(view.affine),
                    "valid": view.valid,
                    **({} if view.roi is None else {"seen": list(view.roi)}),
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
        entry = header.get("__metadata__")
        text = entry.get(_METADATA_KEY) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise TokenFormatError(f"no {_METADATA_KEY!r} entry in the safetensors metadata")
        metadata = _parse(text, f"the {_METADATA_KEY!r} entry")
        if metadata.get("schema") != SCHEMA:
            raise TokenFormatError(
                f"schema {metadata.get('schema')!r} is not {SCHEMA!r}, the one this version reads; see FORMAT"
            )
        if "tokens" not in header:
            raise TokenFormatError("there is no tensor named 'tokens'")
        _check_layout(header, len(payload))
        tokens, dtype = _tensor(header["tokens"], payload, "tokens")
        features = None
        if "features" in header:
            features, feature_dtype = _tensor(header["features"], payload, "features")
            if feature_dtype != dtype:
                raise TokenFormatError(f"tokens are {dtype} but features {feature_dtype}")
        try:
            views = tuple(
                View(
                    camera=view["camera"],
                    frame_id=view["frame_id"],
                    stamp_ns=_whole(view["stamp"]["sec"], -(2**31), 2**31) * 10**9
                    + _whole(view["stamp"]["nanosec"], 0, 10**9),
                    height=_whole(view["height"]),
                    width=_whole(view["width"]),
                    affine=_affine(view["affine"]),
                    valid=_boolean(view["valid"]),
                    roi=_rectangle(view["seen"]) if "seen" in view else None,
                )
                for view in metadata["views"]
            )
            read = cls(
                data=tokens,
                dtype=dtype,
                views=views,
                sequence=_whole(metadata["sequence"], stop=2**63),
                features=features,
                **_model_fields(metadata),  # type: ignore[arg-type]
            )
        except TokenFormatError:
            raise
        except KeyError as error:
            raise TokenFormatError(f"the {_METADATA_KEY!r} entry lacks {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise TokenFormatError(f"the {_METADATA_KEY!r} entry is garbled: {error}") from error
        read.check_finite()
        return read

    def check_finite(self) -> None:
        """TokenFormatError if a valid view's tokens or features hold NaN or infinity. `from_bytes` does it by itself."""
        # Words are compared, a fraction of the cost of np.isfinite on 16 bits: as integers, NaN and infinity are the
        # largest ones of either sign.
        infinity = _INFINITY[self.dtype]
        unsigned, signed = (np.uint16, np.int16) if self.data.itemsize == 2 else (np.uint32, np.int32)
        sign = 2 ** (8 * self.data.itemsize - 1)
        for name, values in (("tokens", self.data), ("features", self.features)):
            for index, view in enumerate(self.views):
                if values is None or not view.valid:
                    continue
                words = values[index]
                if words.view(signed).max() >= infinity or words.view(unsigned).max() >= sign + infinity:
                    raise TokenFormatError(
                        f"{name} of {view.camera!r} hold values that are no finite numbers; float16 ends at 65504, "
                        "bfloat16 and float32 do not"
                    )


def check_header(header: Header) -> None:
    """ValueError, with the reason, for an image's header that no token message can carry."""
    sec, nanosec = header.stamp.sec, header.stamp.nanosec
    if sec < 0 or nanosec >= 10**9:
        raise ValueError(
            f"its stamp, {sec} s and {nanosec} ns, is not a time; a driver has to stamp with seconds from 0 and "
            "nanoseconds below 1000000000"
        )
    try:
        _text(header.frame_id)
    except ValueError as error:
        raise ValueError(f"its frame_id cannot go into a token message: {error}") from None


def is_token_message(message: CompressedImage) -> bool:
    """Whether a CompressedImage carries tokens (of any schema version) rather than an image."""
    return message.format.startswith(_ANY_VERSION)


def to_message(tokens: VisualTokens, stamp_ns: int | None = None, frame_id: str | None = None) -> CompressedImage:
    """The token message; its header is the first view's unless given."""
    from sensor_msgs.msg import CompressedImage

    message = CompressedImage()
    stamp_ns = tokens.stamp_ns if stamp_ns is None else stamp_ns
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    message.header.frame_id = tokens.views[0].frame_id if frame_id is None else frame_id
    message.format = FORMAT
    message.data = byte_array(*tokens.to_parts())
    return message


def from_message(message: CompressedImage) -> VisualTokens:
    """The tokens of a message, as read-only views of its data.

    Raises:
        TokenFormatError: it carries an image, another schema version, or damaged bytes.
    """
    if message.format != FORMAT:
        advice = (
            "it was written by another version of vla_perception; use the same one on both sides"
            if is_token_message(message)
            else "it is no token message; subscribe to the tokenizer's `tokens` topic"
        )
        raise TokenFormatError(f"format {message.format!r} is not {FORMAT!r}: {advice}")
    return VisualTokens.from_bytes(message.data)


#: Sorted and compact, so that the same content gives the same bytes; NaN and infinity are no JSON.
_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def _model_fields(model: Mapping[str, object]) -> dict[str, object]:
    """The fields of `VisualTokens` that say what the model is, checked. KeyError, TypeError, ValueError if amiss."""
    fields = {key: model[key] for key in _MODEL_KEYS}
    for key in ("model", "weights", "fingerprint", "compute_dtype", "token_strategy", "projector"):
        _text(fields[key])
    rows, columns = fields["grid"]  # type: ignore[misc]
    encoders = []
    for encoder in fields["encoders"]:  # type: ignore[attr-defined]
        start, stop = encoder["channels"]
        channels = [_whole(start), _whole(stop)]
        encoders.append(dict(encoder) | {"name": _text(encoder["name"]), "channels": channels})
    if len({encoder["name"] for encoder in encoders}) != len(encoders):
        raise ValueError("two encoders have the same name")
    inputs = model.get("fingerprint_inputs")
    fields["fingerprint_inputs"] = None if inputs is None else checked_inputs(inputs)
    return fields | {
        "grid": (_whole(rows, 1), _whole(columns, 1)),
        "pool": _whole(fields["pool"], 1),
        "encoders": tuple(encoders),
    }


def queue_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host. From a GPU the copy goes to pinned memory and is only queued: wait for the current stream."""
    import torch

    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A boolean on their device, without waiting for it: whether they hold neither NaN nor infinity."""
    import torch

    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()


def _torch_words(tensor: torch.Tensor) -> np.ndarray:
    import torch

    tensor = tensor.contiguous()
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
    if length > _MAX_HEADER:
        raise TokenFormatError(f"the header has {length} bytes, more than {_MAX_HEADER}: this is no token message")
    try:
        text = str(data[8 : 8 + length], "utf-8")
    except UnicodeDecodeError:
        raise TokenFormatError("the safetensors header is not UTF-8") from None
    return _parse(text, "the safetensors header"), data[8 + length :]


def _parse(text: str, what: str) -> dict:
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


def _no_constant(name: str) -> float:
    raise TokenFormatError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def _check_layout(header: Mapping[str, object], size: int) -> None:
    """Every byte of the payload belongs to one tensor, as safetensors demands: none can pass for another."""
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = entry["data_offsets"]  # type: ignore[index]
            spans.append((_whole(start), _whole(stop)))
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFormatError(f"the safetensors header describes {name!r} wrongly") from error
    end = 0
    for start, stop in sorted(spans):
        if start != end or stop < start:
            raise TokenFormatError(f"the tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != size:
        raise TokenFormatError(f"the tensors take {end} bytes, and there are {size}: truncated?")


def _tensor(entry: Mapping[str, object], payload: memoryview, name: str) -> tuple[np.ndarray, str]:
    start, stop = entry["data_offsets"]  # type: ignore[misc]
    try:
        stored, shape = entry["dtype"], [_whole(length) for length in entry["shape"]]  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError) as error:
        raise TokenFormatError(f"the safetensors header describes {name} wrongly") from error
    found = [(dtype, word) for dtype, (code, word) in _DTYPES.items() if code == stored]
    if not found:
        raise TokenFormatError(f"{name} is stored as {_brief(stored)}; BF16, F16 or F32 is needed")
    ((dtype, word),) = found
    if stop - start != math.prod(shape) * word.itemsize:
        raise TokenFormatError(f"{name} {shape} of {dtype} does not fit its {stop - start} bytes")
    return np.frombuffer(payload[start:stop], word).reshape(shape), dtype


def _whole(value: object, start: int = 0, stop: int = 2**32) -> int:
    """An integer from `start` to below `stop`; ValueError for anything else, and for true and false."""
    if type(value) is not int or not start <= value < stop:
        raise ValueError(f"{_brief(value)} is not a whole number from {start} to {stop - 1}")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_brief(value)} is neither true nor false")
    return value


def _text(value: object) -> str:
    """A string that can be printed."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"{_brief(value)} is no string of at most {_MAX_TEXT} characters")
    value.encode()  # raises for half a surrogate pair
    return value


def _affine(values: object) -> tuple[float, ...]:
    a, b, c, d, e, f = _numbers(values, 6, "a view's affine map")
    if abs(a * e - b * d) < 1 / _FAR**2:
        raise ValueError(f"a view's affine map cannot be inverted: {_brief(values)}")
    return a, b, c, d, e, f


def _rectangle(values: object) -> tuple[float, ...]:
    left, top, right, bottom = _numbers(values, 4, "the part of an image that was seen")
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f"the part of an image that was seen must be left, top, right, bottom, got {_brief(values)}")
    return left, top, right, bottom


def _numbers(values: object, count: int, what: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"{what} must be {count} numbers, got {_brief(values)}")
    for value in values:
        if type(value) not in (int, float) or not -_FAR < value < _FAR:
            raise ValueError(f"{what} must be {count} finite numbers, got {_brief(values)}")
    return tuple(map(float, values))


def _brief(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or -(2**64) < value < 2**64 else "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}…"
