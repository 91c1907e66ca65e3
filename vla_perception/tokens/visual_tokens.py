"""`VisualTokens`: what a token message holds, checked, and where on the source image each token lies.

Bytes are in `codec`, the ROS message is in `message`. Needs NumPy; torch only for `VisualTokens.from_torch` and
`VisualTokens.torch`, ml_dtypes only for `VisualTokens.numpy` and `encoder` on bfloat16.
"""

from __future__ import annotations

import array
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_perception.options import TOKEN_STRATEGIES
from vla_perception.tokens import codec
from vla_perception.tokens.codec import TokenFormatError
from vla_perception.tokens.fingerprint import checked_inputs
from vla_perception.tokens.view import View

if TYPE_CHECKING:
    import torch

#: A token map's indices take 8 bytes per pixel.
_MAX_MAP_PIXELS = 2**26
#: Pixels of a row or column of an image; one of no width could be of any height.
_MAX_MAP_SIDE = 2**16
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
        features: [views, tokens, encoder channels] before the projector, like `data`, or None; `pixel_shuffle` ² times as
            many as patch tokens.
        fingerprint_inputs: what the fingerprint is the hash of, ``settings`` and ``weights`` (a digest); None where the
            message does not say.
        pixel_shuffle: k: the projector made one token of k × k patches; 1 for projectors that do not.
        condition: digest (hex) of what the encoders were modulated with beside the image (FiLM); None without.
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
    encoders: tuple[Mapping[str, Any], ...]
    projector: str
    features: np.ndarray | None = field(default=None, repr=False)
    fingerprint_inputs: Mapping[str, object] | None = field(default=None, repr=False)
    pixel_shuffle: int = 1
    condition: str | None = None
    #: `data`, and the tensor on a GPU that it is a copy of: for `torch`, while `data` is still that one.
    _source: tuple[np.ndarray, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_tensors()
        self._check_views()
        self._check_channels()

    def _check_tensors(self) -> None:
        if self.dtype not in codec.DTYPES:
            raise TokenFormatError(f"unknown token dtype {self.dtype!r}; one of {', '.join(codec.DTYPES)} is needed")
        word = codec.DTYPES[self.dtype][1]
        for name, values in self._tensors().items():
            if values.ndim != 3 or 0 in values.shape or values.dtype != word:
                raise TokenFormatError(
                    f"{name} must be a non-empty [views, tokens, channels] array of {word} for {self.dtype}, "
                    f"got {list(values.shape)} of {values.dtype}"
                )
            if name == "features" and values.shape[:2] != (self.shape[0], self._cls_tokens + self._feature_patches):
                raise TokenFormatError(f"features {list(values.shape)} do not go with tokens {list(self.data.shape)}")

    def _check_views(self) -> None:
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
        if min(self.grid) < 1 or self.shape[1] != self._cls_tokens + self._patches:
            raise TokenFormatError(
                f"{self.shape[1]} tokens per view do not fill a grid of {self.grid[0]} × {self.grid[1]} "
                f"(token_strategy {self.token_strategy})"
            )

    def _check_channels(self) -> None:
        width = 0
        for encoder in self.encoders:
            start, stop = encoder["channels"]
            if not width == start < stop:
                raise TokenFormatError(
                    f"encoder {encoder['name']!r} has the channels {start}–{stop}, where the one before it ends at {width}"
                )
            width = stop
        for name, values in self._tensors().items():
            if (name == "features" or self.projector == "none") and values.shape[2] != width:
                raise TokenFormatError(f"{name} have {values.shape[2]} channels, but the encoders fill {width}")

    def _tensors(self) -> dict[str, np.ndarray]:
        """The message's tensors by their names."""
        return {"tokens": self.data} | ({} if self.features is None else {"features": self.features})

    @property
    def _cls_tokens(self) -> int:
        """Tokens per view that stand before the grid."""
        return 0 if self.token_strategy == "patch" else 1

    @property
    def _patches(self) -> int:
        """Tokens per view that lie on the grid."""
        return 0 if self.token_strategy == "cls" else self.grid[0] * self.grid[1]

    @property
    def _feature_patches(self) -> int:
        """Features per view that lie on the grid."""
        return self._patches * self.pixel_shuffle**2

    @property
    def shape(self) -> tuple[int, int, int]:
        """(views, tokens per view, channels)."""
        return self.data.shape

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
        **model: Any,
    ) -> VisualTokens:
        """Tokens [views, tokens, channels] in the dtype that they are to have, from any device.

        From a GPU, they are copied to the host once, and `torch` still gives them there.

        Args:
            model: `VisualTokenizer.metadata()`.
        """
        dtype = str(tokens.dtype).removeprefix("torch.")
        from vla_perception.tokens.torch_tensors import queue_to_host, to_words

        on_host = [queue_to_host(part.detach().to(tokens.dtype)) for part in (tokens, features) if part is not None]
        if tokens.is_cuda:
            import torch

            torch.cuda.current_stream(tokens.device).synchronize()
        words = [to_words(part) for part in on_host]
        return cls(
            data=words[0],
            dtype=dtype,
            views=tuple(views),
            sequence=sequence,
            features=words[1] if len(words) > 1 else None,
            _source=(words[0], tokens.detach()) if tokens.is_cuda else None,
            **model_fields(model),
        )

    def numpy(self) -> np.ndarray:
        """[views, tokens, channels] without a copy; bfloat16 as ml_dtypes' bfloat16. Read-only where received."""
        return codec.typed(self.data, self.dtype)

    def float32(self) -> np.ndarray:
        """[views, tokens, channels] as float32: exact, and a copy unless the tokens are float32 already."""
        return codec.float32(self.data, self.dtype)

    def features_float32(self) -> np.ndarray:
        """[views, tokens, encoder channels] as float32; ValueError if the message carries none."""
        if self.features is None:
            raise ValueError("this message carries no features; set the tokenizer's publish_features parameter")
        return codec.float32(self.features, self.dtype)

    def torch(self, device: str = "cpu") -> torch.Tensor:
        """[views, tokens, channels] as a torch tensor in `dtype` on `device`, a separate copy."""
        import torch

        if self._source is not None and self._source[0] is self.data:
            target = torch.device(device)
            if target.type == "cuda" and target.index is None:
                target = torch.device("cuda", torch.cuda.current_device())
            source = self._source[1]
            if source.device == target:
                if source.is_cuda:  # else what is encoded next could be given its memory before this stream has read it
                    source.record_stream(torch.cuda.current_stream(target))
                return source.clone()
        # A received array is read-only, which torch does not know: hence a copy.
        words = torch.from_numpy(self.data.view(np.int16 if self.data.itemsize == 2 else np.int32).copy())
        return words.view(getattr(torch, self.dtype)).to(device)

    def select(self, camera: str) -> VisualTokens:
        """The part of one camera, with one view. KeyError with the names that exist."""
        if camera not in self.cameras:
            raise KeyError(f"no camera {camera!r} among {', '.join(self.cameras)}")
        index = self.cameras.index(camera)
        data = self.data[index : index + 1]
        source = self._source if self._source is not None and self._source[0] is self.data else None
        return replace(
            self,
            data=data,
            _source=None if source is None else (data, source[1][index : index + 1]),
            views=(self.views[index],),
            features=None if self.features is None else self.features[index : index + 1],
        )

    def encoder_channels(self, name: str) -> slice:
        """Channels of one encoder, within `features` (and within tokens where there is no projector)."""
        for encoder in self.encoders:
            if encoder["name"] == name:
                start, stop = encoder["channels"]
                return slice(start, stop)
        raise KeyError(f"no encoder {name!r} among {', '.join(str(e['name']) for e in self.encoders)}")

    def encoder(self, name: str) -> np.ndarray:
        """What one encoder saw, [views, features, its channels], like `numpy`: a slice of the features.

        Raises:
            KeyError: there is no such encoder.
            ValueError: behind a projector the encoders are mixed, and the message carries no features.
        """
        channels = self.encoder_channels(name)
        if self.features is not None:
            return codec.typed(self.features, self.dtype)[..., channels]
        if self.projector == "none":
            return self.numpy()[..., channels]
        raise ValueError(
            "the projector has mixed the encoders' channels and this message carries no features; set the "
            "tokenizer's publish_features parameter"
        )

    def as_grid(self, values: np.ndarray | None = None) -> np.ndarray:
        """Patch tokens (or `values`, [views, tokens, …], or features') as [views, rows, columns, …]: a view, not a copy."""
        values = self.numpy() if values is None else values
        self._need_patches()
        patches = values[:, self._cls_tokens :]
        k = self.pixel_shuffle if patches.shape[1] == self._feature_patches else 1
        return patches.reshape(values.shape[0], self.grid[0] * k, self.grid[1] * k, *values.shape[2:])

    def token_at(self, x: float, y: float, view: int = 0) -> int | None:
        """Index of the token that sees the source pixel (x, y); None if no token does (cropped, or beyond the grid).

        Pixel i covers [i, i + 1). ValueError with ``cls``, whose only token sees everything.
        """
        self._need_patches()
        patch = int(self.views[view].patch_at(x, y, self.grid))
        return None if patch < 0 else self._cls_tokens + patch

    def token_map(self, view: int = 0) -> np.ndarray:
        """Index of the token that sees each pixel's centre of the source image; −1 where no token does.

        For pixels of a scaled image, or a few rows at a time, see `View.patch_at`.

        Returns:
            intp [height, width].

        Raises:
            ValueError: with ``cls``, whose only token sees everything; or the message claims more than 2**26 pixels, or
                2**16 in a row or column.
        """
        self._need_patches()
        source = self.views[view]
        if source.height * source.width > _MAX_MAP_PIXELS or max(source.height, source.width) > _MAX_MAP_SIDE:
            raise ValueError(
                f"a token map of {source.height} × {source.width} pixels is too large; ask View.patch_at for parts of it"
            )
        x, y = np.arange(source.width) + 0.5, np.arange(source.height)[:, None] + 0.5
        patches = source.patch_at(x, y, self.grid)
        patches[patches >= 0] += self._cls_tokens
        return patches

    def patch_corners(self, token: int, view: int = 0) -> tuple[tuple[float, float], ...]:
        """The four corners (x, y) of a token's patch in the source image, in pixels, clockwise from its first.

        They may lie outside the image where padding was added. ValueError for a token that is not a patch.
        """
        position = token - self._cls_tokens
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
            raise ValueError("a cls token has no place on the grid (token_strategy cls)")

    def to_bytes(self) -> bytes:
        """One safetensors file; the same content gives the same bytes."""
        return b"".join(self.to_parts())

    def to_parts(self) -> list[bytes | memoryview]:
        """The pieces of `to_bytes` in their order; the tensors are not copied, so that one copy puts them in place."""
        return [self._header, *codec.payload_parts(self._tensors())]

    @functools.cached_property
    def _header(self) -> bytes:
        """What stands before the tensors in `to_bytes`; it says nothing about their values, and can be made before them."""
        metadata = {
            "sequence": self.sequence,
            **{key: getattr(self, key) for key in _MODEL_KEYS},
            "encoders": [dict(encoder) for encoder in self.encoders],
            **({} if self.fingerprint_inputs is None else {"fingerprint_inputs": self.fingerprint_inputs}),
            **({} if self.pixel_shuffle == 1 else {"pixel_shuffle": self.pixel_shuffle}),
            **({} if self.condition is None else {"condition": self.condition}),
            "views": [view.to_metadata() for view in self.views],
        }
        return codec.header_bytes(metadata, self._tensors(), self.dtype)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview | np.ndarray | array.array) -> VisualTokens:
        """Reads what `to_bytes` wrote; arrays are read-only views of `data`. TokenFormatError if it is damaged."""
        contents = codec.read(data)
        metadata = contents.metadata
        if "views" not in metadata and "recording" in metadata:
            raise TokenFormatError(
                "this is the token file of a recording, not one message: open it with "
                "vla_perception.offline.token_file.TokenFile"
            )
        try:
            tokens = cls(
                data=contents.tensors["tokens"],
                dtype=contents.dtype,
                views=tuple(View.from_metadata(entry) for entry in metadata["views"]),
                sequence=codec.whole_number(metadata["sequence"], stop=2**63),
                features=contents.tensors.get("features"),
                **model_fields(metadata),
            )
        except TokenFormatError:
            raise
        except KeyError as error:
            raise TokenFormatError(f"the {codec.METADATA_KEY!r} entry lacks {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise TokenFormatError(f"the {codec.METADATA_KEY!r} entry is garbled: {error}") from error
        tokens.check_finite()
        return tokens

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_bytes` into a file, for training and offline use."""
        with open(path, "wb") as file:
            file.writelines(self.to_parts())

    @classmethod
    def load(cls, path: str | os.PathLike) -> VisualTokens:
        """Reads a file of a message's data, as `save` writes it; its arrays are mapped, not copied.

        Files of many frames, as `vla-perception tokenize` writes them, have the same metadata about the model;
        `vla_perception.offline.token_file.TokenFile` reads these and files of one message.

        Raises:
            OSError: the file cannot be read.
            TokenFormatError: it is not a token file, or damaged.
        """
        # An empty file cannot be mapped.
        return cls.from_bytes(np.memmap(path, np.uint8, mode="r") if os.path.getsize(path) else b"")

    def check_finite(self) -> None:
        """TokenFormatError if a valid view's tokens or features hold NaN or infinity. `from_bytes` does it by itself."""
        for name, values in self._tensors().items():
            for index, view in enumerate(self.views):
                if view.valid and not codec.is_finite(values[index], self.dtype):
                    raise TokenFormatError(
                        f"{name} of {view.camera!r} hold values that are not finite numbers; float16 ends at 65504, "
                        "bfloat16 and float32 do not"
                    )


def model_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `VisualTokens` that say what the model is, checked. KeyError, TypeError, ValueError if amiss."""
    fields = {key: model[key] for key in _MODEL_KEYS}
    for key in ("model", "weights", "fingerprint", "compute_dtype", "token_strategy", "projector"):
        codec.string(fields[key])
    rows, columns = fields["grid"]
    encoders = []
    for encoder in fields["encoders"]:
        start, stop = encoder["channels"]
        channels = [codec.whole_number(start), codec.whole_number(stop)]
        encoders.append(dict(encoder) | {"name": codec.string(encoder["name"]), "channels": channels})
    if len({encoder["name"] for encoder in encoders}) != len(encoders):
        raise ValueError("two encoders have the same name")
    inputs = model.get("fingerprint_inputs")
    fields["fingerprint_inputs"] = None if inputs is None else checked_inputs(inputs)
    fields["pixel_shuffle"] = codec.whole_number(model.get("pixel_shuffle", 1), 1)
    condition = fields["condition"] = model.get("condition")
    if condition is not None and not re.fullmatch("[0-9a-f]{64}", codec.string(condition)):
        raise ValueError(f"condition {condition!r:.80} is not 64 hexadecimal digits")
    return fields | {
        "grid": (codec.whole_number(rows, 1), codec.whole_number(columns, 1)),
        "pool": codec.whole_number(fields["pool"], 1),
        "encoders": tuple(encoders),
    }
