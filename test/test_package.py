"""The package as a package: what it declares, what it installs, and which way its imports point."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from blocked_imports import run_without
from packaging.requirements import Requirement
from ros_harness import RosContext, free_domain, ros_environment, wait_until

import vla_perception

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vla_perception"
MANIFEST = ElementTree.parse(ROOT / "package.xml").getroot()
VERSION = MANIFEST.findtext("version")
#: Python modules of ROS packages, which are called as the packages are.
ROS_MODULES = re.compile(
    r"rclpy|rcl_interfaces|builtin_interfaces|cv_bridge|ament_index_python|launch\w*|\w+_(msgs|srvs)"
)


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports anywhere in it, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources(*parts: str) -> list[Path]:
    """The Python files of a folder, or the file itself."""
    path = PACKAGE.joinpath(*parts)
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def entry_points() -> dict[str, str]:
    """Name → `module:function` of each console script, as setup.py says them."""
    return dict(re.findall(r'f"([\w-]+) = \{NAME\}\.([\w.]+:\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))


# --- what it declares


def test_the_version_has_one_source():
    try:
        installed = metadata.version("vla_perception")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package installed: pip install .")
    assert vla_perception.__version__ == installed == VERSION
    assert VERSION not in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_extras():
    """Each extra's requirements are met where everything is installed; the base stays light."""
    try:
        declared = [Requirement(text) for text in metadata.requires("vla_perception")]
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package installed: pip install .")
    base = {requirement.name for requirement in declared if requirement.marker is None}
    assert base == {"numpy", "safetensors", "ml_dtypes"}
    extras = set(metadata.metadata("vla_perception").get_all("Provides-Extra"))
    assert extras == {
        "tokenizer",
        "ros",
        "shm",
        "bags",
        "offline",
        "ray",
        "view",
        "sim",
        "openvla",
        "test",
        "dev",
        "all",
    }
    for requirement in declared:
        if requirement.marker is not None and requirement.marker.evaluate({"extra": "all"}):
            assert requirement.specifier.contains(metadata.version(requirement.name)), requirement


def test_every_console_script_exists():
    assert {"visual_tokenizer", "bag_player", "vla-perception"} <= set(entry_points())
    for name, target in entry_points().items():
        module, function = target.split(":")
        path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        assert path.is_file(), f"{name}: {path} does not exist"
        functions = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")]
        assert function in functions, f"{name}: {path} has no {function}()"


def test_every_ros_package_in_use_is_declared():
    """In package.xml for rosdep; and, unless it is not on PyPI, in the extra `ros` and for Jazzy."""
    used = set()
    for path in [*sources(), *(ROOT / "launch").glob("*.py")]:
        used |= {name.split(".")[0] for name in imported_modules(path)}
    used = {name for name in used if ROS_MODULES.fullmatch(name)}
    assert {"rclpy", "sensor_msgs"} <= used
    assert used <= {element.text for element in MANIFEST.findall("exec_depend")}
    not_on_pypi = {name for name in used if name.startswith("launch")} | {"cv_bridge"}
    for file in ("setup.py", "requirements/jazzy.txt"):
        text = (ROOT / file).read_text(encoding="utf-8")
        missing = {name for name in used - not_on_pypi if f"ros-{name.replace('_', '-')}" not in text}
        assert not missing, f"{file} lacks {missing}"


# --- which way imports point


#: Modules without ROS, PyTorch or anything else of the package, which every part may import.
FOR_ALL = r"(?:options|fingerprint_inputs|printable|byte_array|condition|cpu_quota|kept_threads)\b"


