"""A VLA cut in two at the projector acts as the whole one.

The whole: `miniature_openvla`, from pixels to logits in one forward pass, without vla_perception. The split: this
package's node in a process for the vision part, tokens over DDS, examples/openvla_policy.py for the rest.
"""

import contextlib
import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from ros_harness import ROOT, Listener, RosProcess, free_domain, wait_until

pytest.importorskip("timm")
pytest.importorskip("transformers", reason="transformers (the extra `test`) makes the language model")
sys.path.insert(0, str(ROOT / "examples"))

import torch
from miniature_openvla import EMPTY_TOKEN, STATISTICS, Miniature, prompt_ids
from openvla_policy import LanguageModel

from vla_perception.tokenizer import VisualTokenizer
from vla_perception.tokens import (
    FingerprintMismatchError,
    LocalTokenizer,
    TokenSubscriber,
    VisualTokens,
    tokenize,
)

INSTRUCTION = "Put the Bowl on the plate"
IMAGES = 3


#: Several processes with a thread per core each would wait for one another's threads most of the time.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def miniature():
    return Miniature()


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    return miniature.write(tmp_path_factory.mktemp("miniature") / "checkpoint")


@pytest.fixture(scope="module")
def language_model(folder):
    return LanguageModel(folder, dtype=torch.float32)


def images(seed: int, count: int) -> list[np.ndarray]:
    """Smooth ones, so that the image decides more than its noise, of two sizes."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(count):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        fine = np.kron(coarse, np.ones((20 - 4 * index, 20, 1), np.uint8))
        made.append(np.clip(fine + random.integers(-20, 20, fine.shape), 0, 255).astype(np.uint8))
    return made


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def agree(action, whole) -> None:
    """`action` of the split model, `whole` of the uncut one: (values, token ids, logits)."""
    values, ids, logits = whole
    assert action.token_ids == tuple(ids)
    assert relative(action.logits, logits) < 1e-4
    np.testing.assert_allclose(action.values, values, rtol=1e-6, atol=1e-9)


def same(received, computed) -> None:
    """What the node published, and what the tokenizer gives in this process: everything but the frame's name."""
    np.testing.assert_allclose(received.float32(), computed.float32(), rtol=1e-4, atol=1e-5)
    plain = {"data": None, "views": tuple(replace(view, frame_id="") for view in received.views)}
    assert {**vars(received), **plain} == {
        **vars(VisualTokens.from_bytes(computed.to_bytes())),
        **plain,
        "views": tuple(replace(view, frame_id="") for view in computed.views),
    }


def node_process(folder, cameras, domain) -> RosProcess:
    arguments = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args"]
    for setting in (
        f"model:={folder}",
        f"cameras:=[{','.join(cameras)}]",
        "token_dtype:=float32",
        "autostart:=true",
    ):
        arguments += ["-p", setting]
    return RosProcess(arguments, domain, ONE_THREAD)


def send(publishers, shown, cameras) -> int:
    """One image per camera with one stamp, which is returned."""
    from sensor_msgs.msg import Image

    stamp = time.time_ns()
    for publisher, image, camera in zip(publishers, shown, cameras):
        message = Image(height=image.shape[0], width=image.shape[1], encoding="rgb8", step=3 * image.shape[1])
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
        message.header.frame_id = f"{camera}_optical"
        message.data = image.tobytes()
        publisher.publish(message)
    return stamp


def send_and_wait(publishers, shown, cameras, source, node):
    """The tokens of these images. What is seen here is known to the node a little later: sent until answered."""
    end = time.monotonic() + 90.0
    while True:
        stamp = send(publishers, shown, cameras)
        with contextlib.suppress(TimeoutError):
            while (visual := source.wait(3.0)).stamp_ns != stamp:
                pass
            return visual
        assert node.process.poll() is None and time.monotonic() < end, node.output


