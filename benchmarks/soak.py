"""The node for an hour among policies that come, go, stop and die: does anything grow, is every frame accounted for?

    make soak MINUTES=60
    python benchmarks/soak.py --minutes 60 --json soak.json

Two cameras publish 640 × 480 at 30 Hz, each in a separate process; the node runs the preset `tiny-random` (random
weights) at `--max-rate-hz`. One policy stays for the whole time and says how old its tokens are. Every minute another
one comes and leaves, one is stopped (SIGSTOP) for 20 s and goes on, and one is killed, by turns on the topic and in
shared memory. Every third minute the node is deactivated, cleaned up, configured and activated, in the others only
deactivated and activated.

A row a minute, when the node is active: resident memory (`anonymous` is what the process itself allocated; the rest is
files, shared memory among them), threads and file descriptors of the node and of the policy that stays; files in
/dev/shm that a process of this run has open or mapped; `left`, files there that no process has, which killed processes left
(Fast DDS never removes them, `fastdds shm clean` does); the frames of the last minute; the age of the tokens at the
policy that stays. /dev/shm is one of this run's own where a mount namespace is to be had; elsewhere `left` is empty.

Ends with 1 if the slope of a column after `--warm-up` minutes (Theil–Sen: the median of the slopes between any two rows)
is above its limit, a frame is not accounted for, a minute passes without tokens, a policy that was stopped gets none
afterwards, or a process does not end as it should.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "support"), str(ROOT / "benchmarks")]

from node import to_messages  # noqa: E402
from ros_harness import COUNTS, RosContext, RosProcess, answer_of, frame_counts, statuses_of, wait_until  # noqa: E402
from transport import PROFILE, PROFILE_VARIABLES, percentile, processor  # noqa: E402

CAMERAS = ("front", "wrist")
RATE_HZ = 30.0
#: Column → the largest slope that is no growth, per minute.
LIMITS = {
    "node_anonymous_mib": 0.5,
    "node_threads": 0.05,
    "node_fds": 0.05,
    "policy_anonymous_mib": 0.2,
    "policy_threads": 0.05,
    "policy_fds": 0.05,
    "shm_in_use": 0.2,
    "iceoryx2_left": 0.1,
}
PROFILES = dict.fromkeys(PROFILE_VARIABLES, PROFILE)
#: A /dev/shm and iceoryx2 folder that no other process of this machine uses. The limit is none that this run comes near.
OWN_FOLDERS = (
    "mkdir -p /tmp/iceoryx2 && mount -t tmpfs tmpfs /tmp/iceoryx2 && mount -t tmpfs -o size=2g tmpfs /dev/shm && "
    'exec "$@"'
)
NAMESPACES = (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"])


# Processes


def publish_images(options: argparse.Namespace) -> None:
    """A camera, until it is ended."""
    import rclpy

    rclpy.init()
    messages = to_messages("640x480", "rgb8")
    node = rclpy.create_node(options.camera)
    publisher = node.create_publisher(type(messages[0]), f"{options.camera}/image_raw", 10)
    begin = time.monotonic()
    for index in itertools.count():
        time.sleep(max(0.0, begin + index / RATE_HZ - time.monotonic()))
        message = messages[index % len(messages)]
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
        publisher.publish(message)


def receive_tokens(options: argparse.Namespace) -> None:
    """A policy, until it is ended; a line of JSON for every message."""
    import rclpy

    from vla_perception.tokens import TokenSubscriber

    rclpy.init()
    with TokenSubscriber(rclpy.create_node("policy"), shared_memory=options.shared_memory) as subscriber:
        while True:
            try:
                tokens = subscriber.wait(1.0)
            except TimeoutError:
                continue
            said = {
                "age_ms": round(1e3 * subscriber.age(tokens), 2),
                "received": subscriber.received,
                "lost": subscriber.lost,
                "restarts": subscriber.restarts,
                "transport": subscriber.transport,
            }
            print(json.dumps(said), flush=True)


def policy(domain: int, *, shared_memory: bool) -> RosProcess:
    words = [str(Path(__file__).resolve()), "--role", "policy"] + ["--shared-memory"] * shared_memory
    return RosProcess(words, domain, PROFILES)


def messages_of(process: RosProcess) -> list[dict]:
    found = []
    for line in process.output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a warning runs into
            found += [json.loads(line)] if line.startswith("{") else []
    return found


# What is measured


def status_of(pid: int) -> dict[str, float]:
    """Memory in MiB, threads and file descriptors of a process."""
    status = dict(re.findall(r"^(\w+):\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return {
        "rss_mib": round(int(status["VmRSS"]) / 1024, 1),
        "anonymous_mib": round(int(status["RssAnon"]) / 1024, 1),
        "threads": int(status["Threads"]),
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
    }


def shm_in_use(pids: list[int]) -> set[str]:
    """Files in /dev/shm that one of the processes has open or mapped."""
    found: set[str] = set()
    for pid in pids:
        try:
            found |= set(re.findall(r"(/dev/shm/\S+)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE))
            found |= {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists()}
        except OSError:
            continue  # it has just ended
    return {name for name in found if name.startswith("/dev/shm/")}


def shm_files() -> set[str]:
    return {str(path) for path in Path("/dev/shm").rglob("*") if not path.is_dir()}


def slope(values: list[float]) -> float:
    """Theil–Sen: per row. A step that comes back, as a reconfiguration makes, does not count."""
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median((high - low) / (j - i) for (i, low), (j, high) in pairs)


@dataclass
class Observer:
    """What the node says of itself: the last counters, and whether they add up."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    heard: float = 0.0
    problems: list[str] = field(default_factory=list)

    def take(self, message) -> None:
        self.heard = time.monotonic()
        for name, status in statuses_of(message).items():
            if name.startswith("camera "):
                counts = frame_counts(status.values)
                if counts["received"] != sum(counts[key] for key in COUNTS):
                    self.problems.append(f"{name}: frames are not accounted for: {counts}")
                self.counts[name.removeprefix("camera ")] = counts

    def totals(self) -> dict[str, int]:
        """Of all cameras together."""
        return {key: sum(counts[key] for counts in self.counts.values()) for key in ("received", *COUNTS)}


