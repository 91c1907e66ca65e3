"""Every string that a user may choose, once: the node, the command line, launch files, presets and the wire format read them.

Standard library only, and nothing of this package: so programs offer and check these before anything long is imported.
"""

from __future__ import annotations

import re

# Where and how a model computes

#: ``auto`` takes the first CUDA device that works, otherwise the CPU; ``cuda:N`` (the N-th CUDA device) is one, too.
DEVICES = ("auto", "cpu", "cuda")
#: Precision of tokens in a message.
TOKEN_DTYPES = ("float32", "bfloat16", "float16")
#: Precision of encoders and projector.
COMPUTE_DTYPES = ("auto", *TOKEN_DTYPES, "float8")
#: How the network runs on its device (tokenizer/runtime.py).
RUNTIMES = ("auto", "eager", "onednn", "graph", "compile")

# Which tokens a model gives

#: ``patch``: a token per patch; ``cls``: the cls token alone; ``cls+patch``: the cls token, then the patches' tokens.
TOKEN_STRATEGIES = ("patch", "cls", "cls+patch")
#: From the encoders' width to the language model's; ``none`` gives features.
PROJECTORS = ("linear", "gelu-mlp", "fused-gelu-mlp", "pixel-shuffle-linear", "none")
#: Resizes without distortion, the rest padded (tokenizer/resize_with_pad.py).
RESIZE_WITH_PAD = (
    "resize_with_pad_pil",
    "resize_with_pad_torch",
    "resize_with_pad_jax",
    "resize_with_pad_top_left",
    "resize_with_pad_lerobot_0_4",
)
#: How an image becomes an encoder's square (tokenizer/preprocess.py).
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox", *RESIZE_WITH_PAD)
#: What is done to images before they are resized (tokenizer/image_transforms.py), and last how they are.
IMAGE_TRANSFORMS = ("rotate180", "crop", "jpeg", "lanczos3", "center_crop_tf", "center_crop_pil", *RESIZE_WITH_PAD)
#: What `vla-perception tokenize` writes, and the token viewer shows.
OUTPUTS = ("tokens", "features")

# Frames and messages of the node

#: Among the names of cameras: a view that the policy expects and the robot has no camera for.
NO_CAMERA = "none"
#: Which camera topics are subscribed to: ``<camera>/image_raw``, or ``<camera>/image_raw/compressed``.
IMAGE_TRANSPORTS = ("raw", "compressed")
#: How frames of several cameras become a frame set (synchronizer.py).
SYNC_POLICIES = ("approximate", "latest")
#: Pixels of an image unless another bound is given.
MAX_IMAGE_PIXELS = 64_000_000
#: When a frame set is encoded: whenever there is one, or when the service `encode` is called.
TRIGGERS = ("continuous", "on_request")

# Launch files and logs

#: Severities of ROS 2's loggers.
LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")

# Recorded data (offline/)

#: What a damaged frame or file of a recording leads to: it is left out and counted, or ends the run.
ON_ERROR = ("skip", "stop")
#: What a run consists of: token files, or bags of token messages.
RUN_FORMATS = ("safetensors", "mcap")
#: What computes a run: this process, or the actors of a Ray cluster.
ENGINES = ("local", "ray")

# Simulated cameras

#: Motion of the simulated scene; ``auto``: ``sine`` for the built-in one, ``none`` for any other.
SIMULATION_MOTIONS = ("auto", "sine", "none")
#: How MuJoCo renders without a display; ``auto``: MUJOCO_GL, otherwise the first that is installed.
SIMULATION_GL = ("auto", "egl", "osmesa")


def is_device(text: str) -> bool:
    """Whether `text` is the name of a device: one of `DEVICES`, ``cuda:N``, or another of PyTorch's that computes (``mps``)."""
    return re.fullmatch(r"auto|(cpu|cuda|hpu|mps|mtia|npu|xla|xpu)(:\d+)?", text) is not None


def tokens_per_view(token_strategy: str, patches: int) -> int:
    """Tokens that a view has by `token_strategy`, where its grid has so many patches (after pooling)."""
    return {"patch": patches, "cls": 1, "cls+patch": 1 + patches}[token_strategy]
