"""Small datasets that LeRobot's own writer makes, where LeRobot is installed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

#: Frames of each episode.
LENGTHS = (13, 2, 20)
FPS = 15
#: Name → the kind of each camera's feature, and LeRobot's name of the codec.
KINDS = {
    "av1": (("video", "video"), "libsvtav1"),
    "h264": (("video", "video"), "h264"),
    "png": (("image", "image"), ""),
    "mixed": (("video", "image"), "h264"),
    "files": (("video", "video"), "h264"),  # a file of each kind per episode
}
#: Height, width.
SIZES = {"observation.images.front": (72, 96), "observation.images.wrist": (54, 70)}


def image(rows: int, columns: int, episode: int, frame: int) -> np.ndarray:
    """uint8 [rows, columns, 3]: colored waves that move over a gradient, with noise."""
    y, x = np.mgrid[:rows, :columns]
    shift = frame * (1.5 + episode)
    wave = np.stack([np.sin((x + shift) / 5), np.sin((y - shift) / 7), np.sin((x + y + 2 * shift) / 11)], axis=-1)
    noise = np.random.default_rng(1000 * episode + frame).normal(0, 6, (rows, columns, 3))
    return np.clip(60 + x[..., None] + 50 * wave + noise, 0, 255).astype(np.uint8)


def write(root: Path, kind: str) -> Path:
    """A dataset of v3.0 with several episodes, two cameras, state and action."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
    }
    kinds, codec = KINDS[kind]
    for (key, size), dtype in zip(SIZES.items(), kinds):
        features[key] = {"dtype": dtype, "shape": (*size, 3), "names": ["height", "width", "channels"]}
    options: dict[str, Any] = {"use_videos": "video" in kinds}
    if codec and "vcodec" in inspect.signature(LeRobotDataset.create).parameters:
        options["vcodec"] = codec
    elif codec:
        from lerobot.configs.video import RGBEncoderConfig

        options["rgb_encoder"] = RGBEncoderConfig(vcodec=codec)
    dataset = LeRobotDataset.create(f"local/{kind}", FPS, features, root=root, robot_type="none", **options)
    if kind == "files":
        dataset.meta.update_chunk_settings(data_files_size_in_mb=1e-6, video_files_size_in_mb=1e-6)
    random = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            images = {key: image(*size, episode, frame) for key, size in SIZES.items()}
            numbers = {name: random.normal(size=2).astype(np.float32) for name in ("observation.state", "action")}
            dataset.add_frame({**images, **numbers, "task": f"task {episode}"})
        dataset.save_episode()
    dataset.finalize()
    return root


def items(root: Path, backend: str) -> list[dict[str, Any]]:
    """Every item as LeRobot's own reader gives it: images as float32 [3, height, width] from 0 to 1."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(f"local/{root.name}", root=root, video_backend=backend)
    return [dataset[index] for index in range(len(dataset))]
