"""What an aarch64 board (a Jetson) gets, as far as this can be known without one: requirements, imports, /proc/cpuinfo."""

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BOARD = {**default_environment(), "platform_machine": "aarch64", "sys_platform": "linux", "python_version": "3.12"}
#: Distributions with wheels for x86-64 Linux alone, and the modules that they bring. docs/jetson.md has the command that
#: asks PyPI about the others.
X86_ONLY = {"iceoryx2"}
CPUINFO = """processor\t: 0
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd42
"""


def extras() -> dict[str, list[Requirement]]:
    """Extra → requirements, as setup.py says them; ``""`` is the base."""
    program = (
        "import json, setuptools, sys; from unittest import mock; sys.argv = ['setup.py', 'egg_info']\n"
        "with mock.patch('setuptools.setup') as setup: exec(compile(open('setup.py').read(), sys.argv[0], 'exec'),"
        " {'__file__': 'setup.py', '__name__': 'x'})\n"
        "print(json.dumps({'': setup.call_args.kwargs['install_requires']} | setup.call_args.kwargs['extras_require']))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return {extra: [Requirement(text) for text in texts] for extra, texts in ast.literal_eval(run.stdout).items()}


def wanted(requirements: list[Requirement]) -> set[str]:
    """What pip installs of these on such a board."""
    return {each.name for each in requirements if each.marker is None or each.marker.evaluate(BOARD)}


def test_no_requirement_of_the_topic_path_is_for_x86_alone():
    """Wheels of ROS are in the extra `ros` alone: a board has a distribution's. iceoryx2 is asked for on x86-64 alone."""
    found = extras()
    for extra, requirements in found.items():
        names = wanted(requirements)
        assert not names & X86_ONLY, extra
        if extra not in ("ros", "all"):
            assert not [name for name in names if name.startswith("ros-")], extra
    assert wanted(found["shm"]) == set()
    assert {"torch", "timm", "pillow"} <= wanted(found["tokenizer"])
    assert {each.name for each in found["shm"]} == X86_ONLY


def test_installation_lines_of_the_docs_bring_iceoryx2_on_x86_alone():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if "'iceoryx2>=" in line and "torch" in line or "mcap 'iceoryx2" in line:
                assert 'platform_machine == "x86_64"' in line, f"{path.name}: {line}"


def imported_at_once(path: Path) -> set[str]:
    """What a module's import imports, by full name."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_what_a_board_may_lack_is_imported_within_functions_alone():
    """Triton has modules of its own, which are imported within functions, or by each other."""
    paths = {
        f"vla_perception.{'.'.join(p.relative_to(ROOT / 'vla_perception').with_suffix('').parts)}": p
        for p in (ROOT / "vla_perception").rglob("*.py")
    }
    imports = {module: imported_at_once(path) for module, path in paths.items()}
    for module, names in imports.items():
        assert not {name.split(".")[0] for name in names} & (X86_ONLY | {"simplejpeg", "cv_bridge", "cv2"}), module
    need_triton = {module for module, names in imports.items() if any(name.split(".")[0] == "triton" for name in names)}
    assert "vla_perception.tokenizer.triton_kernels" in need_triton
    while more := {module for module, names in imports.items() if names & need_triton} - need_triton:
        need_triton |= more
    assert all(
        "kernel" in module or "triton" in module or "image_transforms_gpu" in module for module in need_triton
    ), need_triton


def test_without_triton_pytorchs_kernels_do_it(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    from vla_perception import tokenizer as package
    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokenizer.fused_blocks import fuse_blocks
    from vla_perception.tokenizer.preprocess_gpu import DevicePreprocessor

    for name in [
        name
        for name in sys.modules
        if re.match(r"triton\b|vla_perception\.tokenizer\..*(kernels?|triton|image_transforms_gpu)", name)
    ]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(package, name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    made = VisualTokenizer.load("tiny-random", device="cpu", compute_dtype="bfloat16", runtime="eager")
    on_device = DevicePreprocessor(made.config.encoders, torch.device("cpu"))
    on_device._use_kernels()
    assert "triton" in on_device.fallback and not on_device.does_steps
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for got, expected in zip(on_device([image]), made.preprocess([image])):
        assert torch.equal(got, expected)
    assert "triton" in fuse_blocks(made.network, torch.bfloat16)
    assert torch.isfinite(made([image]).tokens).all()


def test_shared_memory_without_iceoryx2_is_a_reason_and_no_error(monkeypatch):
    from vla_perception.tokens import shared_memory

    monkeypatch.setitem(sys.modules, "iceoryx2", None)
    assert "iceoryx2" in shared_memory.unavailable_reason()


def test_a_processor_that_is_not_of_x86(tmp_path, monkeypatch):
    """Nothing is assumed of /proc/cpuinfo: no vendor and no model name are there."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    from vla_perception import bench
    from vla_perception.tokenizer import runtime

    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    real = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **given: real(file if str(self) == "/proc/cpuinfo" else self, **given)
    )
    assert runtime._processor_vendor() == ""
    for capability, dtype in itertools.product(("DEFAULT", "SVE256"), (torch.float32, torch.bfloat16, torch.float16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert not runtime.onednn_gains(dtype)
    monkeypatch.setattr(bench.platform, "processor", lambda: "")
    monkeypatch.setattr(bench.platform, "machine", lambda: "aarch64")
    assert bench._device_name(torch.device("cpu")).startswith("aarch64, ")
