"""Images published → tokens at a policy, through the real node, each in a separate process; and what receiving costs.

    python benchmarks/node.py --json node.json                                # two 640 × 480 cameras
    python benchmarks/node.py --sizes 1920x1080 --encodings rgb8 jpeg --views 1 2 --rates 2 --seconds 20
    python benchmarks/node.py --reception --json reception.json               # an image as message, raw bytes, JPEG

The node runs the preset `tiny-random` (random weights), where device and compute_dtype `auto` put it. Images are
noise-free gradients with the sensor's noise on top, stamped with the monotonic clock, which the processes of one
machine share: age is from just before a set's first image is published until `TokenSubscriber.wait` returns its
tokens. Stages are the node's own figures, from /diagnostics; `overhead` is from the callback of the set's last image
until it is published, less what the tokenizer takes (preprocess and encode). Where encoding takes longer than the
cameras' period, sets wait for it, which is overhead, too: ask for a rate that the machine keeps up with. Everything
runs with config/fastdds.xml. The first --warm-up sets count for nothing, but for the stages' medians.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import queue
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support"), str(ROOT / "benchmarks")]

from ros_harness import free_domain, ros_environment, statuses_of  # noqa: E402
from transport import PROFILE, PROFILE_VARIABLES, percentile, processor  # noqa: E402

from vla_perception.cli import add_placement  # noqa: E402
from vla_perception.nodes.executables import set_up_malloc  # noqa: E402

CAMERAS = ("front", "wrist", "left", "right")
ENCODINGS = ("rgb8", "bgr8", "mono8", "yuv422_yuy2", "jpeg")
KINDS = ("message", "raw", "jpeg")


def environment(domain: int) -> dict[str, str]:
    return ros_environment(domain, dict.fromkeys(PROFILE_VARIABLES, PROFILE))


def start(domain: int, command: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], env=environment(domain), text=True, **options)


def answer(process: subprocess.Popen, processes: list[subprocess.Popen], seconds: float, log: IO[str] | None) -> dict:
    """The JSON of the process's next line; ends the benchmark with the node's log if it does not come.

    Raises:
        SystemExit: one of `processes` ended, or nothing came for so many seconds.
    """
    lines = queue.SimpleQueue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=0.5)
            if line:
                return json.loads(line)
        ended = [other.args[1:4] for other in processes if other.poll() is not None]
        if ended or time.monotonic() > end:
            if log is not None:
                log.seek(0)
                print(log.read()[-4000:], file=sys.stderr)
            raise SystemExit(f"ended: {ended}" if ended else f"no answer in {seconds:.0f} s from {process.args[1:4]}")


def stop(processes: list[subprocess.Popen]) -> None:
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        process.wait(60)


def run(size: str, encoding: str, views: int, rate: float, transport: str, options: argparse.Namespace) -> dict:
    domain, cameras, processes, stack = free_domain(), CAMERAS[:views], [], contextlib.ExitStack()
    stack.callback(stop, processes)
    settings = {
        "model": options.model,
        "device": options.device,
        "compute_dtype": options.compute_dtype,
        "cameras": f"[{','.join(cameras)}]",
        "image_transport": "compressed" if encoding == "jpeg" else "raw",
        "shared_memory": "true" if transport == "shared_memory" else "false",
        "autostart": "true",
    }
    given = [*(f"{name}:={value}" for name, value in settings.items()), *options.parameters]
    words = [word for value in given for word in ("-p", value)]
    inner = [str(Path(__file__).resolve()), "--role"]
    with stack:
        policy = start(domain, [*inner, "policy"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(policy)
        node = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", *words]
        log = None if options.verbose else stack.enter_context(tempfile.TemporaryFile("w+"))
        processes.append(start(domain, node, stderr=log))
        camera = start(
            domain,
            [
                *inner,
                "camera",
                "--sizes",
                size,
                "--encodings",
                encoding,
                "--views",
                str(views),
                "--rates",
                str(rate),
                "--seconds",
                str(options.seconds),
                "--warm-up",
                str(options.warm_up),
            ],
            stdout=subprocess.PIPE,
        )
        processes.append(camera)
        first = answer(camera, processes, options.start_sec, log)["first"]  # stamp of the first set that counts
        published = answer(camera, processes, options.seconds + 30, log)["published"]
        camera.wait(60)
        print(first, file=policy.stdin, flush=True)
        found = answer(policy, processes[:2], 30, log)
    case = {"size": size, "encoding": encoding, "views": views, "rate_hz": rate, "transport": transport}
    return case | {"sets_published": published} | found


def images(size: str, count: int = 8) -> list[np.ndarray]:
    """uint8 [height, width, 3], as compressible as a camera's."""
    width, height = map(int, size.split("x"))
    random, y, x = np.random.default_rng(0), *np.mgrid[:height, :width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2)
    return [np.clip(base + random.normal(0, 4, base.shape), 0, 255).astype(np.uint8) for _ in range(count)]


