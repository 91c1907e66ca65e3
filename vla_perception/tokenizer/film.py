"""OpenVLA-OFT's FiLM: the instruction scales and shifts what every block of the encoders computes.

Between a block's attention and its MLP, x becomes x · (1 + γ) + β, for all tokens alike, prefix tokens included. γ and β
are linear functions of one vector, the condition: the mean of the instruction's embeddings in the language model. So they
change with the instruction alone, and are computed when that does (``FiLMedVisionTransformerBlock`` of openvla-oft).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from vla_perception.condition import condition_digest
from vla_perception.tokenizer.devices import without_autocast
from vla_perception.tokenizer.timm_import import Block


class FilmLinear(nn.Linear):
    """A separate layer type, so that runtimes which put others in the place of `nn.Linear` leave it."""


class FilmBlock(nn.Module):
    """timm's block with FiLM. The names of its tensors are the block's, and ``scale`` and ``shift``."""

    def __init__(self, block: Block, width: int, condition_channels: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.scale = FilmLinear(condition_channels, width)
        self.shift = FilmLinear(condition_channels, width)
        self._modulation: tuple[torch.Tensor, torch.Tensor] | None = None  # 1 + γ and β, [channels] each

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[views, tokens, channels] → the same."""
        values = values + self.ls1(self.attn(self.norm1(values)))
        if self._modulation is None:
            raise RuntimeError("a block with FiLM has no condition yet")
        gain, offset = self._modulation
        values = values * gain + offset
        return values + self.ls2(self.mlp(self.norm2(values)))

    def set_condition(self, condition: torch.Tensor) -> None:
        """[condition channels] in the block's dtype, on its device. In place, where a CUDA graph reads it."""
        gain, offset = 1 + self.scale(condition), self.shift(condition)
        if self._modulation is None:
            self._modulation = gain, offset
        else:
            self._modulation[0].copy_(gain)
            self._modulation[1].copy_(offset)


class Condition:
    """The condition of a network's blocks: set whole between two encodings, never during one.

    Args:
        channels: length of the vector; 0 for a network without FiLM, for which nothing is done.
    """

    def __init__(self, network: nn.Module, channels: int, device: torch.device, dtype: torch.dtype) -> None:
        self.channels = channels
        self._blocks = [module for module in network.modules() if isinstance(module, FilmBlock)]
        self._device, self._dtype = device, dtype
        self._lock = threading.Lock()
        self._digest: str | None = None
        self._done = torch.cuda.Event() if channels and device.type == "cuda" else None
        if channels:
            self._apply(np.zeros(channels, np.float32))  # so that there is something to warm up with

    @property
    def digest(self) -> str | None:
        """Of the condition that is set; None before the first one, and without FiLM."""
        return self._digest

    def set(self, vector: np.ndarray | Sequence[float]) -> str:
        """Takes a vector [channels], and returns its digest. ValueError if it is no such vector of finite numbers."""
        if not self.channels:
            raise ValueError("this model has no FiLM, so that nothing but the image decides its tokens")
        digest = condition_digest(vector)
        values = np.asarray(vector, np.float32)
        if values.shape != (self.channels,):
            raise ValueError(f"the condition must be a vector of {self.channels} numbers, got {list(values.shape)}")
        with self._lock:
            self._apply(values)
            self._digest = digest
        return digest

    @torch.inference_mode()
    def _apply(self, values: np.ndarray) -> None:
        vector = torch.from_numpy(values.copy()).to(self._device, self._dtype)
        self._wait()
        # Read by graphs, which are captured outside of inference mode; a caller's autocast is not the compute dtype.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self._device):
            for block in self._blocks:
                block.set_condition(vector.clone())
        self._record()

    @contextmanager
    def held(self) -> Iterator[str | None]:
        """While it is held, the condition stays; yields its digest."""
        if not self.channels:
            yield None
            return
        with self._lock:
            self._wait()
            yield self._digest
            self._record()

    def _wait(self) -> None:
        # What was queued on another stream still reads the last condition, or writes it.
        if self._done is not None and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def _record(self) -> None:
        if self._done is not None and not torch.cuda.is_current_stream_capturing():
            self._done.record(torch.cuda.current_stream(self._device))
