"""`make demo`: a bag's cameras become visual tokens at a policy, every piece in a process of its own.

    python -m vla_perception.demo [--model tiny-random] [--bag examples/sample_bag] [--out out/demo]

Starts the tokenizer (lifecycle node), a policy that subscribes to its tokens, and the bag player, on a ROS domain
that nobody else on this machine uses; follows them, and when everything is through accounts for every frame, prints
a table, and writes `report.json` and `tokens.png`. Exit code 0 if all frames are accounted for, 1 if not or if a
process failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vla_perception.cli import add_placement
from vla_perception.sources.bags import COMPRESSED_IMAGE, Bag, BagError, BagMessage

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("decode", "preprocess", "encode", "publish")
COUNTERS = ("received", "encoded", "replaced", "unmatched", "undecodable", "pending")
PERCENTILES = (50, 95, 99)
IMAGES_LIMIT = 1 << 30  # bytes
MOMENTS = 3  # of the bag, that are in the image

LOADING_SEC = 1800.0  # the first use of a checkpoint reads and hashes gigabytes
IDLE_SEC = 600.0  # from the last frame published until nothing moves any more
LOST_SEC = 10.0
ENDING_SEC = 20.0


class DemoError(Exception):
    """What kept the demo from its end, as the user is to read it."""


@dataclass(frozen=True)
class Cameras:
    """The cameras of a bag: names (in the order of their views), image transport, and topic of each."""

    names: tuple[str, ...]
    transport: str
    topics: Mapping[str, str]


class Child:
    """A process of the demo. What it prints to stderr goes to a file, whose end is shown if it fails."""

    def __init__(self, title: str, module: str, parameters: Mapping[str, object], environment: dict, folder: Path):
        self.title = title
        self.log = folder / f"{module.rpartition('.')[2]}.log"
        command = [sys.executable, "-m", module, "--ros-args"]
        for name, value in parameters.items():
            command += ["-p", f"{name}:={json.dumps(value)}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def failure(self) -> DemoError:
        code = self.process.poll()
        how = f"ended with exit code {code}" if code is not None else "failed"
        lines = self.log.read_text(errors="replace").splitlines()[-40:]
        return DemoError(f"The {self.title} {how}. Its last words:\n" + "\n".join(f"    {line}" for line in lines))

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise self.failure()

    def end(self, number: int = signal.SIGINT) -> int:
        """Asks it to end and returns its exit code; kills it if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(ENDING_SEC)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@dataclass
class Events:
    """What the policy's process has told so far: token messages, latest diagnostics, and how often they repeated."""

    policy: Child
    rmw: str | None = None
    messages: int = 0
    status: dict = field(default_factory=dict)
    diagnostics: int = 0
    problems: list[str] = field(default_factory=list)

    def take(self, timeout: float) -> None:
        """Takes in what comes within `timeout` seconds, at least what is there."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = self.policy.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            if line is None:
                raise self.policy.failure()
            event = json.loads(line)
            if event["event"] == "ready":
                self.rmw = event["rmw"]
            elif event["event"] == "tokens":
                self.messages = event["count"]
            elif event["event"] == "problem":
                self.problems.append(event["text"])
            elif event["event"] == "diagnostics":
                status = {name: v for name, v in event["status"].items() if name.startswith("visual_tokenizer")}
                if status:
                    self.status = self.status | status
                    self.diagnostics += 1

    def camera(self, name: str) -> dict[str, int]:
        """The camera's counters; {} before the first diagnostics."""
        values = self.status.get(f"visual_tokenizer: camera {name}", {})
        return {key: int(values[key]) for key in COUNTERS if key in values}

    def model(self) -> dict[str, str]:
        return self.status.get("visual_tokenizer: model", {})

    def timing(self) -> dict[str, str]:
        return self.status.get("visual_tokenizer: timing", {})


