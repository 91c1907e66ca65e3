"""The launch files: what they name exists; and, where `ros2 launch` does, they start systems that work.

The first half runs anywhere, with stand-ins for the few classes of launch and launch_ros that the files use. The
second half needs launch_ros, `ros2` and this package installed by colcon, and is skipped with the reason otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import yaml
from node_sources import parameter_specs_of
from ros_harness import RosProcess, free_domain, in_domain, ros_environment, wait_until

from vla_perception.nodes.parameters import Changes, ParameterSpec

ROOT = Path(__file__).resolve().parent.parent
BAG = ROOT / "examples" / "sample_bag"
FILES = sorted(path.name for path in (ROOT / "launch").glob("*.launch.py"))


# Stand-ins


class Recorded:
    """Any action or substitution: remembers what it was made of."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __getattr__(self, name):
        try:
            return self.kwargs[name]
        except KeyError:
            raise AttributeError(name) from None


class LaunchConfiguration(Recorded):
    def perform(self, context):
        return context.launch_configurations[self.args[0]]


class Context:
    def __init__(self, launch_configurations, environment=(), argv=()):
        self.launch_configurations = launch_configurations
        self.environment = dict(environment)
        self.argv = list(argv)


class ParameterValue(Recorded):
    @property
    def value(self):
        return self.args[0]


MODULES = {
    "launch": ["LaunchContext", "LaunchDescription"],
    "launch.actions": [
        "DeclareLaunchArgument",
        "IncludeLaunchDescription",
        "LogInfo",
        "OpaqueFunction",
        "SetEnvironmentVariable",
        "Shutdown",
        "TimerAction",
    ],
    "launch.substitutions": [LaunchConfiguration],
    "launch.launch_description_sources": ["PythonLaunchDescriptionSource"],
    "launch_ros": [],
    "launch_ros.actions": ["Node"],
    "launch_ros.parameter_descriptions": [ParameterValue],
}


@pytest.fixture
def launch_file(monkeypatch, tmp_path):
    """A launch file's module by name, over stand-ins; its `run(**arguments)` gives the actions."""
    pytest.importorskip("ament_index_python")
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        for member in members:
            kind = type(member, (Recorded,), {}) if isinstance(member, str) else member
            setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vla_perception.launch_utils", raising=False)
    parts = importlib.import_module("vla_perception.launch_utils")
    monkeypatch.setattr(parts, "share", lambda *path: ROOT.joinpath(*path))
    monkeypatch.setattr(parts.shutil, "which", lambda _: sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))  # no package is installed

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name.removesuffix(".launch.py"), ROOT / "launch" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        entities = module.generate_launch_description().args[0]
        module.arguments = {e.args[0]: e for e in entities if type(e).__name__ == "DeclareLaunchArgument"}
        assert type(entities[-1]).__name__ == "OpaqueFunction"

        def run(environment=(), argv=(), others=(), **given):
            """argv: the command line's arguments; others: launch configurations of a file that includes this one."""
            assert set(given) <= set(module.arguments)
            values = dict(others) | {
                key: given.get(key, action.kwargs.get("default_value")) for key, action in module.arguments.items()
            }
            for key, action in module.arguments.items():
                choices = action.kwargs.get("choices")
                assert choices is None or values[key] in choices
            return entities[-1].kwargs["function"](Context(values, environment, argv))

        module.run = run
        module.parts = parts
        return module

    yield load
    sys.modules.pop("vla_perception.launch_utils", None)


def kinds(actions, kind: str) -> list:
    return [action for action in actions if type(action).__name__ == kind]


def parameters_of(node) -> dict:
    values = {}
    for entry in node.kwargs["parameters"]:
        if isinstance(entry, dict):
            values |= {key: getattr(value, "value", value) for key, value in entry.items()}
    return values


def parameters_of_executable(executable: str) -> dict[str, ParameterSpec]:
    entry = f'"{executable} = {{NAME}}.nodes.executables:{executable}"'  # each takes the module of its own name
    assert entry in (ROOT / "setup.py").read_text(), f"{executable} is not a console script"
    pytest.importorskip("rclpy")
    return parameter_specs_of(executable)


