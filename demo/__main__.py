"""The command `python -m demo`; with --view, see `view`.

Starts the tokenizer (lifecycle node), a policy that subscribes to its tokens, and the bag player, on a ROS domain that
nothing else on this machine uses; follows them, and when everything is through accounts for every frame, prints a
table, and writes `report.json` and `tokens.png`. Exit code 0 if all frames are accounted for, 1 if not or if a process
failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import demo
from demo import ROOT, DemoError
from demo.events import Events, Settled, follow
from demo.processes import Child, Processes
from demo.recording import Recording
from demo.report import make_report, print_table, read_stamp_log
from vla_perception.cli import add_placement
from vla_perception.sources.bags import Bag, BagError

MOMENTS = 3  # of the bag, that are in the figure

LOADING_SEC = 1800.0  # the first use of a checkpoint reads and hashes gigabytes
IDLE_SEC = 600.0  # from the last frame published until nothing moves any more


def run(arguments: argparse.Namespace) -> int:
    """The whole demo; returns the exit code. Raises DemoError or BagError."""
    with Bag(arguments.bag) as bag, tempfile.TemporaryDirectory(prefix="vla_perception_demo_") as folder:
        record = Path(folder)
        recording = Recording.read(bag)
        with Processes(record) as processes:
            node, events = start_tokenizer_and_policy(processes, recording, arguments, record)
            published = play(processes, recording, arguments.rate, node, events, record / "stamps.jsonl")
            events.policy.process.stdin.close()
            if events.policy.wait() != 0:
                raise events.policy.failure()
            if node.stop() != 0:
                raise node.failure()
        messages = json.loads((record / "messages.json").read_text())
        if not messages:
            raise DemoError("No token message reached the policy. " + str(node.failure()))
        report, problems = make_report(events, messages, published, recording.topics)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        draw_figure(record, published, recording, arguments.out / "tokens.png")

    print_table(report, arguments.out)
    problems = events.problems + problems
    for problem in problems:
        print(f"WARNING: {problem}", file=sys.stderr)
    return 1 if problems else 0


def view(arguments: argparse.Namespace) -> int:
    """The bag in a loop, and the page that shows it, until Ctrl-C."""
    with Bag(arguments.bag) as bag, tempfile.TemporaryDirectory(prefix="vla_perception_demo_") as folder:
        recording = Recording.read(bag)
        with Processes(Path(folder)) as processes:
            command = [sys.executable, "-m", "vla_perception.cli", "view", *["--no-browser"] * arguments.no_browser]
            page = processes.run("page", command, "view")
            watched = [
                page,
                start_tokenizer(processes, recording, arguments),
                start_player(processes, recording, arguments.rate, loop=True),
            ]
            try:
                while True:
                    with contextlib.suppress(queue.Empty):
                        if line := page.lines.get(timeout=0.5):
                            print(line, end="", flush=True)
                    for child in watched:
                        child.check_alive()
            except KeyboardInterrupt:
                return 0


def start_tokenizer(
    processes: Processes, recording: Recording, arguments: argparse.Namespace, **parameters: object
) -> Child:
    """The tokenizer's process, which is loading its model."""
    return processes.start(
        "tokenizer",
        "vla_perception.nodes.visual_tokenizer",
        {
            "model": arguments.model,
            "device": arguments.device,
            "compute_dtype": arguments.compute_dtype,
            "cameras": list(recording.topics),
            "image_transport": recording.transport,
            "sync_policy": "approximate",
            "publish_features": True,
            "autostart": True,
            **parameters,
        },
        {f"{name}/image_raw": base for name, base in recording.bases.items()},
    )


def start_tokenizer_and_policy(
    processes: Processes, recording: Recording, arguments: argparse.Namespace, record: Path
) -> tuple[Child, Events]:
    """The tokenizer's process, active, and what the policy's process reports, which has subscribed to its tokens."""
    # However busy the machine is, no frame may be lost on its way to the node: every one is to be accounted for.
    depths = {
        f"qos_overrides.{topic}.subscription.depth": len(recording.images[name])
        for name, topic in recording.topics.items()
    }
    node = start_tokenizer(processes, recording, arguments, **depths)
    spacing = recording.seconds / arguments.rate / MOMENTS
    policy = processes.start("policy", "demo.policy", {"record": str(record), "keep_spacing_sec": spacing})
    events = Events(policy)
    follow(
        events,
        [node],
        lambda: events.rmw is not None,
        LOADING_SEC,
        lambda seconds: f"Loading {arguments.model} … {seconds:.0f} s",
        "the tokenizer did not become active",
    )
    print(f"Tokenizer is active, policy has subscribed (ROS domain {processes.domain}, {events.rmw})", flush=True)
    return node, events


