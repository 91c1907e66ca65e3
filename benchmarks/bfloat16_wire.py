"""What bfloat16 on the wire changes in the language model's logits, over a few hundred frames.

    python benchmarks/bfloat16_wire.py --frames 300

Frames are crops of the sample bag's images. Each goes through the miniature OpenVLA of the tests (random weights)
in float32 twice: with tokens carried as float32, and carried as bfloat16. The seven action steps are compared on the
same prefix, the tokens that float32 chose, so that one difference is not counted seven times. With random weights a
flipped token alone means nothing: it is set beside the margin between the two best tokens.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support"), str(ROOT / "examples")]

from miniature_openvla import Miniature  # noqa: E402
from openvla_policy import LanguageModel  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokens import VisualTokens, tokenize  # noqa: E402

INSTRUCTION = "put the cup on the plate"


def frames(count: int):
    """RGB crops of random place and size from the sample bag's two cameras."""
    from rosbags.highlevel import AnyReader

    random, images = np.random.default_rng(0), []
    with AnyReader([ROOT / "examples" / "sample_bag"]) as reader:
        for connection, _, raw in reader.messages():
            if connection.topic.endswith("/compressed"):
                data = bytes(reader.deserialize(raw, connection.msgtype).data)
                images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    for index in range(count):
        image = images[index % len(images)]
        side = int(random.integers(200, min(image.shape[:2])))
        top, left = (int(random.integers(0, length - side + 1)) for length in image.shape[:2])
        yield image[top : top + side, left : left + side]


@torch.inference_mode()
def logits(model: LanguageModel, visual: VisualTokens, said: tuple[int, ...] | None = None):
    """float32 [7, vocabulary] after the prefix `said` (what the model chooses itself where not given), and it."""
    if said is None:
        action = model.act(visual, INSTRUCTION)
        return action.logits, action.token_ids
    llama = model._llama
    prompt = model.embed(visual, INSTRUCTION)
    answer = llama.get_input_embeddings()(torch.tensor([said[:-1]]))
    hidden = llama.model(inputs_embeds=torch.cat([prompt, answer], dim=1)).last_hidden_state[:, -len(said) :]
    return llama.lm_head(hidden)[0].float(), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Miniature().write(Path(folder))
        tokenizer, model = VisualTokenizer.load(path), LanguageModel(path, dtype=torch.float32)
    errors, margins, flips, near, images = [], [], [], [], []
    for image in frames(options.frames):
        exact = tokenize(tokenizer, {"front": image})
        words = VisualTokens.from_bytes(tokenize(tokenizer, {"front": image}, token_dtype="bfloat16").to_bytes())
        expected, said = logits(model, exact)
        found, _ = logits(model, words, said)
        best = expected.topk(2, dim=-1)
        errors.append((found - expected).abs().amax(-1) / expected.abs().amax(-1))
        margins.append((best.values[:, 0] - best.values[:, 1]) / expected.abs().amax(-1))
        flips.append(found.argmax(-1) != best.indices[:, 0])
        near.append(margins[-1] < 2 * errors[-1])
        images.append(expected[0])
    errors, margins, flips, near = (torch.cat(values).numpy() for values in (errors, margins, flips, near))
    spread = torch.stack(images)
    between = ((spread - spread.roll(1, 0)).abs().amax(-1) / spread.abs().amax(-1)).median().item()

    def row(name, values):
        return f"| {name} | " + " | ".join(f"{np.percentile(values, q):.1e}" for q in (1, 50, 99, 100)) + " |"

    print(f"{options.frames} frames, {errors.size} action steps; all relative to the largest logit of the step\n")
    print("| | 1 % | median | 99 % | largest |\n| --- | --- | --- | --- | --- |")
    print(row("largest error of any logit", errors))
    print(row("margin between the two best tokens", margins))
    print(f"\nsteps whose margin is below twice the error, where the choice may change: {near.sum()} of {near.size}")
    print(f"steps where it did: {flips.sum()}; of these with a larger margin: {(flips & ~near).sum()}")
    print(f"for comparison, another image changes the first step's logits by {between:.1e} (median)")


if __name__ == "__main__":
    main()
