"""LeRobot's own SmolVLA, π0 and π0.5 in miniature act alike whole and split, where LeRobot is installed.

The whole: LeRobot's own code from images to actions. The split: this package's tokenizer on the file that LeRobot saved, and
LeRobot's own policy with examples/lerobot_policy.py in the place of its vision. `pytest -s` prints how far they are apart.
"""

import os
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("lerobot", reason="an environment with LeRobot: test/data/README.md")
import lerobot_environment  # noqa: E402
import make_lerobot_policy as make  # noqa: E402
from parity import relative_error  # noqa: E402
from ros_harness import ROOT, Listener, RosProcess, free_domain, wait_until  # noqa: E402

sys.path.insert(0, str(ROOT / "examples"))
import lerobot_policy  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokens import View, VisualTokens  # noqa: E402

SHAPE = (3, 60, 90)
#: The Python that runs the node; by default the same. `make .venv/.installed` makes one.
NODE_PYTHON = os.environ.get("VLA_PERCEPTION_NODE_PYTHON", sys.executable)


class Miniature:
    """A policy's folder, and both halves of it."""

    def __init__(self, kind: str, folder) -> None:
        self.kind, self.folder = kind, folder
        make.write(kind, folder, SHAPE)
        self.model = lerobot_environment.as_transformers_places_patches(folder, kind)
        self.image_transforms = lerobot_environment.image_transforms(kind)
        self.tokenizer = VisualTokenizer.load(
            self.model, device="cpu", compute_dtype="float32", image_transforms=self.image_transforms
        )
        self.whole = make.load(folder)
        self.policy, self.before, self.behind = lerobot_policy.load(str(folder), "cpu")
        self.split = lerobot_policy.SplitPolicy(self.policy)

    def tokens(self, images) -> VisualTokens:
        """Of these images of the first views, and an empty view if there are fewer than the policy takes."""
        missing = len(images) < len(self.split.views)
        return message(self.tokenizer, self.split.views, images, self.tokenizer(list(images)).tokens, missing)

    def act(self, tokens: VisualTokens, inputs) -> np.ndarray:
        """Actions [steps, dimensions], as the example's `main` computes them, with the noise that is given."""
        self.policy.model.sample_noise = lambda _shape, _device: torch.from_numpy(inputs["noise"])
        observation = {"observation.state": torch.from_numpy(inputs["state"])[None], "task": make.INSTRUCTION}
        batch = self.before(observation | self.split.images(tokens))
        return self.behind(self.split.act(tokens, batch))[0].float().numpy()


def message(tokenizer, names, images, values: torch.Tensor, missing: bool) -> VisualTokens:
    views = [
        View(name, "", 0, *image.shape[:2], tokenizer.affine(*image.shape[:2])) for name, image in zip(names, images)
    ]
    if missing:
        values = torch.cat([values, tokenizer.encode_empty().tokens.to(values.dtype)])
        views.append(View("none", "", 0, 60, 90, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), valid=False))
    return VisualTokens.from_torch(values, sequence=0, views=views, **tokenizer.metadata())


@pytest.fixture(scope="module", params=list(make.VIEWS))
def miniature(request, tmp_path_factory):
    if reason := lerobot_environment.reason_to_skip(request.param):
        pytest.skip(reason)
    return Miniature(request.param, tmp_path_factory.mktemp("policies") / request.param)


def test_split_and_whole_give_the_same_actions(miniature):
    largest = 0.0
    for seed in range(3):
        inputs = make.drawn(miniature.kind, SHAPE, seed)
        expected = make.whole(miniature.whole, miniature.folder, inputs)
        tokens = miniature.tokens(inputs["images"])
        count = len(tokens.cameras)
        assert relative_error(tokens.float32(), expected["embeddings"][:count]) < 1e-5
        actions = miniature.act(tokens, inputs)
        assert actions.shape == (make.STEPS, make.ACTIONS)
        assert relative_error(actions, expected["actions"]) < 1e-4
        largest = max(largest, float(np.abs(actions - expected["actions"]).max() / np.abs(expected["actions"]).max()))
        other = miniature.act(miniature.tokens(inputs["images"][::-1]), inputs)  # otherwise this would prove nothing
        assert relative_error(other, expected["actions"]) > 1e-3
    versions = ", ".join(f"{name} {lerobot_environment.version(name)}" for name in ("lerobot", "transformers", "torch"))
    print(f"\n{miniature.kind} ({versions}): actions differ by {largest:.1e} of the largest one")


def test_a_view_without_a_camera(miniature):
    inputs = make.drawn(miniature.kind, SHAPE, 5)
    expected = make.whole(miniature.whole, miniature.folder, inputs, views=1)
    if miniature.kind == "smolvla":  # empty_cameras is 1, so that LeRobot leaves out the second of two missing views
        assert len(expected["embeddings"]) == 2
    actions = miniature.act(miniature.tokens(inputs["images"][:1]), inputs)
    assert relative_error(actions, expected["actions"]) < 1e-4


