"""The digest of a condition: the vector that modulates a model's encoders beside the image (FiLM). NumPy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def condition_digest(vector: np.ndarray | Sequence[float]) -> str:
    """SHA-256 (hex) over a condition as little-endian float32; ValueError if it is not a vector of finite numbers."""
    values = np.asarray(vector, "<f4")
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("a condition must be a vector of finite numbers")
    return hashlib.sha256(values.tobytes()).hexdigest()
