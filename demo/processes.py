"""The demo's processes, on a ROS domain that nothing else on this machine uses."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from demo import ROOT, DemoError
from vla_perception.fast_dds import PROFILE_VARIABLES

sys.path.insert(0, str(ROOT / "test" / "support"))

from ros_harness import domains_given_back, free_domain, ros_environment

ENDING_SEC = 20.0


class Child:
    """A process of the demo. What it prints to stderr goes to a file, whose end is shown if it fails.

    Attributes: process; lines, a queue of what it prints to stdout and None at the end.
    """

    def __init__(self, title: str, command: list[str], environment: Mapping[str, str], log: Path):
        self.title = title
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def failure(self) -> DemoError:
        """The error that says how the process ended, and its last lines."""
        code = self.process.poll()
        how = f"ended with exit code {code}" if code is not None else "failed"
        lines = self.log.read_text(errors="replace").splitlines()[-40:]
        return DemoError(f"The {self.title} {how}. Its last words:\n" + "\n".join(f"    {line}" for line in lines))

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise self.failure()

    def stop(self, number: int = signal.SIGINT) -> int:
        """Asks it to end and returns its exit code; kills it if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(ENDING_SEC)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Processes:
    """`with Processes(folder) as processes: processes.start(…)`: all of them are ended at the end.

    Attributes: domain.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._children: list[Child] = []
        self._lock = domains_given_back()

    def __enter__(self) -> Processes:
        self._lock.__enter__()
        self.domain = free_domain()
        self._environment = ros_environment(self.domain)
        for name in PROFILE_VARIABLES:
            self._environment.setdefault(name, str(ROOT / "config" / "fastdds.xml"))
        return self

    def __exit__(self, *exception: object) -> None:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave children behind
        for child in reversed(self._children):
            child.stop()
        self._lock.__exit__(None, None, None)
        signal.signal(signal.SIGINT, interrupt)

    def start(
        self, title: str, module: str, parameters: Mapping[str, object], remappings: Mapping[str, str] | None = None
    ) -> Child:
        """Starts a node of this Python: a module, its parameters, and names that are remapped."""
        command = [sys.executable, "-m", module, "--ros-args"]
        for name, value in parameters.items():
            command += ["-p", f"{name}:={json.dumps(value)}"]
        for name, to in (remappings or {}).items():
            command += ["-r", f"{name}:={to}"]
        return self.run(title, command, module.rpartition(".")[2])

    def run(self, title: str, command: list[str], log: str) -> Child:
        """Starts any program; `log` names the file of its stderr."""
        self._children.append(Child(title, command, self._environment, self._folder / f"{log}.log"))
        return self._children[-1]
