"""What differs between the tokenizer that a policy expects and the one whose tokens came.

A fingerprint is one hash over the weights' digest and the settings (docs/wire_format.md), so alone it says that
something differs. What differs is known where both sides' inputs of the hash are at hand. Of the tokens that came the
message has them. Of the expected ones they are known where the policy gave them, or where the expected hash comes out
for the message's own weights with other image transforms or options: the common mistakes are tried.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from vla_perception.fingerprint_inputs import (
    IMAGENET_MEAN,
    IMAGENET_MEAN_BF16,
    IMAGENET_STD,
    IMAGENET_STD_BF16,
    SPELLED_IN_FINGERPRINTS,
    as_json,
    fingerprint,
    spelled_today,
)
from vla_perception.options import RESIZE_WITH_PAD

#: The settings' entry of the image transforms.
_TRANSFORMS = SPELLED_IN_FINGERPRINTS["image_transforms"]
_ENTRIES = 12
#: Bytes of settings up to which other ones are tried; real ones have about one thousand.
_MAX_TRIED = 1 << 14
_IMAGENET = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
_IMAGENET_BF16 = {"mean": list(IMAGENET_MEAN_BF16), "std": list(IMAGENET_STD_BF16)}


def checked_inputs(value: object) -> dict[str, object]:
    """The inputs of a fingerprint, as a message or a policy gives them; ValueError if they are malformed."""
    if (
        not isinstance(value, Mapping)
        or not isinstance(value.get("settings"), Mapping)
        or not isinstance(value.get("weights"), str)
        or not re.fullmatch("[0-9a-f]{64}", value["weights"])
    ):
        raise ValueError("fingerprint_inputs must be an object of settings (an object) and weights (64 hex digits)")
    return {"settings": value["settings"], "weights": value["weights"]}


def expectation(expected: str | Mapping[str, object]) -> tuple[str, dict[str, object] | None]:
    """The digits that a policy expects, and the inputs of the fingerprint where it gave them.

    Args:
        expected: the fingerprint or its first digits; or a mapping with ``fingerprint`` and ``fingerprint_inputs``, as
            `VisualTokenizer.metadata` gives it.

    Raises:
        ValueError: fewer than 8 digits, or inputs that are none.
    """
    inputs = None
    digits: object = expected
    if isinstance(expected, Mapping):
        given, digits = expected.get("fingerprint_inputs"), expected.get("fingerprint", "")
        inputs = None if given is None else checked_inputs(given)
    if not isinstance(digits, str) or len(digits) < 8:
        raise ValueError("expect_fingerprint must have at least 8 of the 64 hexadecimal digits")
    if inputs is not None and not fingerprint(inputs).startswith(digits.lower()):
        raise ValueError(f"expect_fingerprint: the inputs have the fingerprint {fingerprint(inputs)}, not {digits}")
    return digits.lower(), inputs


def difference(expected: str, wanted: Mapping[str, object] | None, found: Mapping[str, object] | None, got: str) -> str:
    """A sentence about what differs, with both values where they are known.

    Args:
        expected: the digits that are expected.
        wanted: inputs of the expected fingerprint, where they are known.
        found: inputs of the fingerprint of the tokens that came, where the message has them.
        got: that fingerprint.
    """
    try:
        if found is None or fingerprint(found) != got:
            return "the message does not say what its fingerprint is made of, so what differs is not known"
        if wanted is None and len(as_json(found)) <= _MAX_TRIED:
            wanted = next((inputs for inputs in _neighbours(found) if fingerprint(inputs).startswith(expected)), None)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return "the message is garbled where it says what its fingerprint is made of"
    if wanted is None:
        options = {key: value for key, value in _readable(found["settings"]).items() if key != "preprocessing"}
        return (
            "most likely the weights differ: with these ones (digest "
            f"{str(found['weights'])[:16]}…) no usual image transforms and options have the expected "
            f"fingerprint; they came with {_short(options)}"
        )
    parts = []
    if wanted["weights"] != found["weights"]:
        parts.append(f"weights (expected digest {str(wanted['weights'])[:16]}…, got {str(found['weights'])[:16]}…)")
    before, after = _flat(_readable(wanted["settings"])), _flat(_readable(found["settings"]))
    # As the hash sees them: there 1, 1.0 and true are three values.
    names = [name for name in sorted({**before, **after}) if _brief(before, name, None) != _brief(after, name, None)]
    parts += [f"{name[:80]} (expected {_brief(before, name)}, got {_brief(after, name)})" for name in names[:_ENTRIES]]
    if len(names) > _ENTRIES:
        parts.append(f"{len(names) - _ENTRIES} more settings")
    same = "; the weights are the expected ones" if wanted["weights"] == found["weights"] else ""
    return f"what differs: {', '.join(parts) or 'the form of settings'}{same}"


def _readable(settings: object) -> dict[str, object]:
    """Settings with the image transforms as parameters and options spell them today."""

    def spelled(steps: object) -> object:
        return (
            [spelled_today(step) if isinstance(step, str) else step for step in steps]
            if isinstance(steps, list)
            else steps
        )

    result = dict(settings) if isinstance(settings, Mapping) else {}
    if _TRANSFORMS in result:
        value = result.pop(_TRANSFORMS)
        chains = (
            {camera: spelled(steps) for camera, steps in value.items()}
            if isinstance(value, Mapping)
            else spelled(value)
        )
        result["image_transforms"] = chains
    return result


def _flat(settings: object, prefix: str = "") -> dict[str, object]:
    """Settings by dotted names; those of an encoder begin with its name."""
    result: dict[str, object] = {}
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if key == "preprocessing" and isinstance(value, Sequence) and not isinstance(value, str):
            for index, encoder in enumerate(value):
                name = encoder.get("encoder", index) if isinstance(encoder, Mapping) else index
                result |= _flat(encoder, f"{prefix}{name}.")
        elif isinstance(value, Mapping) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _brief(values: Mapping[str, object], name: str, length: int | None = 160) -> str:
    return _short(values[name], length) if name in values else "none"


def _short(value: object, length: int | None = 160) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return text if length is None or len(text) <= length else f"{text[:length]}…"


def _neighbours(found: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """The same weights with other image transforms and options, and then with another resize or other statistics."""
    settings = found["settings"]
    if not isinstance(settings, Mapping):
        return
    encoders = settings.get("preprocessing")
    if not isinstance(encoders, list) or not all(isinstance(entry, Mapping) for entry in encoders):
        return
    sizes = {entry.get("image_size") for entry in encoders if isinstance(entry.get("image_size"), int)}
    transforms = [settings.get(_TRANSFORMS), *_transforms(sizes)]
    pools = [settings.get("pool"), 1, 2, 3, 4, 7, 8, 9, 14, 16]
    strategies = [settings.get("token_strategy"), "patch", "cls", "cls+patch"]
    for strategy, pool, chain in itertools.product(strategies, pools, transforms):
        changed = {_TRANSFORMS: chain, "pool": pool, "token_strategy": strategy}
        yield {"settings": {**settings, **changed}, "weights": found["weights"]}
    for preprocessing, chain in itertools.product(_preprocessings(encoders), transforms):
        yield {
            "settings": {**settings, "preprocessing": preprocessing, _TRANSFORMS: chain},
            "weights": found["weights"],
        }


def _transforms(sizes: set[int]) -> Iterator[list[str]]:
    """Image transforms that evaluations and data sets of this kind of model use."""
    size = next(iter(sizes)) if len(sizes) == 1 else None
    resizes = [[], [f"lanczos3:{size}"]] if size else [[]]
    crops = [[], ["center_crop_pil"], [f"center_crop_tf:{size}"]] if size else [[], ["center_crop_pil"]]
    for turn, jpeg, resize, crop in itertools.product(([], ["rotate180"]), ([], ["jpeg:95"]), resizes, crops):
        yield [*turn, *jpeg, *resize, *crop]


def _preprocessings(encoders: Sequence[Mapping]) -> Iterator[list[dict]]:
    """Another resize strategy or interpolation, and ImageNet's statistics exact or as they come out of bfloat16."""
    for strategy in ("resize-naive", "resize-crop", *RESIZE_WITH_PAD):
        yield [{**entry, "resize_strategy": strategy, "letterbox_fill": None} for entry in encoders]
    fill = [int(255 * value) for value in encoders[0].get("mean", ())] if encoders else []
    yield [{**entry, "resize_strategy": "letterbox", "letterbox_fill": fill} for entry in encoders]
    for interpolation in (1, 2, 3):  # lanczos, bilinear, bicubic
        yield [{**entry, "interpolation": interpolation} for entry in encoders]
    for old, new in ((_IMAGENET, _IMAGENET_BF16), (_IMAGENET_BF16, _IMAGENET)):
        yield [{**entry, **(new if entry.get("mean") == old["mean"] else {})} for entry in encoders]
