"""``vla-perception doctor``: how this machine will compute, and its problems, each with a cure.

Each check yields `Finding`s about one subject. ``fail``: the tokenizer cannot work here; ``warn``: it works more slowly,
or not as expected.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import vla_perception
from vla_perception.cpu_quota import cpu_quota
from vla_perception.fast_dds import OLD_PROFILE_DISTROS, PROFILE_VARIABLES

MIB = 1 << 20
#: Bytes of /dev/shm that some processes with config/fastdds.xml take.
_SHM_BYTES = 256 * MIB
#: Distributions that encoding takes: the lowest version, and the first that is too new (setup.py has the reasons).
_PACKAGES = {
    "torch": ("2.4", ""),
    "torchvision": ("0.19", ""),
    "timm": ("1.0.26", "2"),
    "huggingface_hub": ("1.0", "3"),
    "pillow": ("10.3", "13"),
    "numpy": ("1.26", ""),
    "simplejpeg": ("1.7", ""),
}
#: In a separate process: rcl ends one whose RMW_IMPLEMENTATION cannot be loaded, and a full /dev/shm ends any.
_RCLPY_PROBE = """
import rclpy
rclpy.init()
print("\\n", rclpy.get_rmw_implementation_identifier(), rclpy.utilities.get_default_context().get_domain_id())
"""
_DISCOVERY_RANGES = ("SUBNET", "LOCALHOST", "OFF", "SYSTEM_DEFAULT")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was checked.
        state: ``ok``, ``warn`` or ``fail``.
        text: what was found.
        cure: what to do about it; empty for ``ok``.
    """

    subject: str
    state: str
    text: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.state:4}  {self.subject}: {self.text}" + (f"\n      → {self.cure}" if self.cure else "")


