"""Token messages → what is painted: colors, norms, changes and similarities of patches. NumPy only.

A *space* is one kind of vector per patch: an encoder's name, what that encoder gave before the projector; `JOINED`, what
all of them gave, one behind the other; `TOKENS`, what the projector made of it. Encoders are known where the message
carries features, or there is no projector. Where the projector shuffles pixels, features lie on a finer grid than tokens,
and only the latter are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vla_perception.tokens import VisualTokens
from vla_perception.visualization.color_basis import ColorBasis

#: No encoder has these names: they hold a space.
JOINED, TOKENS = "encoders joined", "projected tokens"
#: Messages over which the meaning of colors settles. A page's first colors are there with the first message.
FIT_MESSAGES = 5
#: Patches that they are fitted to: the robot may have no core to spare for more.
FIT_PATCHES = 256


def spaces(tokens: VisualTokens) -> tuple[str, ...]:
    """The spaces of a message, in the order in which a token goes through them."""
    projected = tokens.projector != "none"
    if projected and (tokens.features is None or tokens.pixel_shuffle > 1):
        return (TOKENS,)
    names = tuple(str(encoder["name"]) for encoder in tokens.encoders)
    return (*names, *[JOINED] * (len(names) > 1), *[TOKENS] * projected)


def patch_vectors(tokens: VisualTokens, space: str) -> np.ndarray:
    """float32 [views, rows · columns, channels] of one space; without the cls token, which lies nowhere.

    Raises:
        KeyError: the message has no such space.
        ValueError: it has no patch tokens (token_strategy cls).
    """
    if space not in spaces(tokens):
        raise KeyError(f"the message has no {space}: set the tokenizer's publish_features parameter for its encoders")
    if space == TOKENS:
        values = tokens.float32()
    else:
        values = tokens.float32() if tokens.features is None else tokens.features_float32()
        if space != JOINED:
            values = values[..., tokens.encoder_channels(space)]
    grid = tokens.as_grid(values)
    return grid.reshape(grid.shape[0], -1, grid.shape[-1])


def has_patches(tokens: VisualTokens) -> bool:
    return tokens.token_strategy != "cls"


class Patches:
    """The patches of one message in one space, with what is derived from them computed once.

    Attributes:
        vectors: float32 [views, patches, channels].
    """

    def __init__(self, tokens: VisualTokens, space: str) -> None:
        self.vectors = patch_vectors(tokens, space)
        self.valid = np.array(tokens.valid)

    @cached_property
    def norms(self) -> np.ndarray:
        """float32 [views, patches]: Euclidean norms."""
        return np.sqrt(np.einsum("vpc,vpc->vp", self.vectors, self.vectors))

    def similarity(self, reference: np.ndarray) -> np.ndarray:
        """float32 [views, patches]: cosine similarity to a vector [channels], from -1 to 1. 0 where a vector is 0."""
        length = float(np.linalg.norm(reference))
        scale = self.norms * length
        products = self.vectors @ reference.astype(np.float32)
        return np.clip(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0), -1, 1)

    def change(self, before: Patches | None) -> np.ndarray | None:
        """float32 [views, patches]: 1 - cosine similarity to the same patch of the message before, from 0 to 2."""
        if before is None or before.vectors.shape != self.vectors.shape:
            return None
        scale = self.norms * before.norms
        products = np.einsum("vpc,vpc->vp", self.vectors, before.vectors)
        return 1 - np.clip(np.divide(products, scale, out=np.ones_like(products), where=scale > 0), -1, 1)

    def mean(self, view: int, patches: Sequence[int]) -> np.ndarray:
        """float32 [channels]: the mean of some patches of one view."""
        return self.vectors[view, list(patches)].mean(axis=0)


class Palette:
    """Principal components as colors, per space; they settle over a few messages and are the same for every page."""

    def __init__(self) -> None:
        self._bases: dict[str, ColorBasis] = {}
        self._of: tuple[object, ...] | None = None

    def colors(self, tokens: VisualTokens, space: str, patches: Patches) -> np.ndarray:
        """uint8 [views, patches, 3]; black in views that are not valid, and where nothing is finite."""
        of = (tokens.fingerprint, tokens.grid)
        if of != self._of:
            self._of, self._bases = of, {}
        basis = self._bases.setdefault(space, ColorBasis(FIT_MESSAGES, FIT_PATCHES))
        try:
            return basis.colors_of_views(patches.vectors, patches.valid)
        except ValueError:  # nothing to fit to, or another number of channels under the same fingerprint
            return np.zeros((*patches.vectors.shape[:2], 3), np.uint8)

    def refit(self) -> None:
        """Colors settle anew."""
        self._of = None


@dataclass(frozen=True)
class Pin:
    """A place in one view: a rectangle in pixels of the source image, of no area for a single patch.

    Attributes:
        camera: the view's.
        box: left, top, right, bottom.
    """

    camera: str
    box: tuple[float, float, float, float]

    def patches(self, tokens: VisualTokens) -> list[int]:
        """Patches, counted without the cls token, whose middle lies in the box; the one below its middle, if none does.

        Empty where no patch sees that place, or the message has no such view.
        """
        if self.camera not in tokens.cameras or not has_patches(tokens):
            return []
        index = tokens.cameras.index(self.camera)
        view = tokens.views[index]
        left, top, right, bottom = self.box
        if right > left and bottom > top:
            middles = patch_middles(tokens, index)
            inside = (middles >= (left, top)).all(axis=1) & (middles < (right, bottom)).all(axis=1)
            sees = view.patch_at(middles[:, 0], middles[:, 1], tokens.grid) == np.arange(len(middles))
            if (inside & sees).any():
                return np.flatnonzero(inside & sees).tolist()
        patch = int(view.patch_at((left + right) / 2, (top + bottom) / 2, tokens.grid))
        return [patch] if patch >= 0 else []


def patch_middles(tokens: VisualTokens, view: int) -> np.ndarray:
    """float64 [patches, 2]: the middle of each patch of a view, (x, y) in pixels of its source image."""
    a, b, c, d, e, f = tokens.views[view].affine
    rows, columns = np.divmod(np.arange(tokens.grid[0] * tokens.grid[1]), tokens.grid[1])
    u, v = columns + 0.5 - c, rows + 0.5 - f
    return np.stack([e * u - b * v, a * v - d * u], axis=1) / (a * e - b * d)
