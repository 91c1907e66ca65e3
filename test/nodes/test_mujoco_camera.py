"""mujoco_camera: the scene, its cameras' geometry, what is refused; then the node over DDS."""

import contextlib
import importlib.util
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from vla_perception.sources import simulation
from vla_perception.sources.simulation import Simulation, SimulationError

if importlib.util.find_spec("mujoco") is None:  # importing it here would settle which OpenGL it takes
    pytest.skip("needs MuJoCo: pip install '.[sim]'", allow_module_level=True)
if not any(map(simulation._is_there, simulation.GL_LIBRARIES)):
    pytest.skip(f"no OpenGL without a screen: {simulation.GL_ADVICE}", allow_module_level=True)

with contextlib.suppress(ImportError):  # behind the first image it would end the tests (docs/without_ros.md)
    import triton.knobs  # noqa: F401

BALL = (0.3, 0.2, -2.0)  # seen from the camera: right, up, and behind its back is where it looks
SCENE = """
<mujoco>
  <visual><headlight ambient="1 1 1" diffuse="0 0 0"/></visual>
  <worldbody>
    <geom type="sphere" size="0.1" pos="{ball[0]} {ball[1]} {ball[2]}" rgba="1 0 0 1"/>
    <camera name="plain" fovy="60"/>
    <camera name="lens" focal="0.004 0.004" sensorsize="0.008 0.006" resolution="320 240"/>
    <camera name="shifted" focal="0.004 0.004" principal="0.0006 0.0004" sensorsize="0.008 0.006" resolution="320 240"/>
    {more}
  </worldbody>
</mujoco>
"""


