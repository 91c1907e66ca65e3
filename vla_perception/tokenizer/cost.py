"""What a model's tokens are and cost, before anything is loaded or bought: arithmetic on an architecture.

Multiplications and additions of matrix products and attention are counted as two operations, as torch's
``FlopCounterMode`` counts them; norms, activations and softmax, well below 1 %, are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vla_perception.options import tokens_per_view
from vla_perception.tokenizer.config import EncoderConfig, TokenizerConfig, projector_widths
from vla_perception.tokenizer.vits import Vit, by_name, of_module

#: Bytes of a number, for each of `options.TOKEN_DTYPES`.
DTYPE_BYTES = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


@dataclass(frozen=True)
class LanguageModel:
    """A decoder in Llama's shape; Llama-2-7B, which is OpenVLA's, by default.

    Attributes:
        width, layers, heads: hidden size, number of blocks, attention heads.
        kv_heads: heads of keys and values; None for as many as heads.
        mlp_width: of the gated MLP; None for Llama's rule, 8/3 of the width rounded up to a multiple of 256.
    """

    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None
    mlp_width: int | None = None

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self._kv_heads, self._mlp_width) < 1 or self.width % self.heads:
            raise ValueError(
                f"a language model of width {self.width} with {self.layers} layers and {self.heads} heads cannot be: "
                "all must be at least 1, and the heads must divide the width"
            )
        if self.heads % self._kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} heads of keys and values")

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _mlp_width(self) -> int:
        return math.ceil(8 * self.width / 3 / 256) * 256 if self.mlp_width is None else self.mlp_width

    @property
    def _kv_width(self) -> int:
        return self.width // self.heads * self._kv_heads

    def prefill(self, tokens: int) -> tuple[int, int]:
        """(operations of all blocks, those of them in attention) to read a prompt of `tokens`, without the output head.

        Attention is counted in full; kernels that leave out the masked half do half of it.
        """
        weights = 2 * self.width * self.width + 2 * self.width * self._kv_width + 3 * self.width * self._mlp_width
        attention = 4 * tokens * tokens * self.width * self.layers
        return 2 * tokens * weights * self.layers + attention, attention

    def cache_bytes(self, tokens: int, element: int) -> int:
        """Bytes of keys and values of `tokens`, `element` bytes each number."""
        return 2 * self.layers * self._kv_width * tokens * element

    def settings(self) -> dict:
        return {
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self._kv_heads,
            "mlp_width": self._mlp_width,
        }


def describe(
    config: TokenizerConfig,
    *,
    views: int = 1,
    rate_hz: float = 30.0,
    dtype: str = "bfloat16",
    language_model: LanguageModel | None = None,
    text_tokens: int = 32,
) -> dict:
    """Everything that follows from an architecture, as plain values for JSON; `as_text` writes it out.

    Args:
        views: cameras, encoded as one batch and sent as one message.
        rate_hz: messages per second.
        dtype: of weights, tokens, and the language model's cache.
        language_model: None for Llama-2-7B in the width of the tokens.
        text_tokens: of the instruction, read beside the visual ones.

    Raises:
        ValueError: encoders and projector do not go together, or numbers that cannot be.
    """
    _check_request(views, rate_hz, dtype, text_tokens)
    language_model = language_model or LanguageModel()
    it = _architecture(config, views, dtype)
    grid = (it["grid"][0] * config.pool, it["grid"][1] * config.pool)
    width, element = it["token_width"], DTYPE_BYTES[dtype]
    return it | {
        "rate_hz": rate_hz,
        "bytes_per_second": it["bytes"]["message"] * rate_hz,
        "flops_per_second": views * rate_hz * it["flops_per_view"],
        "language_model": language_model.settings() | {"text_tokens": text_tokens},
        "downstream": [
            _downstream(config, grid, width, count, pool, text_tokens, language_model, element)
            for count in sorted({1, 2, views})
            for pool in _pools(config, *grid)
        ],
    }


def _architecture(config: TokenizerConfig, views: int, dtype: str) -> dict:
    """What the tokens are and what one message of them takes."""
    element = DTYPE_BYTES[dtype]
    vits = _vits(config)
    rows, columns = config.joint_grid({encoder.name: vit.grid for encoder, vit in zip(config.encoders, vits)})
    encoders = [_encoder(encoder, vit, config) for encoder, vit in zip(config.encoders, vits)]
    shuffle = config.patches_per_side // config.pool
    rows, columns = rows // shuffle, columns // shuffle
    projected = tokens_per_view(config.token_strategy, rows * columns)
    tokens = tokens_per_view(config.token_strategy, rows * columns // config.pool**2)
    channels = sum(encoder["channels"] for encoder in encoders)
    widths = projector_widths(config.projector, channels, config.output_channels, config.pixel_shuffle)
    projector = _projector(config, widths, shuffle, projected)
    flops = sum(encoder["flops"] for encoder in encoders) + projector["flops"]
    parameters = sum(encoder["parameters"] for encoder in encoders) + projector["parameters"]
    widest = max(part.pop("widest") for part in [projector, *encoders])
    width = widths[-1]
    size = {
        "weights": parameters * element,
        "widest_layer": views * widest * element,
        "pixel_values_per_view": sum(3 * encoder["image_size"] ** 2 * element for encoder in encoders),
        "tokens_per_view": tokens * width * element,
        "message": views * tokens * width * element,
    }
    return {
        "model": config.name,
        "encoders": encoders,
        "channels": channels,
        "token_strategy": config.token_strategy,
        "pool": config.pool,
        "grid": [rows // config.pool, columns // config.pool],
        "tokens_per_view": tokens,
        "token_width": width,
        "projector": projector,
        "parameters": parameters,
        "dtype": dtype,
        "views": views,
        "flops_per_view": flops,
        "bytes": size,
    }


def _check_request(views: int, rate_hz: float, dtype: str, text_tokens: int) -> None:
    if views < 1 or not rate_hz > 0 or text_tokens < 0:
        raise ValueError(
            f"views {views}, rate {rate_hz} and text tokens {text_tokens}: at least 1, above 0, at least 0"
        )
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPE_BYTES)}")


def _projector(config: TokenizerConfig, widths: Sequence[int], shuffle: int, tokens: int) -> dict:
    """The projector of `tokens` per view; `shuffle` × `shuffle` patches become one of them."""
    layers = list(zip(widths, widths[1:]))
    return {
        "kind": config.projector,
        "pixel_shuffle": shuffle,
        "widths": widths,
        "parameters": sum(inputs * outputs + outputs * (shuffle == 1) for inputs, outputs in layers),
        "flops": sum(2 * tokens * inputs * outputs for inputs, outputs in layers),
        "widest": max((tokens * (inputs + outputs) for inputs, outputs in layers), default=0),
    }


def as_text(description: dict) -> str:
    """A description as lines for people, the arithmetic shown."""
    return "\n".join(_lines(description)) + "\n"


def _vits(config: TokenizerConfig) -> list[Vit]:
    """Each encoder: a preset's from the table, others as timm builds them, without memory."""
    known = [vit for encoder in config.encoders if (vit := by_name(encoder, config.cls_token))]
    if len(known) == len(config.encoders):
        return known
    from vla_perception.tokenizer.network import empty_network

    return [of_module(tower) for tower in empty_network(config).towers]


