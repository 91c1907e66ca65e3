"""Full-size checkpoints with formula weights (test/data/README.md), what is compared, and memory while one is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / "data"


def formula_checkpoint(name: str, script: str, *arguments: str) -> Path:
    """The folder that a script of test/data writes, once, into a cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vla_perception-test" / f"{name}-formula"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        subprocess.run([sys.executable, DATA / script, partial, *arguments], check=True)
        try:
            partial.rename(folder)
        except OSError:  # another run was quicker
            for file in partial.iterdir():
                file.unlink()
            partial.rmdir()
    return folder


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# The child sets its own cache folder, so the digest is computed in one run and found in the other.
LOADER = """
import json, sys, time, threading
import torch
from vla_perception.tokenizer import VisualTokenizer

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))

before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        done.wait(0.005)
thread = threading.Thread(target=watch); thread.start()
tokenizer = VisualTokenizer.from_checkpoint(sys.argv[1], compute_dtype=sys.argv[2])
done.set(); thread.join()
print(json.dumps({"growth": max(peak, anonymous()) - before, "fingerprint": tokenizer.fingerprint}))
"""


def loading(checkpoint: Path, compute_dtype: str, cache: Path) -> dict:
    """``growth`` (bytes of memory at most while it was loaded) and ``fingerprint``, of a process that loads it."""
    result = subprocess.run(
        [sys.executable, "-c", LOADER, checkpoint, compute_dtype],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)
