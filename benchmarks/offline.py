"""What `vla-perception tokenize` takes: against the node, in memory, at random access, on a local Ray.

    python benchmarks/offline.py --work /tmp/offline --json offline.json
    python benchmarks/offline.py --work /tmp/offline --parts rate share --model base

rate     tokens per second offline against the node's at saturation: same model, device, one frame set at a time. The
         sample bag; the two take turns, so that what else the machine does meets both.
share    of the wall time of an offline run of the sample bag, JPEG of two cameras, in which the encoders compute.
memory   resident memory of a run at frame 10 000 against frame 100, over a bag of 2.4 GB that is made in --work. With a
         stand-in for the tokenizer: a model's own memory does not grow.
access   one frame of 2 MiB out of a token file of 2 GB, each in a separate process, the file in the page cache: from
         opening the file until the frame lies in separate memory.
ray      frame sets per second of two local workers with a core each against one, loading the model not counted.

Figures are medians over --rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support"), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the node and the command have it

from vla_perception.offline import run  # noqa: E402
from vla_perception.offline.recordings import FrameSet, Selection, open_recordings  # noqa: E402

BAG = ROOT / "examples" / "sample_bag"
PARTS = ("rate", "share", "memory", "access", "ray")
#: Frames of the bag for `memory`, and a width and height that make 2.4 GB of them.
FRAMES, WIDTH, HEIGHT = 10_400, 320, 240


def offline(given: argparse.Namespace, tokenizer, out: Path, sources=(BAG,)) -> run.Statistics:
    """One run from the beginning."""
    shutil.rmtree(out, ignore_errors=True)
    settings = run.RunSettings(out)
    recordings = open_recordings(sources, settings.selection)
    run.begin(settings, tokenizer, recordings)
    return run.encode_recordings(recordings, tokenizer, settings)[1]


def load(given: argparse.Namespace):
    from vla_perception.tokenizer import VisualTokenizer

    tokenizer = VisualTokenizer.load(given.model, device=given.device)
    tokenizer.warm_up(2, cameras=["front", "wrist"])
    return tokenizer


def live_rate(given: argparse.Namespace) -> float:
    """Frame sets per second that the node publishes while the sample bag is played faster than it encodes."""
    from ros_harness import RosContext, RosProcess, wait_until
    from sensor_msgs.msg import CompressedImage

    from vla_perception.tokens.message import from_message

    extra = {"OMP_WAIT_POLICY": "PASSIVE"}
    node = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", "-p", f"model:={given.model}"]
    node += ["-p", "cameras:=[front, wrist]", "-p", "image_transport:=compressed", "-p", "autostart:=true"]
    node += ["-p", f"device:={given.device}"]
    player = ["-m", "vla_perception.nodes.bag_player", "--ros-args", "-p", f"bag:={BAG}", "-p", "loop:=true"]
    player += ["-p", f"rate:={given.player_rate}", "-p", "wait_for_subscribers:=1", "-p", "wait_timeout_sec:=600.0"]
    seen: list[tuple[float, int]] = []
    with RosContext() as ros:
        counter = ros.node("counter")
        counter.create_subscription(
            CompressedImage,
            "tokens",
            lambda message: seen.append((time.monotonic(), from_message(message).sequence)),
            10,
        )
        ros.spin(counter)
        with RosProcess(node, ros.domain, extra) as tokenizer, RosProcess(player, ros.domain, extra):
            tokenizer.wait_for("ready after", 600)
            wait_until(lambda: seen, 600, "tokens")
            wait_until(lambda: seen[-1][0] - seen[0][0] >= given.seconds, 600 + given.seconds, "more tokens")
    (begun, first), (ended, last) = seen[min(3, len(seen) - 2)], seen[-1]
    return (last - first) / (ended - begun)


def rate(given: argparse.Namespace) -> dict:
    tokenizer, rounds = load(given), []
    for _ in range(given.rounds):
        found = offline(given, tokenizer, given.work / "rate")
        rounds.append((found.frame_sets / found.seconds, live_rate(given)))
        print(f"  offline {rounds[-1][0]:.2f}, node {rounds[-1][1]:.2f} frame sets per second", flush=True)
    return {
        "offline_per_sec": statistics.median(pair[0] for pair in rounds),
        "node_per_sec": statistics.median(pair[1] for pair in rounds),
        "ratio": statistics.median(pair[0] / pair[1] for pair in rounds),
    }


def share(given: argparse.Namespace) -> dict:
    tokenizer = load(given)
    found = [offline(given, tokenizer, given.work / "share") for _ in range(given.rounds)]
    return {
        "encoding_share": statistics.median(each.encoding_sec / each.seconds for each in found),
        "per_sec": statistics.median(each.frame_sets / each.seconds for each in found),
    }


def large_bag(path: Path) -> Path:
    """A bag of raw images, 2.4 GB."""
    from recorded import write_bag

    if (path / "metadata.yaml").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)

    class Frames:
        """As `write_bag` takes them, but one at a time."""

        def __iter__(self):
            for index in range(FRAMES):
                yield "/front/image_raw", index * 33_000_000, np.roll(noise, index, axis=1)

    return write_bag(path, Frames(), sort=False)


def memory(given: argparse.Namespace) -> dict:
    from pixel_tokenizer import PixelTokenizer

    bag, out = large_bag(given.work / "large_bag"), given.work / "memory"
    shutil.rmtree(out, ignore_errors=True)
    settings = run.RunSettings(out)
    recordings = open_recordings([bag], settings.selection)
    tokenizer = PixelTokenizer()
    run.begin(settings, tokenizer, recordings)
    done, at = 0, {}

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done in (100, 1000, 10_000):
            at[done] = _resident()

    found = run.encode_recordings(recordings, tokenizer, settings, advance=advance)[1]
    size = sum(file.stat().st_size for file in bag.iterdir())
    return {
        "bag_bytes": size,
        "resident_bytes": at,
        "growth": at[10_000] / at[100] - 1,
        "per_sec": found.frame_sets / found.seconds,
    }


def _resident() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):  # pages of mapped files are the system's, to take back at any time
            return int(line.split()[1]) << 10
    raise RuntimeError("no smaps_rollup")


_ACCESS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from vla_perception.offline.token_file import TokenFile
import ml_dtypes
began = time.perf_counter()
frame = TokenFile(sys.argv[2]).read(int(sys.argv[3]), int(sys.argv[3]) + 1)
print(time.perf_counter() - began, frame.nbytes, int(frame.view("u2")[0, 0, 0, 0]))
"""