def _encoder(encoder: EncoderConfig, vit: Vit, config: TokenizerConfig) -> dict:
    rows, columns = vit.grid
    tokens = rows * columns + vit.prefix_tokens
    flops = sum(2 * layer.count * layer.inputs * layer.outputs for layer in vit.layers)
    flops += 4 * tokens * tokens * vit.channels * vit.blocks
    flops += 4 * vit.latents * tokens * vit.channels
    return {
        "name": encoder.name,
        "timm_id": encoder.timm_id,
        "image_size": encoder.image_size,
        "patch_size": vit.patch_size,
        "grid": [rows, columns],
        "unseen_pixels": encoder.image_size - rows * vit.patch_size,
        "channels": vit.channels,
        "blocks": vit.blocks,
        "blocks_left_out": 0 if config.cls_token else -1 - encoder.layer,
        "final_norm": config.cls_token or encoder.final_norm,
        "activation": encoder.overrides.get("act_layer", "gelu"),
        "resize_strategy": encoder.resize_strategy,
        "film": encoder.film,
        "heads": vit.heads,
        "prefix_tokens": vit.prefix_tokens,
        "parameters": vit.parameters,
        "flops": flops,
        "widest": max(layer.count * (layer.inputs + layer.outputs) for layer in vit.layers),
    }


