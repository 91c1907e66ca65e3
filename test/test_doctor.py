"""`vla-perception doctor`: each check on a machine that is made up, and the whole on this one."""

import json
import os
import platform
import re
import sys
import textwrap
import types
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vla_perception import cli, doctor

ROOT = Path(__file__).resolve().parent.parent
Usage = namedtuple("Usage", "total used free")


def states(findings):
    found = list(findings)
    assert all(finding.cure for finding in found if finding.state != "ok"), "every trouble has its cure"
    return [(finding.subject, finding.state) for finding in found]


@pytest.fixture
def installed(monkeypatch):
    """Makes up which packages are installed."""

    def make(**versions):
        monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, ""))
        monkeypatch.setitem(sys.modules, "cv_bridge", None)

    return make


#: As they are called today, and by NVIDIA for Jetson.
GOOD = {
    "torch": "2.5.0a0+872d972e41.nv24.8",
    "torchvision": "0.20.0a0+afc54f7",
    "timm": "1.0.26",
    "huggingface_hub": "1.0",
    "pillow": "12.0.0",
    "numpy": "1.26.4",
    "simplejpeg": "1.9.0",
}


def test_packages(installed, monkeypatch):
    installed(**GOOD)
    assert {state for _, state in states(doctor.packages())} == {"ok"}
    for name in ("torch", "torchvision", "timm", "huggingface_hub", "pillow", "numpy"):
        installed(**GOOD | {name: ""})
        assert (name, "fail") in states(doctor.packages())
    installed(**GOOD | {"simplejpeg": "", "pillow": "13.0.0"})
    assert {("simplejpeg", "warn"), ("pillow", "fail")} <= set(states(doctor.packages()))
    for name, version in {
        "timm": "1.0.25",
        "torch": "2.3.1+cu121",
        "huggingface_hub": "3.0.0",
        "pillow": "9.5",
    }.items():
        installed(**GOOD | {name: version})
        assert [line for line in states(doctor.packages()) if line[1] != "ok"] == [(name, "warn")]
    real = doctor.importlib.import_module

    def load(name):
        if name == "cv_bridge":
            raise ImportError("numpy.core.multiarray failed to import")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    assert ("cv_bridge", "warn") in states(doctor.packages())
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: types.ModuleType(name))
    assert ("cv_bridge", "ok") in states(doctor.packages())


def test_the_versions_are_those_that_setup_py_asks_for():
    asked = {}
    for text in re.findall(r'"([a-z_]+[<>=][^"]*)"', (ROOT / "setup.py").read_text(encoding="utf-8")):
        requirement = Requirement(text)
        asked.setdefault(requirement.name, requirement.specifier)
    for name, (lowest, too_new) in doctor._PACKAGES.items():
        assert SpecifierSet(f">={lowest}" + (f",<{too_new}" if too_new else "")) == asked[name], name