def access(given: argparse.Namespace) -> dict:
    from fake_tokenizer import MODEL

    from vla_perception.offline.token_file_writer import Geometry, Layout, TokenFileWriter

    frames, shape = 1000, (1, 256, 4096)
    path, source = given.work / "access" / "large.safetensors", given.work / "source"
    source.write_bytes(b"")
    model = {**MODEL, "grid": [16, 16], "encoders": list(MODEL["encoders"])}
    writer = TokenFileWriter(path, Layout(model, ("front",), shape, "bfloat16", {"name": "large"}), [source])
    if not writer.is_finished:
        geometry = [Geometry(480, 640, (16 / 640, 0.0, 0.0, 0.0, 16 / 480, 0.0), None)]
        for index in range(writer.done, frames):
            frame = FrameSet(index, index, float(index), (index,), ("",), list)
            writer.add(frame, geometry, np.full(shape, index, np.uint16))
        writer.finish({})
    with path.open("rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    seconds = []
    for index in np.random.default_rng(0).integers(0, frames, 5 * given.rounds).tolist():
        command = [sys.executable, "-c", _ACCESS, str(ROOT), str(path), str(index)]
        took, size, first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert (int(size), int(first)) == (2 << 20, index)
        seconds.append(float(took))
    return {
        "file_bytes": path.stat().st_size,
        "median_ms": 1e3 * statistics.median(seconds),
        "worst_ms": 1e3 * max(seconds),
    }


def _loaded(model: str):
    import torch

    from vla_perception.tokenizer import VisualTokenizer

    torch.set_num_threads(1)
    tokenizer = VisualTokenizer.load(model, device="cpu")
    tokenizer.warm_up(2)
    return tokenizer


def ray(given: argparse.Namespace) -> dict:
    import ray

    from vla_perception.offline import ray_engine

    sources = []
    for index in range(8):
        copy = given.work / "ray" / f"bag_{index}"
        if not copy.exists():
            shutil.copytree(BAG, copy)
        sources.append(copy)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "test/support")])
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    rates: dict[int, list[float]] = {1: [], 2: []}
    settings = run.RunSettings(given.work / "ray_out", Selection(every=4))
    recordings = open_recordings(sources, settings.selection)
    for _ in range(given.rounds):
        for workers in rates:
            shutil.rmtree(settings.out, ignore_errors=True)
            load = partial(_loaded, given.model)
            _, found = ray_engine.tokenize(load, sources, recordings, settings, workers=workers)
            rates[workers].append(found.frame_sets / found.encoding_sec)
            print(f"  {workers} workers: {rates[workers][-1]:.2f} frame sets per second", flush=True)
    ray.shutdown()
    return {
        "one_per_sec": statistics.median(rates[1]),
        "two_per_sec": statistics.median(rates[2]),
        "ratio": statistics.median(two / one for one, two in zip(rates[1], rates[2])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made, some gigabytes")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--model", default="tiny-random")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the node, each round")
    parser.add_argument("--player-rate", type=float, default=8.0, help="times the recorded 5 Hz; more than it encodes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {"model": given.model, "device": given.device, "cores": len(os.sched_getaffinity(0))}
    for part in given.parts:
        print(part, flush=True)
        found[part] = globals()[part](given)
        print(f"  {json.dumps(found[part])}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