def check_nodes(actions) -> list[str]:
    """Executables, parameter names and files of this package's nodes exist. The executables, in order."""
    started = []
    for node in kinds(actions, "Node"):
        started.append(node.executable)
        if node.package != "vla_perception":
            continue
        specs = parameters_of_executable(node.executable)
        for name in parameters_of(node):
            assert name == "use_sim_time" or name in specs, f"{node.executable} has no parameter {name}"
        for entry in node.kwargs["parameters"]:
            assert isinstance(entry, dict) or Path(entry).is_file()
    return started


RUNS = [
    ("tokenizer.launch.py", {}, ["visual_tokenizer"]),
    ("tokenizer.launch.py", {"cameras": "front,wrist", "view": "true"}, ["visual_tokenizer", "token_viewer"]),
    (
        "real_camera.launch.py",
        {"cameras": "front=a.mp4,wrist=/dev/video2", "width": "640", "height": "480", "rate_hz": "15"},
        ["opencv_camera", "opencv_camera", "visual_tokenizer"],
    ),
    ("sim_camera.launch.py", {}, ["mujoco_camera", "visual_tokenizer"]),
    ("replay_bag.launch.py", {"bag": str(BAG), "loop": "true", "rate": "2.0"}, ["bag_player", "visual_tokenizer"]),
]


@pytest.mark.parametrize(("name", "arguments", "executables"), RUNS)
def test_what_a_launch_file_names_exists(launch_file, name, arguments, executables):
    if name == "replay_bag.launch.py":
        pytest.importorskip("rosbags")
    module = launch_file(name)
    actions = module.run(**arguments)
    assert check_nodes(actions) == executables
    assert all(action.kwargs.get("description") for action in module.arguments.values())
    profile = {action.args[0]: action.args[1] for action in kinds(actions, "SetEnvironmentVariable")}
    assert set(profile) == {"FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"}
    assert all(Path(path).is_file() for path in profile.values())
    # A variable is set for what is started after it.
    assert [type(a).__name__ for a in actions if type(a).__name__ != "LogInfo"][:2] == ["SetEnvironmentVariable"] * 2


@pytest.mark.parametrize(("name", "arguments"), [run[:2] for run in RUNS])
def test_the_model_is_locked_unless_it_is_asked_not_to_be(launch_file, name, arguments):
    if name == "replay_bag.launch.py":
        pytest.importorskip("rosbags")
    module = launch_file(name)
    for given, locked in (({}, True), ({"model_locked": "false"}, False), ({"model_locked": "true"}, True)):
        nodes = kinds(module.run(**arguments, **given), "Node")
        (tokenizer,) = [node for node in nodes if node.executable == "visual_tokenizer"]
        assert parameters_of(tokenizer)["model_locked"] is locked