@pytest.fixture
def scene(tmp_path):
    def write(more="", **replaced):
        path = tmp_path / "scene.xml"
        text = SCENE.format(ball=BALL, more=more)
        for old, new in replaced.items():
            text = text.replace(old, new)
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def open_scene():
    opened = []

    def make(*arguments, **options):
        opened.append(Simulation(*arguments, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.mark.parametrize("camera", ["plain", "lens", "shifted"])
def test_intrinsics_say_where_things_are_in_the_image(scene, open_scene, camera):
    opened = open_scene(scene(), [camera], 640, 480)
    opened.step()
    image = opened.render(camera)
    assert image.shape == (480, 640, 3) and image.dtype == np.uint8
    rows, columns = np.nonzero((image[:, :, 0] > 100) & (image[:, :, 1] < 60))
    fx, fy, cx, cy = opened.intrinsics(camera)
    # The ball's outline, an ellipse, is centred a little further out than its centre.
    assert columns.mean() == pytest.approx(cx + fx * BALL[0] / -BALL[2], abs=1.5)
    assert rows.mean() == pytest.approx(cy - fy * BALL[1] / -BALL[2], abs=1.5)
    if camera == "plain":
        assert fy == pytest.approx(240 / math.tan(math.radians(30)))
        assert (cx, cy) == (319.5, 239.5)


def test_orthographic_cameras_have_no_intrinsics(scene, open_scene):
    import mujoco

    new = hasattr(mujoco, "mjtProjection")
    flat = 'projection="orthographic"' if new else 'orthographic="true"'
    opened = open_scene(scene(f'<camera name="flat" {flat} fovy="2"/>'), ["flat"])
    assert opened.intrinsics("flat") is None


def test_tabletop_moves_in_both_cameras(open_scene):
    opened = open_scene("", [], 160, 120)
    assert opened.cameras == ["wrist", "front"] or opened.cameras == ["front", "wrist"]
    before = {name: opened.render(name).astype(int) for name in opened.cameras}
    opened.step(1000)
    assert opened.time_ns == 2_000_000_000
    for name in opened.cameras:
        assert before[name].std() > 20
        changed = np.abs(opened.render(name) - before[name]).max(axis=2) > 30
        assert changed.mean() > 0.02


def test_tabletop_is_deterministic(open_scene):
    images = []
    for _ in range(2):
        opened = open_scene("", ["front"], 64, 48)
        opened.step(300)
        images.append(opened.render("front"))
    assert np.array_equal(*images)


def test_motion_none_leaves_the_arm_alone(open_scene):
    opened = open_scene("", ["front"], 64, 48, motion="none")
    opened.step()
    assert not opened._data.ctrl.any()


@pytest.mark.parametrize(
    "arguments, why",
    [
        (("/no/such.xml",), "there is no MJCF file /no/such.xml"),
        ((__file__,), "is not a scene that MuJoCo"),
        (("", ["front", "rear"]), "has no camera rear; it has front, wrist|it has wrist, front"),
    ],
)
def test_bad_scenes_are_refused(arguments, why):
    with pytest.raises(SimulationError, match=why):
        Simulation(*arguments)


def test_a_scene_without_cameras_is_refused(tmp_path):
    path = tmp_path / "bare.xml"
    path.write_text("<mujoco><worldbody/></mujoco>")
    with pytest.raises(SimulationError, match='add <camera name="front"'):
        Simulation(str(path))


@pytest.mark.parametrize(
    "replaced, why",
    [
        *(
            ({"<mujoco>": f"<mujoco><option timestep='{step}'/>"}, "timestep")
            for step in ("0", "-1", "nan", "1e-300", "1e9")
        ),
        ({'fovy="60"': 'fovy="0"'}, "camera 'plain' has no image"),
        ({'fovy="60"': 'fovy="nan"'}, "camera 'plain' has no image"),
        ({'sensorsize="0.008 0.006"': 'sensorsize="inf inf"'}, "camera 'lens' has no image"),
        ({'fovy="60"': 'projection="\u202e"'}, r"\\u202e"),
    ],
)
def test_numbers_that_mujoco_takes_and_no_camera_has_are_refused(scene, replaced, why):
    with pytest.raises(SimulationError, match=why) as error:
        Simulation(scene(**replaced))
    assert str(error.value).isprintable()


def test_whatever_mujoco_raises_is_said(scene, monkeypatch):
    """RuntimeError, for a height field of 10^10 points."""

    def load(path):
        raise RuntimeError("Caught an unknown exception!")

    stand_in = SimpleNamespace(MjModel=SimpleNamespace(from_xml_path=load), __version__="4.0.0")
    monkeypatch.setattr(simulation, "_import_mujoco", lambda gl: stand_in)
    with pytest.raises(SimulationError, match="Caught an unknown exception"):
        Simulation(scene())


def test_more_cameras_than_a_robot_has_are_refused_unless_some_are_chosen(scene, open_scene):
    path = scene("".join(f'<camera name="more{index}"/>' for index in range(64)))
    with pytest.raises(SimulationError, match="67 cameras with a name; choose at most 64"):
        Simulation(path)
    assert open_scene(path, ["more7"]).cameras == ["more7"]


def failure_of(code):
    """What a Simulation says that is made in a process of its own after `code`."""
    code = f"from vla_perception.sources import simulation\n{code}\ntry: simulation.Simulation()\nexcept Exception as e: print(e)"
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_what_is_missing_is_named():
    assert "pip install mujoco" in failure_of("import sys; sys.modules['mujoco'] = None")
    nothing = "simulation.GL_LIBRARIES = {'egl': ('libNone.so',), 'osmesa': ('libNone.so',)}"
    assert "apt install libegl1" in failure_of(nothing)
    assert "libNone.so is not installed" in failure_of(nothing + "; import os; os.environ['MUJOCO_GL'] = 'osmesa'")


# The node.

try:
    from ros_harness import Listener, RosProcess, answer_of, free_domain, wait_for_messages
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    from vla_perception.images.decode import compressed_to_rgb, image_to_rgb
except ImportError:  # no ROS here: the tests below are not selected
    pass


def node(domain, **parameters):
    command = ["-m", "vla_perception.nodes.mujoco_camera", "--ros-args"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={value}"]
    return RosProcess(command, domain)


def nanoseconds(stamp):
    return stamp.sec * 10**9 + stamp.nanosec


@pytest.mark.ros
def test_node_publishes_cameras_in_step_with_its_clock():
    domain = free_domain()
    with Listener(domain) as listener:
        front = listener.collect(Image, "/front/image_raw")
        wrist = listener.collect(CompressedImage, "/wrist/image_raw/compressed")
        info = listener.collect(CameraInfo, "/front/camera_info")
        clock = listener.collect(Clock, "/clock", depth=1000)
        with node(domain, width=96, height=64, rate_hz=5.0) as process:
            wait_for_messages(front, 6, 60)
            wait_for_messages(wrist, 6)
            assert process.stop(signal.SIGINT) == 0, process.output
    stamps = [nanoseconds(message.header.stamp) for message in front]
    assert all(stamp % 200_000_000 == 0 and stamp > 0 for stamp in stamps)
    assert set(np.diff(stamps)) == {200_000_000}
    assert {nanoseconds(message.header.stamp) for message in wrist} & set(stamps)
    assert image_to_rgb(front[0]).shape == (64, 96, 3) == compressed_to_rgb(wrist[0]).shape
    assert not np.array_equal(image_to_rgb(front[0]), image_to_rgb(front[-1]))
    assert front[0].header.frame_id == "front_optical_frame"
    assert info[0].k[4] == pytest.approx(32 / math.tan(math.radians(21))) and info[0].k[2] == 47.5
    ticks = [nanoseconds(message.clock) for message in clock]
    assert set(np.diff(ticks)) == {10_000_000}
    assert set(stamps[1:-1]) <= set(ticks)


@pytest.mark.ros
def test_node_with_another_scene_the_wall_clock_and_a_namespace(scene):
    domain = free_domain()
    command = ["-m", "vla_perception.nodes.mujoco_camera", "--ros-args", "-r", "__ns:=/sim", "-p", f"scene:={scene()}"]
    command += ["-p", "cameras:=[plain]", "-p", "clock:=false", "-p", "real_time_factor:=0.0", "-p", "rate_hz:=50.0"]
    with Listener(domain) as listener, RosProcess(command, domain) as process:
        images = wait_for_messages(listener.collect(Image, "/sim/plain/image_raw"), 3, 60)
        assert nanoseconds(images[0].header.stamp) > 10**18
        topics = dict(listener.node.get_topic_names_and_types())
        assert "/clock" not in topics and "/sim/lens/image_raw" not in topics
        assert process.stop(signal.SIGTERM) == 0, process.output


@pytest.mark.ros
def test_node_answers_parameter_requests_while_it_renders():
    from rcl_interfaces.srv import GetParameters

    domain = free_domain()
    with Listener(domain) as listener, node(domain, width=64, height=48, real_time_factor=0.0) as process:
        wait_for_messages(listener.collect(Image, "/front/image_raw"), 1, 60)
        client = listener.node.create_client(GetParameters, "/mujoco_camera/get_parameters")
        answer = answer_of(client, GetParameters.Request(names=["rate_hz", "cameras"]))
        assert answer.values[0].double_value == 10.0
        assert process.stop() == 0, process.output


@pytest.mark.ros
@pytest.mark.parametrize(
    "parameters, why",
    [
        ({"scene": "/no/such.xml"}, "there is no MJCF file /no/such.xml"),
        ({"cameras": "[rear]"}, "has no camera rear"),
        ({"motion": "dance"}, "motion must be one of auto, sine, none"),
        ({"gl": "vulkan"}, "gl must be one of auto, egl, osmesa"),
    ],
)
def test_node_that_cannot_start_says_why_in_one_sentence(parameters, why):
    with node(free_domain(), **parameters) as process:
        assert process.wait(60) == 1
    assert why in process.output
    assert "Traceback" not in process.output
