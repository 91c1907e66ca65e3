"""SIGINT and SIGTERM, in whatever a node's process is doing: it ends with 0, and does not wait for what never ends.

What never ends sleeps for ten minutes: a process that waited for it would fail its test's time limit.
"""

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from importlib import metadata

import pytest
from ros_harness import ROOT, RosProcess, free_domain, ros_environment

import vla_perception

INT, TERM = signal.SIGINT, signal.SIGTERM
NODES = ["visual_tokenizer", "bag_player", "opencv_camera", "mujoco_camera", "token_viewer"]


def send(process: RosProcess, numbers) -> None:
    for number in numbers:
        if process.process.poll() is None:
            process.process.send_signal(number)


# While it starts


@pytest.fixture(scope="module")
def slow_rclpy(tmp_path_factory):
    """An environment where importing rclpy takes for ever."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "rclpy").mkdir()
    (folder / "rclpy/__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    for name in ("rcl_interfaces", "diagnostic_msgs"):  # what some import before it
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("import rclpy\n")
    return {"PYTHONPATH": os.pathsep.join((str(folder), ros_environment(0)["PYTHONPATH"]))}


MODULES = [*(f"vla_perception.nodes.{name}" for name in NODES), "demo.policy"]
FUNCTION = "from vla_perception.nodes import executables; executables.{}()"
STARTS = {name: ["-m", name] for name in MODULES} | {name: ["-c", FUNCTION.format(name)] for name in NODES}


@pytest.mark.parametrize("numbers", [(INT,), (TERM,), (INT, TERM)], ids=["SIGINT", "SIGTERM", "both"])
def test_while_rclpy_is_imported(slow_rclpy, numbers):
    with ExitStack() as stack:
        started = {name: stack.enter_context(RosProcess(start, 0, slow_rclpy)) for name, start in STARTS.items()}
        for process in started.values():
            process.wait_for("importing", 60)
            send(process, numbers)
        assert {name: process.wait() for name, process in started.items()} == dict.fromkeys(STARTS, 0)
        assert "".join(process.output for process in started.values()) == "importing\n" * len(STARTS)


def test_every_executable_takes_signals_first():
    """What pip and colcon make scripts of, and nothing on the way there that imports rclpy."""
    scripts = dict(re.findall(r'f"(\w+) = \{NAME\}\.nodes\.(\S+)"', (ROOT / "setup.py").read_text()))
    assert scripts == {name: f"executables:{name}" for name in NODES}
    code = "import sys; from vla_perception.nodes import executables; print(sorted(sys.modules))"
    with RosProcess(["-c", code], 0) as process:
        assert process.wait() == 0
    assert not set(re.findall(r"'([\w.]+)'", process.output)) & {"rclpy", "numpy", "torch", "cv2", "importlib.metadata"}
    assert vla_perception.__version__ == metadata.version("vla_perception")
    with pytest.raises(ImportError):
        from vla_perception import nothing  # noqa: F401


# While it runs

BEGIN = """
import atexit, faulthandler, sys, threading, time
from vla_perception.nodes import executables
executables.begin()
faulthandler.enable()  # as in a node
atexit.register(time.sleep, 600)  # stands for the last garbage collection of torch
import rclpy
from rclpy.node import Node
from vla_perception.nodes import node_runner as process

def forever(*_arguments, **_options):
    print("now", flush=True)
    time.sleep(600)

def busy(*_arguments, **_options):
    print("now", flush=True)
    while True:
        pass

class Slow(Node):
    def __init__(self, stop):
        super().__init__("slow")
        self.create_timer(0.01, self.on_timer)

    def on_timer(self):
        print("now", flush=True)
"""
#: The tokenizer's node with a model of the test's.
TOKENIZER = """
from types import SimpleNamespace
from vla_perception.nodes.visual_tokenizer import node as visual_tokenizer
from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher

class Model:
    model = fingerprint = runtime = kernels = weights = compute_dtype = "odd"
    tokens_per_view = channels = 1
    condition, condition_channels = None, 0
    notes, device, config = (), SimpleNamespace(type="cpu"), SimpleNamespace(image_transforms={})

    def prepare(self, images, *_arguments, **_options):
        return images

    def encode(self, *_arguments, **_options):
        forever()

    def __getattr__(self, name):  # warm_up and whatever else is called
        return lambda *_arguments, **_options: None

