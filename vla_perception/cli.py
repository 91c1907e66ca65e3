"""The ``vla-perception`` command."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vla_perception import __version__, options, startup
from vla_perception.offline import command as offline
from vla_perception.view import command as view_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 after printing one sentence about what went wrong, or 130 after Ctrl-C."""
    startup.open_standard_streams()
    parser = argparse.ArgumentParser(prog="vla-perception", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_tokenize(commands)
    offline.add_verify(commands)
    _add_describe(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_doctor(commands)
    view_command.add_view(commands)
    view_command.add_top(commands)
    given = parser.parse_args(arguments)
    # What takes long, as a download does, and what is assumed.
    logging.basicConfig(format=startup.log_format("vla-perception: %(message)s"))
    logging.getLogger("vla_perception").setLevel(logging.INFO)
    try:
        code = given.run(given)
    except ModuleNotFoundError as error:
        print(
            f"vla-perception: {error}; install what it needs with pip install '.[tokenizer]' in this package's sources, "
            "or on a ROS 2 machine as docs/install.md says",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"vla-perception: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vla-perception: interrupted", file=sys.stderr)
        return 130  # as shells have it for a program that Ctrl-C ended
    return code or 0


MODEL_HELP = (
    "checkpoint (docs/models.md), Hugging Face id, names of timm's encoders, or a preset's name for random weights"
)


def _add_tokenize(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tokenize",
        help="images, videos, bags and LeRobot datasets to files of tokens",
        description="Into a folder, it writes one file per recording or episode, and an index (docs/offline.md). Into "
        "FILE.safetensors, it writes one tensor of image files, [images, tokens, channels], in the order in which they "
        "are given.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="SOURCE",
        type=Path,
        help="files or folders of images (JPEG, PNG, BMP, GIF, PPM, TIFF or WebP), videos, rosbag2 recordings, LeRobot "
        "datasets. For FILE.safetensors image files alone, of which a damaged one is an error",
    )
    add_model(parser)
    add_placement(parser)
    parser.add_argument(
        "--output",
        default="tokens",
        choices=options.OUTPUTS,
        help="tokens: after the projector; features: before it (default: %(default)s)",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=options.MAX_IMAGE_PIXELS,
        metavar="N",
        help="larger images are refused (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER or FILE.safetensors")
    offline.add_options(parser)
    parser.set_defaults(run=_tokenize)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that say which tokenizer; `model_options` reads them."""
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--adapter", metavar="DIRECTORY", help="LoRA adapter to add; none: not even the model's own")
    add_options(parser)


def add_placement(parser: argparse.ArgumentParser) -> None:
    """The options that say where and in what precision a model computes."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        type=_device,
        help="auto, cpu, cuda or cuda:N; auto: a CUDA device that works, otherwise the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--compute-dtype",
        default="auto",
        choices=options.COMPUTE_DTYPES,
        help="auto: bfloat16 on CUDA (float16 before Ampere), float32 on a CPU; float8: the encoders' linear layers in "
        "float8, from Ada and Hopper on, less exact (default: %(default)s)",
    )


def _device(text: str) -> str:
    if not options.is_device(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; choose auto, cpu, cuda or cuda:N")
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that any model has."""
    _add_encoders(parser)
    parser.add_argument(
        "--token-strategy", default="patch", choices=options.TOKEN_STRATEGIES, help="default: %(default)s"
    )
    parser.add_argument("--projector", choices=options.PROJECTORS, help="default: the model's own")
    parser.add_argument("--pool", type=int, default=1, metavar="K", help="average K × K patch tokens into one")
    parser.add_argument(
        "--image-transforms",
        nargs="+",
        default=[],
        metavar="STEP",
        help="what is done to images first, in the order given (docs/nodes.md says what each does): "
        + ", ".join(options.IMAGE_TRANSFORMS).replace("crop,", "crop:x,y,width,height,"),
    )


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoders", nargs="+", metavar="NAME", help="encoders to keep, such as dinov2; default: all")
    parser.add_argument(
        "--image-size",
        nargs="+",
        type=int,
        metavar="PIXELS",
        help="one for all encoders, or one for each; 0: the model's own",
    )


def model_options(given: argparse.Namespace) -> dict:
    """What `add_model` or `add_options` read, as keywords of `VisualTokenizer.load`."""
    names = ("adapter", "encoders", "image_size", "token_strategy", "projector", "pool", "image_transforms")
    return {name: value for name, value in vars(given).items() if name in names}


def _add_describe(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "describe",
        help="what a model's tokens are and cost, without loading it",
        description="Patch grid, channels, projector, operations, memory, message and what tokens cost a language model. "
        "No weights are read or fetched.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_options(parser)
    parser.add_argument("--views", type=int, default=1, help="cameras in one message (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=30.0, metavar="HZ", help="messages per second (default: 30)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=options.TOKEN_DTYPES,
        help="of weights, tokens and the language model's cache (default: %(default)s)",
    )
    model = parser.add_argument_group("the language model that reads the tokens", "by default Llama-2-7B, OpenVLA's")
    model.add_argument("--llm-width", type=int, default=4096, metavar="N", help="hidden size (default: %(default)s)")
    model.add_argument("--llm-layers", type=int, default=32, metavar="N", help="default: %(default)s")
    model.add_argument("--llm-heads", type=int, default=32, metavar="N", help="default: %(default)s")
    model.add_argument("--llm-kv-heads", type=int, metavar="N", help="default: as many as heads")
    model.add_argument("--llm-mlp-width", type=int, metavar="N", help="default: Llama's rule, 11008 for 4096")
    model.add_argument("--text-tokens", type=int, default=32, metavar="N", help="beside them (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the same as JSON, in plain numbers")
    parser.set_defaults(run=_describe)


def _describe(given: argparse.Namespace) -> None:
    from vla_perception.tokenizer.checkpoints.open import check_model, read_config
    from vla_perception.tokenizer.cost import LanguageModel, as_text, describe

    check_model(given.model, **model_options(given))
    language_model = LanguageModel(
        given.llm_width, given.llm_layers, given.llm_heads, given.llm_kv_heads, given.llm_mlp_width
    )
    description = describe(
        read_config(given.model, **model_options(given)),
        views=given.views,
        rate_hz=given.rate,
        dtype=given.dtype,
        language_model=language_model,
        text_tokens=given.text_tokens,
    )
    print(json.dumps(description, indent=2) if given.json else as_text(description), end="\n" if given.json else "")


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise ValueError(f"the folder {file.parent} does not exist")


def _tokenize(given: argparse.Namespace) -> int:
    if given.out.suffix != ".safetensors":
        return offline.run(given, model_options(given))
    offline.refuse_options(given)
    from vla_perception.sources import image_files
    from vla_perception.tokenizer.checkpoints.open import check_model

    offline.allow_large_images()
    for path in given.images:  # before anything that takes long, as importing PyTorch does
        offline.refuse_recording(path)
        image_files.check(path, given.max_image_pixels)
    _check_folder(given.out)
    check_model(given.model, **model_options(given))
    tokenizer = offline.load(given, model_options(given))
    import torch
    from safetensors.torch import save_file

    from vla_perception.tokens.codec import IMAGE_FILES_KEY

    result = torch.empty(0)
    with startup.Progress() as progress:
        for index, path in enumerate(given.images):  # one at a time: however many there are, only their tokens add up
            progress(f"encoding image {index + 1} of {len(given.images)}", begins=index == 0)
            output = tokenizer(image_files.read(path, given.max_image_pixels), features=given.output == "features")
            row = getattr(output, given.output)[0]
            if index == 0:
                result = torch.empty(len(given.images), *row.shape, dtype=row.dtype)
            result[index] = row
    condition = {} if tokenizer.condition is None else {"condition": tokenizer.condition}
    metadata = tokenizer.metadata() | condition | {"images": [str(path) for path in given.images]}
    save_file({given.output: result}, given.out, metadata={IMAGE_FILES_KEY: json.dumps(metadata, sort_keys=True)})
    print(
        f"{given.out}: {given.output} {list(result.shape)} {tokenizer.compute_dtype}, "
        f"{tokenizer.model} ({tokenizer.weights} weights), fingerprint {tokenizer.fingerprint[:12]}"
    )
    return 0


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="how fast a model encodes on this machine",
        description="Times preprocessing, encoders and projector on fresh random images of 640 × 480, in "
        "milliseconds, and checks that the tokens are those of the baseline: PIL and torchvision, both timm towers "
        "with all blocks, one after the other, eager, then the projector.",
        epilog="The JSON has ratio_to_baseline, end_to_end_ratio, agreement, stages_ms, floor_ms and more at its top "
        "level for the first number of views, and all of that under by_views for every one; device, versions and what "
        "else does not depend on it only at the top level. docs/performance.md says what the keys mean.",
    )
    parser.add_argument("--model", required=True, help="whatever `tokenize` takes; presets have random weights")
    add_placement(parser)
    parser.add_argument(
        "--runtime",
        default="auto",
        choices=options.RUNTIMES,
        help="docs/performance.md says what they are (default: %(default)s)",
    )
    parser.add_argument(
        "--views", default=[1], type=_numbers, metavar="N[,N…]", help="images in a batch, e.g. 1,2,4 (default: 1)"
    )
    parser.add_argument("--baseline", action="store_true", help="also time the baseline, alternating, in the same run")
    parser.add_argument(
        "--seconds", default=30.0, type=float, help="of measuring for each number of views (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.set_defaults(run=_bench)


def _numbers(text: str) -> list[int]:
    """``1,2,4`` → [1, 2, 4]."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text} holds a number below 1")
    return numbers


def _bench(given: argparse.Namespace) -> None:
    from vla_perception.tokenizer.checkpoints.open import check_model

    check_model(given.model)
    if given.json is not None:
        _check_folder(given.json)
    with startup.Progress() as progress, startup.imports():
        progress("importing PyTorch, torchvision and timm", begins=True)
        from vla_perception import bench

    bench.run(
        given.model,
        device=given.device,
        compute_dtype=given.compute_dtype,
        runtime=given.runtime,
        views=given.views,
        baseline=given.baseline,
        seconds=given.seconds,
        json_file=given.json,
    )


def _add_tune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the fastest matrix products for a model on this GPU, once",
        description="Tries cuBLASLt's proposals for the encoders' matrix products in the CUDA graph, and keeps the fastest "
        "in the cache folder: runtime graph takes them from the next start on, for the same GPU, versions, precision and "
        "layers. Last bits of tokens can change. Leave the GPU to it meanwhile (docs/performance.md).",
    )
    parser.add_argument("--model", help=MODEL_HELP)
    _add_encoders(parser)
    add_placement(parser)
    parser.add_argument(
        "--views", default=[1], type=_numbers, metavar="N[,N…]", help="images in a batch, e.g. 1,2,4 (default: 1)"
    )
    parser.add_argument(
        "--seconds", default=60.0, type=float, help="of searching for each number of views (default: %(default)s)"
    )
    parser.add_argument("--forget", action="store_true", help="remove what was found, for all models, and end")
    parser.set_defaults(run=_tune)