@pytest.mark.parametrize(
    "part, forbidden",
    [
        ("tokenizer", rf"vla_perception\.(?!tokenizer\b|{FOR_ALL}).*"),
        ("images", rf"vla_perception\.(?!images\b|{FOR_ALL}).*|rclpy|torchvision|timm"),
        ("sources", rf"vla_perception\.(?!sources\b|images\b|{FOR_ALL}).*|rclpy"),
        ("tokens", rf"vla_perception\.(?!tokens\b|tokenizer\b|{FOR_ALL}).*|torchvision|timm"),
        ("visualization", rf"vla_perception\.(?!tokens\b|visualization\b|{FOR_ALL}).*|rclpy|torch"),
        (
            "offline",
            rf"vla_perception\.(?!(offline|sources|images|tokens|tokenizer|synchronizer|startup|__version__)\b|{FOR_ALL}).*",
        ),
        # live.py alone knows ROS.
        *((f"offline/{path.name}", r"rclpy") for path in sources("offline") if path.name != "live.py"),
        ("synchronizer.py", rf"vla_perception\.(?!tokens\.arrivals\b|{FOR_ALL}).*|rclpy|torch"),
        ("options.py", r"(?!__future__|re\b).*"),
        # live.py alone knows ROS; the command brings them together.
        *(
            (
                f"view/{name}.py",
                r"vla_perception\.(?!tokens\b|images\b|sources\b|visualization\b|printable\b|view\b).*|rclpy",
            )
            for name in ("analysis", "health", "snapshot", "wire", "session", "server", "recording", "top")
        ),
        ("view/recorded.py", r"vla_perception\.(nodes|doctor|bench|cli)\b.*|rclpy"),
        ("fingerprint_inputs.py", r"(?!__future__|collections.abc|hashlib|json).*"),
        ("condition.py", r"vla_perception\..*|torch|rclpy"),
        ("printable.py", r"vla_perception\..*"),
        ("byte_array.py", r"vla_perception\..*"),
        ("cli.py", r"rclpy"),
    ],
)
def test_imports_point_one_way(part, forbidden):
    for path in sources(part):
        names = imported_modules(path)
        if part in ("tokenizer", "visualization"):
            assert not [name for name in names if ROS_MODULES.fullmatch(name.split(".")[0])], path
        wrong = sorted(name for name in names if re.match(rf"(?:{forbidden})(?:\.|$)", name))
        assert not wrong, f"{path} imports {wrong}"


#: What a policy's environment need not have.
HEAVY = r"torch|torchvision|timm|cv2|PIL|rosbags|mcap|mujoco"


def test_tokens_are_read_with_numpy_alone():
    run_without(
        rf"{HEAVY}|rclpy|\w+_msgs",
        """
        import vla_perception.images.decode
        from vla_perception.tokens import TokenBuffer, TokenSubscriber, VisualTokens, from_message
        import vla_perception.visualization.principal_components
        """,
    )


@pytest.mark.ros
def test_the_node_starts_without_torch():
    """So it is up at once, and can say that torch is missing."""
    run_without("torch|torchvision|timm", "import vla_perception.nodes.visual_tokenizer.node")


@pytest.mark.parametrize("name", sorted(set(entry_points()) - {"vla-perception"}))
def test_a_node_without_ros_says_what_to_install(name):
    run_without(
        r"rclpy|rcl_interfaces|\w+_msgs|\w+_srvs",
        f"""
        import os
        from vla_perception.nodes import executables

        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, 2)
            executables.{name}()
        os.close(writing)
        printed = os.fdopen(reading).read()
        assert os.waitpid(child, 0)[1] >> 8 == 1, printed
        assert len(printed.splitlines()) == 1 and "pip install '.[ros]'" in printed, printed
        """,
    )


def test_the_command_says_what_is_missing():
    run_without(
        "torch|torchvision|timm",
        """
        import contextlib, io
        from vla_perception import cli

        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            assert cli.main(["describe", "timm:test_vit"]) == 1
        assert "pip install '.[tokenizer]' in this package's sources" in printed.getvalue(), printed.getvalue()
        """,
    )


@pytest.mark.ros
@pytest.mark.parametrize(
    "node, missing, arguments, cure",
    [
        ("bag_player", "mcap|lz4|zstandard", [f"bag:={ROOT}/examples/sample_bag"], "pip install mcap pyyaml"),
        ("opencv_camera", "cv2", [f"source:={ROOT}/README.md"], "pip install opencv-python-headless"),
        ("opencv_camera", "cv2", ["source:=rtsp://127.0.0.1:9/x"], "pip install opencv-python-headless"),
        ("mujoco_camera", "mujoco", [], "pip install mujoco|apt install"),  # without OpenGL that comes first
        ("token_viewer", "cv2", ["image_transport:=compressed"], "pip install opencv-python-headless"),
    ],
)
def test_a_node_without_its_extra_says_what_to_install(node, missing, arguments, cure):
    settings = [word for argument in arguments for word in ("-p", argument)]
    run_without(
        missing,
        f"""
        import contextlib, io, re
        from vla_perception.nodes import {node}

        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            assert {node}.main(["{node}", "--ros-args", *{settings!r}]) == 1
        assert re.search({cure!r}, printed.getvalue()) and "Traceback" not in printed.getvalue(), printed.getvalue()
        """,
    )


@pytest.mark.ros
def test_a_policy_needs_rclpy_and_numpy_only():
    run_without(HEAVY, "import demo.policy")


# --- how long its parts are