def test_the_unit_of_the_deployment_page_is_closed():
    page = (ROOT / "docs" / "deployment.md").read_text()
    unit = page.partition("```ini\n")[2].partition("```")[0]
    assert "Environment=ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST\n" in unit
    (start,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert " model_locked:=true " in start


def test_every_launch_file_is_covered():
    assert set(FILES) == {name for name, _, _ in RUNS}


def test_cameras_and_remappings(launch_file):
    module = launch_file("tokenizer.launch.py")
    (node,) = kinds(module.run(cameras="front, wrist=/arm/color/image_raw", namespace="robot1"), "Node")
    assert parameters_of(node)["cameras"] == ["front", "wrist"]
    assert node.remappings == [("wrist/image_raw", "/arm/color/image_raw")]
    assert node.namespace == "/robot1"
    assert node.ros_arguments == ["--log-level", "robot1.visual_tokenizer:=info"]
    assert "cameras" not in parameters_of(*kinds(module.run(), "Node"))  # as the file says
    for wrong in ("front,front", "front=/a,front=/b"):
        with pytest.raises(ValueError, match="front is there twice"):
            module.run(cameras=wrong)
    for wrong in ("front camera", "1=a"):
        with pytest.raises(ValueError, match="cameras:="):
            module.run(cameras=wrong)
    with pytest.raises(ValueError, match="no such file"):
        module.run(params_file="/nowhere.yaml")


def test_the_device_and_the_precision_are_left_open_unless_given(launch_file):
    """The file's `auto` reaches the node, which hands it to the tokenizer (test_devices.py)."""
    launch = launch_file("tokenizer.launch.py")
    (node,) = kinds(launch.run(cameras="front", model="openvla-7b"), "Node")
    assert not {"device", "compute_dtype"} & set(parameters_of(node))
    file = yaml.safe_load(Path(node.kwargs["parameters"][0]).read_text())["/**/visual_tokenizer"]["ros__parameters"]
    assert (file["device"], file["compute_dtype"]) == ("auto", "auto")
    for name in FILES:
        arguments = launch_file(name).arguments
        assert {"device", "compute_dtype"} <= set(arguments), name
    (node,) = kinds(launch.run(cameras="front", device="cuda:1", compute_dtype="float16"), "Node")
    given = parameters_of(node)
    assert (given["device"], given["compute_dtype"]) == ("cuda:1", "float16")


@pytest.mark.parametrize(("respawn", "left"), [("true", "on_exit"), ("false", "respawn")])
def test_a_tokenizer_that_ends_is_started_again_or_ends_the_launch(launch_file, respawn, left):
    """What the policy sees then: test_faults.py."""
    (node,) = kinds(launch_file("tokenizer.launch.py").run(cameras="front", respawn=respawn), "Node")
    assert node.kwargs.get("respawn", False) is (respawn == "true") and left not in node.kwargs
    assert node.kwargs.get("respawn_delay", 2.0) == 2.0


#: The node on a machine with one GPU, which is made up: what would run there runs on the CPU.
NODE_ON_A_GPU = """
import pytest, torch
import fake_cuda
from vla_perception.tokenizer import cuda_graphs, devices, tokenizer, weights

patch = pytest.MonkeyPatch()
fake_cuda.install(patch)
cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
for name, value in {"init": None, "device_count": 1, "get_device_capability": (9, 0)}.items():
    patch.setattr(torch.cuda, name, lambda *_, value=value: value)
patch.setattr(devices, "_operate", lambda device: None)
fill, make_runtime, graphs = weights._fill, tokenizer.make_runtime, cuda_graphs.CudaGraphs
patch.setattr(weights, "_fill", lambda *given: fill(*given[:3], {gpu: cpu}[given[3]], given[4]))
patch.setattr(tokenizer, "make_runtime", lambda name, network, _, *rest: make_runtime(name, network, gpu, *rest))
patch.setattr(cuda_graphs, "CudaGraphs", lambda network, _, dtype, **rest: graphs(network, cpu, dtype, **rest))

from vla_perception.nodes.executables import visual_tokenizer

visual_tokenizer()
"""


@pytest.mark.ros
@pytest.mark.kilted_alone  # what a device is given is PyTorch's side
def test_what_is_launched_on_a_gpu_computes_there_in_bfloat16_by_itself(launch_file, tmp_path):
    """`tokenizer.launch.py cameras:=front model:=tiny-random`, and nothing about a device or a precision."""
    pytest.importorskip("timm")
    (node,) = kinds(launch_file("tokenizer.launch.py").run(cameras="front", model="tiny-random"), "Node")
    given = tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump({"/**": {"ros__parameters": parameters_of(node)}}))
    program = tmp_path / "node_on_a_gpu.py"
    program.write_text(NODE_ON_A_GPU)
    command = [program, "--ros-args", "-r", f"__node:={node.name}"]
    command += ["--params-file", node.kwargs["parameters"][0], "--params-file", given]
    path = os.pathsep.join(map(str, (ROOT / "test" / "support", ROOT)))
    with RosProcess(list(map(str, command)), free_domain(), {"PYTHONPATH": path}) as process:
        process.wait_for("ready after", 120)
        assert "computes on cuda:0 in bfloat16: a fake, compute capability 9.0" in process.output
        assert re.search(r"ready after .*, runtime graph on \S+ in bfloat16", process.output)
        assert process.stop(signal.SIGTERM) == 0, process.output


