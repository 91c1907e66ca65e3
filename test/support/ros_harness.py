"""The one ROS harness of tests, benchmarks and the demo: domains, environments, processes, and nodes of this process.

They may run beside each other and beside a robot's own nodes: every domain is locked, and seen by this machine only.
rclpy is imported where nodes are made, so that what needs no ROS can use the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
#: Domain 0 is what everybody uses; above 101 the ports reach into Linux's ephemeral range.
_DOMAINS = range(2, 100)
_LOCKS: dict[int, socket.socket] = {}
#: What may become of a camera's frame, in /diagnostics: `received` is their sum.
COUNTS = ("encoded", "replaced", "unmatched", "undecodable", "pending")


def free_domain() -> int:
    """A ROS_DOMAIN_ID that no other test process of this machine holds; kept until `domains_given_back` ends.

    The lock is a socket name in Linux's abstract namespace: exclusive, without a file, and given back by the kernel
    however the process ends. The discovery port tells of participants that do not take part in this.
    """
    start = os.getpid() * 7
    for offset in range(len(_DOMAINS)):
        domain = _DOMAINS[(start + offset) % len(_DOMAINS)]
        if domain in _LOCKS or _discovery_port_taken(domain):
            continue
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            lock.bind(f"\0vla_perception.ros_domain.{domain}")
        except OSError:
            lock.close()
            continue
        _LOCKS[domain] = lock
        return domain
    raise RuntimeError(f"all ROS domains {_DOMAINS.start}–{_DOMAINS.stop - 1} are in use on this machine")


@contextlib.contextmanager
def domains_given_back() -> Iterator[None]:
    """Gives back what was taken inside: there are fewer domains than tests, and other runs need some as well."""
    before = set(_LOCKS)
    yield
    for domain in set(_LOCKS) - before:
        _LOCKS.pop(domain).close()


def _discovery_port_taken(domain: int) -> bool:
    """Whether a participant listens on the unicast discovery port of the first participant in `domain`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", 7400 + 250 * domain + 10))
        except OSError:
            return True
    return False


