"""Triton's preprocessing kernels on a GPU or in Triton's interpreter, and images as they may lie in memory."""

import numpy as np
import pytest
import torch

from vla_perception.tokenizer import preprocess_kernels
from vla_perception.tokenizer.config import HALF, EncoderConfig
from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device on which the kernels run."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")  # Triton 3.6's interpreter does not get on with NumPy 2.5
    from triton.runtime.interpreter import InterpretedFunction

    for name in ("_along_rows", "_along_columns"):
        monkeypatch.setattr(preprocess_kernels, name, InterpretedFunction(getattr(preprocess_kernels, name).fn))
    # The interpreter's time is one per program: few and large ones, which still do not divide the sizes here.
    monkeypatch.setattr(preprocess_kernels, "BLOCK_ALONG_ROWS", (64, 32))
    monkeypatch.setattr(preprocess_kernels, "BLOCK_ALONG_COLUMNS", (32, 32))
    return torch.device("cpu")


def encoder(side, strategy="resize-naive", statistics=(HALF, HALF), name="e0", interpolation=3):
    return EncoderConfig(name, "vit_tiny_patch16_224", side, *statistics, strategy, interpolation=interpolation)


def preprocessor(encoders, device) -> DevicePreprocessor:
    made = DevicePreprocessor(encoders, device)
    if device.type == "cpu":
        made._use_kernels()  # where CUDA is, the constructor does it
    assert made.fallback == "", made.fallback
    return made


def noise(shape, seed=0):
    # Of two levels every other time: they overshoot 0 and 255, which PIL clips after each pass.
    levels = np.arange(256) if seed % 2 else [0, 255]
    return np.random.default_rng(seed).choice(np.array(levels, np.uint8), shape)


CAMERA = noise((44, 60, 4), 1)
VIEWS = {
    "rgb8": CAMERA[:, :, :3].copy(),
    "bgr8": CAMERA[:, :, :3].copy()[:, :, ::-1],
    "rgba8": CAMERA[:, :, :3],
    "bgra8": CAMERA[:, :, 2::-1],
    "mono8": np.broadcast_to(CAMERA[:, :, 0].copy()[:, :, None], (44, 60, 3)),
    "mono8 of rgb8": np.broadcast_to(CAMERA[:, :, 1, None], (44, 60, 3)),
    "rows padded": np.lib.stride_tricks.as_strided(noise(44 * 190, 3), (44, 60, 3), (190, 3, 1)),
    "rotate180": CAMERA[::-1, ::-1, :3],
    "bgr8, upside down": CAMERA[::-1, :, 2::-1],
    "mono8, mirrored": np.broadcast_to(CAMERA[:, ::-1, 0].copy()[:, :, None], (44, 60, 3))[:, ::-1],
    "planes": noise((3, 44, 60), 5).transpose(1, 2, 0),
    "columns first": np.asfortranarray(noise((44, 60, 3), 5)),
    "region": noise((90, 200, 3), 7)[20:64, 90:150],
    "region of bgra8, rotated": noise((90, 200, 4), 7)[20:64, 90:150, 2::-1][::-1, ::-1],
    "every second pixel": noise((88, 180, 3), 9)[::2, ::3],
    "channels overlap": np.lib.stride_tricks.as_strided(noise(50 * 70, 5), (44, 60, 3), (70, 1, 1)),
    "one row many times": np.broadcast_to(noise((1, 60, 3), 11), (44, 60, 3)),
}