def test_names_of_test_files_differ():
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "test").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_files_and_functions_are_short():
    """Files of at most 500 lines, functions of at most 60: longer ones hold two ideas."""
    long_files, long_functions = {}, {}
    for path in sources():
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > 500:
            long_files[str(path.relative_to(PACKAGE))] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                long_functions[f"{path.relative_to(PACKAGE)}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert not long_files and not long_functions


# --- what it installs


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of what belongs to the package, where builds may write."""
    folder = tmp_path_factory.mktemp("workspace") / "src" / "vla_perception"
    folder.mkdir(parents=True)
    for name in ("package.xml", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("vla_perception", "resource", "scripts", "launch", "config"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "sample_bag", folder / "examples" / "sample_bag")
    return folder


def fresh_shell() -> dict[str, str]:
    """The environment of a terminal in which this Python's environment is active, and nothing else."""
    names = ("PYTHONPATH", "AMENT_PREFIX_PATH", "LD_LIBRARY_PATH", "_ROS_WHEELS_BOOTSTRAP_COMPLETE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def colcon(workspace: Path, *arguments: str) -> str:
    executable = shutil.which("colcon", path=fresh_shell()["PATH"])
    if executable is None:
        pytest.skip("needs colcon: pip install '.[test]'")
    result = subprocess.run([executable, *arguments], cwd=workspace, env=fresh_shell(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def install_space(source) -> Path:
    """A workspace's `install` folder, made by `colcon build`."""
    workspace = source.parent.parent
    colcon(workspace, "build")
    return workspace / "install"


def test_colcon_knows_the_package(source):
    # A package.xml with a mistake in it turns the package into a plain Python one, and colcon sets no ROS paths.
    assert "(ros.ament_python)" in colcon(source.parent.parent, "list")


@pytest.mark.ros
def test_colcon_installs_everything(install_space):
    prefix = install_space / "vla_perception"
    assert (prefix / "share/ament_index/resource_index/packages/vla_perception").is_file()
    share = prefix / "share/vla_perception"
    assert (share / "package.xml").is_file()
    for folder in ("launch", "config", "examples/sample_bag"):
        expected = {path.name: path.read_bytes() for path in (ROOT / folder).glob("*.*")}
        assert {path.name: path.read_bytes() for path in (share / Path(folder).name).glob("*")} == expected
    assert {path.name for path in (prefix / "lib/vla_perception").iterdir()} == set(entry_points())
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".xml", ".typed"):
            pattern = f"lib/python3*/site-packages/{path.relative_to(ROOT)}"
            assert list(prefix.glob(pattern)), f"{path.relative_to(ROOT)} is not installed"


def in_install_space(install_space: Path, command: str) -> list[str]:
    return ["bash", "-c", f". {install_space}/setup.sh && exec {command}"]


@pytest.mark.ros
def test_the_command_is_on_the_path_of_a_sourced_workspace(install_space):
    where = subprocess.run(
        in_install_space(install_space, "which vla-perception"), env=fresh_shell(), capture_output=True, text=True
    )
    assert where.stdout.strip() == str(install_space / "vla_perception/bin/vla-perception")
    version = subprocess.run(
        in_install_space(install_space, "vla-perception --version"), env=fresh_shell(), capture_output=True, text=True
    )
    assert version.stdout.strip() == f"vla-perception {VERSION}", version.stderr


@pytest.mark.ros
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_node_starts_from_a_colcon_install(install_space, number, tmp_path):
    """From the installed files, not from this checkout; seen in the ROS graph; ends cleanly."""
    domain = free_domain()
    environment = ros_environment(domain)
    environment = fresh_shell() | {name: environment[name] for name in environment if name.startswith("ROS_")}
    where = subprocess.run(
        in_install_space(install_space, "python3 -c 'import vla_perception; print(vla_perception.__file__)'"),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(install_space)), where.stdout + where.stderr

    executable = install_space / "vla_perception/lib/vla_perception/visual_tokenizer"
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            in_install_space(install_space, str(executable)),
            env=environment,
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with RosContext(domain) as ros:
            node = ros.node("observer")
            wait_until(
                lambda: (
                    ("visual_tokenizer" in node.get_node_names() and log.stat().st_size) or process.poll() is not None
                ),
                60,
                "visual_tokenizer in the graph, and what it says in its log",
            )
        assert process.poll() is None, log.read_text()
        process.send_signal(number)
        assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_wheel_has_what_pip_needs(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("*.egg-info"))
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"vla_perception-{VERSION}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"vla_perception/tokenizer/tokenizer.py", "vla_perception/py.typed"} <= set(names)
    assert not [name for name in names if re.search(r"\.data/(data/bin|scripts)/", name)], "pip makes the scripts"
    assert any(name.endswith("share/vla_perception/package.xml") for name in names)