@pytest.mark.ros
@pytest.mark.jazzy_alone  # numbers are PyTorch's; the next test has the policy's process, under both
def test_split_over_dds_acts_as_the_whole_with_one_view(miniature, folder, language_model):
    pytest.importorskip("rclpy")
    from sensor_msgs.msg import Image

    tokenizer = VisualTokenizer.load(folder)
    domain, cameras = free_domain(), ("full",)
    with (
        node_process(folder, cameras, domain) as node,
        Listener(domain) as listener,
        TokenSubscriber(listener.node) as source,
    ):
        publishers = [listener.publisher(Image, "full/image_raw")]
        wait_until(publishers[0].get_subscription_count, 90.0, "the node to subscribe")
        chosen = set()
        for seed in range(IMAGES):
            shown = images(seed, 1)
            visual = send_and_wait(publishers, shown, cameras, source, node)
            assert visual.cameras == cameras and visual.dtype == "float32"
            whole = miniature.act(shown, INSTRUCTION)
            agree(language_model.act(visual, INSTRUCTION), whole)
            chosen.add(tuple(whole[1]))
            same(visual, tokenize(tokenizer, {"full": shown[0]}, stamp_ns=visual.stamp_ns, sequence=visual.sequence))
        assert len(chosen) > 1, "the images must matter"
        assert node.stop() == 0, node.output


@pytest.mark.ros
def test_split_over_dds_acts_as_the_whole_with_two_views(miniature, folder, language_model):
    """Logits by this process, actions by the example in a process of its own."""
    pytest.importorskip("rclpy")
    from sensor_msgs.msg import Image, JointState

    domain, cameras = free_domain(), ("full", "wrist")
    fingerprint = VisualTokenizer.load(folder).fingerprint
    policy_arguments = [
        str(ROOT / "examples" / "openvla_policy.py"),
        "--model",
        str(folder),
        "--instruction",
        INSTRUCTION,
        "--dtype",
        "float32",
        "--views",
        "2",
        "--max-age",
        "30",
        "--expect-fingerprint",
        fingerprint,
    ]
    with (
        node_process(folder, cameras, domain) as node,
        RosProcess(policy_arguments, domain, ONE_THREAD) as policy,
        Listener(domain) as listener,
        TokenSubscriber(listener.node, expect_fingerprint=fingerprint) as source,
    ):
        actions = listener.collect(JointState, "action")
        publishers = [listener.publisher(Image, f"{camera}/image_raw") for camera in cameras]
        for publisher in publishers:
            wait_until(publisher.get_subscription_count, 90.0, "the node to subscribe")
        policy.wait_for("waiting for /tokens", 90.0)
        wait_until(lambda: listener.node.count_publishers("/action"), 30.0, "the policy's publisher")
        for seed in range(IMAGES):
            shown = images(seed, 2)

            def action_on(stamp):
                for action in list(actions):
                    if (action.header.stamp.sec, action.header.stamp.nanosec) == divmod(stamp, 10**9):
                        return action
                return None

            end = time.monotonic() + 60.0
            while True:  # the policy may be matched later than this process
                visual = send_and_wait(publishers, shown, cameras, source, node)
                with contextlib.suppress(AssertionError):
                    action = wait_until(lambda: action_on(visual.stamp_ns), 5.0, "the action")  # noqa: B023
                    break
                assert time.monotonic() < end, policy.output
            assert visual.cameras == cameras
            whole = miniature.act(shown, INSTRUCTION)
            agree(language_model.act(visual, INSTRUCTION), whole)
            np.testing.assert_allclose(action.position, whole[0], rtol=1e-6, atol=1e-9)
            assert list(action.name) == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
            assert action.header.frame_id == "full_optical"
        assert policy.stop() == 0, policy.output
        assert node.stop() == 0, node.output


def test_split_in_one_process(miniature, folder, language_model):
    """The same through LocalTokenizer, where no ROS is."""
    source = LocalTokenizer(VisualTokenizer.load(folder))
    for seed in range(2):
        full, wrist = images(seed, 2)
        visual = source.encode({"full": full, "wrist": wrist})
        agree(language_model.act(visual, INSTRUCTION), miniature.act([full, wrist], INSTRUCTION))
        agree(language_model.act(visual.select("full"), INSTRUCTION), miniature.act([full], INSTRUCTION))