MISTAKES = [
    ("camera", "is cameras:= meant?"),
    ("Namespace", "is namespace:= meant?"),
    ("MODEL", "is model:= meant?"),
    ("image-transport", "is image_transport:= meant?"),
    ("--cameras", "is cameras:= meant?"),
    ("MAX_RATE_HZ", "max_rate_hz is a parameter of the tokenizer"),
    ("modle", "is model:= meant?"),
    ("imagetransport", "is image_transport:= meant?"),
    ("max_rate_hz", "max_rate_hz is a parameter of the tokenizer"),
    ("sync_slop_sec", "sync_slop_sec is a parameter of the tokenizer"),
    ("sync_slop", "sync_slop_sec is a parameter of the tokenizer"),
    ("xyz", "it has autostart, "),
]


@pytest.mark.parametrize("name", FILES)
def test_arguments_that_do_not_exist_are_refused(launch_file, monkeypatch, name):
    module = launch_file(name)
    given = {"bag": str(BAG)} if name.startswith("replay") else {}
    for command in (["ros2", "launch", "vla_perception", name], ["ros2", "launch", f"/opt/share/{name}", "--debug"]):
        monkeypatch.setattr(sys, "argv", command)
        for wrong, advice in MISTAKES:
            with pytest.raises(ValueError, match=re.escape(f"{name} has no argument {wrong}:= ({advice}")):
                module.run(argv=["model:=tiny-random", f"{wrong}:=3"], **given)
        with pytest.raises(ValueError, match="no argument camera:=.*; xyz:="):
            module.run(argv=["camera:=2", "xyz:=1", "camera:=3"], **given)
        with pytest.raises(ValueError, match=re.escape("model:= is there several times (tiny-random, base)")):
            module.run(argv=["model:=tiny-random", "model:=base", "model:=tiny-random"], **given)
        module.run(
            argv=[*(f"{known}:=x" for known in module.arguments), "launch-prefix:=gdb", "odd", "model:=x"], **given
        )


def test_arguments_of_a_launch_file_that_includes_ours(launch_file, monkeypatch):
    """They are its own; only what looks like a mistake is named, and goes on."""
    module = launch_file("tokenizer.launch.py")
    monkeypatch.setattr(sys, "argv", ["ros2", "launch", "robot", "bringup.launch.py", "robot:=a"])
    actions = module.run(argv=["robot:=a"], others={"robot": "a", "map": "b", "rviz": "c", "lidar_topic": "d"})
    assert not kinds(actions, "LogInfo")
    actions = module.run(argv=["robot:=a"], others={"robot": "a", "camera": "front", "max_rate_hz": "5"})
    said = [action.msg for action in kinds(actions, "LogInfo")]
    assert len(said) == 2 and "camera:= (is cameras:= meant?)" in said[0] and "max_rate_hz" in said[1]


def test_the_fast_dds_profile_can_be_left_out_and_is_not_replaced(launch_file):
    module = launch_file("tokenizer.launch.py")
    assert not kinds(module.run(fastdds_profile="false"), "SetEnvironmentVariable")
    for distro, old in (("jazzy", True), ("kilted", False), ("lyrical", False)):  # later ones warn of Jazzy's variable
        names = [action.args[0] for action in kinds(module.run({"ROS_DISTRO": distro}), "SetEnvironmentVariable")]
        assert names == ["FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"][: 2 if old else 1]
    own = {"FASTRTPS_DEFAULT_PROFILES_FILE": "/own.xml"}
    actions = module.run(environment=own)
    assert not kinds(actions, "SetEnvironmentVariable") and "/own.xml" in kinds(actions, "LogInfo")[0].msg
    own = {"FASTDDS_DEFAULT_PROFILES_FILE": "/own.xml"}  # Jazzy does not read it
    for distro, expected in (("jazzy", [("FASTRTPS_DEFAULT_PROFILES_FILE", "/own.xml")]), ("kilted", [])):
        actions = module.run(own | {"ROS_DISTRO": distro})
        assert [action.args for action in kinds(actions, "SetEnvironmentVariable")] == expected
        assert "/own.xml" in kinds(actions, "LogInfo")[0].msg