class Soak:
    """All processes of one run."""

    def __init__(self, ros: RosContext, options: argparse.Namespace, own_shm: bool) -> None:
        from diagnostic_msgs.msg import DiagnosticArray
        from lifecycle_msgs.srv import ChangeState, GetState

        self.domain, self.options, self.own_shm = ros.domain, options, own_shm
        self.observer, self.rows = Observer(), []
        self.problems = self.observer.problems
        watcher = ros.node("observer")
        watcher.create_subscription(DiagnosticArray, "/diagnostics", self.observer.take, 10)
        self._change = watcher.create_client(ChangeState, "visual_tokenizer/change_state")
        self._state = watcher.create_client(GetState, "visual_tokenizer/get_state")
        ros.spin(watcher)
        settings = {
            "model": "tiny-random",
            "cameras": f"[{','.join(CAMERAS)}]",
            "max_rate_hz": str(options.max_rate_hz),
            "autostart": "true",
        }
        words = [word for name, value in settings.items() for word in ("-p", f"{name}:={value}")]
        self.node = RosProcess(
            ["-m", "vla_perception.nodes.visual_tokenizer", "--ros-args", *words], self.domain, PROFILES
        )
        self.node.wait_for("ready after", 180)
        here = str(Path(__file__).resolve())
        self.cameras = [
            RosProcess([here, "--role", "camera", "--camera", name], self.domain, PROFILES) for name in CAMERAS
        ]
        self.steady = policy(self.domain, shared_memory=True)
        self.others: list[RosProcess] = []
        self.killed = 0
        self._encoded_before = dict.fromkeys(("received", *COUNTS), 0)
        self._messages_before = 0
        wait_until(lambda: messages_of(self.steady), 120, "tokens")

    # What happens in a minute

    def minute(self, index: int, begin: float, seconds: float) -> None:
        """Events at fixed parts of the minute, then the row."""
        shared_memory = bool(index % 2)
        reconfigure = index % 3 == 2
        events = [
            (0.05, self.come),
            (0.10, lambda: self.come(shared_memory=shared_memory)),
            (0.15, lambda: self.come(shared_memory=not shared_memory)),
            (0.35, lambda: self.others[1].process.send_signal(signal.SIGSTOP)),
            (0.45, self.kill),
            (0.68, self.go_on),
            (0.75, lambda: self.reconfigure(cleanup=reconfigure)),
        ]
        for part, event in events:
            time.sleep(max(0.0, begin + part * seconds - time.monotonic()))
            event()
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
        self.leave()
        self.rows.append(self.row(index + 1))

    def come(self, *, shared_memory: bool = True) -> None:
        self.others.append(policy(self.domain, shared_memory=shared_memory))

    def kill(self) -> None:
        victim = self.others.pop()
        if not messages_of(victim):
            self.problems.append(f"a policy got no tokens before it was killed: {victim.output[-2000:]}")
        victim.process.kill()
        victim.wait()
        self.killed += 1

    def go_on(self) -> None:
        """The stopped policy goes on, and gets tokens that are newer than its stop."""
        stopped = self.others[1]
        before = len(messages_of(stopped))
        stopped.process.send_signal(signal.SIGCONT)
        try:
            wait_until(lambda: len(messages_of(stopped)) > before + 2, 30, "tokens after SIGCONT")
        except AssertionError as error:
            self.problems.append(f"{error}: {stopped.output[-2000:]}")

    def reconfigure(self, *, cleanup: bool) -> None:
        from lifecycle_msgs.msg import Transition

        steps = [Transition.TRANSITION_DEACTIVATE]
        if cleanup:
            steps += [Transition.TRANSITION_CLEANUP, Transition.TRANSITION_CONFIGURE]
        for step in (*steps, Transition.TRANSITION_ACTIVATE):
            self.change(step)

    def change(self, transition: int) -> None:
        """Asks until the state is the wanted one: DDS may drop an answer on a busy machine."""
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState, GetState

        wanted = {
            Transition.TRANSITION_DEACTIVATE: "inactive",
            Transition.TRANSITION_CLEANUP: "unconfigured",
            Transition.TRANSITION_CONFIGURE: "inactive",
            Transition.TRANSITION_ACTIVATE: "active",
        }[transition]
        self._change.call_async(ChangeState.Request(transition=Transition(id=transition)))

        def reached() -> bool:
            return answer_of(self._state, GetState.Request(), 60).current_state.label == wanted

        wait_until(reached, 120, f"the node is {wanted}; its log ends with {self.node.output[-2000:]}")

    def leave(self) -> None:
        """Who is still there ends as by Ctrl-C."""
        for process in self.others:
            if code := process.stop(signal.SIGINT, 30):
                self.problems.append(f"a policy ended with {code}: {process.output[-2000:]}")
        self.others.clear()

    # The row

    def row(self, minute: int) -> dict[str, object]:
        processes = [self.node, self.steady, *self.cameras]
        for process in processes:
            if process.process.poll() is not None:
                raise AssertionError(f"ended with {process.process.returncode}: {process.output[-4000:]}")
        if time.monotonic() - self.observer.heard > 10:
            self.problems.append(f"minute {minute}: no diagnostics for 10 s")
        row: dict[str, object] = {"minute": minute}
        for name, process in (("node", self.node), ("policy", self.steady)):
            row |= {f"{name}_{key}": value for key, value in status_of(process.process.pid).items()}
        used = shm_in_use([os.getpid(), *(process.process.pid for process in processes)])
        row["shm_in_use"] = len(used)
        left = shm_files() - used if self.own_shm else set()
        row["left"], row["iceoryx2_left"] = len(left), sum("iox2" in name for name in left)
        row["killed"] = self.killed
        totals = self.observer.totals()
        # A new configuration counts from 0.
        before = self._encoded_before if totals["received"] >= self._encoded_before["received"] else {}
        row |= {key: totals[key] - (before.get(key, 0) if key != "pending" else 0) for key in totals}
        self._encoded_before = totals
        messages = messages_of(self.steady)
        recent, self._messages_before = messages[self._messages_before :], len(messages)
        if not recent:
            self.problems.append(f"minute {minute}: the policy that stays got no tokens")
        ages = [message["age_ms"] for message in recent]
        row |= {"tokens": len(recent), "age_p50_ms": percentile(ages, 50), "age_p99_ms": percentile(ages, 99)}
        row |= {key: messages[-1][key] for key in ("lost", "restarts", "transport")} if messages else {}
        row["load"] = round(os.getloadavg()[0], 1)
        return row

    def end(self) -> None:
        """The node ends as by Ctrl-C, whatever else is there."""
        for process in (self.node, self.steady, *self.cameras):
            if (code := process.stop(signal.SIGINT, 30)) and process not in self.cameras:
                self.problems.append(f"ended with {code}: {process.output[-2000:]}")

    def close(self) -> None:
        for process in (*self.others, self.steady, *self.cameras, self.node):
            process.process.send_signal(signal.SIGCONT)
            process.__exit__()


