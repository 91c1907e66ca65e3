"""A small action head on visual tokens: trained on recordings, and the same file runs it on a robot's tokens.

    python examples/train_policy.py train tokens --out policy.safetensors
    python examples/train_policy.py run policy.safetensors

`tokens` is a folder that `vla-perception tokenize` wrote, with the value `action`. The head is a transformer of a few
layers: it sees the tokens of the last frames and gives the next actions. Its error on episodes that it was not trained
on is printed beside two baselines, the mean action of the training and the action that was sent last. The weights' file
says which fingerprint the tokens had; other tokens are refused, in training and on the robot.

`run` reads the topic `tokens` and publishes sensor_msgs/JointState on `action`: the first of the actions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Subset

from vla_perception.offline.token_dataset import TokenDataset

WIDTH, HEADS, LAYERS = 96, 4, 2


class ActionHead(nn.Module):
    """Tokens [batch, history, views, tokens, channels] → actions [batch, horizon, numbers], in the action's own units."""

    def __init__(self, shape: tuple[int, int, int], history: int, horizon: int, numbers: int) -> None:
        super().__init__()
        views, tokens, channels = shape
        self.settings = {"shape": list(shape), "history": history, "horizon": horizon, "numbers": numbers}
        self.register_buffer("token_mean", torch.zeros(channels))
        self.register_buffer("token_std", torch.ones(channels))
        self.register_buffer("action_mean", torch.zeros(numbers))
        self.register_buffer("action_std", torch.ones(numbers))
        self.embed = nn.Linear(channels, WIDTH)
        self.place = nn.Parameter(torch.randn(views * tokens, WIDTH) * 0.1)
        self.age = nn.Parameter(torch.randn(history, 1, WIDTH) * 0.1)
        self.queries = nn.Parameter(torch.randn(horizon, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.actions = nn.Linear(WIDTH, numbers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        values = (tokens.float() - self.token_mean) / self.token_std
        embedded = self.embed(values).flatten(2, 3) + self.place + self.age  # [batch, history, views · tokens, WIDTH]
        queries = self.queries.expand(len(tokens), -1, -1)
        seen = self.layers(torch.cat([queries, embedded.flatten(1, 2)], dim=1))
        return self.actions(seen[:, : queries.shape[1]]) * self.action_std + self.action_mean


def train(given: argparse.Namespace) -> int:
    torch.manual_seed(given.seed)
    dataset = TokenDataset(given.tokens, history=given.history, values=["action"], horizon={"action": given.horizon})
    episodes = range(len(dataset.episodes))
    held_out = set(episodes[4::5]) or {len(episodes) - 1}
    training = [i for e in episodes if e not in held_out for i in dataset.indices(e)]
    testing = [i for e in sorted(held_out) for i in dataset.indices(e)]
    if not training:
        raise SystemExit(f"{given.tokens} has {len(episodes)} episode: some are to be trained on, one is held out")
    actions = np.concatenate([dataset.file(e).values["action"] for e in episodes if e not in held_out])
    head = ActionHead(dataset.shape, given.history, given.horizon, actions.shape[1])
    sample = torch.stack([dataset[i]["tokens"][-1] for i in training[:: max(1, len(training) // 64)]]).float()
    head.token_mean.copy_(sample.mean((0, 1, 2)))
    head.token_std.copy_(sample.std((0, 1, 2)) + 1e-3)
    head.action_mean.copy_(torch.from_numpy(actions.mean(0)))
    head.action_std.copy_(torch.from_numpy(actions.std(0)) + 1e-6)

    loader = DataLoader(
        Subset(dataset, training), given.batch, shuffle=True, num_workers=given.workers, drop_last=False
    )
    steps = given.steps or given.epochs * len(loader)
    optimizer = torch.optim.AdamW(head.parameters(), lr=given.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.rate, total_steps=steps)
    began, done = time.monotonic(), 0
    head.train()
    while done < steps:
        for batch in loader:
            wanted, missing = batch["action"].float(), batch["action_is_pad"]
            error = ((head(batch["tokens"]) - wanted) / head.action_std)[~missing]
            loss = error.square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done == 1 or done % 50 == 0 or done == steps:
                print(f"step {done} of {steps}: loss {loss.item():.4f}, {time.monotonic() - began:.0f} s", flush=True)
            if done == steps:
                break
    errors = evaluate(head, dataset, testing, given.batch)
    print(f"mean absolute error on {len(held_out)} held-out episodes, over the next {given.horizon} actions:")
    for name, error in errors.items():
        print(f"  {name:12} {error:.4f}")
    save(head, dataset, given.out)
    print(f"{given.out}: for tokens of fingerprint {dataset.fingerprint[:12]}")
    return 0


@torch.no_grad()
def evaluate(head: ActionHead, dataset: TokenDataset, indices: list[int], batch_size: int) -> dict[str, float]:
    """Mean absolute error, in the actions' units, of the head and of two baselines that see no image."""
    head.eval()
    errors: dict[str, list[torch.Tensor]] = {"this head": [], "last action": [], "mean action": []}
    for batch in DataLoader(Subset(dataset, indices), batch_size):
        wanted, there = batch["action"].float(), ~batch["action_is_pad"]
        last = []
        for episode, frame in zip(batch["episode"].tolist(), batch["frame"].tolist()):
            sent = dataset.file(episode).values["action"]
            last.append(torch.from_numpy(sent[frame - 1]).float() if frame else head.action_mean)
        found = {
            "this head": head(batch["tokens"]),
            "last action": torch.stack(last)[:, None].expand_as(wanted),
            "mean action": head.action_mean.expand_as(wanted),
        }
        for name, actions in found.items():
            errors[name].append((actions - wanted).abs()[there])
    return {name: torch.cat(parts).mean().item() for name, parts in errors.items()}


def save(head: ActionHead, dataset: TokenDataset, path: Path) -> None:
    """Weights, and beside them what they are for: the tokens' fingerprint, cameras and settings."""
    pinned = {"fingerprint": dataset.fingerprint, "cameras": list(dataset.cameras), **head.settings}
    save_file(head.state_dict(), path, metadata={"policy": json.dumps(pinned, sort_keys=True)})


def load(path: Path) -> tuple[ActionHead, dict]:
    with safe_open(path, "pt") as file:
        pinned = json.loads(file.metadata()["policy"])
        state = {name: file.get_tensor(name) for name in file.keys()}
    head = ActionHead(tuple(pinned["shape"]), pinned["history"], pinned["horizon"], pinned["numbers"])
    head.load_state_dict(state)
    return head.eval(), pinned


def run(given: argparse.Namespace) -> int:
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from sensor_msgs.msg import JointState

    from vla_perception.tokens import TokenSubscriber

    head, pinned = load(given.weights)
    rclpy.init()
    node = rclpy.create_node("policy")
    publisher = node.create_publisher(JointState, "action", 1)
    done = 0
    try:
        subscriber = TokenSubscriber(node, history=pinned["history"], expect_fingerprint=pinned["fingerprint"])
        with subscriber, torch.no_grad():
            while done != given.count:
                visual = subscriber.wait(timeout_sec=60.0)
                if visual.cameras != tuple(pinned["cameras"]):
                    raise SystemExit(f"tokens of {visual.cameras}, but the policy was trained on {pinned['cameras']}")
                seen = [message.torch() for message in subscriber.history]
                seen = [seen[0]] * (pinned["history"] - len(seen)) + seen  # as in training: the first one repeated
                action = head(torch.stack(seen)[None])[0, 0].tolist()
                publisher.publish(JointState(header=header_of(visual), position=action))
                print(f"message {visual.sequence}: " + ", ".join(f"{value:+.3f}" for value in action), flush=True)
                done += 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    return 0


def header_of(visual):
    """The header of an action: when the images behind it were taken."""
    from std_msgs.msg import Header

    header = Header()
    header.stamp.sec, header.stamp.nanosec = divmod(visual.stamp_ns, 10**9)
    return header


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="on a folder of tokens")
    training.add_argument("tokens", type=Path)
    training.add_argument("--out", type=Path, default=Path("policy.safetensors"))
    training.add_argument("--history", type=int, default=3, help="frames that the head sees")
    training.add_argument("--horizon", type=int, default=8, help="actions that it gives")
    training.add_argument("--epochs", type=int, default=14)
    training.add_argument("--steps", type=int, default=0, help="instead of epochs")
    training.add_argument("--batch", type=int, default=32)
    training.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    training.add_argument("--workers", type=int, default=0, help="processes that read tokens")
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=train)
    running = commands.add_parser("run", help="as a node, on the topic tokens")
    running.add_argument("weights", type=Path)
    running.add_argument("--count", type=int, default=-1, help="end after so many actions")
    running.set_defaults(run=run)
    given = parser.parse_args()
    return given.run(given)


if __name__ == "__main__":
    sys.exit(main())
