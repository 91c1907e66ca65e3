"""One process that fuzzes, started by `fuzzing.run_child`: ends with a line of JSON per finding, or dies of one.

child.py MODULE check COUNT          every target of a module: its seeds, what was found before, COUNT mutated inputs
child.py MODULE fuzz TARGET SECONDS  one target, led by coverage where atheris is installed
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from engine import Current, Finding, Target, check, limit_process, smaller  # noqa: E402

#: Inputs between two reports of how many there were: atheris ends the process without a word.
_EVERY = 100
#: Inputs after which a process led by coverage ends, and another one goes on: libFuzzer takes some KB for each.
_RUNS = 50_000
#: Inputs of a run without coverage that later ones are made of.
_KEPT = 2000


def report(target: Target, data: bytes, finding: Finding) -> None:
    print(json.dumps([target.name, data.hex(), finding.signature, finding.text]), flush=True)


def run_checks(targets: list[Target], count: int, current: Current) -> None:
    """The same inputs each time."""
    for target in targets:
        random, reported = Random(target.name), set()
        seeds = [*target.seeds(), *target.found()]
        limit_process()
        inputs = [*seeds, *(target.mutated(random.choice(seeds), random) for _ in range(count // target.cost))]
        for data in inputs:
            finding = check(target, data, current)
            if finding is not None and finding.signature not in reported:
                reported.add(finding.signature)
                report(target, data, finding)
        print(json.dumps([target.name, len(inputs)]), flush=True)


class Reporter:
    """Runs inputs, and reports the first one of each kind of finding, shortened."""

    def __init__(self, target: Target, current: Current) -> None:
        self.target, self.current = target, current
        self.signatures: set[str] = set()
        self.inputs = 0

    def __call__(self, data: bytes) -> None:
        self.inputs += 1
        if self.inputs % _EVERY == 0:
            print(json.dumps([self.target.name, self.inputs]), flush=True)
        finding = check(self.target, data, self.current)
        if finding is not None and finding.signature not in self.signatures:
            self.signatures.add(finding.signature)
            report(self.target, smaller(self.target, data, finding, self.current), finding)


def fuzz_blindly(target: Target, seconds: float, reporter: Reporter) -> None:
    """Without coverage: inputs from seeds, and from inputs that came before."""
    random, end = Random(os.urandom(8)), time.monotonic() + seconds
    seeds = [*target.seeds(), *target.found()]
    kept = list(seeds)
    limit_process()
    while time.monotonic() < end:
        data = target.mutated(random.choice(random.choice((seeds, kept))), random)
        reporter(data)
        if len(kept) < _KEPT:
            kept.append(data)
        else:
            kept[random.randrange(_KEPT)] = data


def fuzz_by_coverage(target: Target, seconds: float, reporter: Reporter, corpus: Path) -> None:
    """By atheris, which keeps what reaches code that nothing reached before; never returns."""
    import atheris

    seeds = corpus / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    grown = corpus / "grown"
    grown.mkdir(exist_ok=True)
    for index, data in enumerate([*target.seeds(), *target.found()]):
        (seeds / f"{index}").write_bytes(data)
    limit_process()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.3:
            return atheris.Mutate(data, max_size)
        return target.mutated(data, random)[:max_size]

    options = {
        "max_len": target.max_bytes,
        "max_total_time": max(int(seconds), 1),
        "runs": _RUNS,
        "rss_limit_mb": 0,  # the engine has limits of its own
        "timeout": 0,
        "detect_leaks": 0,
        # The process dies of a signal, as its parent expects: libFuzzer would end it with 77, and what was found with it.
        **dict.fromkeys((f"handle_{name}" for name in ("segv", "bus", "abrt", "ill", "fpe", "xfsz", "term", "int")), 0),
        "verbosity": 1,  # its lines on stderr are where the coverage stands
    }
    arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(grown), str(seeds)]
    atheris.Setup(arguments, reporter, custom_mutator=mutate)
    atheris.Fuzz()


def _target(module: str, name: str) -> Target:
    return next(target for target in importlib.import_module(module).TARGETS if target.name == name)


def main(module: str, mode: str, *arguments: str) -> None:
    current = Current(Path(os.environ["FUZZ_CURRENT"]))
    if mode == "check":
        run_checks(importlib.import_module(module).TARGETS, int(arguments[0]), current)
        return
    corpus = os.environ.get("FUZZ_CORPUS")
    if corpus:
        import atheris

        # Before any of them is imported; what is only imported where it is used, is so for the seeds.
        with atheris.instrument_imports(include=["vla_perception"]):
            target = _target(module, arguments[0])
            for data in target.seeds():
                check(target, data, current)
    else:
        target = _target(module, arguments[0])
    reporter, seconds = Reporter(target, current), float(arguments[1])
    if corpus:
        fuzz_by_coverage(target, seconds, reporter, Path(corpus))
    else:
        fuzz_blindly(target, seconds, reporter)


if __name__ == "__main__":
    main(*sys.argv[1:])
