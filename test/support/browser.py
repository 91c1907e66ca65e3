"""A real Chromium and a running tokenizer with its page: for tests, benchmarks and the images in docs/images."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ros_harness import ROOT, RosProcess, wait_until

CAMERAS = ("front", "wrist")
WINDOW, PHONE = (1440, 900), (390, 844)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def unavailable_reason() -> str:
    """Why no browser can be driven here; empty if one can."""
    try:
        import selenium  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install '.[test]'"
    if not any(map(shutil.which, _NAMES)) or shutil.which("chromedriver") is None:
        return "needs Chromium and its driver: apt-get install chromium chromium-driver (Debian)"
    return ""


@contextlib.contextmanager
def browser() -> Iterator:
    """Selenium's driver of a headless Chromium with a window of `WINDOW`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, _NAMES)))
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        resize(driver, WINDOW)
        yield driver
    finally:
        driver.quit()


def resize(driver, size: tuple[int, int], *, scale: float = 1, mobile: bool = False) -> None:
    """The page's own width and height, in CSS pixels."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def fast_dds_profile() -> dict[str, str]:
    """Images and tokens go through Fast DDS's shared memory, as with the launch files."""
    profile = str(ROOT / "config" / "fastdds.xml")
    return {"FASTRTPS_DEFAULT_PROFILES_FILE": profile, "FASTDDS_DEFAULT_PROFILES_FILE": profile}


def tokenizer(domain: int, **parameters: object) -> RosProcess:
    """The real node with the preset `tiny-random` on the sample bag's cameras."""
    given = {
        "model": "tiny-random",
        "cameras": f"[{','.join(CAMERAS)}]",
        "image_transport": "compressed",
        "publish_features": True,
        "autostart": True,
    } | parameters
    arguments = [part for name, value in given.items() for part in ("-p", f"{name}:={value}".replace("True", "true"))]
    command = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", *arguments]
    return RosProcess(command, domain, fast_dds_profile() | {"OMP_NUM_THREADS": "1"})


def player(domain: int, rate: float = 1.0) -> RosProcess:
    """The sample bag in a loop, stamped anew; at rate 1 its cameras send 5 images a second."""
    bag = ROOT / "examples" / "sample_bag"
    parameters = ["-p", f"bag:={bag}", "-p", "loop:=true", "-p", "restamp:=true", "-p", f"rate:={rate}"]
    return RosProcess(["-m", "vla_perception.nodes.bag_player", "--ros-args", *parameters], domain, fast_dds_profile())


class View(RosProcess):
    """`vla-perception view` on a free port.

    Attributes:
        address: of its page.
    """

    def __init__(self, domain: int, *options: str, extra: Mapping[str, str] | None = None) -> None:
        command = ["-m", "vla_perception.cli", "view", "--no-browser", "--port", "0", *options]
        super().__init__(command, domain, fast_dds_profile() | dict(extra or {}))
        self.wait_for("(Ctrl-C ends it)", 120)
        self.address = re.search(r"(http://\S+)  \(Ctrl-C", self.output)[1]


def value(driver, expression: str):
    """What a JavaScript expression is in the page."""
    return driver.execute_script(f"return {expression}")


def wait_for_frames(driver, more: int = 1, timeout: float = 60.0) -> None:
    """Until the page has painted so many frames more."""
    before = value(driver, "window.view ? view.frames : 0")
    wait_until(
        lambda: value(driver, "window.view ? view.frames : 0") >= before + more, timeout, f"{more} frames painted"
    )


def pin(driver, tile: int, x: float, y: float) -> None:
    """A click on a tile, at a part of its width and height; returns when the heat map is there."""
    from selenium.webdriver import ActionChains

    canvas = driver.find_elements("css selector", "figure canvas")[tile]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    size = canvas.size
    ActionChains(driver, duration=0).move_to_element_with_offset(
        canvas, round((x - 0.5) * size["width"]), round((y - 0.5) * size["height"])
    ).click().perform()
    condition = "view.tiles.shown.pin?.hold && view.tiles.shown.spaces.every(space => space.values !== null)"
    wait_until(lambda: value(driver, condition), 20, "the heat map of the click")


def take_screenshots(driver, folder: Path) -> list[Path]:
    """Screenshots of the page that is open and shows frames: components, similarity, and on a phone."""
    from PIL import Image

    written = []

    def take(name: str) -> None:
        wait_for_frames(driver, 2)
        written.append(folder / f"{name}.jpg")
        image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        image.save(written[-1], quality=85, subsampling=0, optimize=True)  # a quarter of a PNG's size

    resize(driver, WINDOW)
    driver.execute_script("document.querySelector('[value=colors]').click(); scrollTo(0, 0)")
    take("view")
    pin(driver, 2, 0.27, 0.85)  # the cup
    driver.execute_script("scrollTo(0, 0)")
    take("view_similarity")
    resize(driver, PHONE, scale=2, mobile=True)
    take("view_phone")
    resize(driver, WINDOW)
    driver.execute_script("document.querySelector('#unpin').click(); document.querySelector('[value=colors]').click()")
    return written


def main() -> None:
    """Writes docs/images/view*.jpg anew."""
    from ros_harness import free_domain

    argparse.ArgumentParser(description=main.__doc__).parse_args()
    domain = free_domain()
    with tokenizer(domain) as node, player(domain), View(domain) as view, browser() as driver:
        node.wait_for("ready after", 120)
        driver.get(view.address)
        wait_for_frames(driver, 60, 120)  # colors have settled, and curves have begun
        for path in take_screenshots(driver, ROOT / "docs" / "images"):
            print(path)
        for process in (view, node):
            process.stop(signal.SIGTERM)


if __name__ == "__main__":
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    sys.exit(main())
