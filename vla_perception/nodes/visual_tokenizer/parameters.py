"""The node's parameters: one table. docs/nodes.md and config/visual_tokenizer.yaml say the same, held to it by tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vla_perception import options
from vla_perception.nodes.parameters import Changes, parameter, parameter_specs

#: Cameras, and characters of a camera's name: more is a mistake, and a peer must not make the node warm up for it.
MAX_CAMERAS = 64
MAX_CAMERA_NAME = 200


def _check_not_empty(value: Sequence[object]) -> str:
    return "" if value else "must not be empty"


def _check_cameras(cameras: Sequence[str]) -> str:
    there = [camera for camera in cameras if camera != options.NO_CAMERA]
    if not there or len(set(there)) != len(there):
        return f"must be one or more different names, got {list(cameras)}"
    longest = max(map(len, cameras))
    if len(cameras) > MAX_CAMERAS or longest > MAX_CAMERA_NAME:
        return (
            f"must be at most {MAX_CAMERAS} names of at most {MAX_CAMERA_NAME} characters, got {len(cameras)} of at most "
            f"{longest}"
        )
    for camera in cameras:
        if not all(part.isidentifier() and part.isascii() for part in camera.removeprefix("/").split("/")):
            return f"must be names of letters, digits and _, got {camera!r}: name it otherwise and remap its topic"
    return ""


_MODEL = {"changes": Changes.UNCONFIGURED, "locked": True}
_TOPICS = {"changes": Changes.UNCONFIGURED}
_LIVE = {"changes": Changes.RUN_TIME}


@dataclass(frozen=True)
class TokenizerParameters:
    """What the node is set to. Instances have validated values (`ParameterSpec.validate`)."""

    # Which model is loaded, and how it runs

    model: str = parameter(
        "tiny-random",
        "A checkpoint as it is published (docs/models.md), names of timm's encoders, or a preset's name for random "
        "weights.",
        check=_check_not_empty,
        **_MODEL,
    )
    adapter: str = parameter(
        "",
        "Directory of a LoRA adapter to add to the model; empty: the one in the checkpoint's lora_adapter, where its "
        "weights are without it; none: none.",
        **_MODEL,
    )
    encoders: tuple[str, ...] = parameter(
        (), "Names of the encoders to keep, such as dinov2; empty: all of the model.", **_MODEL
    )
    image_size: tuple[int, ...] = parameter(
        (0,),
        "Side of the encoders' input in pixels, one for all or one for each; 0: the model's own.",
        check=_check_not_empty,
        **_MODEL,
    )
    image_transforms: tuple[str, ...] = parameter(
        (),
        "What is done to images before they are resized, in this order, as in training: rotate180, "
        "crop:x,y,width,height, jpeg, lanczos3, center_crop_tf, center_crop_pil; camera=step for one camera alone. Last, "
        "for all: a resize_with_pad_… in the place of the model's own way to resize.",
        **_MODEL,
    )
    token_strategy: str = parameter(
        "patch",
        "patch: a token per patch; cls: each encoder's cls token of the whole image; cls+patch: both.",
        choices=options.TOKEN_STRATEGIES,
        **_MODEL,
    )
    projector: str = parameter(
        "",
        "From the encoders' width to the language model's; empty: the model's own; none: features.",
        choices=("", *options.PROJECTORS),
        **_MODEL,
    )
    pool: int = parameter(1, "k: k × k neighbouring patch tokens are averaged into one.", low=1, high=64, **_MODEL)
    device: str = parameter(
        "auto",
        "Where encoders and projector run: cpu, cuda or cuda:N; auto: a CUDA device that works, otherwise the CPU.",
        check=_check_not_empty,
        **_MODEL,
    )
    compute_dtype: str = parameter(
        "auto",
        "Precision of encoders and projector; auto: bfloat16 on CUDA (float16 before Ampere), float32 on a CPU; float8: "
        "the encoders' linear layers in float8, all else in bfloat16: from Ada and Hopper on, less exact.",
        choices=options.COMPUTE_DTYPES,
        **_MODEL,
    )
    runtime: str = parameter(
        "auto",
        "How the network runs: auto; eager; onednn (CPU); graph (CUDA graphs); compile (torch.compile, which takes half "
        "a minute or more when the node is configured).",
        choices=options.RUNTIMES,
        **_MODEL,
    )

    # Cameras, and what an image may take

    cameras: tuple[str, ...] = parameter(
        ("front",),
        "Names of the cameras, in the order of the views; each is subscribed to as <name>/image_raw. none: a view that "
        "the policy expects and the robot has no camera for.",
        check=_check_cameras,
        **_TOPICS,
    )
    image_transport: str = parameter(
        "raw",
        "raw: <camera>/image_raw; compressed: <camera>/image_raw/compressed.",
        choices=options.IMAGE_TRANSPORTS,
        **_TOPICS,
    )
    max_image_pixels: int = parameter(
        options.MAX_IMAGE_PIXELS,
        "A larger image is counted as undecodable, before anything of it is decoded.",
        low=1,
        high=1_000_000_000,
        locked=True,
        **_LIVE,
    )

    # Which frames become tokens

    sync_policy: str = parameter(
        "approximate",
        "approximate: frames whose stamps lie within sync_slop_sec; latest: each frame of the first camera with the "
        "others' last ones.",
        choices=options.SYNC_POLICIES,
        **_LIVE,
    )
    sync_slop_sec: float = parameter(
        0.05,
        "approximate: largest difference between the stamps of one frame set, in seconds.",
        low=0.0,
        high=10.0,
        **_LIVE,
    )
    max_age_sec: float = parameter(
        0.5,
        "latest: largest distance of a frame's stamp from the first camera's, in seconds.",
        low=0.0,
        high=60.0,
        **_LIVE,
    )
    trigger: str = parameter(
        "continuous",
        "continuous: every latest frame set; on_request: the latest one when the service encode is called.",
        choices=options.TRIGGERS,
        **_LIVE,
    )
    max_rate_hz: float = parameter(
        0.0, "continuous: at most this many token messages per second; 0 for no limit.", low=0.0, high=1000.0, **_LIVE
    )

    # The token message

    token_dtype: str = parameter(
        "bfloat16", "Type of the tokens in the message.", choices=options.TOKEN_DTYPES, **_LIVE
    )
    publish_features: bool = parameter(
        False, "Whether the message also carries the features before the projector.", **_LIVE
    )
    shared_memory: bool = parameter(
        True,
        "Whether policies on this machine may read the tokens from shared memory, where iceoryx2 is installed.",
        **_TOPICS,
    )

    # When /diagnostics warns (levels.py)

    warn_age_sec: float = parameter(
        5.0, "Seconds without a frame after which a camera is a warning.", low=0.5, high=3600.0, **_LIVE
    )
    error_age_sec: float = parameter(
        10.0,
        "Seconds without a frame after which a camera is an error, and of nothing but failures, without a message, after "
        "which the model is.",
        low=0.5,
        high=3600.0,
        **_LIVE,
    )
    warn_rate_hz: float = parameter(
        0.0, "A camera with fewer frames per second is a warning; 0: never.", low=0.0, high=1000.0, **_LIVE
    )
    warn_drop_share: float = parameter(
        1.0,
        "Share of a camera's frames of the last 10 s that become no tokens (replaced, unmatched, undecodable) above which "
        "it is a warning; 1: never.",
        low=0.0,
        high=1.0,
        **_LIVE,
    )
    warn_token_age_sec: float = parameter(
        0.0,
        "Age of the tokens when they are published, by the node's clock, above which the timing is a warning (95 % of the "
        "last 10 s); 0: never.",
        low=0.0,
        high=3600.0,
        **_LIVE,
    )

    # The process

    bond: bool = parameter(
        False,
        "Whether the node, while it is active, keeps a bond with a lifecycle manager such as Nav2's, which then notices "
        "that it has died. Needs bondpy.",
        **_TOPICS,
    )
    model_locked: bool = parameter(
        False,
        "Whether what decides on the model (model, adapter, device, …) keeps for the life of the process the value that "
        "it was started with, whichever client asks.",
    )
    autostart: bool = parameter(False, "Whether the node configures and activates itself, or ends if it cannot.")

    @property
    def subscribed_cameras(self) -> tuple[str, ...]:
        """`cameras` without those that the robot does not have."""
        return tuple(camera for camera in self.cameras if camera != options.NO_CAMERA)

    def model_options(self) -> dict[str, Any]:
        """What a user chooses of a model, as `VisualTokenizer.load` takes it."""
        return {
            "adapter": self.adapter or None,
            "encoders": list(self.encoders),
            "image_size": list(self.image_size),
            "image_transforms": list(self.image_transforms),
            "token_strategy": self.token_strategy,
            "projector": self.projector or None,
            "pool": self.pool,
        }


PARAMETERS = parameter_specs(TokenizerParameters)
