"""What the page of `vla-perception view` takes: until the first frame, from camera to pixels, of the node's rate, per click.

    python benchmarks/view.py --json view.json        # needs Chromium and its driver (apt-get install chromium chromium-driver)

The real node runs the preset `tiny-random` (random weights) on the two cameras of the sample bag; Chromium is headless and
draws without a GPU. Everything is on this machine.

first_frame_sec   from starting the command to the first painted frame, the node running, the browser open at an empty page
stamp_to_pixels_ms  from a camera's stamp to the painted frame, by the page's clock; `tokens_ms` of it until its tokens are
                  at the subscriber
rate_loss         of the node, which is sent more frames than it can encode and has a subscriber anyway: with a page open
                  at --hz 5 less than without, phases alternating. `elsewhere`: the page is on another machine (its web
                  socket is read and confirmed here, nothing is drawn); `here`: Chromium draws on the node's own cores;
                  `cores_of_view`: what the command's process takes of a core meanwhile
click_ms          from the pointer's release to the painted heat map, 2 views of 256 × 4096 bfloat16 tokens and 2176
                  features
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support"), str(ROOT / "benchmarks")]

import browser  # noqa: E402
from browser import value, wait_for_frames  # noqa: E402
from fake_feed import FakeFeed, random_tokens  # noqa: E402
from ros_harness import RosContext, RosProcess, wait_until  # noqa: E402
from transport import processor  # noqa: E402

from vla_perception.tokens import VisualTokens  # noqa: E402

CLICK = """
const done = arguments[arguments.length - 1];
const tiles = view.tiles, at = arguments[0], before = tiles.shown;
const begin = performance.now();
tiles.onTouch("front", [at, 100, at, 100], true);
const look = () => tiles.shown !== before && tiles.shown.pin ? done(performance.now() - begin) : requestAnimationFrame(look);
requestAnimationFrame(look);
"""


def percentiles(values) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 95)} | {"count": len(values)}


def first_frame(driver, domain: int) -> float:
    driver.get("about:blank")
    begin = time.time()
    with browser.View(domain) as view:
        driver.get(view.address)
        wait_for_frames(driver)
        return round(value(driver, "performance.timeOrigin + view.firstMs") / 1e3 - begin, 2)


def stamp_to_pixels(driver, domain: int, frames: int) -> dict[str, object]:
    with browser.View(domain, "--hz", "60") as view:
        driver.get(view.address)
        wait_for_frames(driver, 10)
        driver.execute_script("view.paintedMs = []")
        wait_for_frames(driver, min(frames, 100), 300)
        ages = value(driver, "view.samples.list.slice(-10).map(s => s.age_ms).filter(a => a !== null)")
        return percentiles(value(driver, "view.paintedMs")) | {"tokens_ms": round(statistics.median(ages), 1)}


class NodeRate:
    """Token messages per second, by the node's diagnostics."""

    def __init__(self, ros: RosContext) -> None:
        from diagnostic_msgs.msg import DiagnosticArray

        self._counts: list[tuple[float, int]] = []
        node = ros.node("observer")
        node.create_subscription(DiagnosticArray, "/diagnostics", self._take, 10)
        ros.spin(node)

    def _take(self, message) -> None:
        for status in message.status:
            pairs = {pair.key: pair.value for pair in status.values}
            if "token_messages" in pairs:
                self._counts.append((time.monotonic(), int(pairs["token_messages"])))

    def over(self, seconds: float) -> float:
        """From the second report after now on, for so long at least."""
        first = len(self._counts) + 1
        wait_until(lambda: len(self._counts) > first, 20, "diagnostics")
        begin, low = self._counts[first]
        wait_until(lambda: self._counts[-1][0] >= begin + seconds, seconds + 20, "diagnostics")
        end, high = self._counts[-1]
        return (high - low) / (end - begin)