def to_messages(size: str, encoding: str) -> list:
    """sensor_msgs/Image or CompressedImage, filled."""
    from sensor_msgs.msg import CompressedImage, Image

    from vla_perception.byte_array import byte_array

    messages = []
    for image in images(size):
        height, width = image.shape[:2]
        if encoding == "jpeg":
            import cv2

            data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            messages.append(CompressedImage(format="bgr8; jpeg compressed bgr8", data=byte_array(data)))
            continue
        pixels = {"mono8": image[..., :1], "yuv422_yuy2": image[..., :2]}.get(encoding, image)
        data = byte_array(np.ascontiguousarray(pixels))
        step = width * pixels.shape[2]
        messages.append(Image(height=height, width=width, step=step, encoding=encoding, data=data))
    return messages


def publish_images(options: argparse.Namespace) -> None:
    """One camera process for all views: a set's images share a stamp."""
    import rclpy

    set_up_malloc()  # as in the package's cameras
    rclpy.init()
    node = rclpy.create_node("cameras")
    encoding, rate = options.encodings[0], options.rates[0]
    messages = to_messages(options.sizes[0], encoding)
    suffix = "/compressed" if encoding == "jpeg" else ""
    publishers = [
        node.create_publisher(type(messages[0]), f"{camera}/image_raw{suffix}", 10)
        for camera in CAMERAS[: options.views[0]]
    ]
    while not all(publisher.get_subscription_count() for publisher in publishers):
        time.sleep(0.05)
    time.sleep(1.0)
    count, begin = options.warm_up + round(options.seconds * rate), time.monotonic()
    for index in range(count):
        time.sleep(max(0.0, begin + index / rate - time.monotonic()))
        message, stamp = messages[index % len(messages)], time.monotonic_ns()
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
        if index == options.warm_up:
            print(json.dumps({"first": stamp}), flush=True)
        for publisher in publishers:
            publisher.publish(message)
    time.sleep(2.0)
    print(json.dumps({"published": count - options.warm_up}), flush=True)


def receive_tokens(_options: argparse.Namespace) -> None:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor

    from vla_perception.tokens import TokenSubscriber

    rclpy.init()
    node, said, last = rclpy.create_node("policy"), [], {}
    threading.Thread(target=lambda: said.append(sys.stdin.readline()), daemon=True).start()
    watcher = rclpy.create_node("watcher")
    watcher.create_subscription(
        DiagnosticArray,
        "/diagnostics",
        lambda message: last.update({name: status.values for name, status in statuses_of(message).items()}),
        10,
    )
    executor = SingleThreadedExecutor()
    executor.add_node(watcher)
    watching = threading.Thread(target=lambda: [executor.spin_once(0.1) for _ in iter(lambda: not said, False)])
    watching.start()
    ages = {}
    with TokenSubscriber(node) as tokens:
        while not said:
            try:
                visual = tokens.wait(0.2)
                ages[visual.stamp_ns] = (time.monotonic_ns() - visual.stamp_ns) / 1e6
            except TimeoutError:
                pass
        counted = [age for stamp, age in ages.items() if stamp >= int(said[0])]
        timing, cameras = last["timing"], [values for name, values in last.items() if name.startswith("camera ")]
        result = {
            "sets_received": len(counted),
            "lost_on_the_way": tokens.lost,
            "frames_received": [int(camera["received"]) for camera in cameras],
            "frames_replaced": [int(camera["replaced"]) for camera in cameras],
            "age_p50_ms": percentile(counted, 50),
            "age_p99_ms": percentile(counted, 99),
            **{
                f"{stage}_p50_ms": float(timing[f"{stage}_p50_ms"])
                for stage in ("decode", "preprocess", "encode", "publish", "overhead")
            },
            "transport_in_use": tokens.transport,
        }
    watching.join()
    executor.shutdown()
    print(json.dumps(result), flush=True)


