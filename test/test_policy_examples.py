"""The examples that read tokens, each run as a user would; and the environment that a policy needs at least."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_tokenizer import MODEL, make_tokens
from ros_harness import ROOT, RosProcess, free_domain, ros_environment, wait_until

from vla_perception.tokens import VisualTokens

LINE = re.compile(r"\('front', 'wrist'\) \(2, 196, 256\) bfloat16 [\d.]+ Hz, -?\d+ ms old, 0 lost")
FAKE = ["--rate", "20", "--cameras", "front", "wrist", "--grid", "14", "14", "--channels", "256", "--dtype", "bfloat16"]
#: What pip and uv say when no index answers, and only then.
NO_INDEX = (
    "Failed to fetch",
    "Request failed",
    "NewConnectionError",
    "Network is unreachable",
    "ReadTimeout",
    "ProxyError",
)


def fake_tokenizer(domain: int) -> RosProcess:
    return RosProcess([str(ROOT / "test" / "support" / "fake_tokenizer.py"), *FAKE], domain)


@pytest.mark.ros
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_minimal_policy(number):
    pytest.importorskip("rclpy")
    code = (ROOT / "examples" / "minimal_policy.py").read_text()
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    domain = free_domain()
    with RosProcess([str(ROOT / "examples" / "minimal_policy.py")], domain) as policy, fake_tokenizer(domain):
        policy.wait_for(" lost\n")
        assert LINE.search(policy.output), policy.output
        assert policy.stop(number) == 0, policy.output
        assert "Traceback" not in policy.output


def build(program: Path, *sources: Path, flags=("-O1",)) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build examples/cpp_reader with")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def cpp_reader(tmp_path_factory) -> Path:
    source = ROOT / "examples" / "cpp_reader" / "token_reader.cpp"
    return build(tmp_path_factory.mktemp("cpp") / "token_reader", source)


def test_the_cpp_header_can_be_included_in_several_files_of_a_program(tmp_path):
    (tmp_path / "one.cpp").write_text(
        '#include "token_reader.hpp"\n'
        "size_t size_of(const unsigned char* data, size_t size) { return vla_tokens::read_tokens(data, size).tokens; }\n"
    )
    (tmp_path / "two.cpp").write_text(
        '#include <fstream>\n#include <iterator>\n#include "token_reader.hpp"\n#include "token_reader.hpp"\n'
        "size_t size_of(const unsigned char* data, size_t size);\n"
        "int main(int, char** arguments) {\n"
        "  std::ifstream file(arguments[1], std::ios::binary);\n"
        "  const std::vector<uint8_t> data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};\n"
        "  const auto tokens = vla_tokens::read_tokens(data.data(), data.size());\n"
        "  const bool same = tokens.tokens == size_of(data.data(), data.size());\n"
        '  return same && tokens.camera(0) == "front" && tokens.valid(0) && !tokens.valid(1) ? tokens.sequence() : 0;\n'
        "}\n"
    )
    folder = ROOT / "examples" / "cpp_reader"
    program = build(tmp_path / "program", tmp_path / "one.cpp", tmp_path / "two.cpp", flags=("-O0", f"-I{folder}"))
    assert subprocess.run([str(program), str(ROOT / "examples" / "sample_message.safetensors")]).returncode == 42


def test_the_sample_message_is_what_its_program_writes(tmp_path):
    program = ROOT / "examples" / "make_sample_message.py"
    subprocess.run([sys.executable, str(program), str(tmp_path)], check=True, env=ros_environment(0))
    for name in ("sample_message.safetensors", "sample_message.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "examples" / name).read_bytes(), name


def test_readers_find_in_the_sample_message_what_is_said_of_it(cpp_reader):
    """The C++ reader, the one on the page of the wire format, and safetensors' own."""
    safetensors = pytest.importorskip("safetensors")
    path = ROOT / "examples" / "sample_message.safetensors"
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path.stat().st_size == expected["bytes"]

    done = subprocess.run([str(cpp_reader), str(path)], check=True, capture_output=True)
    found = json.loads(done.stdout)
    for key in ("shape", "dtype", "sequence", "fingerprint"):
        assert found[key] == expected[key], key
    for view, described in zip(found["views"], expected["views"], strict=True):
        assert view == {key: described[key] for key in view}

    page = (ROOT / "docs" / "wire_format.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], namespace := {})
    values, metadata = namespace["read"](path.read_bytes())
    assert values.tolist() == expected["tokens"]
    for key in ("sequence", "fingerprint", "grid", "token_strategy"):
        assert metadata[key] == expected[key]
    for view, described in zip(metadata["views"], expected["views"], strict=True):
        assert view.get("seen") == described["seen"]
        for key in ("camera", "frame_id", "valid", "affine"):
            assert view[key] == described[key]
        # Where pixels end up, by the page's formula alone; the cls token stands before the grid.
        a, b, c, d, e, f = view["affine"]
        left, top, right, bottom = view.get("seen") or (0, 0, view["width"], view["height"])
        for x, y, token in described["token_of_pixels"]:
            column, row = int(np.floor(a * x + b * y + c)), int(np.floor(d * x + e * y + f))
            rows, columns = expected["grid"]
            inside = 0 <= row < rows and 0 <= column < columns and left <= x < right and top <= y < bottom
            assert token == (1 + row * columns + column if inside else None)

    torch = pytest.importorskip("torch")
    with safetensors.safe_open(path, framework="pt") as file:
        for name in ("tokens", "features"):
            assert file.get_tensor(name).dtype == torch.bfloat16
            assert file.get_tensor(name).float().tolist() == expected[name]


def stored(dtype: str) -> VisualTokens:
    """Random tokens of two cameras, one without an image, with a name that JSON has to escape."""
    values = np.random.default_rng(0).standard_normal((2, 12, 6)).astype(np.float32)
    values[0, 0, :3] = (6e-8, -3e-5, 60000.0)  # halves: denormal, smallest, largest
    words = {"float32": values, "float16": values.astype(np.float16)}
    words["bfloat16"] = (values.view(np.uint32) >> 16).astype(np.uint16)
    tokens = make_tokens(7, cameras=("front", "wrist"), data=words[dtype], dtype=dtype, model='a "model"\n名')
    views = (tokens.views[0], type(tokens.views[1])("wríst", "", 5 * 10**9, 480, 640, tokens.views[1].affine, False))
    return VisualTokens(**{**tokens.__dict__, "views": views})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cpp_reader_reads_what_python_wrote(cpp_reader, tmp_path, dtype):
    tokens = stored(dtype)
    (tmp_path / "message").write_bytes(tokens.to_bytes())
    done = subprocess.run([str(cpp_reader), str(tmp_path / "message")], check=True, capture_output=True)
    read = json.loads(done.stdout)
    assert read["shape"] == [2, 12, 6] and read["sequence"] == 7 and read["fingerprint"] == MODEL["fingerprint"]
    assert read["dtype"] == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for view, values in enumerate(tokens.float32().astype(np.float64).reshape(2, -1)):
        found, described = read["views"][view], tokens.views[view]
        assert (found["camera"], found["valid"]) == (described.camera, described.valid)
        assert found["sec"] == described.stamp_ns // 10**9
        np.testing.assert_allclose(found["sum"], values.sum(), rtol=1e-12)
        np.testing.assert_allclose(found["weighted"], values @ (np.arange(values.size) % 1009), rtol=1e-12)


def test_cpp_reader_refuses_what_is_damaged_and_never_crashes(cpp_reader, tmp_path):
    data = stored("bfloat16").to_bytes()
    random = np.random.default_rng(0)
    spoilt = [
        b"",
        data[:5],
        data[:-1],
        data[:300],
        data.replace(b"vla_tokens/1", b"vla_tokens/2"),
        data.replace(b"[2,12,6]", b"[2,12,9]"),
        (2**63).to_bytes(8, "little") + data[8:],
        data + b"more",
        data.replace(b'"data_offsets":[0,288]', b'"data_offsets":[2,290]') + b"\0\0",
        data.replace(b'"dtype":"BF16","shape"', b'"dtype":"BF16","dtype":"F16","shape"'),
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ]
    for index, wrong in enumerate(spoilt):
        (tmp_path / "message").write_bytes(wrong)
        done = subprocess.run([str(cpp_reader), str(tmp_path / "message")], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("token_reader: "), (index, done)
    header = int.from_bytes(data[:8], "little")
    for _ in range(150):
        wrong = bytearray(data)
        for position in random.integers(0, header + 8, 2):
            wrong[position] = random.integers(0, 256)
        (tmp_path / "message").write_bytes(wrong)
        done = subprocess.run([str(cpp_reader), str(tmp_path / "message")], capture_output=True)
        assert done.returncode in (0, 1), done


def test_a_venv_with_nothing_but_the_ros_extra_receives_tokens(tmp_path):
    """`pip install vla_perception[ros]`: no torch, no timm, no custom interface."""
    pytest.importorskip("rclpy")
    if sys.platform != "linux" or sys.version_info >= (3, 13):
        pytest.skip("ROS 2's wheels are for Python 3.10 to 3.12 on Linux")
    # Another environment's Python must not get this one's libraries; a copy keeps build outputs out of the sources.
    inherited = ("LD_LIBRARY_PATH", "_ROS_WHEELS_BOOTSTRAP_COMPLETE", "PYTHONPATH", "VIRTUAL_ENV", "AMENT_PREFIX_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    source, venv = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "install", "log", "out", "*.egg-info"))
    python = str(venv / "bin" / "python")
    uv = shutil.which("uv") or next((str(p) for p in [ROOT / ".bootstrap" / "bin" / "uv"] if p.is_file()), None)
    if uv:
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(venv)], check=True, env=environment)
        install = [uv, "pip", "install", "--quiet", "--python", python, ".[ros]"]
    else:
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, env=environment)
        install = [python, "-m", "pip", "install", "--quiet", "--retries", "1", ".[ros]"]
    done = subprocess.run(install, cwd=source, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode and any(words in done.stderr for words in NO_INDEX):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr

    names = "import importlib.util as u; print([n for n in ('torch', 'timm', 'cv2', 'PIL', 'scipy') if u.find_spec(n)])"
    found = subprocess.run([python, "-c", names], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found

    domain = free_domain()
    settings = {k: ros_environment(domain)[k] for k in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE")}
    with fake_tokenizer(domain):
        policy = subprocess.Popen(
            [python, "-u", str(ROOT / "examples" / "minimal_policy.py")],
            cwd=tmp_path,
            env=environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            line = policy.stdout.readline()
            assert LINE.search(line), line + policy.stdout.read()
        finally:
            policy.send_signal(signal.SIGINT)
            rest, _ = policy.communicate(timeout=30)
    assert policy.returncode == 0, rest


def code_on_the_page(words: str) -> str:
    """The one program of docs/policy.md that has these words in it."""
    page = (ROOT / "docs" / "policy.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if words in code)
    return code


@pytest.mark.ros
def test_the_policy_on_the_page_works():
    """As somebody would type it in."""
    pytest.importorskip("rclpy")
    domain = free_domain()
    with (
        RosProcess(["-c", code_on_the_page("tokens.float32().shape, subscriber.age")], domain) as policy,
        fake_tokenizer(domain),
    ):
        policy.wait_for("('front', 'wrist') (2, 196, 256) 0.")


@pytest.mark.ros
def test_the_node_on_the_page_acts_on_two_frames():
    pytest.importorskip("rclpy")
    from ros_harness import Listener
    from sensor_msgs.msg import JointState

    domain = free_domain()
    with (
        Listener(domain) as listener,
        RosProcess(["-c", code_on_the_page("class Policy(Node)")], domain) as policy,
        fake_tokenizer(domain),
    ):
        actions = listener.collect(JointState, "action")
        wait_until(lambda: actions, 30.0, "an action")
        # Every value of a message is its sequence number: two that follow one another have their mean at a half.
        assert len(actions[0].position) == 7 and set(actions[0].position) == {actions[0].position[0]}
        assert actions[0].position[0] % 1 == 0.5
        assert policy.stop() == 0, policy.output


@pytest.mark.ros
def test_the_loop_on_the_page_infers_once_and_holds_without_tokens():
    pytest.importorskip("rclpy")
    before = """
import time, rclpy
from vla_perception.tokens import TokenSubscriber
def say(*words): print(*words, flush=True)
hold, follow = (lambda: say("hold")), (lambda chunk: say("follow", chunk))
def act(tokens): say("act", tokens.sequence); return tokens.sequence
rclpy.init()
subscriber = TokenSubscriber(rclpy.create_node("policy"))
"""
    code, domain = before + code_on_the_page("max_age_sec=0.1").replace("0.1", "0.5"), free_domain()
    with RosProcess(["-c", code], domain) as policy:
        policy.wait_for("hold\n")
        # Half of the 30 turns a second have no new message; then there are no more, and what there was gets old.
        with RosProcess(
            [str(ROOT / "test" / "support" / "fake_tokenizer.py"), "--rate", "10", "--count", "10"], domain
        ):
            policy.wait_for("follow 9\n")
            policy.wait_for("follow 9\nhold\n")
    said = [line for line in policy.output.splitlines() if line.startswith("act")]
    assert said and len(said) == len(set(said)) and said[-1] == "act 9", policy.output
    assert policy.output.count("follow 9\n") > 1
