"""A model with FiLM behind the node: no tokens before a condition, and those of the one that was sent last."""

import time

import checkpoints
import film_checkpoints
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("rclpy")
from ros_harness import Listener, RosProcess, free_domain, wait_until  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokens import TokenSubscriber, tokenize  # noqa: E402

pytestmark = pytest.mark.ros


def test_tokens_of_the_condition_that_the_policy_sent(tmp_path):
    folder = film_checkpoints.write(tmp_path / "oft", film_checkpoints.film_state())
    tokenizer = VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")
    picture = checkpoints.image(1, 40, 50)
    conditions = [np.full(96, 0.5, np.float32), np.linspace(-1, 1, 96, dtype=np.float32)]
    expected = {}
    for vector in conditions:
        digest = tokenizer.set_condition(vector)
        expected[digest] = tokenize(tokenizer, {"full": picture}, token_dtype="float32")

    domain = free_domain()
    command = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args"]
    for setting in (f"model:={folder}", "cameras:=[full]", "token_dtype:=float32", "autostart:=true"):
        command += ["-p", setting]
    with (
        RosProcess(command, domain, {"OMP_NUM_THREADS": "1"}) as node,
        Listener(domain) as listener,
        TokenSubscriber(listener.node) as source,
    ):
        publisher = listener.publisher(Image, "full/image_raw")
        wait_until(publisher.get_subscription_count, 120.0, "the node to subscribe")

        def send() -> None:
            assert node.process.poll() is None, node.output
            message = Image(height=40, width=50, encoding="rgb8", step=150, data=picture.tobytes())
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
            publisher.publish(message)

        for _ in range(10):
            send()
            time.sleep(0.1)
        assert source.received == 0
        digests = []
        for vector in conditions:
            digests.append(source.set_condition(vector, "pick up the cup"))
            end = time.monotonic() + 90.0
            while source.latest is None:
                assert time.monotonic() < end, node.output
                send()
                time.sleep(0.1)
            found = source.latest
            assert found.condition == digests[-1]
            np.testing.assert_allclose(found.float32(), expected[digests[-1]].float32(), rtol=1e-4, atol=1e-5)
        assert digests == list(expected)
        with pytest.raises(ValueError, match="finite"):
            source.set_condition(np.full(96, np.nan))
        assert node.stop() == 0, node.output
    assert "'pick up the cup'" in node.output
    assert "no tokens before the policy sends 96 numbers on /condition" in node.output