class Progress:
    """One line that is written over on a terminal, and a line every few seconds elsewhere."""

    def __init__(self):
        self._terminal = sys.stdout.isatty()
        self._next = 0.0

    def show(self, text: str) -> None:
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)
        elif time.monotonic() >= self._next:
            print(text, flush=True)
            self._next = time.monotonic() + 2.0

    def done(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self._terminal else text, flush=True)
        self._next = 0.0


def find_cameras(bag: Bag) -> Cameras:
    """The cameras whose topics the tokenizer can subscribe to. DemoError if there are none."""
    for transport, pattern in (("compressed", r"/(.+)/image_raw/compressed"), ("raw", r"/(.+)/image_raw")):
        topics = {}
        for topic in bag.image_topics():
            match = re.fullmatch(pattern, topic)
            if match and (bag.topics[topic].type == COMPRESSED_IMAGE) == (transport == "compressed"):
                topics[match[1]] = topic
        if topics:
            return Cameras(tuple(topics), transport, topics)
    raise DemoError(
        f"{bag.path} has no topic CAMERA/image_raw/compressed or CAMERA/image_raw with images; it has "
        + (", ".join(bag.topics) or "no topics")
    )


def read_images(bag: Bag, cameras: Cameras) -> dict[str, list[BagMessage]]:
    """Every image of each camera. DemoError if they take more memory than a demo should."""
    images: dict[str, list[BagMessage]] = {name: [] for name in cameras.topics}
    names = {topic: name for name, topic in cameras.topics.items()}
    size = 0
    for message in bag.messages(list(names)):
        size += len(message.cdr)
        if size > IMAGES_LIMIT:
            raise DemoError(
                f"{bag.path} has more than {IMAGES_LIMIT >> 20} MiB of images, which the demo keeps in memory: choose a "
                "shorter bag, or play this one with replay_bag.launch.py"
            )
        images[names[message.topic]].append(message)
    return images


def free_domain() -> tuple[int, socket.socket]:
    """A ROS domain that nobody on this machine uses, and the lock that keeps it: hold on to it.

    The lock is a name in Linux's abstract socket namespace (the tests' ros_harness.py takes the same ones), which the
    kernel gives back however the process ends; the port is that of the domain's first DDS participant.
    """
    for domain in range(2, 100):
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            lock.bind(f"\0vla_perception.ros_domain.{domain}")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.bind(("127.0.0.1", 7400 + 250 * domain + 10))
            return domain, lock
        except OSError:
            lock.close()
    raise DemoError("All ROS domains from 2 to 99 are in use on this machine")


