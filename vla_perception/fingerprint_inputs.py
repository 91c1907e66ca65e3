"""What a fingerprint is the hash of: for the tokenizer, which computes it, and for policies, which explain a mismatch.

Standard library only, and nothing of this package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
#: The released OpenVLA processor went through bfloat16, so these are what the models were run with.
IMAGENET_MEAN_BF16: Triple = (0.484375, 0.455078125, 0.40625)
IMAGENET_STD_BF16: Triple = (0.228515625, 0.2236328125, 0.224609375)

#: Options whose name in the inputs is another one than today's, since 0.1.0: a hash is over them, so it stays.
SPELLED_IN_FINGERPRINTS = {"image_transforms": "prepare", "crop": "region"}


def as_json(inputs: Mapping[str, object]) -> str:
    """The text that is hashed: `settings` and `weights` as sorted JSON without spaces."""
    entries = {"settings": inputs["settings"], "weights": inputs["weights"]}
    return json.dumps(entries, sort_keys=True, separators=(",", ":"))


def fingerprint(inputs: Mapping[str, object]) -> str:
    """SHA-256, 64 hexadecimal digits, of ``{"settings": what changes tokens, "weights": digest of the weights}``."""
    return hashlib.sha256(as_json(inputs).encode()).hexdigest()


def spelled_in_fingerprint(step: str) -> str:
    """An image transform (``crop:0,0,9,9``) as `fingerprint_inputs` spell it."""
    name, colon, argument = step.partition(":")
    return SPELLED_IN_FINGERPRINTS.get(name, name) + colon + argument


def spelled_today(step: str) -> str:
    """The reverse of `spelled_in_fingerprint`."""
    name, colon, argument = step.partition(":")
    return next((new for new, old in SPELLED_IN_FINGERPRINTS.items() if old == name), name) + colon + argument