def test_real_cameras(launch_file, monkeypatch):
    module = launch_file("real_camera.launch.py")
    with pytest.raises(RuntimeError, match="sudo apt install ros-.*-usb-cam"):
        module.run(driver="usb_cam")
    with pytest.raises(ValueError, match="no source"):
        module.run(cameras="front")
    with pytest.raises(ValueError, match="width and height"):
        module.run(width="640")
    with pytest.raises(ValueError, match="rate_hz:=fast is not a number"):
        module.run(rate_hz="fast")
    with pytest.raises(ValueError, match="rate_hz:=nan is not a number"):
        module.run(rate_hz="nan")
    camera, tokenizer = kinds(module.run(cameras="front=0", namespace="arm"), "Node")
    assert camera.namespace == "/arm/front" and parameters_of(camera)["source"] == "0"
    # One camera may end, the last one ends the rest.
    failed, over = types.SimpleNamespace(returncode=1), types.SimpleNamespace(returncode=0)
    first, second, _ = kinds(module.run(cameras="a=0,b=1"), "Node")
    assert first.on_exit(failed, None) is None
    assert type(second.on_exit(over, None)[0]).__name__ == "Shutdown"
    first, second, tokenizer = kinds(module.run(cameras="a=0,b=1"), "Node")
    assert second.on_exit(over, None) is None
    for node in (first, tokenizer):
        with pytest.raises(RuntimeError, match="exit code 1"):
            node.on_exit(failed, None)

    monkeypatch.setattr(module, "require_package", lambda *_: None)
    for driver, topic in (
        ("v4l2_camera", None),
        ("usb_cam", None),
        ("realsense2_camera", "front/camera/color/image_raw"),
    ):
        actions = module.run(driver=driver, cameras="front=/dev/video0", width="640", height="480", rate_hz="30")
        camera, tokenizer = kinds(actions, "Node")
        assert camera.package == driver and tokenizer.remappings == ([("front/image_raw", topic)] if topic else [])


def test_gazebo(launch_file, monkeypatch):
    """As far as it goes without Gazebo: the world is well-formed and has the sensors whose topics are bridged."""
    import xml.etree.ElementTree as ElementTree

    module = launch_file("sim_camera.launch.py")
    with pytest.raises(RuntimeError, match="sudo apt install ros-.*-ros-gz"):
        module.run(simulator="gazebo")
    monkeypatch.setattr(module, "require_package", lambda *_: None)
    index = importlib.import_module("ament_index_python.packages")
    monkeypatch.setattr(index, "get_package_share_directory", lambda package: f"/opt/{package}")
    actions = module.run(simulator="gazebo", namespace="lab")
    (include,) = kinds(actions, "IncludeLaunchDescription")
    world = Path(dict(include.launch_arguments)["gz_args"].split()[-1])
    topics = {e.text for e in ElementTree.parse(world).iter() if e.tag in ("topic", "camera_info_topic")}
    bridge, tokenizer = kinds(actions, "Node")
    bridged = {argument.split("@")[0] for argument in bridge.arguments}
    assert bridged == {f"/{topic}" for topic in topics} | {"/clock"}
    assert ("/front/image_raw", "/lab/front/image_raw") in bridge.remappings
    assert parameters_of(tokenizer)["use_sim_time"] is True


