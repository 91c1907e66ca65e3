"""A π0, π0.5 or SmolVLA policy of LeRobot's on visual tokens from a topic: its own vision part is never run.

    python examples/lerobot_policy.py --policy lerobot/pi05_base --instruction "pick up the cup" --device cuda

The other half is the node `visual_tokenizer` with the same policy as its `model`, and as `cameras` the policy's views by
their names without ``observation.images.``; a camera that the robot lacks is `none`, after those that are there (LeRobot
puts them last). Needs lerobot 0.4 or newer with the policy's extra; received tokens take the place of `embed_image`.

Subscribes to `state` (sensor_msgs/JointState: positions, in the order of training). Publishes `action_chunk`
(sensor_msgs/JointState): stamp and frame of the image that was acted on; position and name hold the chunk row by row,
named STEP.DIMENSION.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import Any

import torch

from vla_perception.tokens import FingerprintMismatchError, TokenFormatError, TokenSubscriber, VisualTokens

PREFIX = "observation.images."
#: The layers behind the vision tower, by their names in LeRobot's policies.
CONNECTORS = r"\.(multi_modal_projector|connector)\."


class SplitPolicy:
    """A policy of LeRobot's whose `embed_image` gives what was received.

    Args:
        policy: with `config.image_features`, `predict_action_chunk(batch)`, and a `model` with the part that embeds images.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        parts = ("paligemma_with_expert", "vlm_with_expert")
        embedder = next(getattr(policy.model, part) for part in parts if hasattr(policy.model, part))
        # What `embed_image` returns has the connector's dtype: bfloat16 in most SmolVLAs and in LeRobot 0.4's π0.
        weights = {name: weight for name, weight in embedder.named_parameters() if re.search(CONNECTORS, name)}
        self._dtype = next(iter(weights.values())).dtype
        embedder.embed_image = self._next_view
        self._waiting: list[torch.Tensor] = []

    @property
    def views(self) -> tuple[str, ...]:
        """The policy's views in its order, by the names of cameras."""
        return tuple(key.removeprefix(PREFIX) for key in self._policy.config.image_features)

    def images(self, tokens: VisualTokens) -> dict[str, torch.Tensor]:
        """What stands for the images of a batch: [1, 3, height, width] per view that is there. Only their sizes matter."""
        there = dict(zip(tokens.cameras, tokens.valid))
        features = self._policy.config.image_features
        return {
            key: torch.zeros(1, *feature.shape)
            for key, feature in features.items()
            if there.get(key.removeprefix(PREFIX), False)
        }

    def act(self, tokens: VisualTokens, batch: dict[str, Any]) -> torch.Tensor:
        """Actions [1, steps, dimensions] for a batch that has `images` and has been through the policy's preprocessor.

        Raises:
            ValueError: the message lacks a view that the policy takes.
        """
        values = dict(zip(tokens.cameras, tokens.torch().unsqueeze(1)))
        empty = [values[name] for name, valid in zip(tokens.cameras, tokens.valid) if not valid]
        there = [name for name in self.views if f"{PREFIX}{name}" in batch]
        missing = len(self.views) - len(there)
        if missing and not empty:
            raise ValueError(
                f"the policy takes {', '.join(self.views)}, and the tokens are of {', '.join(tokens.cameras)}"
            )
        # LeRobot embeds the views that are there, in its order, then those that are missing.
        self._waiting = [values[name] for name in there] + missing * empty[:1]
        with torch.inference_mode():
            return self._policy.predict_action_chunk(batch)

    def _next_view(self, image: torch.Tensor, **_options: object) -> torch.Tensor:
        """In the place of `embed_image`: [1, 3, height, width] → [1, tokens, channels]."""
        return self._waiting.pop(0).to(image.device, self._dtype)


def load(path: str, device: str) -> tuple[Any, Any, Any]:
    """The policy, and what it has before and behind it: tokenizer of the instruction, normalization."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(path)
    config.device = device
    policy = get_policy_class(config.type).from_pretrained(path, config=config).eval()
    overrides = {"device_processor": {"device": device}}
    before, behind = make_pre_post_processors(config, pretrained_path=path, preprocessor_overrides=overrides)
    return policy, before, behind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory or Hugging Face id")
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-age", type=float, default=0.5, help="seconds; older images give no actions")
    parser.add_argument("--expect-fingerprint", help="of the tokenizer, or its first digits")
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from rclpy.utilities import remove_ros_args
    from sensor_msgs.msg import JointState

    options = parser.parse_args(remove_ros_args(sys.argv)[1:])
    policy, before, behind = load(options.policy, options.device)
    split = SplitPolicy(policy)
    rclpy.init()
    node = rclpy.create_node("lerobot_policy")
    log = node.get_logger()
    state: list[JointState] = []
    node.create_subscription(JointState, "state", lambda message: state.__setitem__(slice(None), [message]), 1)
    chunks = node.create_publisher(JointState, "action_chunk", 1)
    try:
        with TokenSubscriber(node, expect_fingerprint=options.expect_fingerprint) as subscriber:
            log.info(f"waiting for {subscriber.topic}, views {', '.join(split.views)}")
            while True:
                # No actions if anything is wrong: the robot's controller must hold.
                try:
                    tokens = subscriber.wait(5.0)
                except FingerprintMismatchError as error:
                    log.fatal(str(error))
                    return 1
                except (TimeoutError, TokenFormatError) as error:
                    log.error(f"no actions: {error}")
                    continue
                rclpy.spin_once(node, timeout_sec=0.0)  # the latest state
                if not state or not -0.1 <= (age := subscriber.age(tokens)) <= options.max_age:
                    log.error("no actions: no state came yet" if not state else f"no actions: an image of {age:.2f} s")
                    continue
                observation = {
                    "observation.state": torch.tensor([list(state[0].position)]),
                    "task": options.instruction,
                }
                chunk = behind(split.act(tokens, before(observation | split.images(tokens))))[0].float().cpu()
                message = JointState(position=chunk.flatten().tolist())
                message.name = [f"{step}.{dim}" for step in range(chunk.shape[0]) for dim in range(chunk.shape[1])]
                message.header.stamp.sec, message.header.stamp.nanosec = divmod(tokens.stamp_ns, 10**9)
                message.header.frame_id = tokens.views[0].frame_id
                chunks.publish(message)
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    finally:
        with contextlib.suppress(RuntimeError):  # Ctrl-C: rclpy may be shutting down at this moment
            rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