def start_player(processes: Processes, recording: Recording, rate: float, **parameters: object) -> Child:
    return processes.start(
        "bag player",
        "vla_perception.nodes.bag_player",
        {
            "bag": str(recording.path),
            "topics": list(recording.recorded.values()),
            "rate": rate,
            "restamp": True,
            **parameters,
        },
        {
            topic: recording.topics[name]
            for name, topic in recording.recorded.items()
            if topic != recording.topics[name]
        },
    )


def play(
    processes: Processes, recording: Recording, rate: float, node: Child, events: Events, stamps: Path
) -> dict[str, dict[int, int]]:
    """Plays the bag, and waits until every frame is accounted for. Returns what `read_stamp_log` gives."""
    player = start_player(processes, recording, rate, stamp_log=str(stamps), wait_for_subscribers=1)
    length = recording.seconds / rate
    follow(
        events,
        [node],
        lambda: player.process.poll() is not None,
        length + 120.0,
        lambda _: f"Replaying {recording.path.name} ({length:.1f} s): {events.messages} token messages at the policy",
        "the bag player did not come to its end",
    )
    if player.process.returncode != 0:
        raise player.failure()
    published = read_stamp_log(stamps)
    counts = {name: len(published.get(topic, ())) for name, topic in recording.topics.items()}
    follow(
        events,
        [node],
        Settled(events, counts),
        IDLE_SEC,
        lambda _: "Waiting until every frame is accounted for",
        "the tokenizer's diagnostics did not come to rest",
    )
    print(f"Replayed {sum(counts.values())} frames, {events.messages} token messages at the policy", flush=True)
    return published


def draw_figure(record: Path, published: Mapping[str, Mapping[int, int]], recording: Recording, out: Path) -> None:
    """tokens.png, from the messages that the policy kept and the bag's images that belong to their stamps."""
    # Only here, because they need the ROS message packages and Pillow.
    from rclpy.serialization import deserialize_message

    from vla_perception.images.decode import decode_image
    from vla_perception.nodes.bag_player import message_class
    from vla_perception.tokens import VisualTokens
    from vla_perception.visualization.figures import Moment, draw_moments

    order = {
        name: {stamp: index for index, stamp in enumerate(published[topic])} for name, topic in recording.topics.items()
    }
    moments = []
    for file in sorted(record.glob("*.safetensors"))[:MOMENTS]:
        tokens = VisualTokens.from_bytes(file.read_bytes())
        # The n-th stamp that the player gave to a topic is that of its n-th image in the bag.
        shown = [recording.images[view.camera][order[view.camera][view.stamp_ns]] for view in tokens.views]
        images = [decode_image(deserialize_message(image.cdr, message_class(image.type))) for image in shown]
        seconds = (shown[0].time_ns - recording.images[tokens.views[0].camera][0].time_ns) / 1e9
        moments.append(Moment(seconds, tokens, images))
    draw_moments(moments, out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=demo.__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-random", help="preset (random weights) or checkpoint folder")
    parser.add_argument("--bag", default=str(ROOT / "examples" / "sample_bag"), help="folder, .mcap or .db3")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for report.json and tokens.png")
    parser.add_argument("--rate", type=float, default=1.0, help="speed of the replay")
    parser.add_argument("--view", action="store_true", help="play the bag in a loop and show it in a browser")
    parser.add_argument("--no-browser", action="store_true", help="with --view: only print the page's address")
    add_placement(parser)
    parsed = parser.parse_args(arguments)
    if parsed.rate <= 0:
        parser.error("--rate must be above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return view(parsed) if parsed.view else run(parsed)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (DemoError, BagError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
