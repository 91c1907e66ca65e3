"""Visual tokens from one host to another: two network namespaces joined by a veth pair. Needs root and `ip`.

    sudo $(which python) benchmarks/two_hosts.py --seconds 60                    # OpenVLA's tokens of two cameras, 10 Hz
    sudo $(which python) benchmarks/two_hosts.py --seconds 60 --node             # the real node, with tiny-random
    sudo $(which python) benchmarks/two_hosts.py --transports LARGE_DATA --mbit 1000

The namespaces have their own network, /dev/shm, IPC and host name, so nothing but the veth pair joins them; its byte
counter is printed to show that the tokens went through it. Both ends read the same clock, so ages are exact.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support")]
CAMERAS = ("front", "wrist")
HOSTS = {"robot": "10.77.0.1", "policy": "10.77.0.2"}
WARM_UP = 10


def name(host: str) -> str:
    return f"vla-{host}-{os.getpid()}"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def join(mbit: int) -> None:
    """Two namespaces, a cable between them, and a limit on its speed if one is wanted."""
    for host in HOSTS:
        ip("netns", "add", name(host))
    ip("link", "add", "eth0", "netns", name("robot"), "type", "veth", "peer", "name", "eth0", "netns", name("policy"))
    for host, address in HOSTS.items():
        inside = ("-n", name(host))
        ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "link", "set", "eth0", "up")
        ip(*inside, "route", "add", "224.0.0.0/4", "dev", "eth0")  # discovery is multicast
        if mbit:
            limit = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb"]
            subprocess.run(["ip", "netns", "exec", name(host), *limit, "latency", "100ms"], check=True)


def open_host(host: str) -> subprocess.Popen:
    """A process that holds what the host's processes share, and no others: /dev/shm, IPC, a name."""
    setup = 'mount -t tmpfs tmpfs /dev/shm && hostname "$0" && echo ready && exec sleep infinity'
    holder = subprocess.Popen(
        ["ip", "netns", "exec", name(host), "unshare", "--mount", "--ipc", "--uts", "sh", "-c", setup, host],
        stdout=subprocess.PIPE,
        text=True,
    )
    if holder.stdout.readline().strip() != "ready":
        raise SystemExit("two_hosts.py needs root, and ip, unshare and nsenter")
    return holder


