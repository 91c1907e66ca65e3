"""Colors that settle over the first messages and then keep their meaning. NumPy only."""

from __future__ import annotations

import numpy as np

from vla_perception.visualization.principal_components import PrincipalComponents

#: Tokens that a basis is fitted to. More cost seconds and change little.
FIT_TOKENS = 768


class ColorBasis:
    """Principal components that settle over the first messages and then stay, so that colors do not flicker.

    Args:
        messages: over how many messages they settle.
        fit_tokens: tokens that they are fitted to at most.
    """

    def __init__(self, messages: int, fit_tokens: int = FIT_TOKENS):
        self._messages = messages
        self._fit_tokens = fit_tokens
        self._samples: list[np.ndarray] = []
        self._basis: PrincipalComponents | None = None

    def colors(self, tokens: np.ndarray) -> np.ndarray:
        """uint8 [n, 3] of tokens float32 [n, channels]. ValueError if there is nothing finite to fit to."""
        if len(self._samples) < self._messages:
            self._samples.append(_at_most(tokens, self._fit_tokens))
            try:
                rows = _at_most(np.concatenate(self._samples), self._fit_tokens)
                self._basis = PrincipalComponents.fit(rows, self._basis)
            except ValueError:
                self._samples.pop()
                raise
        assert self._basis is not None  # messages is at least 1
        return self._basis.rgb(tokens)

    def colors_of_views(self, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """uint8 [views, …, 3] of tokens float32 [views, …, channels]; black in views that are not `valid` [views]."""
        colors = np.zeros((*tokens.shape[:-1], 3), np.uint8)
        if valid.any():
            painted = self.colors(tokens[valid].reshape(-1, tokens.shape[-1]))
            colors[valid] = painted.reshape(-1, *tokens.shape[1:-1], 3)
        return colors


def _at_most(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[:: -(-len(rows) // count)]
