"""What fuzzing does to one input: runs it within limits, and says what is wrong with how it ended.

An input is *found* if it raises something that its target does not document, takes more time or memory than the target
allows, ends the process, or gets an error that cannot be logged.
"""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mutations import Mutation, change_bytes

HERE = Path(__file__).resolve().parent
FOUND = HERE / "found"
#: Characters of an error that a log can bear.
_MAX_TEXT = 5000
#: Whatever an input takes beyond this ends the process: seconds of CPU, seconds of waiting, bytes.
_CPU_END_SEC, _WAIT_END_SEC, _MEMORY_END = 10.0, 60.0, 1 << 30


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: of the target, of its folder in found/, and on the command line.
        run: reads the input; whatever it returns is not looked at. Asserts what must hold for what was accepted.
        seeds: inputs that real encoders made, all of which `run` takes without a finding.
        errors: the exceptions that are documented for a damaged input. Of Python's own the exact type counts: a
            UnicodeDecodeError is a ValueError, and no clear error.
        mutations: of its format; bytes are changed anyway.
        max_bytes: inputs are no longer.
        cpu_sec, memory_mib: what one input may take.
        cost: of it compared with the others; a run of a given number of inputs has so many times fewer.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    errors: tuple[type[Exception], ...]
    mutations: tuple[Mutation, ...] = ()
    max_bytes: int = 1 << 16
    cpu_sec: float = 1.0
    memory_mib: int = 64
    cost: int = 1

    def mutated(self, data: bytes, random: Random) -> bytes:
        """Another input, made of this one."""
        change = random.choice((*self.mutations, *self.mutations, change_bytes))
        return change(data, random)[: self.max_bytes]

    def found(self) -> list[bytes]:
        """Inputs that were found before."""
        return [path.read_bytes() for path in sorted((FOUND / self.name).glob("*"))]


@dataclass(frozen=True)
class Finding:
    """What is wrong. signature: equal for inputs that fail alike. text: for people."""

    signature: str
    text: str


class Current:
    """The input that is being run, in a file that outlives the process."""

    def __init__(self, path: Path | None) -> None:
        self._map = None
        if path is not None:
            with open(path, "w+b") as file:
                file.truncate(1 << 20)
                self._map = mmap.mmap(file.fileno(), 1 << 20)

    def set(self, target: Target, data: bytes) -> None:
        if self._map is not None:
            name = target.name.encode()
            record = bytes([len(name)]) + name + len(data).to_bytes(4, "little") + data
            self._map[: len(record)] = record

    @staticmethod
    def read(path: Path) -> tuple[str, bytes]:
        """Name of the target and the input."""
        record = path.read_bytes()
        name, rest = record[1 : 1 + record[0]].decode(), record[1 + record[0] :]
        return name, rest[4 : 4 + int.from_bytes(rest[:4], "little")]


def limit_process() -> None:
    """From here on this process may not grow by more than `_MEMORY_END` bytes."""
    # What imports left behind is not looked through again and again: a collection would count for an input.
    gc.collect()
    gc.freeze()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed, highest = pages * mmap.PAGESIZE + _MEMORY_END, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (allowed if highest < 0 else min(allowed, highest), highest))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # With their defaults these end the process also where no Python code runs.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def check(target: Target, data: bytes, current: Current) -> Finding | None:
    """Runs one input; what is wrong with how it ended, None if nothing is."""
    finding, seconds, mib = _run(target, data, current)
    if finding is None and (seconds > target.cpu_sec or mib > target.memory_mib):
        # Once more: now nothing is imported, and no pool grows, for the first time.
        finding, seconds, mib = _run(target, data, current)
        if finding is None and seconds > target.cpu_sec:
            return Finding("time", f"{seconds:.1f} s of CPU; {target.cpu_sec} are allowed")
        if finding is None and mib > target.memory_mib:
            return Finding("memory", f"{mib:.0f} MiB; {target.memory_mib} are allowed")
    return finding


def _run(target: Target, data: bytes, current: Current) -> tuple[Finding | None, float, float]:
    current.set(target, data)
    signal.setitimer(signal.ITIMER_PROF, _CPU_END_SEC)
    signal.setitimer(signal.ITIMER_REAL, _WAIT_END_SEC)
    before, begun = _peak(reset=True), time.process_time()
    finding = None
    try:
        target.run(data)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of Rust code is not an Exception
        finding = _judge(target, error)
    seconds, mib = time.process_time() - begun, _peak() - before
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return finding, seconds, mib


def _judge(target: Target, error: BaseException) -> Finding | None:
    documented = [kind for kind in target.errors if isinstance(error, kind)]
    if not any(type(error) is kind or kind.__module__ != "builtins" for kind in documented):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "vla_perception/" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "target"
        lines = traceback.format_exception(error)
        return Finding(f"{type(error).__name__} in {where}", "".join(lines)[-3000:])
    text = str(error)
    odd = re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", text)
    if not text.strip() or len(text) > _MAX_TEXT or odd:
        what = f"has {odd[0]!r} in it" if odd else f"has {len(text)} characters"
        return Finding(f"text of {type(error).__name__}", f"the error {what}: {text[:500]!r}")
    return None


def _peak(reset: bool = False) -> float:
    """The most memory that this process has had in use since the last reset, in MiB."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status", "rb") as file:
        return int(re.search(rb"VmHWM:\s+(\d+)", file.read())[1]) / 1024  # type: ignore[index]


def keep(target: str, data: bytes, folder: Path = FOUND) -> Path:
    """Writes a found input; its path."""
    path = folder / target / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def smaller(target: Target, data: bytes, finding: Finding, current: Current, seconds: float = 3.0) -> bytes:
    """The input with as much cut off as leaves the finding alike."""
    end = time.monotonic() + seconds
    size = len(data) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            shorter = data[:at] + data[at + size :]
            again = check(target, shorter, current)
            if again is not None and again.signature == finding.signature:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def scratch() -> Path:
    """A folder of this process for inputs that are files; the parent removes it."""
    folder = Path(os.environ["FUZZ_SCRATCH"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder
