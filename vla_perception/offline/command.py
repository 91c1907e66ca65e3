"""`vla-perception tokenize SOURCE… --out FOLDER` and `vla-perception verify`: their options, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_perception import options, startup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vla_perception.offline.recordings import Recording
    from vla_perception.offline.run import RunSettings, Statistics


#: Bytes of a condition's file.
_MAX_CONDITION = 16 << 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `tokenize` takes for runs, beside the model's options."""
    _add_selection(parser)
    _add_execution(parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("which part of the sources, for --out FOLDER")
    which.add_argument(
        "--cameras",
        nargs="+",
        default=[],
        metavar="NAME[=WHERE]",
        help="the views in their order; WHERE: a bag's topic, a dataset's key, a folder's subfolder; default: all there are",
    )
    which.add_argument(
        "--values",
        nargs="+",
        default=[],
        metavar="NAME=TOPIC[:FIELD]",
        help="numbers of a bag's messages to store beside the tokens, such as action=/arm/command; a dataset's numbers "
        "(action, observation.state, …) are stored anyway",
    )
    which.add_argument("--episodes", metavar="N,N-N", help="of a LeRobot dataset; default: all")
    which.add_argument("--every", type=_at_least(1), default=1, metavar="N", help="each N-th frame set (default: all)")
    which.add_argument("--rate", type=float, default=0.0, metavar="HZ", help="at most so many frame sets per second")
    which.add_argument(
        "--image-rate", type=float, default=1.0, metavar="HZ", help="of a folder of images (default: %(default)s)"
    )
    which.add_argument("--sync-policy", default="approximate", choices=options.SYNC_POLICIES, help="as the node's")
    which.add_argument("--sync-slop-sec", type=float, default=0.05, metavar="SEC", help="as the node's (default: 0.05)")
    which.add_argument("--max-age-sec", type=float, default=0.5, metavar="SEC", help="as the node's (default: 0.5)")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how, for --out FOLDER")
    how.add_argument(
        "--dtype",
        default="bfloat16",
        choices=options.TOKEN_DTYPES,
        help="of the stored tokens (default: %(default)s, as the node sends them)",
    )
    how.add_argument(
        "--runtime",
        default="auto",
        choices=options.RUNTIMES,
        help="as the node's (default: %(default)s)",
    )
    how.add_argument(
        "--condition",
        type=Path,
        metavar="FILE.npy",
        help="for models with FiLM: the mean of the instruction's embeddings, a NumPy array of one dimension",
    )
    how.add_argument(
        "--batch",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="frame sets that are encoded together; 1 gives the node's tokens bit by bit, more is faster on a GPU and "
        "changes last bits, by how much is measured and stands in the index (default: 1)",
    )
    how.add_argument(
        "--format",
        default="safetensors",
        choices=options.RUN_FORMATS,
        help="safetensors: token files; mcap: bags of token messages at the times of their frame sets (default: "
        "%(default)s)",
    )
    how.add_argument(
        "--copy-topics",
        nargs="*",
        metavar="TOPIC",
        help="with --format mcap: copy these topics of a bag, too; none named: all but those of its cameras",
    )
    how.add_argument(
        "--engine",
        default="local",
        choices=options.ENGINES,
        help="ray: recordings are shared out among the workers of a Ray cluster, that of RAY_ADDRESS or one on this "
        "machine (default: %(default)s)",
    )
    how.add_argument(
        "--workers", type=_at_least(1), default=0, metavar="N", help="of Ray; default: one per GPU, or core"
    )
    how.add_argument(
        "--worker-cpus", type=_at_least(1), default=1, metavar="N", help="cores and threads of each worker (default: 1)"
    )
    how.add_argument(
        "--on-error",
        default="skip",
        choices=options.ON_ERROR,
        help="a damaged frame or file is skipped, reported and counted, or ends the run (default: %(default)s)",
    )


def refuse_options(given: argparse.Namespace) -> None:
    """ValueError for an option of runs where image files become one FILE.safetensors, which has no use for it.

    It has for the condition of a model with FiLM.
    """
    parser = argparse.ArgumentParser()
    add_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        if name != "condition" and getattr(given, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is for --out FOLDER, not for a FILE.safetensors")


def refuse_recording(path: Path) -> None:
    """ValueError for a source of runs where image files become one FILE.safetensors."""
    from vla_perception.offline.video_recordings import SUFFIXES as VIDEOS

    if path.is_dir() or path.suffix.lower() in {*VIDEOS, ".mcap", ".db3", ".zstd"}:
        raise ValueError(f"{path} is not an image file: FILE.safetensors is for those alone; give --out FOLDER")


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    number.__name__ = "whole number"
    return number


def run(given: argparse.Namespace, choices: dict[str, Any]) -> int:
    """`tokenize` into a folder. `choices`: which tokenizer, as keywords of `VisualTokenizer.load`."""
    from vla_perception.offline import recordings as sources
    from vla_perception.offline.run import RunSettings
    from vla_perception.tokenizer.checkpoints.open import check_model

    if given.output != "tokens":
        raise ValueError("--output features is for --out FILE.safetensors; --projector none makes the tokens features")
    if not 0 <= given.rate < math.inf or not 0 < given.image_rate < math.inf:
        raise ValueError("--rate and --image-rate are frames per second, above 0")
    selection = sources.Selection(
        cameras=sources.parse_cameras(given.cameras),
        values=sources.parse_values(given.values),
        every=given.every,
        rate=given.rate,
        episodes=None if given.episodes is None else sources.parse_episodes(given.episodes),
        sync_policy=given.sync_policy,
        sync_slop_sec=given.sync_slop_sec,
        max_age_sec=given.max_age_sec,
        image_rate=given.image_rate,
        max_image_pixels=given.max_image_pixels,
    )
    if given.copy_topics is not None and given.format != "mcap":
        raise ValueError("--copy-topics needs --format mcap")
    if given.engine != "ray" and (given.workers or given.worker_cpus != 1):
        raise ValueError("--workers and --worker-cpus need --engine ray")
    settings = RunSettings(
        given.out,
        selection,
        given.batch,
        given.dtype,
        given.on_error,
        given.format,
        () if given.copy_topics is None else tuple(given.copy_topics) or None,
    )
    if given.out.exists() and not given.out.is_dir():
        raise ValueError(f"--out {given.out} is a file: name a folder, or a FILE.safetensors for image files alone")
    check_model(given.model, **choices)
    damaged: list[dict[str, str]] = []
    recordings = sources.open_recordings(given.images, selection, damaged if given.on_error == "skip" else None)
    if settings.copied:
        sources.check_topics(recordings, settings.copied)
    for each in damaged:
        print(f"{each['source']}: left out: {each['error']}", file=sys.stderr)
    allow_large_images()
    tokenize = _tokenize if given.engine == "local" else _tokenize_on_ray
    return tokenize(given, choices, settings, recordings, damaged)


def allow_large_images() -> None:
    """image_files has the bound that the user gave; Pillow's own would refuse what lies below it."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None


def _tokenize(
    given: argparse.Namespace,
    choices: dict[str, Any],
    settings: RunSettings,
    recordings: Sequence[Recording],
    damaged: list[dict[str, str]],
) -> int:
    from vla_perception.offline import run as runs
    from vla_perception.offline.recordings import expected_sets

    tokenizer = load(given, choices)
    expected = sum(expected_sets(recording, settings.selection) for recording in recordings)
    settings.out.mkdir(parents=True, exist_ok=True)
    size = runs.expected_bytes(recordings, tokenizer, settings)
    print(_disk_need(settings.out, len(recordings), expected, size), file=sys.stderr)
    index = runs.begin(settings, tokenizer, recordings)
    with _continuing(settings.out), _bar(expected) as bar:
        failed, statistics = runs.encode_recordings(
            recordings,
            tokenizer,
            settings,
            report=lambda text: bar.write(text, file=sys.stderr),
            advance=bar.update,
            found=bar.found,
        )
    index = runs.end(settings, index, recordings, [*damaged, *failed])
    _say_result(settings.out, index, statistics)
    return int(bool(index["failed"]))


def _tokenize_on_ray(
    given: argparse.Namespace,
    choices: dict[str, Any],
    settings: RunSettings,
    recordings: Sequence[Recording],
    damaged: list[dict[str, str]],
) -> int:
    from functools import partial

    from vla_perception.offline import ray_engine
    from vla_perception.offline.recordings import expected_sets

    expected = sum(expected_sets(recording, settings.selection) for recording in recordings)
    settings.out.mkdir(parents=True, exist_ok=True)
    placement = {"device": given.device, "compute_dtype": given.compute_dtype, "runtime": given.runtime}
    with _continuing(settings.out), _bar(expected) as bar:
        index, statistics = ray_engine.tokenize(
            partial(
                _load_in_worker, given.model, given.condition and given.condition.resolve(), **placement, **choices
            ),
            given.images,
            recordings,
            settings,
            workers=given.workers,
            cpus=given.worker_cpus,
            damaged=damaged,
            announce=lambda size: bar.write(_disk_need(settings.out, len(recordings), expected, size), file=sys.stderr),
            report=lambda text: bar.write(text, file=sys.stderr),
            advance=bar.update,
            found=bar.found,
        )
    _say_result(settings.out, index, statistics)
    return int(bool(index["failed"]))


def _load_in_worker(model: str, condition: Path | None, **arguments: Any) -> Any:
    allow_large_images()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vla_perception.tokenizer.tokenizer import VisualTokenizer

    tokenizer = VisualTokenizer.load(model, **arguments)
    _set_condition(tokenizer, condition)
    return tokenizer


def _bar(expected: int) -> Any:
    """A progress bar with rate and time left; without a terminal, a line every half a minute."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"{error}: progress is shown with tqdm: pip install '.[offline]'") from error

    class Bar(tqdm):
        def found(self, count: int) -> None:
            """What an earlier run did: no part of this one's rate."""
            for name in ("n", "initial", "last_print_n"):
                setattr(self, name, getattr(self, name) + count)
            self.refresh()

    interval = 0.2 if sys.stderr.isatty() else 30
    return Bar(total=expected, unit=" frame sets", smoothing=0.05, dynamic_ncols=True, mininterval=interval)


@contextlib.contextmanager
def _continuing(out: Path) -> Iterator[None]:
    """Says how to go on after what interrupts a run."""
    try:
        yield
    except KeyboardInterrupt:
        print("vla-perception: the same command goes on from here", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{out}: no space left; with more of it the same command goes on from here") from error
        raise


def _say_result(out: Path, index: dict, statistics: Statistics) -> None:
    totals, model = index["totals"], index["model"]
    damaged = totals["frames_skipped"] + totals["frames_damaged"]
    print(
        f"{out}: {totals['frames']} frame sets in {len(index['recordings'])} recordings, {totals['bytes'] / 1e9:.2f} GB, "
        f"{model['model']} ({model['weights']} weights), fingerprint {model['fingerprint'][:12]}"
        + (f"; {damaged} frames were damaged" if damaged else "")
        + (f"; {len(index['failed'])} recordings could not be read" if index["failed"] else "")
        + f". {statistics.frame_sets / max(statistics.seconds, 1e-9):.1f} frame sets per second"
    )


def add_verify(commands: Any) -> None:
    """`vla-perception verify`."""
    parser = commands.add_parser(
        "verify",
        help="whether stored tokens are sound, and the same as others or as the node's",
        description="Of A alone: every frame has the bytes that were written. Of A and B: frames of the same images, "
        "matched by their stamps, have the same bits, or by how much they differ and which settings do. With --topic, "
        "A against what a running tokenizer publishes. Ends with 1 where frames differ, are damaged or are on one side alone.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run, token file, or bag of token messages")
    parser.add_argument("b", type=Path, metavar="B", nargs="?", help="another one")
    parser.add_argument("--topic", metavar="TOPIC", help="of a running tokenizer, to which the recording is played")
    parser.add_argument(
        "--silence",
        type=float,
        default=10.0,
        metavar="SEC",
        help="without a message, after the first, until it ends (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=_verify)


def _verify(given: argparse.Namespace) -> int:
    from vla_perception.offline import verify

    if given.b is not None and given.topic:
        raise ValueError("give another run to compare with, or --topic, not both")
    a = verify.Stored(given.a)
    if given.topic:
        from vla_perception.offline.live import compare_live

        print(f"waiting for messages on {given.topic}: play the recording now", file=sys.stderr)
        report = compare_live(a, given.topic, given.silence)
        report.only_a, missed = 0, report.only_a  # a node that is busy takes the latest frame set, and says so itself
    else:
        report, missed = (verify.check(a) if given.b is None else verify.compare(a, verify.Stored(given.b))), 0
    if given.json:
        print(json.dumps(dataclasses.asdict(report) | {"missed": missed, "good": report.is_good}, indent=2))
        return int(not report.is_good)
    alone = given.b is None and not given.topic
    print(f"{report.equal} of {report.frames} frames {'are sound' if alone else 'have the same bits'}")
    if report.worst_at:
        print(
            f"largest difference: {report.worst:g}, {report.worst_steps} steps of the stored dtype, in {report.worst_at}"
        )
    for count, text in (
        (report.only_a, f"frames are in {given.a} alone"),
        (report.only_b, "frames are on the other side alone"),
        (missed, "stored frames did not arrive"),
    ):
        if count:
            print(f"{count} {text}")
    for line in report.settings:
        print(f"differs: {line}")
    for line in report.problems:
        print(f"problem: {line}")
    return int(not report.is_good)


def load(given: argparse.Namespace, choices: dict[str, Any]) -> Any:
    """The tokenizer, warmed up as the node does it, and its notes on stderr."""
    # As in the node: OpenMP threads that spin while they wait take the cores from decoding.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with startup.Progress() as progress:
        progress("importing PyTorch and timm", begins=True)
        with startup.imports():
            from vla_perception.tokenizer.runtime import limit_threads
            from vla_perception.tokenizer.tokenizer import VisualTokenizer

            limit_threads()
        progress(f"loading {given.model}", begins=True)
        tokenizer = VisualTokenizer.load(
            given.model,
            device=given.device,
            compute_dtype=given.compute_dtype,
            runtime=given.runtime,
            **choices,
        )
    _set_condition(tokenizer, given.condition)
    for note in tokenizer.notes:
        print(f"note: {note}", file=sys.stderr)
    if tokenizer.weights == "random":
        print(f"note: {tokenizer.model} is a preset with random weights; its tokens mean nothing", file=sys.stderr)
    return tokenizer


def _set_condition(tokenizer: Any, file: Path | None) -> None:
    """What a model with FiLM needs beside images; ValueError where it is missing, or no such vector."""
    import numpy as np

    if file is None:
        if tokenizer.condition_channels:
            raise ValueError(
                f"{tokenizer.model} has FiLM, so its tokens depend on the instruction, too: --condition FILE.npy with the "
                f"mean of the instruction's embeddings, {tokenizer.condition_channels} numbers"
            )
        return
    if file.stat().st_size > _MAX_CONDITION:
        raise ValueError(f"--condition {file} is larger than {_MAX_CONDITION >> 20} MiB")
    tokenizer.set_condition(np.load(file, allow_pickle=False))


def _disk_need(out: Path, recordings: int, expected: int, size: int) -> str:
    free = shutil.disk_usage(out).free
    text = (
        f"{recordings} recordings with about {expected} frame sets: their tokens take about {size / 1e9:.2f} GB; "
        f"{free / 1e9:.1f} GB are free in {out}"
    )
    return text + (": not enough, unless some are there already" if size > free else "")
