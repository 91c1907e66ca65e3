"""How long loading a checkpoint takes, beside reading its files and copying them to the device, in one run.

    python benchmarks/loading.py CHECKPOINT --device cpu --compute-dtype bfloat16

Each way runs in a separate process, from a warm disk, and they alternate. Reading and copying is what no loader gets
by without: the safetensors files into memory, and those bytes to the device. Loading is all of `VisualTokenizer.load`,
with the fingerprint known: the first loading, which is left out, computes it. Warm-up comes after loading and is told
apart. The time for importing PyTorch and starting CUDA is in none of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vla_perception.options import TOKEN_DTYPES


def measure(way: str, checkpoint: Path, device: str, compute_dtype: str) -> dict[str, float]:
    """Seconds of what one process does."""
    import torch

    from vla_perception.tokenizer import VisualTokenizer

    def synchronize() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    torch.zeros(1, device=device)
    synchronize()
    begun = time.perf_counter()
    if way == "read":
        held = []
        for file in sorted(checkpoint.glob("*.safetensors")):
            host = torch.empty(file.stat().st_size, dtype=torch.uint8)
            with open(file, "rb", buffering=0) as stream:
                rest = memoryview(host.numpy())
                while rest:
                    rest = rest[stream.readinto(rest) :]
            held.append(host.to(device, copy=True))
        synchronize()
        return {"read_and_copy_s": time.perf_counter() - begun}
    tokenizer = VisualTokenizer.load(checkpoint, device=device, compute_dtype=compute_dtype)
    synchronize()
    loaded = time.perf_counter()
    tokenizer.warm_up()
    return {"load_s": loaded - begun, "warm_up_s": time.perf_counter() - loaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="directory of a checkpoint that holds little but the vision part")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute-dtype", default="bfloat16", choices=TOKEN_DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", choices=("read", "load"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.checkpoint, options.device, options.compute_dtype)))
        return

    def in_a_process(way: str) -> dict[str, float]:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", way]
        return json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )

    in_a_process("load")
    rounds = [in_a_process("read") | in_a_process("load") for _ in range(options.rounds)]
    ratios = [times["load_s"] / times["read_and_copy_s"] for times in rounds]
    result = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    result |= {"ratio": statistics.median(ratios), "largest_ratio": max(ratios), "rounds": options.rounds}
    size = sum(file.stat().st_size for file in options.checkpoint.glob("*.safetensors"))
    print(
        f"{size / 1e9:.2f} GB to {options.device} in {options.compute_dtype}, medians of {options.rounds} processes:\n"
        f"read and copy {result['read_and_copy_s']:.2f} s, load {result['load_s']:.2f} s, "
        f"{result['ratio']:.2f} times as long (at most {result['largest_ratio']:.2f}); "
        f"then warm-up {result['warm_up_s']:.2f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
