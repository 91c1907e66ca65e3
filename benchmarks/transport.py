"""Tokens from the node's publisher to a policy's array, in another process of the same machine.

    python benchmarks/transport.py --mib 2 --rate 30 --seconds 60 --json transport.json

`topic_default` is the topic over Fast DDS as it comes, `topic_profile` the same with config/fastdds.xml; both reliable,
with the last 10 kept on either side, as the package sets them up. `shared_memory` is iceoryx2, in the environment of
`topic_default`; no set of it that counts goes by DDS, and the benchmark stops if one did.

The way is the package's own: a `VisualTokens` is handed to `TokenPublisher`, as the node does it, and comes out of
`TokenSubscriber.wait` as a `VisualTokens` whose array is looked at. The time between the two is read from the
monotonic clock, which the processes of one machine share. Before anything is counted, `--warm-up` sets go the same
way. Each process has half of the processor's cores for itself: some kernels of virtual machines pack what is woken
onto the core of who woke it, which is then measured instead (`--share-cores` leaves it to the kernel). One transport
after the other; `lost` is what the subscriber itself tells from gaps in the sequence numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support")]

from ros_harness import free_domain, ros_environment  # noqa: E402

TRANSPORTS = ("topic_default", "topic_profile", "shared_memory")
PROFILE = str(ROOT / "config" / "fastdds.xml")
PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
#: Seconds without a set after which the subscriber says what it has.
SETTLED_SEC = 3.0


class Worker:
    """One of the two processes: told what to do in lines, answers in lines of JSON."""

    def __init__(self, role: str, transport: str, domain: int, options: argparse.Namespace) -> None:
        environment = ros_environment(domain)
        for variable in (*PROFILE_VARIABLES, "FASTDDS_BUILTIN_TRANSPORTS"):
            environment.pop(variable, None)
        if transport == "topic_profile":
            environment.update(dict.fromkeys(PROFILE_VARIABLES, PROFILE))
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        if half and not options.share_cores:
            cores = cores[:half] if role == "publish" else cores[half:]
        inner = ["--role", role, "--transport", transport, "--mib", str(options.mib), "--rate", str(options.rate)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *inner],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.sched_setaffinity(self.process.pid, cores)

    def tell(self, *words: object) -> None:
        print(*words, file=self.process.stdin, flush=True)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, *words: object) -> dict:
        self.tell(*words)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def measure(transport: str, options: argparse.Namespace) -> dict:
    domain = free_domain()
    subscriber = Worker("subscribe", transport, domain, options)
    publisher = Worker("publish", transport, domain, options)
    try:
        subscriber.answer()
        publisher.answer()
        publisher.ask(options.warm_up)
        subscriber.ask("forget")
        sent = publisher.ask(round(options.seconds * options.rate))
        if transport == "shared_memory" and sent["on_topic"]:
            raise SystemExit(f"{sent['on_topic']} sets went by the topic: is iceoryx2 installed?")
        got = subscriber.ask("report")
    finally:
        publisher.close()
        subscriber.close()
    begun, arrived = sent.pop("begun"), got.pop("arrived")
    ages = [(at - begun[sequence]) / 1e6 for sequence, at in arrived.items()]
    times = {f"{name}_ms": percentile(ages, q) for name, q in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))}
    return times | sent | got


def publish(options: argparse.Namespace) -> None:
    import rclpy
    from fake_tokenizer import make_tokens

    from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher

    rclpy.init()
    publisher = TokenPublisher(rclpy.create_node("tokens"))
    if options.transport == "shared_memory":
        publisher.open_shared_memory()
    while not publisher.has_subscribers():
        time.sleep(0.05)
    time.sleep(1.0)  # discovery goes both ways
    gc.collect()
    gc.freeze()  # as the node does
    print("{}", flush=True)
    words, sequence = random_words(options.mib), 0
    for line in sys.stdin:
        count, begun, publishing = int(line), {}, []
        cpu, begin = time.process_time(), time.monotonic()
        messages = publisher.messages
        for index in range(count):
            time.sleep(max(0.0, begin + index / options.rate - time.monotonic()))
            # New ones each time, as an encoder writes them right before the node publishes them.
            data = words_of(words, sequence)
            tokens = make_tokens(sequence, grid=(16, 16), data=data, dtype="bfloat16")
            begun[sequence] = time.monotonic_ns()
            publisher.publish(tokens)
            publishing.append((time.monotonic_ns() - begun[sequence]) / 1e6)
            sequence += 1
        report = {
            "begun": begun,
            "published": count,
            "publish_p50_ms": percentile(publishing, 50),
            "on_topic": publisher.messages - messages,
            "publisher_cpu_ms": round(1e3 * (time.process_time() - cpu) / max(count, 1), 3),
        }
        print(json.dumps(report), flush=True)
    publisher.close_shared_memory()


def subscribe(options: argparse.Namespace) -> None:
    import threading

    import rclpy

    from vla_perception.tokens import TokenSubscriber

    rclpy.init()
    words, commands = random_words(options.mib), []
    threading.Thread(target=lambda: commands.extend(iter(sys.stdin.readline, "")), daemon=True).start()
    arrived, done, quiet_since = {}, 0, time.monotonic()
    with TokenSubscriber(rclpy.create_node("policy"), shared_memory=options.transport == "shared_memory") as tokens:
        print("{}", flush=True)
        received, lost, cpu = 0, 0, time.process_time()
        while done < 2:
            try:
                visual = tokens.wait(0.1)
                array = visual.data
                arrived[visual.sequence] = time.monotonic_ns()
                if not np.array_equal(array, words_of(words, visual.sequence)):
                    raise SystemExit(f"set {visual.sequence} arrived with other tokens than were published")
                quiet_since = time.monotonic()
            except TimeoutError:
                pass
            if len(commands) <= done or time.monotonic() - quiet_since < SETTLED_SEC:
                continue
            done += 1
            if done == 2:
                report = {
                    "arrived": arrived,
                    "received": tokens.received - received,
                    "lost": tokens.lost - lost,
                    "skipped": tokens.received - received - len(arrived),
                    "subscriber_cpu_ms": round(1e3 * (time.process_time() - cpu) / max(len(arrived), 1), 3),
                }
                print(json.dumps(report), flush=True)
            else:
                arrived, received, lost, cpu = {}, tokens.received, tokens.lost, time.process_time()
                print("{}", flush=True)


def random_words(mib: float) -> np.ndarray:
    """bfloat16 words [1, 256, channels] of standard normal values; openvla-7b's 256 × 4096 for 2 MiB."""
    values = np.random.default_rng(0).standard_normal((1, 256, int(mib * 2048)), np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def words_of(words: np.ndarray, sequence: int) -> np.ndarray:
    """The tokens of one set, that differ in every value from the next set's. New memory."""
    return words ^ np.uint16(sequence % 64)  # the mantissa's bits: finite values stay finite


def percentile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 3) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, default=2.0, help="size of a set; 2 is one view of openvla-7b")
    parser.add_argument("--rate", type=float, default=30.0, help="sets per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="per transport")
    parser.add_argument("--warm-up", type=int, default=60, help="sets before those that count")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--share-cores", action="store_true", help="let the kernel place the two processes")
    parser.add_argument("--role", choices=("publish", "subscribe"), help=argparse.SUPPRESS)
    parser.add_argument("--transport", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        return {"publish": publish, "subscribe": subscribe}[options.role](options)
    result = {
        "mib": options.mib,
        "rate_hz": options.rate,
        "seconds": options.seconds,
        "warm_up_sets": options.warm_up,
        "machine": f"{os.cpu_count()} × {processor()}",
    }
    print("| transport | p50 ms | p95 ms | p99 ms | max ms | published | received |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for transport in options.transports:
        found = result[transport] = measure(transport, options)
        times = (found[f"{name}_ms"] for name in ("p50", "p95", "p99", "max"))
        cells = [transport, *("–" if t is None else f"{t:.2f}" for t in times), found["published"], found["received"]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
