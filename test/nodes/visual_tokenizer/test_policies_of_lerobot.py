"""Small π0.5 and SmolVLA policies through the node: what transformers' own classes compute comes over DDS."""

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("rclpy")
import checkpoints  # noqa: E402
import lerobot_checkpoints  # noqa: E402
from parity import relative_error  # noqa: E402
from ros_harness import Listener, RosProcess, free_domain, wait_until  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402

from vla_perception.nodes.visual_tokenizer.empty_views import EmptyViews  # noqa: E402
from vla_perception.nodes.visual_tokenizer.parameters import PARAMETERS, TokenizerParameters  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokens import TokenSubscriber, View, VisualTokens  # noqa: E402

# Numbers are PyTorch's; test_transports.py compares the bytes that arrive, under both distributions.
pytestmark = [pytest.mark.ros, pytest.mark.jazzy_alone]


@pytest.mark.parametrize("kind", ["pi05", "smolvla"])
def test_features_and_tokens_through_the_node(kind, tmp_path):
    model = lerobot_checkpoints.paligemma() if kind == "pi05" else lerobot_checkpoints.smolvlm()
    size = 56 if kind == "pi05" else 128
    folder = lerobot_checkpoints.write(tmp_path / kind, kind, lerobot_checkpoints.vision_tensors(kind, model), size)
    tokenizer = VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")
    image = checkpoints.image(1, 96, 130)
    features, tokens = lerobot_checkpoints.computed(model, tokenizer.preprocess([image])[0])

    domain = free_domain()
    command = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args"]
    for setting in (
        f"model:={folder}",
        "cameras:=[base_0_rgb]",
        "token_dtype:=float32",
        "publish_features:=true",
        "autostart:=true",
    ):
        command += ["-p", setting]
    with (
        RosProcess(command, domain, {"OMP_NUM_THREADS": "1"}) as node,
        Listener(domain) as listener,
        TokenSubscriber(listener.node, expect_fingerprint=tokenizer.fingerprint) as source,
    ):
        publisher = listener.publisher(Image, "base_0_rgb/image_raw")
        wait_until(publisher.get_subscription_count, 90.0, "the node to subscribe")
        message = Image(height=96, width=130, encoding="rgb8", step=3 * 130, data=image.tobytes())
        end = time.monotonic() + 90.0
        while (visual := source.latest) is None:
            assert node.process.poll() is None and time.monotonic() < end, node.output
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
            publisher.publish(message)
            time.sleep(0.1)
        assert node.stop() == 0, node.output
    assert "base_0_rgb, left_wrist_0_rgb" in node.output  # the policy's order of views
    assert relative_error(visual.float32(), tokens.numpy()) < 1e-5
    assert relative_error(visual.features_float32(), features.numpy()) < 1e-5
    k = 4 if kind == "smolvla" else 1
    assert (visual.grid, visual.pixel_shuffle) == (tokenizer.grid, k)
    assert visual.as_grid(visual.encoder("siglip")).shape[1:3] == tuple(k * side for side in visual.grid)

    assert np.allclose(visual.views[0].affine, tokenizer.affine(96, 130))


def test_a_camera_that_the_robot_lacks_is_an_empty_view_in_its_place(tmp_path):
    """`cameras: [base, none, wrist]`: -1 through the tower, computed once, and not valid."""
    model = lerobot_checkpoints.paligemma()
    folder = lerobot_checkpoints.write(tmp_path / "pi05", "pi05", lerobot_checkpoints.vision_tensors("pi05", model), 56)
    tokenizer = VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")
    empty_views = EmptyViews(tokenizer, ("none", "base", "none", "wrist"))
    pixels = tokenizer.preprocess([checkpoints.image(1), checkpoints.image(2)])
    output = tokenizer.encode(pixels, features=True)
    tokens, features = empty_views.add_tokens(output)
    _, empty = lerobot_checkpoints.computed(model, torch.full((1, 3, 56, 56), -1.0))
    for view, expected in enumerate((empty[0], output.tokens[0], empty[0], output.tokens[1])):
        assert relative_error(tokens[view].numpy(), expected.numpy()) < 1e-5
    assert features.shape[0] == 4
    encoded = []
    tokenizer.encode_empty = encoded.append  # not again
    assert torch.equal(empty_views.add_tokens(output)[0], tokens) and not encoded
    views = [View(name, name, 10**18, 90, 130, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)) for name in ("base", "wrist")]
    named = empty_views.add_views(views)
    assert [view.camera for view in named] == ["none", "base", "none_2", "wrist"]
    assert [view.valid for view in named] == [False, True, False, True]
    assert named[0].stamp_ns == 10**18
    message = VisualTokens.from_torch(tokens, sequence=0, views=named, features=features, **tokenizer.metadata())
    assert VisualTokens.from_bytes(message.to_bytes()).valid == (False, True, False, True)


def test_cameras_that_are_missing_may_be_several_and_not_all():
    parameters = TokenizerParameters(cameras=("none", "base", "none"))
    assert parameters.subscribed_cameras == ("base",)
    check = PARAMETERS["cameras"].check
    assert not check(("none", "base", "none")) and check(("none",)) and check(("base", "base", "none"))