def test_tokens_come_in_the_dtype_of_the_vision_part(miniature):
    """In bfloat16 what LeRobot computes with embeddings depends on their dtype: its own embeddings give its own actions."""
    inputs = make.drawn(miniature.kind, SHAPE, 6)
    policies = [make.load(miniature.folder) for _ in range(2)]
    for policy in policies:
        if miniature.kind == "smolvla":
            policy.model.vlm_with_expert.vlm.to(torch.bfloat16)
        else:
            policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    expected = make.whole(policies[0], miniature.folder, inputs)
    split = lerobot_policy.SplitPolicy(policies[1])
    images = inputs["images"]
    values = torch.from_numpy(expected["embeddings"])
    views = [View(name, "", 0, 60, 90, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)) for name in split.views[: len(images)]]
    if len(values) > len(images):
        views.append(View("none", "", 0, 60, 90, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), valid=False))
    tokens = VisualTokens.from_torch(values, sequence=0, views=views, **miniature.tokenizer.metadata())
    policies[1].model.sample_noise = lambda _shape, _device: torch.from_numpy(inputs["noise"])
    observation = {"observation.state": torch.from_numpy(inputs["state"])[None], "task": make.INSTRUCTION}
    chunk = split.act(tokens, miniature.before(observation | split.images(tokens)))
    np.testing.assert_array_equal(miniature.behind(chunk)[0].float().numpy(), expected["actions"])


#: The example as a program, with noise that is the same in every call, and LeRobot's π0 in miniature.
POLICY = """
import sys
sys.path[:0] = [{examples!r}, {data!r}]
import lerobot_policy, make_lerobot_policy, torch
if {kind!r} != "smolvla":
    make_lerobot_policy.miniature_pi({kind!r})
act = lerobot_policy.SplitPolicy.act
def act_with_one_noise(self, tokens, batch):
    torch.manual_seed(7)
    return act(self, tokens, batch)
lerobot_policy.SplitPolicy.act = act_with_one_noise
sys.exit(lerobot_policy.main())
"""


@pytest.mark.ros
def test_as_ros_nodes(miniature):
    """Images in, tokens from the node in its process, state in, action chunks out of the example in another."""
    pytest.importorskip("rclpy")
    from sensor_msgs.msg import Image, JointState

    inputs = make.drawn(miniature.kind, SHAPE, 8)
    torch.manual_seed(7)
    inputs["noise"] = torch.normal(mean=0.0, std=1.0, size=inputs["noise"].shape).numpy()
    expected = make.whole(miniature.whole, miniature.folder, inputs)["actions"]
    names = make.VIEWS[miniature.kind]
    cameras = [*names, "none"] if miniature.kind == "smolvla" else list(names)
    domain = free_domain()
    command = ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args"]
    settings = [
        f"model:={miniature.model}",
        f"cameras:=[{', '.join(cameras)}]",
        "token_dtype:=float32",
        "autostart:=true",
    ]
    if miniature.image_transforms:
        settings.append(f"image_transforms:=[{', '.join(miniature.image_transforms)}]")
    for setting in settings:
        command += ["-p", setting]
    code = POLICY.format(examples=str(ROOT / "examples"), data=str(ROOT / "test/data"), kind=miniature.kind)
    options = [
        "--policy",
        str(miniature.folder),
        "--instruction",
        make.INSTRUCTION,
        "--device",
        "cpu",
        "--max-age",
        "5",
    ]
    with (
        Listener(domain) as listener,
        RosProcess(command, domain, {"OMP_NUM_THREADS": "1"}, python=NODE_PYTHON) as node,
        RosProcess(["-c", code, *options], domain, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}) as policy,
    ):
        chunks = listener.collect(JointState, "action_chunk")
        states = listener.publisher(JointState, "state")
        publishers = [listener.publisher(Image, f"{name}/image_raw") for name in names]
        for publisher in publishers:
            wait_until(publisher.get_subscription_count, 120.0, "the node to subscribe")
        wait_until(states.get_subscription_count, 120.0, "the policy to subscribe")
        height, width = inputs["images"].shape[1:3]
        end = time.monotonic() + 120.0
        while not chunks:
            for process in (node, policy):
                assert process.process.poll() is None and time.monotonic() < end, node.output + policy.output
            states.publish(JointState(position=inputs["state"].astype(float).tolist()))
            stamp = time.time_ns()
            for publisher, image in zip(publishers, inputs["images"]):
                sent = Image(height=height, width=width, encoding="rgb8", step=3 * width, data=image.tobytes())
                sent.header.stamp.sec, sent.header.stamp.nanosec = divmod(stamp, 10**9)
                publisher.publish(sent)
            time.sleep(0.1)
        assert node.stop() == 0, node.output
        assert policy.stop() == 0, policy.output
    assert chunks[0].name[:2] == ["0.0", "0.1"] and len(chunks[0].name) == make.STEPS * make.ACTIONS
    actions = np.array(chunks[0].position).reshape(make.STEPS, make.ACTIONS)
    assert relative_error(actions, expected) < 1e-4
    print(f"\n{miniature.kind}: through the node {np.abs(actions - expected).max() / np.abs(expected).max():.1e}")
