"""Which arguments a checkpoint's configuration may give to ``timm.create_model``.

timm takes whatever it is given: ``checkpoint_path`` is loaded (unpickled, before timm 1.0.26), ``cache_dir`` and
``pretrained_cfg`` read and fetch files, and a name with a scheme (``hf-hub:…``) brings another configuration. So names
and arguments that come from files are only those that shape a plain vision transformer, with values that one has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vla_perception.tokenizer.checkpoints import CheckpointError

#: Whole numbers, within bounds that no vision transformer of today comes near.
_COUNTS = {
    "patch_size": (1, 512),
    "in_chans": (3, 3),
    "embed_dim": (1, 16384),
    "depth": (2, 256),
    "num_heads": (1, 512),
    "reg_tokens": (0, 1024),
}
_NUMBERS = {
    "mlp_ratio": (0.01, 64.0),
    "init_values": (0.0, 1e3),
    "drop_rate": (0.0, 1.0),
    "pos_drop_rate": (0.0, 1.0),
    "patch_drop_rate": (0.0, 1.0),
    "proj_drop_rate": (0.0, 1.0),
    "attn_drop_rate": (0.0, 1.0),
    "drop_path_rate": (0.0, 1.0),
}
_SWITCHES = (
    "qkv_bias",
    "qk_norm",
    "scale_attn_norm",
    "scale_mlp_norm",
    "proj_bias",
    "class_token",
    "no_embed_class",
    "pre_norm",
    "final_norm",
    "fc_norm",
    "pool_include_prefix",
    "dynamic_img_size",
    "fix_init",
)
_NORMS = ("layernorm", "layer_norm", "layernormfp32", "rmsnorm", "rms_norm", "rmsnormfp32", "simplenorm")
_CHOICES = {
    "global_pool": ("", "avg", "avgmax", "max", "token", "map", "prr"),
    "pos_embed": ("", "none", "learn"),
    "weight_init": ("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "relu", "mish"),
    "norm_layer": _NORMS,
    "embed_norm_layer": _NORMS,
}
_KNOWN = (*_COUNTS, *_NUMBERS, *_SWITCHES, *_CHOICES)


def checked_model_args(arguments: Mapping[str, object], where: str) -> dict[str, object]:
    """The arguments that change the network; those that are null, as timm prunes them, are left out.

    Args:
        where: the file and entry that they come from, for the message.

    Raises:
        CheckpointError: an argument that is not among the known ones, or a value that it cannot have; by name.
    """
    unknown = sorted(key for key in arguments if key not in _KNOWN)
    if unknown:
        raise CheckpointError(
            f"{where} has {', '.join(repr(key[:100]) for key in unknown[:8])}, which is refused: timm would load files or "
            f"build something else for it. Remove it; known are {', '.join(_KNOWN)}"
        )
    result = {key: value for key, value in arguments.items() if value is not None}
    for key, value in result.items():
        if not _fits(key, value):
            raise CheckpointError(f"{where}: {key} {value!r:.100} cannot be; {_expected(key)} is needed")
    return result


def check_architecture(name: object, where: str) -> str:
    """timm's name of an architecture without its tag; CheckpointError if timm does not know it, or it is a place."""
    from vla_perception.tokenizer.timm_import import is_model, timm

    if not isinstance(name, str) or not re.fullmatch(r"\w{1,200}", name, re.ASCII) or not is_model(name):
        raise CheckpointError(
            f"{where}: timm {timm.__version__} does not know the encoder {name!r:.200}; check the name, or upgrade timm"
        )
    return name


def _fits(key: str, value: object) -> bool:
    if key in _COUNTS:
        return isinstance(value, int) and type(value) is int and _COUNTS[key][0] <= value <= _COUNTS[key][1]
    if key in _NUMBERS:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return _NUMBERS[key][0] <= value <= _NUMBERS[key][1]  # NaN is not, and whole numbers may have any length
    if key in _SWITCHES:
        return isinstance(value, bool)
    return isinstance(value, str) and value.lower() in _CHOICES[key]


def _expected(key: str) -> str:
    if key in _COUNTS:
        return "a whole number from {} to {}".format(*_COUNTS[key])
    if key in _NUMBERS:
        return "a number from {:g} to {:g}".format(*_NUMBERS[key])
    return "true or false" if key in _SWITCHES else f"one of {', '.join(map(repr, _CHOICES[key]))}"
