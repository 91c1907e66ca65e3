"""Starts the processes that fuzz, and collects what they find; one that dies of an input has found that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import HERE, Current

MODULES = (
    "image_targets",
    "token_targets",
    "checkpoint_targets",
    "recording_targets",
    "dataset_targets",
    "view_targets",
    "node_targets",
    "hub_targets",
)


@dataclass(frozen=True)
class Found:
    """An input and what is wrong with it; `target` is a name."""

    target: str
    data: bytes
    signature: str
    text: str

    def __str__(self) -> str:
        return f"{self.target}: {self.signature}\n{self.text}\ninput: {self.data[:2000].hex()}"


@dataclass(frozen=True)
class Outcome:
    """Of one process. inputs: how many it ran, by target."""

    found: Sequence[Found]
    inputs: Mapping[str, int]
    returncode: int
    errors: str


def run_child(*arguments: str, corpus: Path | None = None, python_path: str = "", timeout: float = 600.0) -> Outcome:
    """child.py with these arguments, in a folder of its own, without a network."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        current = Path(folder, "current")
        environment = dict(os.environ)
        environment |= {"FUZZ_SCRATCH": f"{folder}/scratch", "FUZZ_CURRENT": str(current), "PYTHONPATH": python_path}
        environment |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": f"{folder}/cache", "TMPDIR": folder}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("FUZZ_CORPUS", None)
        if corpus is not None:
            environment["FUZZ_CORPUS"] = str(corpus)
        with open(f"{folder}/stderr", "w+b") as errors:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "child.py"), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
            )
            ended = True
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                # The engine ends an input that takes long, so this is a machine without time for the start.
                ended = False
                process.kill()
                output, _ = process.communicate()
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4000))
            said = errors.read().decode(errors="replace")
        found, inputs = [], {}
        for line in output.decode(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, list) and len(record) == 4:
                found.append(Found(record[0], bytes.fromhex(record[1]), record[2], record[3]))
            elif isinstance(record, list) and len(record) == 2:
                inputs[record[0]] = record[1]
        if not ended:
            said += f"\nnot at its end after {timeout:.0f} s"
        elif process.returncode < 0:
            target, data = Current.read(current)
            found.append(Found(target, data, _name(-process.returncode), f"the process died; it said: {said[-2000:]}"))
    return Outcome(found, inputs, process.returncode if ended else 1, said)


def _name(number: int) -> str:
    meanings = {signal.SIGPROF: "too much time", signal.SIGALRM: "waits", signal.SIGKILL: "killed"}
    return meanings.get(signal.Signals(number), signal.Signals(number).name)


def atheris_is_installed() -> bool:
    """Looked for in a process of its own: importing it changes this one."""
    command = [sys.executable, "-c", "import atheris"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def target_names() -> dict[str, str]:
    """Every target's name and its module, in their order."""
    program = (
        "import importlib, json, sys\n"
        f"sys.path[:0] = {[str(HERE), str(HERE.parent / 'support')]!r}\n"
        f"print(json.dumps({{t.name: m for m in {MODULES!r} for t in importlib.import_module(m).TARGETS}}))"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, FUZZ_SCRATCH=folder)
        output = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.PIPE
        ).stdout
    return json.loads(output.decode().splitlines()[-1])