def test_bag_topics(launch_file):
    pytest.importorskip("rosbags")
    module = launch_file("replay_bag.launch.py")
    player, tokenizer = kinds(module.run(bag=str(BAG), use_sim_time="true"), "Node")
    assert set(parameters_of(player)["topics"]) == {
        "/front/image_raw/compressed",
        "/wrist/image_raw/compressed",
        "/front/camera_info",
        "/wrist/camera_info",
    }
    assert parameters_of(player)["clock"] is True
    assert parameters_of(tokenizer)["image_transport"] == "compressed"
    assert parameters_of(tokenizer)["cameras"] == ["front", "wrist"]
    assert tokenizer.remappings == [("front/image_raw", "/front/image_raw"), ("wrist/image_raw", "/wrist/image_raw")]
    player, tokenizer = kinds(module.run(bag=str(BAG), cameras="left=/wrist/image_raw"), "Node")
    assert parameters_of(tokenizer)["cameras"] == ["left"]
    assert parameters_of(player)["topics"] == ["/wrist/image_raw/compressed", "/wrist/camera_info"]
    with pytest.raises(RuntimeError, match="bag:=/nowhere: .*no such file"):
        module.run(bag="/nowhere")
    with pytest.raises(ValueError, match="not in the bag; it has /front/image_raw, /wrist/image_raw"):
        module.run(bag=str(BAG), cameras="top")

    image, compressed = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
    mixed = {
        "/camera/color/image_raw": image,
        "/camera/depth/image_rect_raw": image,
        "/camera/infra1/image_rect_raw": image,
        "/top/image_raw": image,
        "/top/image_raw/compressed": compressed,
    }
    module.bag_camera_topics = lambda _: mixed
    player, tokenizer = kinds(module.run(bag="mixed"), "Node")
    assert parameters_of(tokenizer)["cameras"] == ["camera_color", "top"]
    assert parameters_of(player)["topics"] == ["/camera/color/image_raw", "/top/image_raw"]
    mixed.pop("/top/image_raw")
    with pytest.raises(ValueError, match="partly raw, partly compressed"):
        module.run(bag="mixed")

    others = {"/cam/jpeg": compressed, "/cam/image_raw/zstd": compressed, "/cam/image_raw/compressedDepth": compressed}
    module.bag_camera_topics = lambda _: others
    player, tokenizer = kinds(module.run(bag="others"), "Node")
    assert parameters_of(player)["topics"] == ["/cam/jpeg"]
    assert player.remappings == [("/cam/jpeg", "/cam/jpeg/compressed")]
    assert tokenizer.remappings == [("cam_jpeg/image_raw", "/cam/jpeg")]


def test_a_namespace_moves_what_the_bag_has(launch_file):
    """Two robots' bags in one domain: no topic in common, and each a clock of its own."""
    pytest.importorskip("rosbags")
    module = launch_file("replay_bag.launch.py")
    published = {}
    for robot in ("robot1", "/lab/robot2/"):
        player, tokenizer = kinds(module.run(bag=str(BAG), namespace=robot, use_sim_time="true"), "Node")
        above = f"/{robot.strip('/')}"
        assert player.namespace == tokenizer.namespace == above
        moved = dict(player.remappings)
        published[robot] = [moved[topic] for topic in [*parameters_of(player)["topics"], "/clock"]]
        assert all(topic.startswith(f"{above}/") for topic in published[robot])
        assert dict(tokenizer.remappings) == {
            "front/image_raw": f"{above}/front/image_raw",
            "wrist/image_raw": f"{above}/wrist/image_raw",
            "/clock": f"{above}/clock",
        }
    assert not set(published["robot1"]) & set(published["/lab/robot2/"])
    module.bag_camera_topics = lambda _: {"/cam/jpeg": "sensor_msgs/msg/CompressedImage"}
    player, tokenizer = kinds(module.run(bag="others", namespace="arm"), "Node")
    assert player.remappings[0] == ("/cam/jpeg", "/arm/cam/jpeg/compressed")
    assert tokenizer.remappings[0] == ("cam_jpeg/image_raw", "/arm/cam/jpeg")
    player, tokenizer = kinds(module.run(bag="others"), "Node")
    assert player.remappings == [("/cam/jpeg", "/cam/jpeg/compressed")]  # without one the bag's topics stay


