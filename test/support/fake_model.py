"""A stand-in for the tokenizer inside the pipeline."""

import threading
from types import SimpleNamespace

import torch


class Gate:
    """Something that takes as long as the test wants: `entered` tells that it began."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def close(self):
        self.entered.clear()
        self.opened.clear()

    def pass_through(self):
        self.entered.set()
        assert self.opened.wait(30.0)


class Model:
    """A tokenizer whose encodings fail or wait as the test wants."""

    model, weights, fingerprint, compute_dtype = "odd", "checkpoint", "0" * 64, "float32"
    device, runtime, kernels = torch.device("cpu"), "eager", "pytorch"
    condition_channels, condition = 0, None

    def __init__(self):
        self.gate, self.results = Gate(), []

    def prepare(self, images, cameras):
        return images

    def encode(self, pixel_values, features):
        self.gate.pass_through()
        result = self.results.pop(0) if self.results else 1.0
        if isinstance(result, Exception):
            raise result
        return SimpleNamespace(tokens=torch.full((1, 4, 8), result), features=None, condition=self.condition)

    def affine(self, height, width, camera):
        return (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def roi(self, height, width, camera):
        return None

    def metadata(self):
        return dict(
            model=self.model,
            weights=self.weights,
            fingerprint=self.fingerprint,
            compute_dtype=self.compute_dtype,
            grid=[2, 2],
            token_strategy="patch",
            pool=1,
            encoders=[],
            projector="linear",
        )