def growth(rows: list[dict], warm_up: int) -> tuple[dict[str, float], list[str]]:
    """Column → slope per minute, and what is wrong with those above their limits."""
    counted = rows[warm_up:]
    if len(counted) < 3:
        return {}, [f"too short to tell what grows: it takes {warm_up + 3} minutes (or a shorter --warm-up)"]
    slopes = {column: round(slope([row[column] for row in counted]), 3) for column in LIMITS}
    wrong = [
        f"{column} grows by {value:g} a minute, more than {LIMITS[column]:g}"
        for column, value in slopes.items()
        if value > LIMITS[column]
    ]
    return slopes, wrong


def own_folders() -> list[str] | None:
    """The words before a command that give it a separate /dev/shm."""
    if shutil.which("unshare"):
        for words in NAMESPACES:
            command = [*words, "sh", "-c", OWN_FOLDERS, "sh", "true"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return [*words, "sh", "-c", OWN_FOLDERS, "sh"]
    return None


def run(options: argparse.Namespace, own_shm: bool) -> int:
    with RosContext() as ros:
        soak = Soak(ros, options, own_shm)

        def judge() -> tuple[dict[str, float], list[str]]:
            """Slopes and what is wrong so far, in the file, too."""
            slopes, wrong = growth(soak.rows, options.warm_up)
            problems = soak.problems + wrong
            if options.json:
                result = {"machine": processor(), "cores": os.cpu_count(), "limits": LIMITS, "command": sys.argv[1:]}
                result |= {"slopes_per_minute": slopes, "problems": problems, "rows": soak.rows}
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            return slopes, problems

        try:
            begin = time.monotonic()
            for index in range(options.minutes):
                soak.minute(index, begin, options.minute_sec)
                begin = max(begin + options.minute_sec, time.monotonic())
                row = soak.rows[-1]
                if index == 0:
                    print("| " + " | ".join(row) + " |\n|" + " -- |" * len(row))
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
                judge()
            soak.end()
        except AssertionError as error:
            soak.problems.append(str(error))
        finally:
            soak.close()
    slopes, problems = judge()
    for column, value in slopes.items():
        print(f"{column}: {value:+g} a minute, at most {LIMITS[column]:g}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--minute-sec", type=float, default=60.0, help="shorter ones for a trial")
    parser.add_argument("--warm-up", type=int, default=6, help="minutes before those whose slope counts")
    parser.add_argument("--max-rate-hz", type=float, default=5.0, help="of the node")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well, after every minute")
    parser.add_argument("--role", choices=("camera", "policy"), help=argparse.SUPPRESS)
    parser.add_argument("--camera", help=argparse.SUPPRESS)
    parser.add_argument("--shared-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--own-shm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        try:
            {"camera": publish_images, "policy": receive_tokens}[options.role](options)
        except KeyboardInterrupt:
            return 0
        except Exception as error:
            if type(error).__name__ not in ("ExternalShutdownException", "RCLError"):
                raise
        return 0
    if not options.own_shm and (words := own_folders()):
        command = [*words, sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--own-shm"]
        os.execvp(command[0], command)
    return run(options, options.own_shm)


if __name__ == "__main__":
    sys.exit(main())