def test_cameras_of_a_bag_by_encoding_and_name(launch_file):
    module = launch_file("replay_bag.launch.py")
    image = "sensor_msgs/msg/Image"
    cameras = ["/oak/rgb/image_raw", "/irving/image_raw", "/left/image_raw", "/masked_man/image", "/segway/image_raw"]
    others = [
        "/camera/infra1/image_rect_raw",
        "/ir/image_raw",
        "/zed/depth_registered/image",
        "/flir/thermal/image_raw",
        "/zed/confidence/image",
        "/seg/labels/image",
        "/sam/mask/image_raw",
        "/camera/aligned_depth_to_color/image_raw",
        "/robot/IR/image_raw",
        "/stereo/disparity/image",
    ]
    module.bag_camera_topics = lambda _: dict.fromkeys([*cameras, *others], image)
    found = module.cameras_of("bag", {})
    assert sorted(camera.topic for camera in found.values()) == sorted(cameras)
    found = module.cameras_of("bag", {"heat": "/flir/thermal/image_raw"})  # by its name any of them
    assert list(found) == ["heat"]
    module.bag_camera_topics = lambda _: dict.fromkeys(others, image)
    with pytest.raises(ValueError, match="only depth, infrared or label images, by name: .*/ir/image_raw.*cameras:="):
        module.cameras_of("bag", {})


def test_bags_need_mcap(launch_file, tmp_path, monkeypatch):
    """Where the nodes' Python lacks it: one sentence, with what to install."""
    (tmp_path / "mcap.py").write_text("raise ModuleNotFoundError(\"No module named 'mcap'\")")
    module = launch_file("replay_bag.launch.py")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    with pytest.raises(RuntimeError, match="No module named 'mcap' in .*: pip install mcap"):
        module.run(bag=str(BAG))


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_parameter_files_name_parameters_that_exist(path):
    content = yaml.safe_load(path.read_text())
    assert "/**/visual_tokenizer" in content
    for node, entry in content.items():
        values, specs = entry["ros__parameters"], parameters_of_executable(node.removeprefix("/**/"))
        for name, value in values.items():
            specs[name].validate(name, value)
        if path.name == "visual_tokenizer.yaml":  # the defaults, of all that is not for one process alone
            started = {name for name, spec in specs.items() if spec.changes is Changes.AT_START}
            assert values == {name: spec.ros_default for name, spec in specs.items() if name not in started}


# With ros2 launch


@pytest.fixture(scope="module")
def ros2() -> str:
    """The `ros2` command, on a machine where this package was built by colcon and its workspace is sourced."""
    for module in ("launch_ros", "ros2launch"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module} in this Python (it comes with a ROS 2 distribution, not from PyPI)")
    from ament_index_python.packages import PackageNotFoundError, get_package_prefix

    try:
        prefix = get_package_prefix("vla_perception")
    except (PackageNotFoundError, OSError):
        pytest.skip("vla_perception is not in the ament index: build it with colcon and source the workspace")
    if not Path(prefix, "lib", "vla_perception", "visual_tokenizer").exists():
        pytest.skip("vla_perception was not installed by colcon, so `ros2 launch` cannot find its executables")
    return shutil.which("ros2") or pytest.skip("needs `ros2`: source a ROS 2 distribution")