def test_the_order_of_views_and_the_prompt_matter(folder, language_model):
    """Otherwise agreement would prove nothing."""
    first, second = images(0, 2)
    tokenizer = VisualTokenizer.load(folder)
    right = language_model.act(tokenize(tokenizer, {"full": first, "wrist": second}), INSTRUCTION).logits[0]
    swapped = language_model.act(tokenize(tokenizer, {"wrist": second, "full": first}), INSTRUCTION).logits[0]
    told = language_model.act(tokenize(tokenizer, {"full": first, "wrist": second}), "do nothing").logits[0]
    assert relative(swapped, right) > 1e-2 and relative(told, right) > 1e-2


def test_the_prompt_is_openvlas(language_model, folder):
    assert language_model.prompt_ids(INSTRUCTION) == prompt_ids(INSTRUCTION)
    ending = LanguageModel(folder, dtype=torch.float32, prompt="In: {} ")  # ends in that token by itself
    assert ending.prompt_ids("x").count(EMPTY_TOKEN) == 3 and ending.prompt_ids("x")[-1] == EMPTY_TOKEN


def test_only_the_language_model_is_read(folder, monkeypatch):
    import openvla_policy

    read = []

    class Spy:
        def __init__(self, *arguments, **options):
            self._file = safe_open(*arguments, **options)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *exception):
            return self._file.__exit__(*exception)

        def keys(self):
            return self._file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self._file.get_tensor(name)

    safe_open = openvla_policy.safe_open
    monkeypatch.setattr(openvla_policy, "safe_open", Spy)
    LanguageModel(folder)
    assert read and all(name.startswith("language_model.") for name in read)


def test_wrong_tokens_and_settings_are_refused(folder, language_model, tmp_path):
    tokenizer = VisualTokenizer.from_preset("tiny-random")
    image = {"full": images(0, 1)[0]}
    with pytest.raises(ValueError, match="256 channels, this language model takes 48"):
        language_model.act(tokenize(tokenizer, image), INSTRUCTION)
    with pytest.raises(FingerprintMismatchError):
        LocalTokenizer(tokenizer, expect_fingerprint=VisualTokenizer.load(folder).fingerprint).encode(image)
    with pytest.raises(ValueError, match="one of miniature"):
        LanguageModel(folder, unnorm_key="bridge_orig")
    # Statistics of several data sets: the policy must say which.
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config["norm_stats"]["other"] = {"action": STATISTICS}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="one of miniature, other"):
        LanguageModel(tmp_path, dtype=torch.float32)
    # Without a mask every dimension is scaled.
    del config["norm_stats"]["other"], config["norm_stats"]["miniature"]["action"]["mask"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    unmasked = LanguageModel(tmp_path, dtype=torch.float32)
    visual = tokenize(VisualTokenizer.load(folder), image)
    action = unmasked.act(visual, INSTRUCTION)
    np.testing.assert_allclose(action.values[6], (action.normalized[6] + 1) / 2, rtol=1e-9)


def test_bfloat16_tokens_change_logits_less_than_choices_need(miniature, folder, language_model):
    """The wire's 16 bits: an error far below the logits' size, and no other choice than by near-ties."""
    tokenizer = VisualTokenizer.load(folder)
    for seed in range(3):
        (image,) = images(seed, 1)
        visual = tokenize(tokenizer, {"full": image}, token_dtype="bfloat16")
        _values, ids, logits = miniature.act([image], INSTRUCTION)
        action = language_model.act(visual, INSTRUCTION)
        best, second = logits[0].topk(2).values
        error = (action.logits[0] - logits[0]).abs().max()
        assert 0 < error / logits[0].abs().max() < 2e-2
        assert action.token_ids[0] == ids[0] or best - second < 2 * error
