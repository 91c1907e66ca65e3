"""How long a start takes: node → active, `describe`, and a message about a missing file; beside another checkout, in turns.

    git worktree add /tmp/before 51d1964
    python benchmarks/start.py --against /tmp/before --rounds 5
    python benchmarks/start.py                                     # this checkout alone, with the node's phases

Each is a separate process, from its start until the node logs that it is ready, or until the process has ended. CPU
seconds (user and system) of the process are beside the seconds, because others on the machine can change only those
much. With --against, both checkouts run in the same environment and take turns; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "test" / "support")]

from ros_harness import free_domain, ros_environment  # noqa: E402

COMMANDS = {
    "node": ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", "-p", "autostart:=true"],
    "describe": ["-m", "vla_perception.cli", "describe", "tiny-random"],
    "missing file": [
        "-m",
        "vla_perception.cli",
        "tokenize",
        "missing.png",
        "--model",
        "tiny-random",
        "--out",
        "tokens",
    ],
}


def start(name: str, checkout: Path) -> dict[str, object]:
    """One process: seconds, CPU seconds, and what the node logged of its phases."""
    environment = ros_environment(free_domain()) if name == "node" else dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(checkout), environment.get("PYTHONPATH"))))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *COMMANDS[name]],
        cwd=checkout,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    phases: dict[str, float] = {}
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"\]: (.+) took ([\d.]+) s$", line):
            phases[found[1]] = float(found[2])
        if "ready after" in line:
            break
    seconds = time.perf_counter() - begun
    process.terminate() if name == "node" else None
    process.communicate()
    seconds = seconds if name == "node" else time.perf_counter() - begun
    if name == "node" and "ready after" not in "".join(lines):
        sys.exit(f"the node did not start:\n{''.join(lines)}")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = ended.ru_utime + ended.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    checkouts = {"here": ROOT} | ({"there": options.against.resolve()} if options.against else {})
    results: dict[str, dict[str, list[dict]]] = {}
    header = [f"{side}: {what}" for side in checkouts for what in ("s", "CPU s")]
    header += ["ratio", "ratio of CPU"] if options.against else []
    print("| start | " + " | ".join(header) + " |\n|" + " --- |" * (1 + len(header)))
    for name in COMMANDS:
        results[name] = {side: [] for side in checkouts}
        for index in range(options.rounds):
            for side in sorted(checkouts, reverse=bool(index % 2)):
                results[name][side].append(start(name, checkouts[side]))
        medians = {
            side: [statistics.median(one[key] for one in results[name][side]) for key in ("seconds", "cpu_seconds")]
            for side in checkouts
        }
        cells = [f"{value:.2f}" for side in checkouts for value in medians[side]]
        if options.against:
            cells += [f"{here / there:.2f}" for here, there in zip(medians["here"], medians["there"])]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print()
    for phase in results["node"]["here"][0]["phases"]:
        median = statistics.median(one["phases"][phase] for one in results["node"]["here"])
        print(f"node, {phase}: {median:.1f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