@pytest.mark.ros
@pytest.mark.parametrize("name", FILES)
def test_show_args(ros2, name):
    result = subprocess.run(
        [ros2, "launch", "vla_perception", name, "--show-args"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    for argument in ("model", "device", "compute_dtype", "params_file", "view", "fastdds_profile"):
        assert f"'{argument}':" in result.stdout


def launched(ros2: str, arguments: list[str], nodes: int, messages: int = 3, killed: str = "") -> tuple[list, str]:
    """Runs `ros2 launch` until `messages` token messages came, then Ctrl-C. The messages and the output.

    killed: a node that gets SIGKILL after the first message; those that count come from its successor.
    """
    import rclpy
    from sensor_msgs.msg import CompressedImage

    from vla_perception.tokens import from_message

    domain = free_domain()
    process = subprocess.Popen(
        [ros2, "launch", "vla_perception", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ros_environment(domain),
        start_new_session=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    received: list = []
    context = rclpy.Context()
    try:
        with in_domain(domain):
            rclpy.init(context=context, domain_id=domain)
            node = rclpy.create_node("policy", context=context)
        node.create_subscription(CompressedImage, "/tokens", lambda message: received.append(from_message(message)), 10)
        executor = rclpy.executors.SingleThreadedExecutor(context=context)
        executor.add_node(node)
        end = time.monotonic() + 120
        while len(received) < messages and process.poll() is None and time.monotonic() < end:
            executor.spin_once(timeout_sec=0.2)
            started = re.findall(rf"\[{killed}-\d+\]: process started with pid \[(\d+)\]", "".join(lines))
            if killed and len(started) == 1:
                if received:
                    os.kill(int(started[0]), signal.SIGKILL)
                    wait_until(lambda: "process has died" in "".join(lines), 30, "launch notices")
                received.clear()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: launch and its nodes get it
        process.wait(40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
        reader.join(5)
    output = "".join(lines)
    assert len(received) >= messages, output
    # `ros2 launch` ends with 0 even if a node was killed.
    wait_until(lambda: output.count("process has finished cleanly") == nodes, 1, output)
    assert output.count("process has died") == bool(killed) and "Traceback" not in output
    return received, output


@pytest.mark.ros
@pytest.mark.parametrize("options", [[], ["loop:=true", "rate:=2.0", "use_sim_time:=true"]])
def test_replay_bag(ros2, options):
    received, output = launched(ros2, ["replay_bag.launch.py", f"bag:={BAG}", *options], nodes=2, messages=5)
    assert received[0].cameras == ("front", "wrist") and received[0].shape[0] == 2
    assert "cameras of the bag: front (/front/image_raw/compressed)" in output


@pytest.mark.ros
def test_a_node_that_is_killed_is_started_again(ros2):
    arguments = ["replay_bag.launch.py", f"bag:={BAG}", "loop:=true", "respawn:=true"]
    received, output = launched(ros2, arguments, nodes=2, killed="visual_tokenizer")
    assert received[0].cameras == ("front", "wrist")
    assert len(re.findall(r"\[visual_tokenizer-\d+\]: process started with pid", output)) == 2


@pytest.mark.ros
def test_real_camera_with_a_video_file(ros2, tmp_path):
    cv2 = pytest.importorskip("cv2")
    import numpy as np

    film = str(tmp_path / "film.mp4")
    writer = cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"mp4v"), 10, (320, 240))
    for i in range(30):
        writer.write(np.full((240, 320, 3), i * 8, np.uint8))
    writer.release()
    received, _ = launched(ros2, ["real_camera.launch.py", f"cameras:=front={film}", "view:=true"], nodes=3)
    assert (received[0].views[0].width, received[0].views[0].height) == (320, 240)


@pytest.mark.ros
def test_sim_camera(ros2):
    pytest.importorskip("mujoco")
    received, _ = launched(ros2, ["sim_camera.launch.py"], nodes=2)
    assert received[-1].cameras == ("front", "wrist") and received[-1].stamp_ns < 10**12  # simulated time


@pytest.mark.ros
def test_a_model_that_is_not_there_ends_everything(ros2):
    result = subprocess.run(
        [ros2, "launch", "vla_perception", "tokenizer.launch.py", "model:=/nowhere"],
        capture_output=True,
        text=True,
        timeout=90,
        env=ros_environment(free_domain()),
    )
    assert re.search("configure failed: .*/nowhere", result.stdout), result.stdout + result.stderr
    assert result.returncode == 1  # for a service manager that restarts what failed