@contextlib.contextmanager
def page_elsewhere(address: str):
    """A page's web socket, read and confirmed as a browser does."""
    from websockets.sync import client

    ended = threading.Event()

    def read() -> None:
        host = address.split("/")[2]
        with client.connect(f"ws://{host}/socket", origin=f"http://{host}", max_size=None) as page:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    if isinstance(page.recv(0.2), bytes):
                        page.send('{"type": "painted"}')

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def page_here(driver, address: str):
    driver.get(address)
    wait_for_frames(driver, 3)
    try:
        yield
    finally:
        driver.get("about:blank")


def rate_loss(driver, ros: RosContext, seconds: float, rounds: int) -> dict[str, object]:
    rate = NodeRate(ros)
    policy = RosProcess([str(ROOT / "examples" / "minimal_policy.py")], ros.domain, browser.fast_dds_profile())
    result: dict[str, object] = {}
    with policy, browser.View(ros.domain, "--hz", "5") as view:
        wait_until(lambda: rate.over(1.0) > 0, 60, "the node encodes")
        pages = {"elsewhere": lambda: page_elsewhere(view.address), "here": lambda: page_here(driver, view.address)}
        for name, page in pages.items():
            without, beside, cores = [], [], []
            for _ in range(rounds):
                without.append(rate.over(seconds))
                with page():
                    begin, used = time.monotonic(), cpu_seconds(view.process.pid)
                    beside.append(rate.over(seconds))
                    cores.append((cpu_seconds(view.process.pid) - used) / (time.monotonic() - begin))
            medians = statistics.median(without), statistics.median(beside)
            result[name] = {
                "without_hz": [round(x, 2) for x in without],
                "beside_hz": [round(x, 2) for x in beside],
                "loss": round(1 - medians[1] / medians[0], 3),
                "cores_of_view": round(statistics.median(cores), 3),
            }
    return result


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def large_tokens(sequence: int) -> VisualTokens:
    rng = np.random.default_rng(sequence)
    encoders = ({"name": "dinov2", "channels": [0, 1024]}, {"name": "siglip", "channels": [1024, 2176]})
    data, features = (
        (rng.normal(size=(2, 256, width)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for width in (4096, 2176)
    )
    tokens = random_tokens(sequence, grid=(16, 16))
    views = tuple(replace(view, affine=(16 / view.width, 0, 0, 0, 16 / view.height, 0)) for view in tokens.views)
    return replace(tokens, data=data, features=features, dtype="bfloat16", encoders=encoders, views=views)


def clicks(driver, count: int) -> dict[str, float]:
    from vla_perception.view.server import PageServer

    feed = FakeFeed()
    server = PageServer(feed)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        driver.get(server.address)
        wait_until(lambda: feed.readers, 20, "the page is there")
        feed.publish(large_tokens(1))
        wait_for_frames(driver)
        driver.execute_script("document.querySelector('[value=similarity]').click()")
        times = [driver.execute_async_script(CLICK, 5 + 150 * index / count) for index in range(count)]
        return percentiles(times[3:])
    finally:
        server.stop()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase of rate_loss")
    parser.add_argument("--rounds", type=int, default=3, help="of both phases, and of first_frame_sec")
    parser.add_argument("--frames", type=int, default=100, help="of stamp_to_pixels_ms")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if reason := browser.unavailable_reason():
        parser.exit(1, f"{reason}\n")
    result: dict[str, object] = {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()}
    with RosContext() as ros, browser.browser() as driver:
        result["click_ms"] = clicks(driver, 40)
        print(json.dumps(result["click_ms"]), flush=True)
        with browser.tokenizer(ros.domain) as node:
            node.wait_for("ready after", 180)
            with browser.player(ros.domain):
                result["first_frame_sec"] = [first_frame(driver, ros.domain) for _ in range(options.rounds)]
                print(result["first_frame_sec"], flush=True)
                result["stamp_to_pixels_ms"] = stamp_to_pixels(driver, ros.domain, options.frames)
                print(result["stamp_to_pixels_ms"], flush=True)
            with browser.player(ros.domain, rate=6.0):
                result["rate_loss"] = rate_loss(driver, ros, options.seconds, options.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