def image_from_cdr(data: bytes):
    """A sensor_msgs/Image from its little-endian CDR bytes, its data as a view of them."""
    from types import SimpleNamespace

    def string(at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<I", data, at)
        return data[at + 4 : at + 3 + length].decode(), at + 4 + length

    def aligned(at: int) -> int:  # to 4 bytes, counted from behind the 4 of the encapsulation
        return at + -at % 4

    seconds, nanoseconds = struct.unpack_from("<iI", data, 4)
    _frame_id, at = string(12)
    at = aligned(at)
    height, width = struct.unpack_from("<II", data, at)
    encoding, at = string(at + 8)
    is_bigendian, at = data[at], aligned(at + 1)
    step, length = struct.unpack_from("<II", data, at)
    return SimpleNamespace(
        stamp_ns=seconds * 10**9 + nanoseconds,
        height=height,
        width=width,
        encoding=encoding,
        step=step,
        is_bigendian=is_bigendian,
        data=memoryview(data)[at + 8 : at + 8 + length],
    )


def receive_images(options: argparse.Namespace) -> None:
    """What the node does with a frame up to its RGB array, by kind of subscription."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from sensor_msgs.msg import CompressedImage, Image

    from vla_perception.images.decode import decode_image

    set_up_malloc()  # as in a node
    rclpy.init()
    node, ages, kind = rclpy.create_node("receiver"), [], options.kind

    def take(message) -> None:
        if kind == "raw":
            message = image_from_cdr(message)
            stamp = message.stamp_ns
        else:
            stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        image = decode_image(message)
        assert image.ndim == 3
        ages.append((time.monotonic_ns() - stamp) / 1e6)

    topic = "front/image_raw" + ("/compressed" if kind == "jpeg" else "")
    node.create_subscription(CompressedImage if kind == "jpeg" else Image, topic, take, 8, raw=kind == "raw")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    end = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), end.set()), daemon=True).start()
    begun = None
    while not end.is_set():
        executor.spin_once(0.1)
        if begun is None and len(ages) >= options.warm_up:
            ages.clear()
            begun = time.process_time()
    cpu = 1e3 * (time.process_time() - begun) / max(len(ages), 1)
    result = {"received": len(ages), "age_p50_ms": percentile(ages, 50), "age_p99_ms": percentile(ages, 99)}
    print(json.dumps(result | {"cpu_ms_per_image": round(cpu, 2)}), flush=True)


def reception(size: str, kind: str, rate: float, options: argparse.Namespace) -> dict:
    domain, inner = free_domain(), [str(Path(__file__).resolve()), "--role"]
    warm_up = ["--warm-up", str(options.warm_up)]
    receiver = start(
        domain, [*inner, "images", "--kind", kind, *warm_up], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    camera = start(
        domain,
        [
            *inner,
            "camera",
            "--sizes",
            size,
            "--encodings",
            "jpeg" if kind == "jpeg" else "rgb8",
            "--views",
            "1",
            "--rates",
            str(rate),
            "--seconds",
            str(options.seconds),
            *warm_up,
        ],
        stdout=subprocess.PIPE,
    )
    camera.stdout.readline()
    published = json.loads(camera.stdout.readline())["published"]
    camera.wait(60)
    print(file=receiver.stdin, flush=True)
    found = json.loads(receiver.stdout.readline())
    receiver.wait(60)
    return {"size": size, "kind": kind, "rate_hz": rate, "published": published} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["640x480"], metavar="WxH")
    parser.add_argument("--encodings", nargs="+", default=["rgb8"], choices=ENCODINGS)
    parser.add_argument("--views", nargs="+", type=int, default=[2], choices=range(1, len(CAMERAS) + 1))
    parser.add_argument("--rates", nargs="+", type=float, default=[2.0], help="sets per second")
    parser.add_argument(
        "--transports", nargs="+", default=["topic", "shared_memory"], choices=("topic", "shared_memory")
    )
    parser.add_argument("--model", default="tiny-random")
    add_placement(parser)
    parser.add_argument("--parameters", nargs="+", default=[], metavar="NAME:=VALUE", help="of the node, beside these")
    parser.add_argument("--seconds", type=float, default=10.0, help="per case")
    parser.add_argument("--start-sec", type=float, default=120.0, help="the node may take so long until it subscribes")
    parser.add_argument("--warm-up", type=int, default=5, help="sets before those that count")
    parser.add_argument("--reception", action="store_true", help="measure subscriptions to images, without the node")
    parser.add_argument("--verbose", action="store_true", help="show what the node logs")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--role", choices=("camera", "policy", "images"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    roles = {"camera": publish_images, "policy": receive_tokens, "images": receive_images}
    if options.role:
        return roles[options.role](options)
    if options.reception:
        cases = itertools.product(options.sizes, KINDS, options.rates)
        results = (reception(*case, options) for case in cases)
    else:
        cases = itertools.product(options.sizes, options.encodings, options.views, options.rates, options.transports)
        results = (run(*case, options) for case in cases)
    rows = []
    for row in results:
        shown = {key: value for key, value in row.items() if not isinstance(value, list)}
        if not rows:
            print("| " + " | ".join(shown) + " |\n|" + " --- |" * len(shown))
        print("| " + " | ".join(map(str, shown.values())) + " |", flush=True)
        rows.append(row)
    if options.json:
        asked = {name: getattr(options, name) for name in ("model", "device", "compute_dtype", "parameters")}
        result = {"machine": processor()} | asked | {"cases": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
