"""How many policies, cameras and bytes a second one node serves before it drops: a curve for each.

    python benchmarks/load.py --json load.json

The node runs the preset `tiny-random` (random weights) where the device is `auto`; camera and policies are processes of
their own, all on this machine, over the topic with config/fastdds.xml and by shared memory. One quantity is raised at a
time, from `--policies 1 --cameras 1 --rate 5 --size 640x480`. A row:

offered_hz   frame sets a second that the cameras publish; offered_mb_s: bytes of their images
tokens_hz    token messages a second at each policy, the least and the most
late_p50_ms, late_p99_ms: age of the tokens at the policies
lost         messages that a policy missed on the way: what DDS or shared memory drop
replaced     share of frames that a newer one replaced before they were encoded: what the node drops
accounted    whether received = encoded + replaced + unmatched + undecodable + pending in every report
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support"), str(ROOT / "benchmarks")]

from node import CAMERAS, to_messages  # noqa: E402
from ros_harness import RosContext, RosProcess, wait_until  # noqa: E402
from soak import PROFILES, Observer, messages_of  # noqa: E402
from transport import percentile, processor  # noqa: E402

SOAK = str(ROOT / "benchmarks" / "soak.py")


def publish_images(options: argparse.Namespace) -> None:
    """All cameras in one process, until it is ended: a set's images share a stamp."""
    import rclpy

    rclpy.init()
    node, messages = rclpy.create_node("cameras"), to_messages(options.size, "rgb8")
    names = CAMERAS[: options.cameras]
    publishers = [node.create_publisher(type(messages[0]), f"{name}/image_raw", 10) for name in names]
    begin, index = time.monotonic(), 0
    while True:
        time.sleep(max(0.0, begin + index / options.rate - time.monotonic()))
        message = messages[index % len(messages)]
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
        for publisher in publishers:
            publisher.publish(message)
        index = max(index + 1, int((time.monotonic() - begin) * options.rate))  # late: a camera does not catch up


def case(policies: int, cameras: int, rate: float, size: str, shared_memory: bool, seconds: float) -> dict[str, object]:
    from diagnostic_msgs.msg import DiagnosticArray

    settings = {"cameras": f"[{','.join(CAMERAS[:cameras])}]", "autostart": "true"}
    words = [word for name, value in settings.items() for word in ("-p", f"{name}:={value}")]
    here = [str(Path(__file__).resolve()), "--role", "camera", "--cameras", str(cameras), "--size", size]
    with RosContext() as ros:
        observer, watcher = Observer(), ros.node("observer")
        watcher.create_subscription(DiagnosticArray, "/diagnostics", observer.take, 10)
        ros.spin(watcher)
        node = RosProcess(["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", *words], ros.domain, PROFILES)
        processes = [node]
        try:
            node.wait_for("ready after", 180)
            processes.append(RosProcess([*here, "--rate", str(rate)], ros.domain, PROFILES))
            reading = [SOAK, "--role", "policy", *(["--shared-memory"] * shared_memory)]
            readers = [RosProcess(reading, ros.domain, PROFILES) for _ in range(policies)]
            processes += readers
            for reader in readers:
                wait_until(lambda of=reader: len(messages_of(of)) > 5, 120, "tokens at every policy")
            first, before = [messages_of(reader) for reader in readers], observer.totals()
            begin = time.monotonic()
            time.sleep(seconds)
            last, after = [messages_of(reader) for reader in readers], observer.totals()
            elapsed = time.monotonic() - begin
        finally:
            for process in reversed(processes):
                process.process.send_signal(signal.SIGINT)
                process.__exit__()
    seen = [new[len(old) :] for old, new in zip(first, last)]
    ages = [message["age_ms"] for messages in seen for message in messages]
    rates = sorted(len(messages) / elapsed for messages in seen)
    received = after["received"] - before["received"]
    width, height = map(int, size.split("x"))
    return {
        "policies": policies,
        "cameras": cameras,
        "size": size,
        "transport": "shared memory" if shared_memory else "topic",
        "offered_hz": rate,
        "offered_mb_s": round(rate * cameras * width * height * 3 / 1e6, 1),
        "tokens_hz": f"{rates[0]:.1f}" if rates[-1] - rates[0] < 0.15 else f"{rates[0]:.1f} to {rates[-1]:.1f}",
        "late_p50_ms": percentile(ages, 50),
        "late_p99_ms": percentile(ages, 99),
        "lost": sum(new[-1]["lost"] - old[-1]["lost"] for old, new in zip(first, last)),
        "replaced": f"{(after['replaced'] - before['replaced']) / max(received, 1):.0%}",
        "accounted": not observer.problems,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[5, 10, 20, 30, 60])
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1280x720", "1920x1080"], metavar="WxH")
    parser.add_argument("--seconds", type=float, default=10.0, help="per case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    parser.add_argument("--role", choices=("camera",), help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        options.cameras = options.cameras[0]
        try:
            publish_images(options)
        except KeyboardInterrupt:
            return 0
    base = {"policies": 1, "cameras": 1, "rate": 5.0, "size": "640x480"}
    cases = [base | {"policies": number, "shared_memory": way} for way in (False, True) for number in options.policies]
    cases += [base | {"cameras": number, "shared_memory": True} for number in options.cameras[1:]]
    cases += [base | {"rate": rate, "shared_memory": True} for rate in options.rates[1:]]
    cases += [base | {"size": size, "shared_memory": True} for size in options.sizes[1:]]
    rows = []
    for given in cases:
        rows.append(case(**given, seconds=options.seconds))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n|" + " -- |" * len(rows[0]))
        print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
        if options.json:
            result = {"machine": processor(), "cores": os.cpu_count(), "command": sys.argv[1:], "cases": rows}
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["accounted"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
