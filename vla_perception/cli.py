"""The ``vla-perception`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vla_perception import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 after printing one sentence about what went wrong."""
    parser = argparse.ArgumentParser(prog="vla-perception", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_tokenize(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ImportError as error:
        print(f"vla-perception: {error}; install it with pip install 'vla_perception[tokenizer]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"vla-perception: {error}", file=sys.stderr)
        return 1
    return 0


def _add_tokenize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tokenize",
        help="picture files to a safetensors file of tokens",
        description="Writes one tensor, [images, tokens, channels], in the order in which the images are given.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="any picture file that PIL reads")
    add_model(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--compute-dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: %(default)s"
    )
    parser.add_argument(
        "--output", default="tokens", choices=("tokens", "features"),
        help="tokens: after the projector; features: before it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors")
    parser.set_defaults(run=_tokenize)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that say which tokenizer; `choices` reads them."""
    parser.add_argument(
        "--model", required=True,
        help="checkpoint (docs/models.md), names of timm's encoders, or a preset's name for random weights",
    )  # fmt: skip
    parser.add_argument("--adapter", metavar="DIRECTORY", help="LoRA adapter to add; none: not even the model's own")
    parser.add_argument("--encoders", nargs="+", metavar="NAME", help="encoders to keep, such as dinov2; default: all")
    parser.add_argument("--image-size", nargs="+", type=int, metavar="PIXELS", help="one for all encoders, or for each")
    parser.add_argument(
        "--token-strategy", default="patch", choices=("patch", "cls", "cls+patch"), help="default: %(default)s"
    )
    parser.add_argument(
        "--projector", choices=("linear", "gelu-mlp", "fused-gelu-mlp", "none"), help="default: the model's own"
    )
    parser.add_argument("--pool", type=int, default=1, metavar="K", help="average K × K patch tokens into one")
    parser.add_argument(
        "--prepare", nargs="+", default=[], metavar="STEP",
        help="what is done to pictures first: rotate180, region:x,y,width,height, jpeg, lanczos3, center_crop_tf, "
        "center_crop_pil",
    )  # fmt: skip


def choices(options: argparse.Namespace) -> dict:
    """What `add_model` read, as keywords of `VisualTokenizer.load`."""
    names = ("adapter", "encoders", "image_size", "token_strategy", "projector", "pool", "prepare")
    return {name: getattr(options, name) for name in names}


def _tokenize(options: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError
    from safetensors.torch import save_file

    from vla_perception.tokenizer import VisualTokenizer

    images = []
    for path in options.images:
        try:
            # As OpenVLA opens its pictures: no EXIF rotation.
            images.append(np.asarray(Image.open(path).convert("RGB")))
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not a picture that PIL reads") from error
    if not options.out.parent.is_dir():
        raise ValueError(f"the folder {options.out.parent} does not exist")
    tokenizer = VisualTokenizer.load(
        options.model, device=options.device, compute_dtype=options.compute_dtype, **choices(options)
    )
    for note in tokenizer.notes:
        print(f"note: {note}", file=sys.stderr)
    if tokenizer.weights == "random":
        print(f"note: {tokenizer.model} is a preset with random weights; its tokens mean nothing", file=sys.stderr)
    rows = []
    for image in images:  # one at a time: memory stays the same however many there are
        output = tokenizer(image, features=options.output == "features")
        rows.append((output.features if options.output == "features" else output.tokens).cpu())
    result = torch.cat(rows)
    metadata = tokenizer.metadata() | {"images": [str(path) for path in options.images]}
    save_file({options.output: result}, options.out, metadata={"vla_perception": json.dumps(metadata, sort_keys=True)})
    print(
        f"{options.out}: {options.output} {list(result.shape)} {options.compute_dtype}, "
        f"{tokenizer.model} ({tokenizer.weights} weights), fingerprint {tokenizer.fingerprint[:12]}"
    )


if __name__ == "__main__":
    sys.exit(main())
