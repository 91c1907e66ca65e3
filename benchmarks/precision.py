"""How far tokens in bfloat16 are from those in float32, on this machine's CPU.

    python test/data/make_lerobot_checkpoint.py /tmp/pi05 pi05
    python benchmarks/precision.py /tmp/pi05

Prints as JSON: relative L2 of all tokens and of the worst one, the least cosine, and what rounding float32 tokens to
bfloat16 alone makes. Two photographs of scikit-image's.
"""

import argparse
import json

import skimage.data
import torch

from vla_perception.tokenizer import VisualTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    options = parser.parse_args()
    images = [skimage.data.astronaut(), skimage.data.coffee()]
    exact, narrow = (
        VisualTokenizer.load(options.model, device="cpu", compute_dtype=dtype)(images).tokens.float()
        for dtype in ("float32", "bfloat16")
    )
    distance = (exact - narrow).norm(dim=-1) / exact.norm(dim=-1)
    result = {
        "relative_l2": float((exact - narrow).norm() / exact.norm()),
        "worst_token": float(distance.max()),
        "least_cosine": float(torch.nn.functional.cosine_similarity(exact, narrow, dim=-1).min()),
        "rounded_alone": float((exact - exact.bfloat16().float()).norm() / exact.norm()),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
