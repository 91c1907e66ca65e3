"""Simulated cameras and the tokenizer, in simulated time.

ros2 launch vla_perception sim_camera.launch.py
ros2 launch vla_perception sim_camera.launch.py scene:=robot/scene.xml cameras:=frontview,robot0_eye_in_hand
ros2 launch vla_perception sim_camera.launch.py simulator:=gazebo
"""

import shlex
from pathlib import Path

from launch.actions import IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource

from launch import LaunchDescription
from vla_perception.launch_utils import (
    BOOLEANS,
    argument,
    check_arguments,
    declare,
    ends_everything,
    fastdds_profile,
    is_true,
    node,
    number,
    parse_cameras,
    require_package,
    share,
    tokenizer,
    tokenizer_arguments,
    typed,
)

ARGUMENTS = dict(
    [
        declare(
            "simulator",
            default_value="mujoco",
            choices=["mujoco", "gazebo"],
            description="mujoco comes with `pip install mujoco`; gazebo needs the distribution's ros_gz_sim and "
            "ros_gz_bridge.",
        ),
        declare(
            "scene",
            default_value="",
            description="MJCF file (mujoco) or SDF world (gazebo). Empty: a table-top scene with the cameras front and "
            "wrist.",
        ),
        declare(
            "cameras",
            default_value="front,wrist",
            description="Names of the scene's cameras, comma-separated, in the order of the views. With gazebo their "
            "sensors' topics are <name>/image_raw and <name>/camera_info.",
        ),
        declare("width", default_value="320", description="Of every image, in pixels (mujoco)."),
        declare("height", default_value="240", description="Of every image, in pixels (mujoco)."),
        declare("rate_hz", default_value="10.0", description="Images per simulated second (mujoco)."),
        declare(
            "real_time_factor",
            default_value="1.0",
            description="Simulated seconds per second (mujoco); 0: as fast as it goes.",
        ),
        declare("gui", default_value="false", choices=BOOLEANS, description="Whether Gazebo shows its window."),
    ]
)


def declared():
    return ARGUMENTS | tokenizer_arguments(cameras=None, use_sim_time=None)


def mujoco(context, cameras):
    options = {
        "cameras": list(cameras),
        "width": number(context, "width", int),
        "height": number(context, "height", int),
        "rate_hz": number(context, "rate_hz"),
        "real_time_factor": number(context, "real_time_factor"),
    }
    if scene := argument(context, "scene"):
        options["scene"] = scene
    return [
        node(
            context,
            "vla_perception",
            "mujoco_camera",
            parameters=[typed(**options)],
            on_exit=ends_everything("the simulation"),
        )
    ]


def gazebo(context, cameras):
    for package in ("ros_gz_sim", "ros_gz_bridge"):
        require_package(package, "simulator:=gazebo", "ros-gz")
    from ament_index_python.packages import get_package_share_directory

    world = Path(argument(context, "scene") or share("config", "tabletop.sdf")).expanduser().absolute()
    if not world.is_file():
        raise ValueError(f"scene:={world}: there is no such file")
    simulator = Path(get_package_share_directory("ros_gz_sim"), "launch", "gz_sim.launch.py")
    # Sensors are rendered by the server; without a window it needs no display. A shell reads this.
    arguments = f"-r {'' if is_true(context, 'gui') else '-s --headless-rendering '}{shlex.quote(str(world))}"
    bridged = ["/clock@rosgraph_msgs/msg/Clock[gz.msgs.Clock"]
    remappings = []
    namespace = argument(context, "namespace").strip("/")
    for name in cameras:
        bridged.append(f"/{name}/image_raw@sensor_msgs/msg/Image[gz.msgs.Image")
        bridged.append(f"/{name}/camera_info@sensor_msgs/msg/CameraInfo[gz.msgs.CameraInfo")
        if namespace:
            remappings += [
                (f"/{name}/{topic}", f"/{namespace}/{name}/{topic}") for topic in ("image_raw", "camera_info")
            ]
    return [
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(simulator)),
            launch_arguments={"gz_args": arguments, "on_exit_shutdown": "true"}.items(),
        ),
        node(
            context,
            "ros_gz_bridge",
            "parameter_bridge",
            name="camera_bridge",
            arguments=bridged,
            remappings=remappings,
            on_exit=ends_everything("the bridge"),
        ),
    ]


def start(context):
    warnings = check_arguments(context, declared(), __file__)
    cameras = parse_cameras(argument(context, "cameras"))
    if not cameras or any(cameras.values()):
        raise ValueError("cameras: the names of the scene's cameras are expected, for example front,wrist")
    simulator = {"mujoco": mujoco, "gazebo": gazebo}[argument(context, "simulator")]
    return [
        *warnings,
        *fastdds_profile(context),
        *simulator(context, cameras),
        *tokenizer(context, cameras, image_transport=argument(context, "image_transport"), use_sim_time=True),
    ]


def generate_launch_description():
    return LaunchDescription([*declared().values(), OpaqueFunction(function=start)])