def ros_environment(domain: int) -> dict[str, str]:
    """For the processes of the demo: a domain of their own, this machine only, and our Fast DDS profile."""
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    for name in ("ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS", "ROS_DISCOVERY_SERVER"):
        environment.pop(name, None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    profile = _shared_file("config/fastdds.xml")
    if profile is not None:
        # Jazzy reads the one, Kilted and later the other.
        for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
            environment.setdefault(name, str(profile))
    return environment


def _shared_file(name: str) -> Path | None:
    """A file of this package: in the source tree, or installed under share/ by colcon; None if it is in neither."""
    if (ROOT / name).exists():
        return ROOT / name
    try:
        from ament_index_python.packages import get_package_share_directory

        path = Path(get_package_share_directory("vla_perception")) / name
    except (ImportError, LookupError, OSError):  # OSError: no AMENT_PREFIX_PATH
        return None
    return path if path.exists() else None


def run(arguments: argparse.Namespace) -> int:
    """The whole demo; returns the exit code. Raises DemoError or BagError."""
    progress = Progress()
    with Bag(arguments.bag) as bag, tempfile.TemporaryDirectory(prefix="vla_perception_demo_") as folder:
        record = Path(folder)
        cameras = find_cameras(bag)
        images = read_images(bag, cameras)
        domain, lock = free_domain()
        environment = ros_environment(domain)
        children: list[Child] = []

        def start(title: str, module: str, **parameters: object) -> Child:
            children.append(Child(title, module, parameters, environment, record))
            return children[-1]

        # However busy the machine is, no frame may be lost on its way to the node: every one is to be accounted for.
        depths = {
            f"qos_overrides.{topic}.subscription.depth": len(images[name]) for name, topic in cameras.topics.items()
        }
        try:
            node = start(
                "tokenizer",
                "vla_perception.nodes.visual_tokenizer",
                model=arguments.model,
                device=arguments.device,
                compute_dtype=arguments.compute_dtype,
                cameras=list(cameras.names),
                image_transport=cameras.transport,
                sync_policy="approximate",
                publish_features=True,
                autostart=True,
                **depths,
            )
            policy = start(
                "policy",
                "vla_perception.demo_policy",
                record=str(record),
                keep_spacing_sec=bag.seconds / arguments.rate / MOMENTS,
            )
            events = Events(policy)
            _follow(
                events,
                [node],
                lambda: events.rmw is not None,
                LOADING_SEC,
                lambda seconds: progress.show(f"Loading {arguments.model} … {seconds:.0f} s"),
                "the tokenizer did not become active",
            )
            progress.done(f"Tokenizer is active, policy has subscribed (ROS domain {domain}, {events.rmw})")

            stamps = record / "stamps.jsonl"
            player = start(
                "bag player",
                "vla_perception.nodes.bag_player",
                bag=str(bag.path.resolve()),
                rate=arguments.rate,
                restamp=True,
                stamp_log=str(stamps),
                wait_for_subscribers=1,
            )
            length = bag.seconds / arguments.rate
            _follow(
                events,
                [node],
                lambda: player.process.poll() is not None,
                length + 120.0,
                lambda _: progress.show(
                    f"Replaying {bag.path.name} ({length:.1f} s): {events.messages} token messages at the policy"
                ),
                "the bag player did not come to its end",
            )
            if player.process.returncode != 0:
                raise player.failure()
            published = read_stamp_log(stamps)
            counts = {name: len(published.get(topic, ())) for name, topic in cameras.topics.items()}
            settled = Settled(events, counts)
            _follow(
                events,
                [node],
                settled,
                IDLE_SEC,
                lambda _: progress.show("Waiting until every frame is accounted for"),
                "the tokenizer's diagnostics did not come to rest",
            )
            progress.done(f"Replayed {sum(counts.values())} frames, {events.messages} token messages at the policy")

            policy.process.stdin.close()
            if policy.wait() != 0:
                raise policy.failure()
            if node.end() != 0:
                raise node.failure()
        finally:
            impatience = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave children behind
            for child in reversed(children):
                child.end()
            lock.close()
            signal.signal(signal.SIGINT, impatience)

        messages = json.loads((record / "messages.json").read_text())
        if not messages:
            raise DemoError("No token message reached the policy. " + str(node.failure()))
        report, problems = make_report(events, messages, published, cameras)
        problems = events.problems + problems
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        draw_image(record, published, cameras, images, arguments.out / "tokens.png")

    print_table(report, arguments.out)
    for problem in problems:
        print(f"WARNING: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _follow(
    events: Events,
    watched: Sequence[Child],
    until: Callable[[], bool],
    timeout: float,
    show: Callable[[float], None],
    complaint: str,
) -> None:
    """Takes in events until the condition holds; DemoError if a process dies, or with the complaint on timeout."""
    began = time.monotonic()
    while not until():
        for child in watched:
            child.check_alive()
        seconds = time.monotonic() - began
        if seconds > timeout:
            raise DemoError(f"After {timeout:.0f} s {complaint}. {watched[0].failure()}")
        show(seconds)
        events.take(0.1)


class Settled:
    """True once nothing moves any more in the tokenizer's diagnostics.

    At once if every frame has been encoded or dropped. `pending` may stay above 0 for good, because a frame can wait
    for a partner that never comes; then the counters have to stand still for longer than encoding a set takes. If
    frames were lost on the way, they have to for LOST_SEC more.
    """

    def __init__(self, events: Events, published: Mapping[str, int]):
        self._events = events
        self._published = published
        self._last: object = None
        self._since = 0.0
        self._seen = events.diagnostics

    def __call__(self) -> bool:
        events = self._events
        if events.diagnostics == self._seen:
            return False
        self._seen = events.diagnostics
        counters = {name: events.camera(name) for name in self._published}
        sent = events.model().get("token_messages")
        now = (counters, events.messages, sent)
        if now != self._last:
            self._last, self._since = now, time.monotonic()
            return False
        still = time.monotonic() - self._since
        encoding = 2e-3 * (_rounded(events.timing().get("encode_p99_ms")) or 0.0)
        lost = any(counters[name].get("received") != count for name, count in self._published.items())
        lost = lost or (sent is not None and int(sent) != events.messages)
        pending = any(count.get("pending") for count in counters.values())
        return still >= (LOST_SEC if lost else 0.0) + (1.5 + encoding if pending or lost else 0.0)


def read_stamp_log(path: Path) -> dict[str, dict[int, int]]:
    """Topic → {stamp (ns): CLOCK_MONOTONIC at publishing (ns)}, in the order of publishing."""
    published: dict[str, dict[int, int]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        published.setdefault(entry["topic"], {})[entry["stamp_ns"]] = entry["monotonic_ns"]
    return published


def make_report(
    events: Events, messages: list[dict], published: Mapping[str, Mapping[int, int]], cameras: Cameras
) -> tuple[dict, list[str]]:
    """The contents of report.json, and what is wrong with it: sentences, none if every frame is accounted for."""
    problems = []
    accounting = {}
    for name in cameras.names:
        counters = events.camera(name)
        missing = [key for key in COUNTERS if key not in counters]
        if missing:
            raise DemoError(f"The tokenizer's diagnostics say nothing about {', '.join(missing)} of camera {name}")
        count = accounting[name] = {"published": len(published.get(cameras.topics[name], ())), **counters}
        if count["published"] != count["received"]:
            problems.append(f"camera {name}: {count['published']} frames published, but {count['received']} received")
        parts = sum(count[key] for key in COUNTERS[1:])
        if count["received"] != parts:
            problems.append(f"camera {name}: {count['received']} frames received, but {parts} accounted for: {count}")

    reference = published.get(cameras.topics[cameras.names[0]], {})
    latencies = [(m["arrival_ns"] - reference[m["stamp_ns"]]) / 1e6 for m in messages if m["stamp_ns"] in reference]
    if len(latencies) != len(messages):
        problems.append(f"{len(messages) - len(latencies)} token messages carry a stamp that was never published")
    told = events.model().get("token_messages")
    if told is not None and int(told) != len(messages):
        problems.append(f"{told} token messages were sent, but {len(messages)} received by the policy")
    constant = ("model", "weights", "fingerprint", "dtype", "shape")
    last = messages[-1]
    if any(m[key] != last[key] for m in messages for key in constant):
        problems.append("token messages differ in model, dtype or shape")
    encoded = Counter(view["camera"] for m in messages for view in m["views"])
    for name in cameras.names:
        if encoded[name] != accounting[name]["encoded"]:
            problems.append(
                f"camera {name}: {accounting[name]['encoded']} frames encoded, {encoded[name]} at the policy"
            )

    timing = events.timing()
    latency = {"image_to_policy": _percentiles(latencies)}
    for stage in STAGES:
        latency[stage] = {f"p{p}": _rounded(timing.get(f"{stage}_p{p}_ms")) for p in PERCENTILES}
    report = {
        "rmw": events.rmw,
        "model": last["model"],
        "weights": last["weights"],
        "fingerprint": last["fingerprint"],
        "frames_in": {name: count["received"] for name, count in accounting.items()},
        "token_messages": len(messages),
        "views": last["shape"][0],
        "tokens_per_view": last["shape"][1],
        "channels": last["shape"][2],
        "dtype": last["dtype"],
        "dropped": {
            name: count["replaced"] + count["unmatched"] + count["undecodable"] for name, count in accounting.items()
        },
        "accounting": accounting,
        "latency_ms": latency,
    }
    return report, problems


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"p{p}": None for p in PERCENTILES}
    return {f"p{p}": _rounded(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _rounded(value: object) -> float | None:
    try:
        return round(float(value), 3)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def draw_image(
    record: Path,
    published: Mapping[str, Mapping[int, int]],
    cameras: Cameras,
    images: Mapping[str, list[BagMessage]],
    out: Path,
) -> None:
    """tokens.png, from the messages that the policy kept and the bag's images that belong to their stamps."""
    # Only here, because they need the ROS message packages and Pillow.
    from rclpy.serialization import deserialize_message

    from vla_perception.demo_image import Moment, draw
    from vla_perception.images.decode import decode_image
    from vla_perception.nodes.bag_player import message_class
    from vla_perception.tokens import VisualTokens

    order = {
        name: {stamp: index for index, stamp in enumerate(published[topic])} for name, topic in cameras.topics.items()
    }
    moments = []
    for file in sorted(record.glob("*.safetensors"))[:MOMENTS]:
        tokens = VisualTokens.from_bytes(file.read_bytes())
        shown = []
        for view in tokens.views:
            # The n-th stamp that the player gave to a topic is that of its n-th image in the bag.
            recorded = images[view.camera][order[view.camera][view.stamp_ns]]
            message = deserialize_message(recorded.cdr, message_class(recorded.type))
            shown.append(decode_image(message))
        index = order[tokens.views[0].camera][tokens.views[0].stamp_ns]
        start = images[tokens.views[0].camera][0].time_ns
        seconds = (images[tokens.views[0].camera][index].time_ns - start) / 1e9
        moments.append(Moment(seconds, tokens, shown))
    draw(moments, out)


def print_table(report: Mapping, out: Path) -> None:
    """What happened, for people."""

    def row(title: str, *cells: object) -> None:
        print(f"  {title:<18}" + "".join(f"{cell!s:>12}" for cell in cells))

    print()
    print(f"  model             {report['model']}, {report['weights']} weights")
    print(f"  fingerprint       {report['fingerprint']}")
    print(
        f"  tokens            {report['token_messages']} messages of {report['views']} × {report['tokens_per_view']} × "
        f"{report['channels']} {report['dtype']}, over {report['rmw']}"
    )
    print()
    counted = ("published", *COUNTERS)
    row("frames", *counted)
    for name, count in report["accounting"].items():
        row(f"  {name}", *(count[key] for key in counted))
    print()
    row("latency, ms", *(f"p{p}" for p in PERCENTILES))
    for stage, values in report["latency_ms"].items():
        cells = ("–" if values[f"p{p}"] is None else f"{values[f'p{p}']:.1f}" for p in PERCENTILES)
        row(f"  {stage.replace('_', ' ')}", *cells)
    print()
    dropped = ", ".join(f"{name} {count}" for name, count in report["dropped"].items())
    print(f"  dropped           {dropped}")
    print(f"  written           {out / 'report.json'}, {out / 'tokens.png'}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_perception.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-random", help="preset (random weights) or checkpoint folder")
    parser.add_argument("--bag", default=str(ROOT / "examples" / "sample_bag"), help="folder, .mcap or .db3")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for report.json and tokens.png")
    parser.add_argument("--rate", type=float, default=1.0, help="speed of the replay")
    add_placement(parser)
    parsed = parser.parse_args(arguments)
    if parsed.rate <= 0:
        parser.error("--rate must be above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(parsed)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (DemoError, BagError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
