"""Where the device leaves the cores free, the next set is decoded and prepared while one is encoded."""

import signal
import threading
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("timm")
from ros_domain import RosProcess, free_domain, wait_until  # noqa: E402
from test_visual_tokenizer_node import DEFAULTS, Robot, assert_same_tokens, image_message, picture  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402

pytestmark = pytest.mark.ros


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_next_set_is_prepared_during_an_encoding_and_none_is_mixed_up(device):
    domain, tokenizer = free_domain(), VisualTokenizer.load("small")
    pictures, ended = {}, threading.Event()
    command = [str(Path(__file__).with_name("overlapping_node.py")), "--ros-args", "-p", "token_dtype:=float32"]
    command += ["-p", f"device:={device}"]
    with RosProcess(command, domain) as process:
        robot = Robot(domain, process)

        def film() -> None:
            while not ended.wait(0.05):
                stamp = robot.next_stamp(50)
                pictures[stamp] = picture(stamp % 2**32)
                robot.send("front", image_message(pictures[stamp], stamp))

        try:
            assert not robot.set(**DEFAULTS)
            robot.start()
            camera = threading.Thread(target=film)
            camera.start()
            try:
                messages = robot.wait_for_tokens(6)[:6]
                counts = robot.counts("front", lambda counts: counts["replaced"] > 0)
                model = robot.diagnostics[-1]["model"]
            finally:
                ended.set()
                camera.join()
            stamps = [message.stamp_ns for message in messages]
            assert stamps == sorted(set(stamps))  # in the order in which they were taken, each once
            for message in messages:
                assert_same_tokens(message, tokenizer([pictures[message.stamp_ns]]))
            assert (model["encode_errors"], model["non_finite"]) == ("0", "0")
            assert counts["encoded"] >= 6  # and every other frame is accounted for, as Robot sees to
            # What waits for the encoder when the node is deactivated is given up, and the threads end.
            robot.unconfigure()
            wait_until(lambda: "camera front" not in robot.diagnostics[-1], 10, "no camera in the diagnostics")
        finally:
            ended.set()
            robot.close()
        assert process.stop(signal.SIGTERM) == 0, process.output
        assert "Traceback" not in process.output