def test_the_device_that_auto_takes(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    from vla_perception.tokenizer import devices

    chip = devices.Placement(
        torch.device("cuda", 0), "bfloat16", "A chip, compute capability 9.0, a CUDA device that works"
    )
    monkeypatch.setattr(devices, "place", lambda: chip)
    (finding,) = [finding for finding in doctor.device() if finding.subject == "device auto"]
    assert finding.state == "ok" and "cuda:0 in bfloat16: A chip" in finding.text and "runtime graph" in finding.text
    assert "Triton" in [subject for subject, _ in states(doctor.device())]
    broken = devices.Placement(torch.device("cpu"), "float32", "no CUDA device works", ("the driver is too old",))
    monkeypatch.setattr(devices, "place", lambda: broken)
    assert [state for subject, state in states(doctor.device()) if subject == "device auto"] == ["ok", "warn"]


def test_what_triton_compiles_with(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(doctor.shutil, "which", {"gcc": "/bin/gcc", "/bin/gcc": "/bin/gcc", "/cc": "/cc"}.get)

    def look(**environment):
        (finding,) = doctor.triton(environment)
        assert finding.state == "ok" or finding.cure
        return finding.state, finding.text

    state, text = look()
    assert state == "warn" and "Python.h is missing" in text
    (tmp_path / "Python.h").touch()
    assert look()[0] == look(CC="/cc")[0] == "ok"
    state, text = look(CC="/opt/none")
    assert state == "warn" and "/opt/none" in text
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    state, text = look()
    assert state == "warn" and "no C compiler" in text
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    state, text = look()
    assert state == "warn" and "not installed" in text


def test_triton_finds_the_same_compiler():
    build = pytest.importorskip("triton.runtime.build")
    try:
        expected = build._find_compiler("c")
    except RuntimeError:
        expected = "no C compiler"
    (finding,) = doctor.triton()
    assert expected in finding.text or "Python.h" in finding.text


def test_without_torch(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("vla_perception.tokenizer.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert states(doctor.device()) == [("device auto", "fail")]


@pytest.mark.parametrize("quota, state", [(4.0, "ok"), (0.5, "warn"), (None, "ok")])
def test_cores(monkeypatch, quota, state):
    monkeypatch.setattr(doctor, "cpu_quota", lambda: quota)
    (finding,) = doctor.cores()
    assert finding.state == state and str(len(os.sched_getaffinity(0))) in finding.text
    assert ("quota allows" in finding.text) == (quota is not None)


@pytest.fixture
def rclpy(tmp_path, monkeypatch):
    """Makes up an rclpy, for the process that looks at it."""
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "rclpy").mkdir()

    def look(init="pass", **environment):
        text = f"""
            import os, sys
            from rclpy import utilities
            get_rmw_implementation_identifier = lambda: "rmw_cyclonedds_cpp"
            def init():
                {init}
        """
        (tmp_path / "rclpy" / "__init__.py").write_text(textwrap.dedent(text))
        (tmp_path / "rclpy" / "utilities.py").write_text(
            "import os, types\n"
            "context = types.SimpleNamespace(get_domain_id=lambda: int(os.environ.get('ROS_DOMAIN_ID', 0)))\n"
            "get_default_context = lambda: context\n"
        )
        return list(doctor.ros({"PYTHONPATH": str(tmp_path)} | environment))

    return look


def test_ros(rclpy, monkeypatch):
    found = rclpy(ROS_DISTRO="jazzy", ROS_DOMAIN_ID="7", ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
    assert found[0].text == "jazzy, rmw_cyclonedds_cpp, domain 7" and "LOCALHOST" in found[1].text
    assert rclpy()[0].text.endswith("(ROS_DISTRO is not set), rmw_cyclonedds_cpp, domain 0")
    assert states(rclpy(ROS_DOMAIN_ID="233"))[0] == ("ROS", "fail")
    for reach, state in {"": "ok", "SUBNET": "ok", "OFF": "warn", "off": "warn", "SUBNETT": "warn"}.items():
        found = rclpy(ROS_AUTOMATIC_DISCOVERY_RANGE=reach)
        assert states(found)[1] == ("discovery", state)
        assert ("taken for LOCALHOST" in found[1].text) == (reach in ("off", "SUBNETT"))
    assert "this machine" in rclpy(ROS_LOCALHOST_ONLY="1", ROS_AUTOMATIC_DISCOVERY_RANGE="SUBNET")[1].text
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert states(doctor.ros({})) == [("ROS", "warn")]


@pytest.mark.parametrize(
    "init, text, cure",
    [
        ("raise ImportError('libfoo.so: cannot open shared object file')", "libfoo.so", "one ROS 2"),
        ("raise RuntimeError('ROS_DOMAIN_ID is not an integral number')", "not an integral", "ROS_DOMAIN_ID"),
        (
            "sys.exit('Expected RMW implementation identifier of rmw_x')",
            "identifier of rmw_x",
            "unset RMW_IMPLEMENTATION",
        ),
        ("os._exit(102)", "102", "one ROS 2"),
        ("os.kill(os.getpid(), 7)", "SIGBUS", "/dev/shm"),
    ],
)
def test_an_rclpy_that_ends_the_process(rclpy, init, text, cure):
    (finding,) = rclpy(init, RMW_IMPLEMENTATION="rmw_x")
    assert finding.state == "fail" and text in finding.text and cure in finding.cure


@pytest.mark.ros
@pytest.mark.parametrize("name, value", [("RMW_IMPLEMENTATION", "rmw_nonesuch_cpp"), ("ROS_DOMAIN_ID", "abc")])
def test_the_rclpy_that_is_installed_ends_the_process(name, value):
    (finding,) = doctor.ros(os.environ | {name: value})
    assert finding.state == "fail" and name in finding.cure


def test_fastdds_profile(tmp_path):
    def state(**environment):
        return [state for _, state in states(doctor.fastdds_profile(environment))]

    good, small = tmp_path / "good.xml", tmp_path / "small.xml"
    good.write_text("<segment_size>16777216</segment_size>")
    small.write_text("<dds/>")
    assert state() == ["warn"]
    assert state(RMW_IMPLEMENTATION="rmw_cyclonedds_cpp") == ["ok"]
    assert state(RMW_IMPLEMENTATION="rmw_fastrtps_cpp") == ["warn"]
    assert state(FASTDDS_DEFAULT_PROFILES_FILE=str(good), FASTRTPS_DEFAULT_PROFILES_FILE=str(good)) == ["ok", "ok"]
    for variable, distribution, expected in (
        ("FASTDDS", "jazzy", "warn"),
        ("FASTRTPS", "jazzy", "ok"),
        ("FASTDDS", "kilted", "ok"),
        ("FASTRTPS", "kilted", "ok"),
    ):
        assert state(**{f"{variable}_DEFAULT_PROFILES_FILE": str(good), "ROS_DISTRO": distribution}) == [expected]
    assert state(FASTDDS_DEFAULT_PROFILES_FILE=str(small)) == ["warn"]
    assert state(FASTDDS_DEFAULT_PROFILES_FILE=str(tmp_path / "none.xml")) == ["fail"]


def test_shared_memory(tmp_path, monkeypatch):
    assert states(doctor.shared_memory(tmp_path / "none"))[0][1] == "warn"
    for free, state in ((64 << 20, "warn"), (1 << 30, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: Usage(2 << 30, 0, free))
        (finding,) = doctor.shared_memory(tmp_path)
        assert finding.state == state and f"{free >> 20} MiB free of 2048" in finding.text
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)  # mounted read-only
    assert states(doctor.shared_memory(tmp_path)) == [(str(tmp_path), "warn")]


def test_iceoryx2(tmp_path, monkeypatch):
    from vla_perception.tokens import shared_memory, shared_memory_services

    monkeypatch.setattr(shared_memory, "unavailable_reason", lambda: "No module named 'iceoryx2'")
    assert states(doctor.iceoryx2()) == [("iceoryx2", "warn")]
    monkeypatch.setattr(shared_memory, "unavailable_reason", lambda: "")
    monkeypatch.setattr(shared_memory_services, "FOLDER", str(tmp_path))
    tmp_path.chmod(0o1777)
    (finding,) = doctor.iceoryx2()
    assert finding.state == "ok" and "made when first used" in finding.text and not list(tmp_path.iterdir())
    folder = shared_memory_services.root().rstrip("/")
    os.symlink("nowhere", folder)  # test_shared_memory_services.py has more that is refused
    assert states(doctor.iceoryx2()) == [("iceoryx2", "warn")]
    os.unlink(folder)
    os.mkdir(folder, 0o700)
    assert f"of user {os.geteuid()}" in next(doctor.iceoryx2()).text
    full = types.SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=256)
    monkeypatch.setattr(shared_memory_services.os, "statvfs", lambda path: full)
    assert states(doctor.iceoryx2()) == [("iceoryx2", "warn")]


def test_a_check_that_breaks_is_a_finding(monkeypatch, capsys):
    def breaks():
        raise OSError("disk on fire")
        yield

    for name in ("packages", "device", "cores", "ros", "fastdds_profile", "shared_memory", "iceoryx2"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    assert cli.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "cores", breaks)
    assert cli.main(["doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out.partition("{")[2].join(("{", "")))
    assert result["state"] == "fail" and result["findings"][-1]["text"] == "OSError: disk on fire"


def test_models(tmp_path):
    pytest.importorskip("timm")
    (finding,) = doctor.checkpoint(str(tmp_path / "none"))
    assert finding.state == "fail" and "no checkpoint directory" in finding.text
    (finding,) = doctor.checkpoint("tiny-random")
    from vla_perception.tokenizer import VisualTokenizer

    assert finding.state == "warn" and VisualTokenizer.load("tiny-random").fingerprint in finding.text


def test_agreement_of_every_runtime_and_precision(monkeypatch):
    """They agree here; and one that does not fails."""
    pytest.importorskip("timm")
    found = {finding.subject: finding for finding in doctor.agreement("tiny-random")}
    assert {subject.split(" on ")[0] for subject in found} >= {
        f"eager in {dtype}" for dtype in ("float32", "bfloat16", "float16")
    }
    for subject, finding in found.items():  # few processors have oneDNN's float16
        assert finding.state == "ok" or (finding.state == "warn" and "onednn in float16" in subject), finding
    monkeypatch.setattr("vla_perception.baseline.TOLERANCES", {"bfloat16": 1e-6})
    assert "fail" in {finding.state for finding in doctor.agreement("tiny-random")}


def test_this_machine(capsys):
    pytest.importorskip("timm")
    assert cli.main(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = {finding["subject"]: finding for finding in result["findings"]}
    import torch

    assert platform.python_version() in found["Python"]["text"]
    assert found["torch"]["text"].split("+")[0] == torch.__version__.split("+")[0]
    assert (" in float32: " in found["device auto"]["text"]) == (not torch.cuda.is_available())
    assert f"{os.cpu_count()}" in found["cores"]["text"] or len(os.sched_getaffinity(0)) != os.cpu_count()
    assert not [finding for finding in result["findings"] if finding["state"] == "fail"]