def examine(model: str | None = None, *, check: bool = False) -> Iterator[Finding]:
    """All checks, one after the other; a check that breaks is a finding, too.

    Args:
        model: whatever `VisualTokenizer.load` takes; None for no look at a model.
        check: encode two images in every runtime and precision of the device, and compare with float32.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        python,
        packages,
        lambda: device(),
        cores,
        ros,
        fastdds_profile,
        shared_memory,
        iceoryx2,
    ]
    if model is not None:
        checks.append(lambda: checkpoint(model))
    if check:
        checks.append(lambda: agreement(model or "tiny-random"))
    for one in checks:
        try:
            yield from one()
        except Exception as error:
            yield Finding(getattr(one, "__name__", "check"), "fail", f"{type(error).__name__}: {error}", "see the text")


def python() -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.machine()}, vla_perception {vla_perception.__version__}"
    yield Finding("Python", "ok", f"{text}, {sys.executable}")


def packages() -> Iterator[Finding]:
    """What encoding takes, and what some options take."""
    for name, (lowest, too_new) in _PACKAGES.items():
        version = _version(name)
        wanted = f"{name}>={lowest}" + (f",<{too_new}" if too_new else "")
        cure = f"pip install '{wanted}'"
        if not version and name == "simplejpeg":
            yield Finding(
                name, "warn", "not installed; needed for the image transform jpeg and compressed images", cure
            )
        elif not version:
            yield Finding(name, "fail", "not installed", cure)
        elif _numbers(lowest) <= _numbers(version) and not (too_new and _numbers(version) >= _numbers(too_new)):
            yield Finding(name, "ok", version)
        elif name == "pillow" and _numbers(version) >= _numbers(too_new):
            yield Finding(name, "fail", f"{version} gives other pixel values than models were trained on", cure)
        else:
            yield Finding(name, "warn", f"{version}, and {wanted} is what this version was tried with", cure)
    try:
        importlib.import_module("cv_bridge")
    except ModuleNotFoundError:
        return  # OpenCV converts
    except Exception as error:
        cure = "pip install 'numpy<2', or leave it: OpenCV converts instead"
        yield Finding("cv_bridge", "warn", f"does not load beside NumPy {_version('numpy')}: {error}", cure)
    else:
        yield Finding("cv_bridge", "ok", f"loads beside NumPy {_version('numpy')}")


def device() -> Iterator[Finding]:
    """What `auto` takes."""
    try:
        import torch

        from vla_perception.tokenizer.devices import place
        from vla_perception.tokenizer.runtime import onednn_gains
    except ImportError as error:
        yield Finding("device auto", "fail", str(error), "pip install '.[tokenizer]' in this package's sources")
        return
    placement = place()
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        yield Finding("NVIDIA driver", "ok", driver.read_text().splitlines()[0].strip())
    on_cpu = "onednn" if onednn_gains(placement.dtype) else "eager"
    runtime = "graph" if placement.device.type == "cuda" else on_cpu
    yield Finding("device auto", "ok", f"{placement}; runtime {runtime}, torch {torch.__version__}")
    for warning in placement.warnings:
        cure = "update NVIDIA's driver, install a torch that fits it, or free the GPU's memory"
        yield Finding("device auto", "warn", warning, cure)
    if placement.device.type == "cuda":
        yield from triton()


def triton(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """What Triton takes to compile kernels when a node starts; it looks for these in the same way."""
    otherwise = "otherwise PyTorch's kernels compute, more slowly"
    if importlib.util.find_spec("triton") is None:
        yield Finding(
            "Triton", "warn", f"not installed; {otherwise}", "pip install triton, if there is one for this torch"
        )
        return
    compiler = environment.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        what = f"CC={compiler} is not a program" if compiler else "finds no C compiler (CC, gcc, clang)"
        yield Finding("Triton", "warn", f"{what}; {otherwise}", "apt install gcc, or set CC to one")
        return
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's own
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not header.is_file():
        cure = "apt install python3-dev (or python3.N-dev, for this Python)"
        yield Finding("Triton", "warn", f"{header} is missing; {otherwise}", cure)
        return
    yield Finding("Triton", "ok", f"{_version('triton') or 'installed'}, compiles with {compiler}")


def cores() -> Iterator[Finding]:
    count, allowed = len(os.sched_getaffinity(0)), cpu_quota()
    if allowed is None:
        yield Finding("cores", "ok", f"{count}, without a quota")
        return
    state = "warn" if allowed < 2 else "ok"
    cure = "give it at least two cores (docker run --cpus, systemd's CPUQuota=)" if state == "warn" else ""
    yield Finding("cores", state, f"{count}, of which a quota allows {allowed:g}", cure)


def ros(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    if importlib.util.find_spec("rclpy") is None:
        cure = "source a ROS 2 distribution, or pip install '.[ros]'; image files need neither"
        yield Finding("ROS", "warn", "rclpy is not there, so no node runs in this environment", cure)
        return
    probe = subprocess.run(
        [sys.executable, "-c", _RCLPY_PROBE], env=dict(environment), capture_output=True, text=True, timeout=60
    )
    if probe.returncode:
        yield _why_rclpy_fails(probe, environment)
        return
    middleware, domain = probe.stdout.split()[-2:]
    distribution = environment.get("ROS_DISTRO") or f"rclpy {_version('rclpy')} (ROS_DISTRO is not set)"
    if int(domain) > 232:
        text = f"domain {domain}: DDS has no ports beyond 232"
        yield Finding("ROS", "fail", text, "set ROS_DOMAIN_ID to one from 0 to 101")
    else:
        yield Finding("ROS", "ok", f"{distribution}, {middleware}, domain {domain}")
    reach = environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "")
    if environment.get("ROS_LOCALHOST_ONLY") == "1":
        yield Finding("discovery", "ok", "ROS_LOCALHOST_ONLY=1 (deprecated): this machine")
    elif reach == "OFF":
        yield Finding(
            "discovery",
            "warn",
            "ROS_AUTOMATIC_DISCOVERY_RANGE=OFF: nodes find no other nodes",
            "unset it, or LOCALHOST",
        )
    elif reach and reach not in _DISCOVERY_RANGES:
        text = f"ROS_AUTOMATIC_DISCOVERY_RANGE={reach} is none of {', '.join(_DISCOVERY_RANGES)}: taken for LOCALHOST"
        yield Finding("discovery", "warn", text, "correct it; capitals count")
    else:
        yield Finding("discovery", "ok", f"ROS_AUTOMATIC_DISCOVERY_RANGE is {reach or 'not set: the whole subnet'}")


def _why_rclpy_fails(probe: subprocess.CompletedProcess[str], environment: Mapping[str, str]) -> Finding:
    cure = "source one ROS 2 distribution alone; its Python must be this one"
    if probe.returncode < 0:
        name = signal.Signals(-probe.returncode).name
        if name == "SIGBUS":
            cure = "make room in /dev/shm (see its line): nothing that imports rclpy runs without"
        return Finding("ROS", "fail", f"rclpy ended with {name}", cure)
    reason = next(
        reversed([line for line in probe.stderr.splitlines() if line.strip()]), f"exit code {probe.returncode}"
    )
    if "RMW_IMPLEMENTATION" in environment and ("RMW" in reason or "rmw" in reason):
        cure = f"install {environment['RMW_IMPLEMENTATION'].replace('_', '-')} (ros-$ROS_DISTRO-…), or unset RMW_IMPLEMENTATION"
    elif "ROS_DOMAIN_ID" in reason:
        cure = "set ROS_DOMAIN_ID to a number from 0 to 101, or unset it"
    return Finding("ROS", "fail", f"rclpy does not load: {reason.strip()}", cure)


def fastdds_profile(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    cure = "export both FASTDDS_ and FASTRTPS_DEFAULT_PROFILES_FILE with config/fastdds.xml, or use the launch files"
    given = {name: environment[name] for name in PROFILE_VARIABLES if environment.get(name)}
    if "fastrtps" not in environment.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp"):
        yield Finding("Fast DDS profile", "ok", f"not needed: RMW_IMPLEMENTATION={environment['RMW_IMPLEMENTATION']}")
    elif not given:
        text = "none in this shell: raw images of best-effort cameras are lost, tokens take longer (docs/transport.md)"
        yield Finding("Fast DDS profile", "warn", text, cure)
    distribution = environment.get("ROS_DISTRO", "")
    if distribution in OLD_PROFILE_DISTROS and set(given) == {PROFILE_VARIABLES[0]}:
        yield Finding("Fast DDS profile", "warn", f"{distribution} does not read {PROFILE_VARIABLES[0]}", cure)
        return
    for name, file in given.items():
        if not Path(file).is_file():
            yield Finding("Fast DDS profile", "fail", f"{name}={file}: there is no such file", cure)
        elif "segment_size" not in Path(file).read_text(encoding="utf-8", errors="replace"):
            yield Finding("Fast DDS profile", "warn", f"{name}={file} sets no segment_size", cure)
        else:
            yield Finding("Fast DDS profile", "ok", f"{name}={file}")


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        yield Finding(str(folder), "warn", str(error), "mount a tmpfs there: Fast DDS keeps its shared memory in it")
        return
    text = f"{usage.free / MIB:.0f} MiB free of {usage.total / MIB:.0f}"
    if not os.access(folder, os.W_OK):
        cure = "mount it writable, mode 1777: Fast DDS and shared memory make files there"
        yield Finding(str(folder), "warn", "it cannot be written to", cure)
    elif usage.free < _SHM_BYTES:
        cure = "docker run --ipc=host or --shm-size=1g; `fastdds shm clean` removes what killed processes left"
        yield Finding(str(folder), "warn", text, cure)
    else:
        yield Finding(str(folder), "ok", text)


def iceoryx2() -> Iterator[Finding]:
    from vla_perception.tokens import shared_memory_services as services
    from vla_perception.tokens.shared_memory import unavailable_reason

    if reason := unavailable_reason():
        cure = "pip install 'iceoryx2>=0.10,<0.11' (x86-64 Linux), or leave it: the topic carries tokens"
        yield Finding("iceoryx2", "warn", f"policies of this machine read tokens from the topic alone: {reason}", cure)
        return
    folder = services.root().rstrip("/")
    try:
        exists = services.check_folder()
        services.check_files()
        services.require_room(services.SERVICES_BYTES)
        if not os.access(services.FOLDER, os.W_OK):
            raise services.SharedMemoryError(f"{services.FOLDER} cannot be written to")
    except services.SharedMemoryError as error:
        yield Finding("iceoryx2", "warn", f"the topic alone carries tokens: {error}", "do what it says, or leave it")
        return
    text = f"of user {os.geteuid()}" if exists else "made when first used"
    yield Finding("iceoryx2", "ok", f"{_version('iceoryx2')}, {folder}, {text}")


def checkpoint(model: str) -> Iterator[Finding]:
    from vla_perception.tokenizer.checkpoints.open import check_model

    try:
        check_model(model)
        from vla_perception.tokenizer import VisualTokenizer

        tokenizer = VisualTokenizer.load(model)
    except (ValueError, OSError, ImportError) as error:
        yield Finding("model", "fail", str(error), "docs/models.md says what can be loaded")
        return
    text = f"{tokenizer.model}, {tokenizer.weights} weights, fingerprint {tokenizer.fingerprint}"
    if tokenizer.weights == "random":
        yield Finding("model", "warn", text, "tokens of random weights mean nothing: give a checkpoint")
    else:
        yield Finding("model", "ok", text)


def agreement(model: str) -> Iterator[Finding]:
    """Every runtime and precision of the device that `auto` takes, but `compile`, against eager float32."""
    import numpy as np
    import torch

    from vla_perception.baseline import TOLERANCES
    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokenizer.devices import float8_unavailable_reason, place

    kind = place()
    without_float8 = float8_unavailable_reason(kind.device)
    runtimes = ("eager", "graph") if kind.device.type == "cuda" else ("eager", "onednn")
    images = list(np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), dtype=np.uint8))
    reference = VisualTokenizer.load(model, device="cpu", compute_dtype="float32", runtime="eager")
    expected = reference(images).tokens.double()
    for runtime in runtimes:
        for dtype, tolerance in TOLERANCES.items():
            if dtype == "float8" and without_float8:  # a choice for some GPUs, and not a fault of the others
                continue
            subject = f"{runtime} in {dtype} on {kind.device}"
            try:
                tokenizer = VisualTokenizer.load(model, device=str(kind.device), compute_dtype=dtype, runtime=runtime)
                found = tokenizer(images).tokens.double().cpu()
            except (ValueError, RuntimeError) as error:
                yield Finding(subject, "warn", str(error).splitlines()[0], "choose another runtime or compute_dtype")
                continue
            distance = float((found - expected).norm() / expected.norm())
            text = f"relative L2 to float32 {distance:.1e}, kernels of {tokenizer.kernels}"
            if tokenizer.runtime != runtime or tokenizer.runtime_fallback:
                cure = f"mend what keeps {runtime} from running, or choose another runtime"
                yield Finding(subject, "warn", f"{text}; runs {tokenizer.runtime}: {tokenizer.runtime_fallback}", cure)
            elif not torch.isfinite(found).all() or distance > tolerance:
                yield Finding(
                    subject, "fail", f"{text}, more than {tolerance:g}", "choose another runtime or compute_dtype"
                )
            elif tokenizer.kernels.startswith("pytorch ("):  # with the reason why it is not Triton
                yield Finding(subject, "warn", text, "mend what the line on Triton says, or what the text names")
            else:
                yield Finding(subject, "ok", text)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Of ``2.5.0a0+nv24.8``: (2, 5, 0)."""
    found = re.match(r"[\d.]*\d", version)
    return tuple(map(int, found[0].split("."))) if found and version[:1].isdigit() else ()


def as_dict(findings: list[Finding]) -> dict:
    """For JSON: the worst state, and every finding."""
    states = {finding.state for finding in findings}
    worst = next((state for state in ("fail", "warn") if state in states), "ok")
    return {"state": worst, "findings": [asdict(finding) for finding in findings]}
