"""README.md's lines do what it says: the policy node is run, and receives tokens."""

import re
from pathlib import Path

import numpy as np
import pytest
from ros_harness import RosContext, RosProcess, wait_until

from vla_perception.tokens import View, VisualTokens, to_message

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tokens(sequence: int) -> VisualTokens:
    """A message as the node sends it, [2, 4, 8] in float32."""
    return VisualTokens(
        data=np.arange(64, dtype="<f4").reshape(2, 4, 8),
        dtype="float32",
        views=tuple(View(name, name, 1, 480, 640, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)) for name in ("front", "wrist")),
        sequence=sequence,
        model="tiny-random",
        weights="random",
        fingerprint="0" * 64,
        compute_dtype="float32",
        grid=(2, 2),
        token_strategy="patch",
        pool=1,
        encoders=(),
        projector="linear",
    )


def program_with(words: str) -> str:
    """The one program of README.md that has these words in it."""
    (program,) = (
        block for block in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if words in block
    )
    return program


def test_images_without_ros():
    pytest.importorskip("timm")
    program = program_with("VisualTokenizer")
    names = {"image": np.zeros((30, 40, 3), np.uint8)}
    exec(program.replace('"openvla/openvla-7b"', '"tiny-random"'), names)
    assert "[1, 256, 4096]" in program and names["tokens"].shape == (1, 196, 256)


@pytest.mark.ros
def test_the_policy_node_receives_tokens(tmp_path):
    pytest.importorskip("torch")
    from sensor_msgs.msg import CompressedImage

    program = program_with("import rclpy")
    (tmp_path / "policy.py").write_text(program, encoding="utf-8")
    with RosContext() as ros, RosProcess([str(tmp_path / "policy.py")], ros.domain) as policy:
        publisher = ros.node("tokenizer").create_publisher(CompressedImage, "tokens", 10)
        wait_until(lambda: publisher.get_subscription_count() or policy.process.poll() is not None, 60, "a policy")
        for sequence in range(3):
            publisher.publish(to_message(tokens(sequence)))
        policy.wait_for("('front', 'wrist') (2, 4, 8) float32 from tiny-random")


def test_files_that_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), f"README.md links to {target}"
