"""The page in a real Chromium, on the real node and the sample bag: seen and used as a person would.

One browser, one tokenizer and one page for all of it; tests run in their order.
"""

import contextlib
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("uvicorn")

import browser
from browser import PHONE, WINDOW, pin, value, wait_for_frames
from PIL import Image
from ros_harness import RosContext, wait_until

from vla_perception.tokens import TokenSubscriber, to_message

pytestmark = [
    pytest.mark.ros,
    pytest.mark.kilted_alone,  # what rclpy has to do with is in test_live.py
    pytest.mark.skipif(bool(browser.unavailable_reason()), reason=browser.unavailable_reason()),
]

HOSTILE = '<img src="x" onerror="window.hacked = true"><script>window.hacked = true</script>'


class Seen:
    """What is open, and every message that went to this process, too."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.ros = stack.enter_context(RosContext())
        self.node = stack.enter_context(browser.tokenizer(self.ros.domain))
        self.player = stack.enter_context(browser.player(self.ros.domain))
        self.view = stack.enter_context(browser.View(self.ros.domain))
        self.driver = stack.enter_context(browser.browser())
        self.messages: dict[int, object] = {}
        observer = self.ros.node("observer")
        self.subscriber = TokenSubscriber(observer, callback=self._keep)
        stack.callback(self.subscriber.close)
        self.observer = observer
        self.ros.spin(observer)
        self.driver.get(self.view.address)

    def _keep(self, tokens) -> None:
        self.messages[tokens.sequence] = tokens
        while len(self.messages) > 300:
            del self.messages[next(iter(self.messages))]

    def text(self, selector: str) -> str:
        return self.driver.find_element("css selector", selector).text

    def click(self, selector: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.driver.find_element("css selector", selector))


@pytest.fixture(scope="module")
def seen():
    with contextlib.ExitStack() as stack:
        yield Seen(stack)


def similarity(tokens, view: int, patch: int) -> dict[str, np.ndarray]:
    """Space → float64 [views, patches], from the message alone."""
    spaces = {str(e["name"]): tokens.features_float32()[..., slice(*e["channels"])] for e in tokens.encoders}
    spaces["projected tokens"] = tokens.float32()
    result = {}
    for name, vectors in spaces.items():
        vectors = vectors.astype(np.float64)
        reference = vectors[view, patch]
        result[name] = vectors @ reference / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(reference)
    return result


def test_the_page_comes_up_and_frames_change(seen):
    wait_for_frames(seen.driver, 3, 120)
    drawn = "document.querySelector('figure canvas').toDataURL()"
    first = value(seen.driver, drawn)
    wait_for_frames(seen.driver, 3)
    assert value(seen.driver, drawn) != first
    wait_until(lambda: seen.text("#state") == "active", 30, "the state of the running tokenizer")
    assert "Random weights" in seen.text("#banner")
    captions = [element.text for element in seen.driver.find_elements("css selector", "figcaption")]
    expected = [f"{camera} {space}" for camera in browser.CAMERAS for space in ("dinov2", "siglip", "projected tokens")]
    assert captions == expected, "every image has come, too"
    assert value(seen.driver, "view.health.details.reception.transport") in ("topic", "shared memory")
    assert value(seen.driver, "view.frame.views.map(v => v.image_late_ms)") == [0, 0], "the very image of the tokens"


def test_a_click_gives_numpys_similarity_value_by_value(seen):
    seen.click("#pause")

    def pinned_in_what_is_shown() -> bool:  # a frame may have been on its way
        pin(seen.driver, 4, 0.4, 0.7)  # the second camera, in siglip's space
        return value(seen.driver, "view.tiles.shown.pin?.sequence === view.frame.sequence")

    wait_until(pinned_in_what_is_shown, 20, "a pin while it is paused")
    assert seen.text("#pause") == "Go on"
    sequence = value(seen.driver, "view.frame.sequence")
    tokens = wait_until(lambda: seen.messages.get(sequence), 10, "this process got that message, too")
    view = tokens.views[1]
    patch = tokens.token_at(0.4 * view.width, 0.7 * view.height, 1)
    assert value(seen.driver, "view.tiles.shown.pin.patches") == [patch]
    shown = value(seen.driver, "view.tiles.shown.spaces.map(s => [s.space, Array.from(s.values)])")
    expected = similarity(tokens, 1, patch)
    assert [name for name, _ in shown] == list(expected)
    for name, values in shown:
        assert np.allclose(np.reshape(values, (2, -1)), expected[name], atol=1e-5), name
    norm = np.linalg.norm(tokens.float32()[1, patch])
    corners = np.array(tokens.patch_corners(patch, 1)).round()
    told = seen.text("#patch")
    assert f"wrist: token {patch} (row {patch // 14}, column {patch % 14})" in told
    assert f"pixels {corners[:, 0].min():.0f}–{corners[:, 0].max():.0f}" in told
    assert float(re.search(r"projected tokens ([\d.]+)", told)[1]) == pytest.approx(norm, rel=1e-3)


def test_under_the_pointer_it_is_compared_too_and_columns_can_be_chosen(seen):
    from selenium.webdriver import ActionChains

    seen.click("#unpin")
    wait_until(lambda: not value(seen.driver, "view.tiles.shown.pin"), 10, "released")
    names = [label.text for label in seen.driver.find_elements("css selector", "#spaces label")]
    assert names == ["dinov2", "siglip", "encoders joined", "projected tokens"]
    for box in seen.driver.find_elements("css selector", "#spaces input")[:3]:  # leaves the last two
        seen.driver.execute_script("arguments[0].click()", box)
    columns = "view.tiles.shown.spaces.map(space => space.space)"
    wait_until(lambda: value(seen.driver, columns) == names[2:], 10, "two columns")
    canvas = seen.driver.find_elements("css selector", "figure canvas")[0]
    ActionChains(seen.driver, duration=0).move_to_element(canvas).perform()
    wait_until(lambda: value(seen.driver, "view.tiles.shown.pin?.hold") is False, 10, "the patch under the pointer")
    tokens = seen.messages[value(seen.driver, "view.frame.sequence")]
    (patch,) = value(seen.driver, "view.tiles.shown.pin.patches")
    joined = tokens.features_float32().astype(np.float64)
    expected = joined @ joined[0, patch] / np.linalg.norm(joined, axis=-1) / np.linalg.norm(joined[0, patch])
    shown = value(seen.driver, "[view.tiles.shown.spaces[0].space, Array.from(view.tiles.shown.spaces[0].values)]")
    assert shown[0] == "encoders joined" and np.allclose(np.reshape(shown[1], (2, -1)), expected, atol=1e-5)
    for box in seen.driver.find_elements("css selector", "#spaces input")[:3]:
        seen.driver.execute_script("arguments[0].click()", box)
    wait_until(lambda: value(seen.driver, columns) == [names[0], names[1], names[3]], 10, "three columns")
    pin(seen.driver, 4, 0.4, 0.7)


def test_the_copied_python_computes_what_the_page_shows(seen, tmp_path):
    seen.click("#copy")
    code = wait_until(lambda: value(seen.driver, "view.copied"), 5, "the copied Python")
    saved = seen.driver.find_element("css selector", "#save-pinned").get_attribute("href")
    sequence = value(seen.driver, "view.tiles.shown.pin.sequence")
    with urllib.request.urlopen(saved, timeout=10) as answer:
        (tmp_path / f"tokens-{sequence}.safetensors").write_bytes(answer.read())
    code = code.replace("print(", "result = (") + "np.save('result.npy', result)\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    shown = value(seen.driver, "Array.from(view.tiles.shown.spaces.at(-1).values)")
    assert np.allclose(np.load(tmp_path / "result.npy").ravel(), shown, atol=6e-4), "three digits of each"
    seen.click("#pause")
    wait_until(lambda: value(seen.driver, "view.frame.sequence") > sequence, 20, "later messages")
    seen.click("#copy")
    assert f"tokens-{sequence}.safetensors" in value(seen.driver, "view.copied"), "the file stays the same"
    with urllib.request.urlopen(saved, timeout=10) as answer:
        assert answer.read() == (tmp_path / f"tokens-{sequence}.safetensors").read_bytes()
    seen.click("#pause")


def test_a_dragged_box_is_compared_by_its_mean(seen):
    from selenium.webdriver import ActionChains

    canvas = seen.driver.find_elements("css selector", "figure canvas")[2]
    width, height = canvas.size["width"], canvas.size["height"]
    chain = ActionChains(seen.driver, duration=0).move_to_element_with_offset(canvas, -width // 4, -height // 4)
    chain.click_and_hold().move_by_offset(width // 5, height // 5).release().perform()
    wait_until(lambda: value(seen.driver, "view.tiles.shown.pin.patches.length") > 3, 10, "a mean of several")
    tokens = seen.messages[value(seen.driver, "view.frame.sequence")]
    vectors = tokens.float32().astype(np.float64)
    reference = vectors[0, value(seen.driver, "view.tiles.shown.pin.patches")].mean(axis=0)
    expected = vectors @ reference / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(reference)
    shown = value(seen.driver, "Array.from(view.tiles.shown.spaces[2].values)")
    assert np.allclose(np.reshape(shown, (2, -1)), expected, atol=1e-5)


def test_it_is_used_without_a_mouse(seen):
    from selenium.webdriver import ActionChains, Keys

    driver = seen.driver
    driver.execute_script("document.querySelector('figure canvas').focus()")
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    wait_until(lambda: not value(driver, "view.tiles.shown.pin?.hold"), 10, "released")
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ENTER).perform()
    # The first key goes to the middle of the grid of 14 × 14.
    wait_until(lambda: value(driver, "view.tiles.shown.pin?.patches") == [8 * 14 + 8], 10, "pinned by Enter")
    assert "row 8, column 8" in seen.text("#patch")
    for element in driver.find_elements("css selector", "button, select, input, a, figure canvas, output"):
        if element.is_displayed():
            assert element.accessible_name or element.tag_name == "output", element.get_attribute("outerHTML")[:200]
    assert not driver.find_elements("css selector", "[tabindex]:not([tabindex='0'])")
    assert value(driver, "document.documentElement.lang") == "en"
    assert {element.aria_role for element in driver.find_elements("css selector", "main, header")} == {"main", "banner"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(seen, scheme):
    """WCAG 2's contrast for text, 4.5 to 1, of every pair of colors that the style sheet puts together."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    seen.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    names = ["back", "card", "text", "dim", "accent", "good", "bad", "warn-back", "warn-text", "bad-back"]
    read = "getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    colors = dict(zip(names, value(seen.driver, f"{names}.map(name => {read})")))

    def luminance(name: str) -> float:
        parts = np.array([int(colors[name][at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    pairs = [(front, "card") for front in ("text", "dim", "accent", "good", "bad")]
    for front, back in [*pairs, ("dim", "back"), ("warn-text", "warn-back"), ("text", "bad-back")]:
        high, low = sorted((luminance(front), luminance(back)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, front, back)
    seen.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_goes_on_and_curves_move(seen):
    seen.click("#unpin")
    seen.click("#pause")
    wait_for_frames(seen.driver, 3)
    points = (
        "view.samples.list.filter(s => s.out_hz > 0 && s.in_hz.front > 0 && s.encode_p50 > 0 && s.age_ms > 0).length"
    )
    before = value(seen.driver, points)
    drawn = "document.querySelector('#latency canvas').toDataURL()"
    first = value(seen.driver, drawn)
    wait_until(lambda: value(seen.driver, points) >= before + 2, 20, "two more points of every curve")
    wait_until(lambda: value(seen.driver, drawn) != first, 20, "the curves have moved")


def test_screenshots_are_taken(seen, tmp_path):
    for path in browser.take_screenshots(seen.driver, tmp_path):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        width, height = PHONE if "phone" in path.name else WINDOW
        scale = 2 if "phone" in path.name else 1
        assert pixels.shape == (height * scale, width * scale, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5000, "images and colors are in it"
    assert value(seen.driver, "document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"


def test_the_page_takes_no_more_and_more_memory(seen):
    def used() -> int:
        seen.driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        metrics = seen.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "JSHeapUsedSize")

    seen.driver.execute_cdp_cmd("Performance.enable", {})
    wait_for_frames(seen.driver, 5)
    before = used()
    wait_for_frames(seen.driver, 40)
    assert used() - before < 2 << 20, "40 frames are 8 MB of images and arrays"


def test_what_foreign_nodes_name_is_text_and_no_markup(seen):
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
    from fake_feed import random_tokens
    from rcl_interfaces.msg import Log
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from sensor_msgs.msg import CompressedImage

    node = seen.observer
    publisher = node.create_publisher(CompressedImage, "/stranger/tokens", 10)
    diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
    log = node.create_publisher(Log, "/rosout", QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL))
    status = [
        DiagnosticStatus(
            name=f"{HOSTILE}: {what}",
            message=HOSTILE,
            hardware_id="/observer",
            values=[
                KeyValue(key=key, value=HOSTILE) for key in ("model", "token_messages", "weights", "device", HOSTILE)
            ],
        )
        for what in ("model", f"camera {HOSTILE}")
    ]
    ended = []

    def speak() -> None:
        publisher.publish(to_message(random_tokens(len(ended), (HOSTILE, "\u202ereversed"), model=HOSTILE)))
        log.publish(Log(level=b"\x28" if isinstance(Log().level, bytes) else 40, name=HOSTILE, msg=HOSTILE))
        diagnostics.publish(DiagnosticArray(status=status))
        ended.append(1)

    timer = node.create_timer(0.3, speak)
    options = "[...document.querySelectorAll('#tokenizers option')].map(option => option.value)"
    wait_until(lambda: "/stranger/tokens" in value(seen.driver, options), 30, "it is found by itself")
    assert set(value(seen.driver, options)) == {"/tokens", "/stranger/tokens"}
    choose = (
        "const menu = document.querySelector('#tokenizers'); menu.value = arguments[0];"
        "menu.dispatchEvent(new Event('change'))"
    )
    seen.driver.execute_script(choose, "/stranger/tokens")
    wait_until(lambda: HOSTILE in seen.text("#tiles") and HOSTILE in seen.text("#log"), 30, "its names as text")
    pin(seen.driver, 0, 0.5, 0.5)
    seen.click("#copy")
    wait_until(lambda: HOSTILE in seen.text("#facts") and HOSTILE in seen.text("#patch"), 30, "and its facts")
    assert not seen.driver.find_elements("css selector", "img, script:not([src])")
    assert value(seen.driver, "window.hacked") is None
    timer.cancel()
    seen.driver.execute_script(choose, "/tokens")
    wait_for_frames(seen.driver, 2)


def test_a_killed_tokenizer_is_gone_and_comes_back(seen):
    seen.node.process.kill()
    wait_until(lambda: seen.text("#state") == "gone", 20, "gone")
    assert value(seen.driver, "document.body.classList.contains('gone')")
    frames = value(seen.driver, "view.frames")
    with browser.tokenizer(seen.ros.domain) as node:
        wait_until(lambda: seen.text("#state") == "active", 120, "back")
        wait_until(lambda: value(seen.driver, "view.frames") > frames + 2, 60, "frames again")
        events = seen.text("#events")
        assert "gone: nothing heard for" in events and "back" in events and "started anew" in events
        assert node.stop(signal.SIGTERM) == 0


def test_a_recording_has_a_time_line(seen):
    first = seen.driver.current_window_handle
    seen.driver.switch_to.new_window("tab")
    bag = str(browser.ROOT / "examples" / "sample_bag")
    with browser.View(seen.ros.domain, bag, "--model", "tiny-random") as view:
        seen.driver.get(view.address)
        wait_for_frames(seen.driver, 1)
        assert value(seen.driver, "document.querySelector('#seek').max") == "39", "frame sets of both cameras"
        assert not seen.driver.find_element("css selector", "#health").is_displayed()
        seek = "const seek = document.querySelector('#seek'); seek.value = 20; seek.dispatchEvent(new Event('input'))"
        seen.driver.execute_script(seek)
        wait_until(lambda: value(seen.driver, "view.frame.index") == 20, 30, "that message")
        assert re.fullmatch(r"\d\.\d\d of 7\.\d\d s", seen.text("#when"))
        pin(seen.driver, 0, 0.5, 0.5)
        seen.click("#play")
        wait_until(lambda: value(seen.driver, "view.frame.index") > 22, 30, "it plays")
        seen.driver.close()
        seen.driver.switch_to.window(first)
        assert view.stop(signal.SIGTERM) == 0


def test_nothing_went_wrong_in_the_page(seen):
    problems = [line for line in seen.driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]
    assert not problems
    assert seen.view.stop(signal.SIGINT) == 0, seen.view.output
    wait_until(lambda: not value(seen.driver, "document.querySelector('#notice').hidden"), 10, "the page says so")
    assert "does not answer" in seen.text("#notice")
    assert "Traceback" not in seen.view.output