def _tune(given: argparse.Namespace) -> None:
    from vla_perception.tokenizer.checkpoints.open import check_model

    if not given.forget:
        if given.model is None:
            raise ValueError("tune takes --model, or --forget")
        check_model(given.model, **model_options(given))
    with startup.Progress() as progress, startup.imports():
        progress("importing PyTorch, torchvision and timm", begins=True)
        from vla_perception import tune

    if given.forget:
        tune.forget()
        return
    tune.run(
        given.model,
        device=given.device,
        compute_dtype=given.compute_dtype,
        views=given.views,
        seconds=given.seconds,
        **model_options(given),
    )


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine will do, and what is wrong with it",
        description="Looks at Python, PyTorch, GPU, ROS, DDS and shared memory; each trouble has its cure beside it. "
        "Ends with 1 if anything fails; warnings leave it at 0.",
    )
    parser.add_argument("--model", help=f"look at a model, too: {MODEL_HELP}")
    parser.add_argument(
        "--check",
        action="store_true",
        help="encode two images in every runtime and precision, and compare with float32",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON: state, findings")
    parser.set_defaults(run=_doctor)


def _doctor(given: argparse.Namespace) -> int:
    from vla_perception import doctor

    logging.getLogger("vla_perception").setLevel(logging.ERROR)  # what is assumed is among the findings
    findings = []
    with startup.Progress() as progress:
        progress("looking", begins=True)
        for finding in doctor.examine(given.model, check=given.check):
            findings.append(finding)
            progress.clear()
            if not given.json:
                print(finding, flush=True)
            progress(f"doctor: checked {finding.subject}", begins=True)
    result = doctor.as_dict(findings)
    if given.json:
        print(json.dumps(result, indent=2))
    return int(result["state"] == "fail")


if __name__ == "__main__":
    sys.exit(main())
