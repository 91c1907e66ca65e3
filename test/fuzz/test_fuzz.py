"""Every fuzz target, for a moment and the same each time; and what was found before. `make fuzz` goes on for minutes.

A failure here names the target and the input; `python test/fuzz --target NAME` looks for more of its kind.
"""

import importlib.util
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("rosbags")
pytest.importorskip("pyarrow")
pytest.importorskip("av")
pytest.importorskip("simplejpeg")
pytest.importorskip("rclpy")
if importlib.util.find_spec("mujoco") is None:  # importing it here would settle which OpenGL test_mujoco_camera.py has
    pytest.skip("needs MuJoCo: pip install '.[sim]'", allow_module_level=True)
from engine import FOUND, HERE
from fuzzing import MODULES, Outcome, run_child, target_names

#: Mutated inputs for each target; slow ones have fewer.
COUNT = 100


@pytest.mark.parametrize("module", MODULES)
def test_damaged_inputs_get_documented_errors_in_little_time_and_memory(module):
    outcome = run_child(module, "check", str(COUNT))
    assert not outcome.found, "\n\n".join(map(str, outcome.found))
    assert outcome.returncode == 0, outcome.errors
    assert sum(outcome.inputs.values()) > COUNT


def test_every_file_of_targets_is_run():
    assert {path.stem for path in HERE.glob("*_targets.py")} == set(MODULES)


def test_what_was_found_belongs_to_a_target():
    folders = {path.name for path in FOUND.iterdir() if path.is_dir()}
    assert folders <= set(target_names())


# The fuzzer itself

FAULTY = """
import ctypes, os, time
from engine import Target

def run(data):
    if data.startswith(b"documented"):
        raise ValueError("this is documented")
    if data.startswith(b"undocumented"):
        return [][0]
    if data.startswith(b"subclass"):
        b"\\xff".decode()
    if data.startswith(b"memory"):
        bytearray(100 << 20)
    if data.startswith(b"time"):
        end = time.process_time() + 0.6
        while time.process_time() < end:
            pass
    if data.startswith(b"text"):
        raise ValueError("\\x1b[31m")
    if data.startswith(b"death"):
        ctypes.string_at(0)
    if data.startswith(b"endless"):
        while True:
            pass

TARGETS = [Target("faulty", run, lambda: [SEED], (ValueError,), cpu_sec=0.3)]
"""


@pytest.mark.parametrize(
    ("seed", "signature"),
    [
        (b"documented", None),
        (b"nothing", None),
        (b"undocumented", "IndexError in target"),
        (b"subclass", "UnicodeDecodeError in target"),
        (b"memory", "memory"),
        (b"time", "time"),
        (b"text", "text of ValueError"),
        (b"death", "SIGSEGV"),
        (b"endless", "too much time"),
    ],
)
def test_the_engine_finds(tmp_path, seed, signature):
    (tmp_path / "faulty_targets.py").write_text(FAULTY.replace("SEED", repr(seed)))
    outcome = run_child("faulty_targets", "check", "0", python_path=str(tmp_path))
    assert [(found.target, found.data, found.signature) for found in outcome.found] == (
        [("faulty", seed, signature)] if signature else []
    )


def test_an_input_that_ends_the_process_is_found_where_coverage_leads(tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris: make fuzz installs it")
    program = "import os\nfrom engine import Target\ndef run(data):\n    if len(data) > 5: os.abort()\n"
    (tmp_path / "dying_targets.py").write_text(program + "TARGETS = [Target('dying', run, lambda: [b'seed'], ())]\n")
    outcome = run_child("dying_targets", "fuzz", "dying", "20", corpus=tmp_path / "corpus", python_path=str(tmp_path))
    assert [found.signature for found in outcome.found] == ["SIGABRT"] and len(outcome.found[0].data) > 5


def test_inputs_are_the_same_each_time(tmp_path):
    program = "from engine import Target\nimport hashlib\nseen = hashlib.sha256()\n"
    program += "def run(data):\n    seen.update(data)\n    if len(data) > 300: raise KeyError(seen.hexdigest())\n"
    (tmp_path / "counting_targets.py").write_text(
        program + "TARGETS = [Target('counting', run, lambda: [b'x' * 200, b'y' * 250], ())]\n"
    )
    first, second = (run_child("counting_targets", "check", "300", python_path=str(tmp_path)) for _ in range(2))
    assert first.found and first.found[0].text.splitlines()[-1] == second.found[0].text.splitlines()[-1]
    assert first.found[0].data == second.found[0].data


def test_make_fuzz_ends_with_an_error_where_a_target_did_not_run(monkeypatch, capsys):
    specification = importlib.util.spec_from_file_location("make_fuzz", HERE / "__main__.py")
    make_fuzz = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make_fuzz)
    outcomes = {"sound": Outcome([], {"sound": 900}, 0, ""), "broken": Outcome([], {}, 1, "ModuleNotFoundError: seeds")}
    now = iter(range(1000))
    monkeypatch.setattr(make_fuzz.time, "monotonic", lambda: 10.0 * next(now))
    monkeypatch.setattr(make_fuzz, "atheris_is_installed", lambda: False)
    monkeypatch.setattr(make_fuzz, "target_names", lambda: dict.fromkeys(outcomes, "module"))
    monkeypatch.setattr(make_fuzz, "run_child", lambda _module, _mode, name, *_rest, **_options: outcomes[name])
    for names, code in ((["sound"], 0), (["sound", "broken"], 1)):
        monkeypatch.setattr(sys, "argv", ["fuzz", "--target", *names])
        assert make_fuzz.main() == code
    said = capsys.readouterr().out
    assert "not run to their end: broken" in said and "ModuleNotFoundError: seeds" in said
