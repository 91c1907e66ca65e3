"""The tokenizer alone, for cameras that already run.

ros2 launch vla_perception tokenizer.launch.py cameras:=front,wrist model:=/models/openvla-7b device:=cuda
ros2 launch vla_perception tokenizer.launch.py cameras:=front=/camera/camera/color/image_raw
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription

SHARE = Path(get_package_share_directory("vla_perception"))
BOOLEANS = ("true", "false")

ARGUMENTS = [
    DeclareLaunchArgument(
        "cameras",
        default_value="",
        description="Camera names, comma-separated: front,wrist. Each is subscribed to as <name>/image_raw, or as "
        "<topic> where name=<topic> is given. Empty: as in params_file.",
    ),
    DeclareLaunchArgument(
        "model",
        default_value="",
        description="Checkpoint directory, or a preset's name for random weights. Empty: as in params_file.",
    ),
    DeclareLaunchArgument(
        "device", default_value="", description="cpu, cuda or cuda:N. Empty: as in params_file."
    ),
    DeclareLaunchArgument(
        "image_transport",
        default_value="",
        choices=["", "raw", "compressed"],
        description="raw or compressed (<camera>/image_raw/compressed). Empty: as in params_file.",
    ),
    DeclareLaunchArgument(
        "params_file",
        default_value=str(SHARE / "config" / "visual_tokenizer.yaml"),
        description="Parameters of the tokenizer; everything that has no argument here is said there.",
    ),
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of the nodes and their topics."),
    DeclareLaunchArgument(
        "log_level",
        default_value="info",
        choices=["debug", "info", "warn", "error", "fatal"],
        description="What the nodes log.",
    ),
    DeclareLaunchArgument(
        "autostart",
        default_value="true",
        choices=BOOLEANS,
        description="Whether the tokenizer configures and activates itself; false where a lifecycle manager does it.",
    ),
    DeclareLaunchArgument(
        "use_sim_time", default_value="false", choices=BOOLEANS, description="Whether the nodes' clock is /clock."
    ),
    DeclareLaunchArgument(
        "view",
        default_value="false",
        choices=BOOLEANS,
        description="Whether to start the token viewer, which shows the tokens as colours on token_image.",
    ),
    DeclareLaunchArgument(
        "fastdds_profile",
        default_value="true",
        choices=BOOLEANS,
        description="Whether everything started here sends images and tokens through a larger shared memory "
        "(config/fastdds.xml; docs/transport.md). A profile that is already set in the environment is kept.",
    ),
]


def parse_cameras(text: str) -> dict[str, str]:
    """front,wrist=/arm/image -> {"front": "", "wrist": "/arm/image"}. ValueError with the form that is expected."""
    cameras: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, topic = part.partition("=")
        if not name.isidentifier() or name in cameras:
            raise ValueError(f"cameras:={text}: {part!r} is not understood; expected cameras:=front,wrist=/some/topic")
        cameras[name] = topic
    return cameras


def start(context):
    def argument(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    params_file = Path(argument("params_file")).expanduser()
    if not params_file.is_file():
        raise ValueError(f"params_file:={params_file}: there is no such file")
    cameras = parse_cameras(argument("cameras"))
    given = {name: argument(name) for name in ("model", "device", "image_transport") if argument(name)}
    if cameras:
        given["cameras"] = list(cameras)
    shared = {name: value for name, value in given.items() if name == "image_transport"}
    common = {"use_sim_time": argument("use_sim_time") == "true"}

    actions = []
    if argument("fastdds_profile") == "true":
        actions += fastdds_profile(context)
    remappings = [(f"{name}/image_raw", topic) for name, topic in cameras.items() if topic]
    actions.append(
        Node(
            package="vla_perception",
            executable="visual_tokenizer",
            name="visual_tokenizer",
            namespace=argument("namespace"),
            parameters=[str(params_file), given | common | {"autostart": argument("autostart") == "true"}],
            remappings=remappings,
            ros_arguments=["--log-level", f"visual_tokenizer:={argument('log_level')}"],
            output="screen",
        )
    )
    if argument("view") == "true":
        actions.append(
            Node(
                package="vla_perception",
                executable="token_viewer",
                name="token_viewer",
                namespace=argument("namespace"),
                parameters=[str(params_file), common | shared],
                remappings=remappings,
                ros_arguments=["--log-level", f"token_viewer:={argument('log_level')}"],
                output="screen",
            )
        )
    return actions


def fastdds_profile(context):
    """The profile in the variable of Jazzy and in that of Kilted, for all that is started from here on."""
    names = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
    for name in names:
        if own := context.environment.get(name):
            return [LogInfo(msg=f"{name}={own} is kept; docs/transport.md says what it should contain")]
    return [SetEnvironmentVariable(name, str(SHARE / "config" / "fastdds.xml")) for name in names]


def generate_launch_description():
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start)])