stand_in = SimpleNamespace(VisualTokenizer=SimpleNamespace(load=lambda *_arguments, **_options: Model()))
sys.modules["vla_perception.tokenizer.tokenizer"] = stand_in
sys.modules["vla_perception.tokenizer.runtime"] = SimpleNamespace(limit_threads=lambda: None)
sys.argv += ["--ros-args", "-p", "autostart:=true", "-p", "shared_memory:=true"]
"""
ENCODING = """
from sensor_msgs.msg import Image
TokenPublisher.has_subscribers = lambda self: True
activate = visual_tokenizer.VisualTokenizerNode.on_activate
def on_activate(self, state):
    result = activate(self, state)
    image = Image(height=2, width=2, step=6, encoding="rgb8", data=bytes(12))
    image.header.stamp.sec = 1
    self._pipeline.add("front", 10**9, image)
    return result
visual_tokenizer.VisualTokenizerNode.on_activate = on_activate
"""
RUN_TOKENIZER = "executables.leave(visual_tokenizer.main())"
RUN_SLOW = "executables.leave(process.run_node(Slow))"
STATES = {
    "node being made": "executables.leave(process.run_node(forever))",
    "idle": RUN_SLOW,
    "callback": "Slow.on_timer = forever\n" + RUN_SLOW,
    "busy callback": "Slow.on_timer = busy\n" + RUN_SLOW,
    "close": "Slow.close = lambda self: time.sleep(600)\n" + RUN_SLOW,
    "close fails": "Slow.close = lambda self: 1 / 0\n" + RUN_SLOW,
    "executor's end": "rclpy.executors.SingleThreadedExecutor.shutdown = lambda *_, **__: time.sleep(600)\n" + RUN_SLOW,
    "model is read": TOKENIZER + "stand_in.VisualTokenizer.load = forever\n" + RUN_TOKENIZER,
    "model is imported, Python's lock contended": TOKENIZER + "stand_in.VisualTokenizer.load = busy\n" + RUN_TOKENIZER,
    "shared memory is tried": TOKENIZER + "TokenPublisher.open_shared_memory = forever\n" + RUN_TOKENIZER,
    "encoding": TOKENIZER + ENCODING + RUN_TOKENIZER,
    "a line that is half written": "Slow.on_timer = lambda self: print('now', end='')\n"
    "sys.stdout.reconfigure(line_buffering=False, write_through=False)\n"
    "threading.Timer(1.0, lambda: print('now', flush=True)).start()\n" + RUN_SLOW,
}
SIGNALS = {"SIGINT twice": (INT, INT), "SIGTERM": (TERM,), "both": (INT, TERM), "both, reversed": (TERM, INT)}
#: Every state with one kind of signals, and one with each.
CASES = [
    (state, name)
    for row, state in enumerate(STATES)
    for column, name in enumerate(SIGNALS)
    if state == "idle" or row % len(SIGNALS) == column
]
#: States that are errors, whatever ends the process.
ERRORS = {"close fails"}


@pytest.mark.ros
def test_in_every_state():
    domain = free_domain()
    with ExitStack() as stack:
        started = {case: stack.enter_context(RosProcess(["-c", BEGIN + STATES[case[0]]], domain)) for case in CASES}
        for (_state, name), process in started.items():
            process.wait_for("now", 90)
            send(process, SIGNALS[name])
        codes = {case: process.wait() for case, process in started.items()}
    wrong = {case: code for case, code in codes.items() if code != int(case[0] in ERRORS)}
    assert not wrong, "\n".join(f"{case}: {code}\n{started[case].output}" for case, code in wrong.items())
    for (state, _name), process in started.items():
        assert ("Traceback" in process.output) == (state in ERRORS), process.output


@pytest.mark.ros
def test_its_own_end_keeps_its_code_where_something_hangs():
    codes = {"stop(3)": 3, "stop(3), stop(0)": 3, "stop(0), stop(3)": 0}
    domain = free_domain()
    with ExitStack() as stack:
        started = {}
        for calls in codes:
            body = "".join(f"    self.stop({number})\n" for number in re.findall(r"\d", calls))
            code = (
                f"{BEGIN}\ndef on_timer(self):\n{body}    time.sleep(600)\n"
                "Slow.on_timer = on_timer\n"
                "def make(stop):\n    node = Slow(stop)\n    node.stop = stop\n    return node\n"
                "executables.leave(process.run_node(make))"
            )
            started[calls] = stack.enter_context(RosProcess(["-c", code], domain))
        assert {calls: process.wait(60) for calls, process in started.items()} == codes


# Leaving


@pytest.mark.parametrize("code", [0, 7])
def test_leaving_writes_what_was_printed_and_logged_and_waits_for_nobody(code):
    program = (
        "import logging, sys, threading, time\n"
        "from vla_perception.nodes import executables\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "logging.error('logged')\n"
        "print('printed', end='')\n"
        f"executables.leave({code})\n"
    )
    with RosProcess(["-c", program], 0, {"PYTHONUNBUFFERED": ""}) as process:
        assert process.wait() == code
    assert process.output == "ERROR:root:logged\nprinted"


def test_leaving_does_not_wait_for_a_reader_of_its_output():
    reading, writing = os.pipe()
    program = (
        "import sys\n"
        "from vla_perception.nodes import executables\n"
        "sys.stdout.write('x' * 10**6)\n"  # more than a pipe takes
        "executables.leave(0)\n"
    )
    with open(reading, "rb"), open(writing, "wb") as output:
        blocked = "import os, sys; os.set_blocking(1, True); "
        command = [sys.executable, "-c", blocked + "sys.stdout = open(1, 'w', buffering=2**22)\n" + program]
        assert subprocess.run(command, stdout=output, env=ros_environment(0), timeout=60).returncode == 0


def test_leaving_with_a_reader_that_has_gone():
    program = "import time\nfrom vla_perception.nodes import executables\nprint('x')\ninput()\nexecutables.leave(5)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**ros_environment(0), "PYTHONUNBUFFERED": ""},
    )
    process.stdout.close()
    _, said = process.communicate(b"\n", timeout=60)
    assert (process.returncode, said) == (5, b"")


def test_a_full_dev_shm_is_a_sentence_at_the_start(monkeypatch, capsys):
    from vla_perception.nodes import executables

    left = []
    state = list(os.statvfs("/dev/shm"))
    state[4] = 3  # blocks
    monkeypatch.setattr(executables.os, "statvfs", lambda _path: os.statvfs_result(state))
    monkeypatch.setattr(executables, "on_signal", lambda _action: None)
    monkeypatch.setattr(executables, "leave", left.append)
    executables.begin()
    assert left == [1] and "/dev/shm is full" in capsys.readouterr().err
    state[4] = 4
    executables.begin()
    state[2] = state[4] = 0  # a tmpfs without a limit
    executables.begin()
    assert left == [1]


WITHOUT = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c"]


def test_without_stdin_stdout_and_stderr_their_numbers_are_no_files(tmp_path):
    """The pipe of signals got those of stdout and stderr: the first line that was logged ended the node, with 0."""
    code = (
        "import os, sys\n"
        "from vla_perception.nodes import executables\n"
        "executables.begin()\n"
        "streams = [os.readlink(f'/proc/self/fd/{number}') for number in range(3)]\n"
        f"open({str(tmp_path / 'streams')!r}, 'w').write(' '.join(streams))\n"
        "print('heard by nobody', sys.stdin.read())\n"
        "print('nor this', file=sys.stderr)\n"
        "os._exit(3)\n"
    )
    assert subprocess.run([*WITHOUT, code], env=ros_environment(0), timeout=60).returncode == 3
    assert (tmp_path / "streams").read_text() == "/dev/null /dev/null /dev/null"


def test_the_command_works_without_them():
    code = "import sys; from vla_perception import cli; sys.exit(cli.main(['describe', 'tiny-random']))"
    assert subprocess.run([*WITHOUT, code], env=ros_environment(0), timeout=120).returncode == 0


def test_other_signals_that_python_handles_end_nothing(monkeypatch):
    from vla_perception.nodes import executables

    ended = []
    monkeypatch.setattr(executables, "_action", lambda: ended.append(1))
    reading, writing = os.pipe()
    os.write(writing, bytes([signal.SIGCHLD, TERM, signal.SIGUSR1]))
    os.close(writing)
    executables._read(reading)
    os.close(reading)
    assert ended == [1]


def test_ctrl_c_at_the_command_line_is_no_traceback(monkeypatch, capsys):
    from vla_perception import cli

    def interrupted(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_describe", interrupted)
    assert cli.main(["describe", "tiny-random"]) == 130
    assert capsys.readouterr().err == "vla-perception: interrupted\n"