def _pools(config: TokenizerConfig, rows: int, columns: int) -> list[int]:
    if config.token_strategy == "cls":
        return [1]
    return [k for k in range(1, min(rows, columns) // 2 + 1) if rows % k == columns % k == 0]


def _downstream(
    config: TokenizerConfig,
    grid: tuple[int, int],
    width: int,
    views: int,
    pool: int,
    text: int,
    model: LanguageModel,
    element: int,
) -> dict:
    tokens = views * tokens_per_view(config.token_strategy, grid[0] * grid[1] // pool**2)
    flops, attention = model.prefill(tokens + text)
    return {
        "views": views,
        "pool": pool,
        "visual_tokens": tokens,
        "prefill_flops": flops,
        "attention_share": attention / flops,
        "kv_cache_bytes": model.cache_bytes(tokens + text, element),
        "message_bytes": tokens * width * element,
    }


def _lines(it: dict) -> Iterator[str]:
    yield it["model"]
    yield ""
    for encoder in it["encoders"]:
        yield f"{encoder['name']}: {encoder['timm_id']}"
        if encoder["resize_strategy"] != "resize-naive":
            yield f"  resized by   {encoder['resize_strategy']}"
        yield f"  patches      {_patches(encoder)}"
        run = f"{encoder['blocks']} blocks of {encoder['heads']} heads"
        if encoder["blocks_left_out"]:
            run += f" (the last of {encoder['blocks'] + 1} is not needed)"
        if encoder["final_norm"]:
            run += " and the final norm"
        if encoder["activation"] != "gelu":
            run += f", activation {encoder['activation']}"
        if encoder["prefix_tokens"]:
            run += f", {encoder['prefix_tokens']} prefix tokens beside the patches"
        yield f"  runs         {run}"
        if encoder["film"]:
            yield (
                f"  modulated    by FiLM: 2 layers {encoder['film']} → {encoder['channels']} in each block, computed when the "
                "instruction changes"
            )
        yield f"  costs        {_si(encoder['parameters'])} parameters, {_si(encoder['flops'])}FLOP per image"
    names = " + ".join(str(encoder["channels"]) for encoder in it["encoders"])
    joined = f"{names} = {it['channels']}" if len(it["encoders"]) > 1 else f"{names}"
    yield ""
    yield f"channels       {joined}" + (", joined patch by patch" if len(it["encoders"]) > 1 else "")
    projector = it["projector"]
    if projector["kind"] == "none":
        yield "projector      none: tokens are the encoders' features"
    else:
        widths = " → ".join(map(str, projector["widths"]))
        if projector["pixel_shuffle"] > 1:
            k = projector["pixel_shuffle"]
            widths = f"{k} × {k} patches become one: {k}² × {it['channels']} = {widths}"
        yield (
            f"projector      {projector['kind']} {widths}: {_si(projector['parameters'])} parameters, "
            f"{_si(projector['flops'])}FLOP per image"
        )
    yield f"tokens         {_tokens(it)}"
    yield ""
    yield from _size_lines(it)
    yield ""
    yield from _downstream_lines(it)


def _size_lines(it: dict) -> Iterator[str]:
    """Operations and bytes, per image and per message."""
    size, dtype = it["bytes"], it["dtype"]
    yield f"per image    {_si(it['flops_per_view'])}FLOP; {_bytes(size['pixel_values_per_view'])} of pixel values in"
    yield (
        f"               {it['tokens_per_view']} × {it['token_width']} × {_element(it)} bytes ({dtype}) = "
        f"{_bytes(size['tokens_per_view'])} of tokens out"
    )
    yield (
        f"memory         {_si(it['parameters'])} parameters × {_element(it)} bytes = {_bytes(size['weights'])} of weights, "
        "read once per batch;"
    )
    yield (
        f"               {_bytes(size['widest_layer'])} for input and output of the widest layer ({it['views']} "
        f"{_plural('view', it['views'])}), so at least that beside them"
    )
    yield (
        f"message        {it['views']} {_plural('view', it['views'])}: {_bytes(size['message'])}; at {it['rate_hz']:g} Hz "
        f"{_bytes(it['bytes_per_second'])}/s and {_si(it['flops_per_second'])}FLOP/s"
    )


def _downstream_lines(it: dict) -> Iterator[str]:
    """What the tokens cost a language model."""
    model = it["language_model"]
    yield (
        f"downstream, a language model of width {model['width']}, {model['layers']} layers, {model['heads']} heads "
        f"({model['kv_heads']} for keys and values), MLP {model['mlp_width']}, with {model['text_tokens']} tokens of text:"
    )
    yield ""
    yield "  views  pool  visual tokens  prefill TFLOP  of it attention  KV cache MB  message MB   MB/s"
    for row in it["downstream"]:
        yield (
            f"  {row['views']:5d}  {row['pool']:4d}  {row['visual_tokens']:13d}  {row['prefill_flops'] / 1e12:13.2f}  "
            f"{100 * row['attention_share']:13.2f} %  {row['kv_cache_bytes'] / 1e6:11.1f}  "
            f"{row['message_bytes'] / 1e6:10.2f}  {row['message_bytes'] * it['rate_hz'] / 1e6:5.1f}"
        )
    if model["width"] != it["token_width"]:
        yield ""
        yield (
            f"note: tokens are {it['token_width']} wide and this language model takes {model['width']}; "
            "a projector of the policy's own has to stand between them"
        )


def _patches(encoder: dict) -> str:
    size, patch, (rows, columns) = encoder["image_size"], encoder["patch_size"], encoder["grid"]
    ratio = f"{size / patch:.2f}".rstrip("0").rstrip(".")
    arithmetic = f"{size} / {patch} = {ratio} → {rows} × {columns} = {rows * columns}"
    if not encoder["unseen_pixels"]:
        return arithmetic
    pixels = encoder["unseen_pixels"]
    return f"{arithmetic}; {pixels} {_plural('pixel', pixels)} at the right and bottom not seen"


def _tokens(it: dict) -> str:
    rows, columns = it["grid"]
    if it["token_strategy"] == "cls":
        return f"1 per view, the cls token, {it['token_width']} wide"
    text = f"{rows} × {columns} = {rows * columns}"
    if it["pool"] > 1:
        pool = it["pool"]
        text = f"{rows * pool} / {pool} × {columns * pool} / {pool} = {text}"
    if it["token_strategy"] == "cls+patch":
        text = f"1 cls token + {text} patches, {it['tokens_per_view']}"
    return f"{text} per view, {it['token_width']} wide, row by row"


def _element(it: dict) -> int:
    return it["bytes"]["weights"] // it["parameters"]


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _si(value: float) -> str:
    """1.5e9 → "1.5 G", three digits."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}" if value < 999.5 * factor else f"{value / factor:.0f} {prefix}"
    return f"{value:.0f} "


def _bytes(value: float) -> str:
    return f"{_si(value)}B"