def start(holder: subprocess.Popen, command: list[str], transports: str) -> subprocess.Popen:
    environment = os.environ | {
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET",
        "ROS_DOMAIN_ID": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("FASTDDS_BUILTIN_TRANSPORTS", None)
    if transports:
        environment["FASTDDS_BUILTIN_TRANSPORTS"] = transports
    inside = ["nsenter", "--target", str(holder.pid), "--mount", "--ipc", "--uts", "--net"]
    return subprocess.Popen([*inside, sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True)


def run(options: argparse.Namespace) -> None:
    processes = []
    inner = [str(Path(__file__).resolve()), "--seconds", str(options.seconds), "--rate", str(options.rate)]
    try:
        join(options.mbit)
        robot, policy = open_host("robot"), open_host("policy")
        processes += [robot, policy]
        receiver = start(policy, [*inner, "--role", "receive"], options.transports)
        processes.append(receiver)
        if options.node:
            arguments = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", "-p", "autostart:=true"]
            settings = [
                "model:=tiny-random",
                f"cameras:=[{','.join(CAMERAS)}]",
                "qos_overrides./tokens.publisher.depth:=20",
            ]
            arguments += [word for setting in settings for word in ("-p", setting)]
            processes.append(start(robot, arguments, options.transports))
        sender = start(robot, [*inner, "--role", "images" if options.node else "tokens"], options.transports)
        processes.append(sender)
        published = json.loads(sender.communicate(timeout=options.seconds + 120)[0].splitlines()[-1])
        time.sleep(2.0)
        receiver.send_signal(signal.SIGINT)
        result = json.loads(receiver.communicate(timeout=30)[0].splitlines()[-1])
        links = json.loads(ip("-n", name("policy"), "-json", "-s", "link", "show", "dev", "eth0"))
        result["megabytes_through_veth"] = round(links[0]["stats64"]["rx"]["bytes"] / 1e6)
        print(json.dumps({"transports": options.transports or "default", "mbit": options.mbit} | published | result))
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", name(host)], check=False, stderr=subprocess.DEVNULL)


def make_node(role: str):
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    return rclpy.create_node(role), stop


def paced(count: int, rate: float):
    begin = time.monotonic()
    for index in range(count):
        yield index
        time.sleep(max(0.0, begin + (index + 1) / rate - time.monotonic()))


def send_tokens(options: argparse.Namespace) -> None:
    """OpenVLA's 2 × 256 × 4096 in bfloat16, 4 MiB a message, stamped when they are published."""
    from fake_tokenizer import make_tokens
    from sensor_msgs.msg import CompressedImage

    from vla_perception.tokens import to_message

    node, _stop = make_node("tokens")
    publisher = node.create_publisher(CompressedImage, "tokens", 20)
    while not publisher.get_subscription_count():
        time.sleep(0.1)
    time.sleep(1.0)
    values = np.random.default_rng(0).standard_normal((2, 256, 4096), np.float32)
    words = (values.view(np.uint32) >> 16).astype(np.uint16)
    count = WARM_UP + int(options.seconds * options.rate)
    publishing = []
    for index in paced(count, options.rate):
        tokens = make_tokens(index, cameras=CAMERAS, grid=(16, 16), data=words, dtype="bfloat16")
        message = to_message(tokens)
        begin = time.monotonic()
        publisher.publish(message)
        publishing.append(time.monotonic() - begin)
    time.sleep(5.0)  # what was lost is sent again
    print(json.dumps({"published": count, "publish_call_p50_ms": round(1e3 * float(np.median(publishing)), 1)}))


def send_images(options: argparse.Namespace) -> None:
    """Two cameras of 640 × 480, on the robot's side with the real node."""
    from sensor_msgs.msg import Image

    from vla_perception.byte_array import byte_array

    node, _stop = make_node("cameras")
    publishers = [node.create_publisher(Image, f"{camera}/image_raw", 10) for camera in CAMERAS]
    while not all(publisher.get_subscription_count() for publisher in publishers):
        time.sleep(0.1)
    time.sleep(1.0)
    data = byte_array(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    count = WARM_UP + int(options.seconds * options.rate)
    for _ in paced(count, options.rate):
        stamp = divmod(time.time_ns(), 10**9)
        for publisher, camera in zip(publishers, CAMERAS):
            message = Image(height=480, width=640, step=1920, encoding="rgb8", data=data)
            message.header.stamp.sec, message.header.stamp.nanosec = stamp
            message.header.frame_id = camera
            publisher.publish(message)
    time.sleep(2.0)
    print(json.dumps({"images_per_camera": count}))


def receive() -> None:
    from vla_perception.tokens import TokenSubscriber

    node, stop = make_node("policy")
    ages, arrivals, tokens = [], [], None
    with TokenSubscriber(node, qos=20) as subscriber:
        while not stop:
            try:
                tokens = subscriber.wait(0.2)
            except TimeoutError:
                continue
            ages.append(1e3 * subscriber.age(tokens))
            arrivals.append(time.monotonic())
        if len(ages) <= WARM_UP:
            raise SystemExit(f"{len(ages)} token messages are too few for statistics")
        p50, p95, p99 = np.percentile(ages[WARM_UP:], (50, 95, 99))
        result = {
            "received": subscriber.received,
            "lost": subscriber.lost,
            "last_sequence": tokens.sequence,
            "shape": list(tokens.shape),
            "rate_hz": round((len(arrivals) - 1) / (arrivals[-1] - arrivals[0]), 2),
            "age_ms": {"p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1)},
        }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=10.0, help="messages per second")
    parser.add_argument("--mbit", type=int, default=0, help="speed of the cable in Mbit/s; 0: as fast as it is")
    parser.add_argument("--transports", default="", help="FASTDDS_BUILTIN_TRANSPORTS, e.g. LARGE_DATA")
    parser.add_argument("--node", action="store_true", help="the real node and cameras on the robot's side")
    parser.add_argument("--role", default="run", choices=("run", "tokens", "images", "receive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    roles = {"run": run, "tokens": send_tokens, "images": send_images, "receive": lambda _options: receive()}
    roles[options.role](options)


if __name__ == "__main__":
    main()