def ros_environment(domain: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a ROS process of this Python on `domain`, seen by this machine only."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    reaching_out = ("ROS_LOCALHOST_ONLY", "ROS_STATIC_PEERS", "ROS_DISCOVERY_SERVER")
    return {
        **{name: value for name, value in os.environ.items() if name not in reaching_out},
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


@contextlib.contextmanager
def in_domain(domain: int) -> Iterator[None]:
    """This process's own environment set for `domain`, for an `rclpy.init` inside; restored afterwards."""
    names = ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: ros_environment(domain)[name] for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def wait_until(condition: Callable[[], object], timeout: float, what: str) -> object:
    """Waits for a true value of `condition` and returns it; AssertionError that names `what` after `timeout` s."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.01)
    return value


def answer_of(client, request, timeout: float = 20.0) -> object:
    """The answer to a request that may be repeated, with the client's node spun elsewhere.

    Fast DDS drops an answer when the service does not know the client's reader 0.1 s later, as on a busy machine.
    """
    assert client.wait_for_service(timeout), client.service_name
    futures, end = [], time.monotonic() + timeout

    def answers() -> list:
        return [future.result() for future in futures if future.done()]

    while not answers():
        assert time.monotonic() < end, f"no answer from {client.service_name} within {timeout:g} s"
        futures.append(client.call_async(request))
        with contextlib.suppress(AssertionError):
            wait_until(answers, 2.0, "an answer")
    return answers()[0]


class Status(NamedTuple):
    """One status of /diagnostics."""

    level: int
    message: str
    values: dict[str, str]


def statuses_of(message) -> dict[str, Status]:
    """What a DiagnosticArray says, by its statuses' names without the node's: "camera front"."""
    return {
        status.name.partition(": ")[2]: Status(
            status.level[0] if isinstance(status.level, bytes) else status.level,
            status.message,
            {item.key: item.value for item in status.values},
        )
        for status in message.status
    }


def frame_counts(values: Mapping[str, str]) -> dict[str, int]:
    """A camera's counters: `received`, and what became of its frames; empty while it has none."""
    return {key: int(values[key]) for key in ("received", *COUNTS) if key in values}


class RosProcess:
    """A ROS process with what it prints: `with RosProcess([...], domain) as process`. Killed at the end if need be.

    Where the block fails, its output goes to stderr.

    Args:
        command: what follows the Python executable, e.g. ``["-m", "vla_perception.nodes.bag_player", …]``.
        python: the executable; another environment's gets neither this one's libraries nor its PYTHONPATH.
    """

    def __init__(
        self,
        command: Sequence[str],
        domain: int,
        extra: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        python: str = sys.executable,
    ) -> None:
        # What leaves the device open computes on the CPU in a test, also where there is a GPU (conftest.py).
        environment = ros_environment(domain, {"CUDA_VISIBLE_DEVICES": "", **(extra or {})})
        if python != sys.executable:
            for name in ("LD_LIBRARY_PATH", "_ROS_WHEELS_BOOTSTRAP_COMPLETE", "VIRTUAL_ENV", "AMENT_PREFIX_PATH"):
                environment.pop(name, None)
            environment["PYTHONPATH"] = str(ROOT)
        self.process = subprocess.Popen(
            [python, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env=environment,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def output(self) -> str:
        """What it has printed so far, stdout and stderr."""
        return "".join(self._lines)

    def wait_for(self, text: str, timeout: float = 30.0) -> None:
        """Waits until it has printed `text`; AssertionError with its output if it ends or stays silent."""
        end = time.monotonic() + timeout
        while text not in self.output:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(5.0)
            if text in self.output:
                return
            if ended or time.monotonic() > end:
                raise AssertionError(f"{text!r} never came (exit code {self.process.poll()}). Output:\n{self.output}")
            time.sleep(0.01)

    def stop(self, number: int = signal.SIGINT, timeout: float = 20.0) -> int:
        """Sends a signal and returns the exit code; AssertionError with its output if it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 20.0) -> int:
        """Waits for its own end and returns the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {timeout:g} s. Output:\n{self.output}") from None
        self._reader.join(5.0)
        return code

    def __enter__(self) -> RosProcess:
        return self

    def __exit__(self, error_type: type[BaseException] | None = None, *_error: object) -> None:
        code = self.process.poll()
        if code is None:
            self.process.terminate()
            try:
                self.process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5.0)
        self.process.stdout.close()
        if error_type is not None:  # pytest shows it with the failure
            print(f"exit code when the test failed: {code}; {self.process.args}:\n{self.output}", file=sys.stderr)


def destroy(node, entity) -> None:
    """Destroys a subscription or publisher of a node that is spun, there: elsewhere it may end rclpy's executor."""
    function = node.destroy_publisher if entity in node.publishers else node.destroy_subscription
    done = node.executor.create_task(function, entity)
    wait_until(done.done, 20, f"the end of {entity.topic_name}")
    assert done.result()


class RosContext:
    """Nodes of this process on one domain: `with RosContext(domain) as ros: node = ros.node("observer")`.

    `args`: as on the command line of its nodes, from "--ros-args" on.

    Attributes: domain (a free one where none is given), context (rclpy's), nodes, spinning (executor, stop event and
    thread of each that is spun).
    """

    def __init__(self, domain: int | None = None, args: Sequence[str] = ()) -> None:
        import rclpy
        from rclpy.signals import SignalHandlerOptions

        self.domain = free_domain() if domain is None else domain
        self.context = rclpy.Context()
        self.nodes: list = []
        self.spinning: list = []
        with in_domain(self.domain):
            rclpy.init(args=list(args), context=self.context, signal_handler_options=SignalHandlerOptions.NO)

    def __enter__(self):
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, the nodes and the context."""
        import rclpy

        for executor, stop, thread in self.spinning:
            stop.set()
            executor.wake()
            thread.join()
            executor.shutdown()
        for node in self.nodes:
            node.destroy_node()
        rclpy.try_shutdown(context=self.context)

    def node(self, name: str = "policy", **options):
        """A node that nothing spins yet."""
        import rclpy

        self.nodes.append(rclpy.create_node(name, context=self.context, **options))
        return self.nodes[-1]

    def spin(self, node):
        """Spins a node in a thread from here on; returns its executor."""
        from rclpy.executors import SingleThreadedExecutor

        executor, stop = SingleThreadedExecutor(context=self.context), threading.Event()
        executor.add_node(node)
        thread = threading.Thread(target=lambda: [executor.spin_once(0.1) for _ in iter(stop.is_set, True)])
        thread.start()
        self.spinning.append((executor, stop, thread))
        return executor


class Listener:
    """A node that is spun from the start: `listener.collect(Image, "/image_raw")` is a list that fills up."""

    def __init__(self, domain: int | None = None) -> None:
        self._ros = RosContext(domain)
        self.domain = self._ros.domain
        self.node = self._ros.node("listener")
        self._executor = self._ros.spin(self.node)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ros.close()

    def collect(self, message_type, topic: str, depth: int = 50) -> list:
        received: list = []
        self.node.create_subscription(message_type, topic, received.append, depth)
        self._executor.wake()
        return received

    def publisher(self, message_type, topic: str, depth: int = 10):
        return self.node.create_publisher(message_type, topic, depth)


def wait_for_messages(received: list, count: int, timeout: float = 20.0) -> list:
    wait_until(lambda: len(received) >= count, timeout, f"{count} messages (got {len(received)})")
    return received[:count]
