"""`make fuzz`: every target for some minutes, or some of them.

python test/fuzz [--minutes 1] [--target image_raw …]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from engine import HERE, keep
from fuzzing import atheris_is_installed, run_child, target_names

CORPUS = HERE.parents[1] / "out" / "fuzz"
#: libFuzzer's account of what all inputs so far reached in this package's code: branches, and how many inputs do it.
_COVERAGE = re.compile(r"cov: (\d+) ft: \d+ corp: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--target", nargs="+", help="these alone")
    options = parser.parse_args()
    names = target_names()
    if unknown := [name for name in options.target or () if name not in names]:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(names)}")
    by_coverage = atheris_is_installed()
    if not by_coverage:
        print("atheris is not installed: inputs are changed blindly, not led by coverage")
    count, broken = 0, []
    for name in options.target or names:
        found, ran = fuzz(name, names[name], 60.0 * options.minutes, CORPUS / name if by_coverage else None)
        count += found
        if not ran:
            broken.append(name)
    print(f"{count} found" + (f": see {HERE / 'found'}" if count else ""))
    if broken:
        print(f"not run to their end: {', '.join(broken)}")
    return 1 if count or broken else 0


def fuzz(name: str, module: str, seconds: float, corpus: Path | None) -> tuple[int, bool]:
    """One target, by one process after the other: it may die of an input. How many inputs were found, and whether it ran."""
    end, signatures, inputs, reached, ran = time.monotonic() + seconds, set(), 0, "", True
    while (left := end - time.monotonic()) > 1.0:
        outcome = run_child(module, "fuzz", name, str(left), corpus=corpus, timeout=left + 180.0)
        inputs += outcome.inputs.get(name, 0)
        if account := _COVERAGE.findall(outcome.errors):
            reached = "{} branches reached by {} of them, ".format(*account[-1])
        for found in outcome.found:
            if found.signature not in signatures:
                signatures.add(found.signature)
                path = keep(found.target, found.data)
                print(f"\n{path.relative_to(HERE)}: {found.signature}\n{found.text}\n", flush=True)
        if outcome.returncode > 0:
            print(f"{name}: the process ended with {outcome.returncode}: {outcome.errors[-1000:]}", flush=True)
            ran = False
            break
    print(f"{name}: {inputs} inputs, {reached}{len(signatures)} found", flush=True)
    return len(signatures), ran


if __name__ == "__main__":
    sys.exit(main())
