"""What the files in launch/ have in common: the tokenizer's arguments, and how it and what belongs to it is started.

Imports launch and launch_ros, which exist only beside a ROS 2 distribution; nothing but the launch files imports this.
It runs in the Python of `ros2`, which may lack what the nodes' Python has (torch, mcap): the standard library only.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ament_index_python.packages import (
    PackageNotFoundError,
    get_package_prefix,
    get_package_share_directory,
)
from launch.actions import DeclareLaunchArgument, LogInfo, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext
from vla_perception import options
from vla_perception.fast_dds import OLD_PROFILE_DISTROS, PROFILE_VARIABLES
from vla_perception.spelling import nearest

BOOLEANS = ["true", "false"]
#: Seconds until a tokenizer that has ended is started again (respawn).
RESPAWN_SEC = 2.0
#: Arguments of `ros2 launch` itself, which it hands on among the others.
LAUNCH_OPTIONS = ("launch-prefix", "launch-prefix-filter")


def share(*parts: str) -> Path:
    """A file of this package's installed share folder."""
    return Path(get_package_share_directory("vla_perception")).joinpath(*parts)


def declare(name: str, **options: Any) -> tuple[str, DeclareLaunchArgument]:
    """An argument of a launch file, by its name."""
    return name, DeclareLaunchArgument(name, **options)


def tokenizer_arguments(**replaced: None) -> dict[str, DeclareLaunchArgument]:
    """The arguments that every launch file has, by name. `replaced`: those that it has not, or as its own."""
    arguments = {**_parameter_arguments(), **_process_arguments()}
    return {name: action for name, action in arguments.items() if name not in replaced}


def _parameter_arguments() -> dict[str, DeclareLaunchArgument]:
    """Parameters of the tokenizer that are given often; empty: as in params_file."""
    return {
        "cameras": DeclareLaunchArgument(
            "cameras",
            default_value="",
            description="Camera names, comma-separated: front,wrist. Each is subscribed to as <name>/image_raw, or "
            "as <topic> where name=<topic> is given. Empty: as in params_file.",
        ),
        "image_transport": DeclareLaunchArgument(
            "image_transport",
            default_value="",
            choices=["", *options.IMAGE_TRANSPORTS],
            description="raw or compressed (<camera>/image_raw/compressed). Empty: as in params_file.",
        ),
        "model": DeclareLaunchArgument(
            "model",
            default_value="",
            description="Checkpoint directory, Hugging Face id (openvla/openvla-7b), or a preset's name for random "
            "weights. Empty: as in params_file.",
        ),
        "device": DeclareLaunchArgument(
            "device",
            default_value="",
            description="auto (a CUDA device that works, otherwise the CPU), cpu, cuda or cuda:N. Empty: as in "
            "params_file, which has auto unless it is another file.",
        ),
        "compute_dtype": DeclareLaunchArgument(
            "compute_dtype",
            default_value="",
            choices=["", *options.COMPUTE_DTYPES],
            description="Precision of encoders and projector; auto: bfloat16 on CUDA (float16 before Ampere), float32 "
            "on a CPU; float8: the encoders' linear layers in float8, less exact. Empty: as in params_file, which has auto unless it is another file.",
        ),
    }


def _process_arguments() -> dict[str, DeclareLaunchArgument]:
    """How the nodes run."""
    return {
        "params_file": DeclareLaunchArgument(
            "params_file",
            default_value=str(share("config", "visual_tokenizer.yaml")),
            description="Parameters of the tokenizer: everything that has no argument here is said there.",
        ),
        "namespace": DeclareLaunchArgument(
            "namespace", default_value="", description="Namespace of the nodes and their topics."
        ),
        "use_sim_time": DeclareLaunchArgument(
            "use_sim_time", default_value="false", choices=BOOLEANS, description="Whether the nodes' clock is /clock."
        ),
        "view": DeclareLaunchArgument(
            "view",
            default_value="false",
            choices=BOOLEANS,
            description="Whether to start the token viewer, which shows tokens as colors on the topic token_image.",
        ),
        "respawn": DeclareLaunchArgument(
            "respawn",
            default_value="false",
            choices=BOOLEANS,
            description="Whether the tokenizer is started again whenever it has ended, instead of ending the launch.",
        ),
        "autostart": DeclareLaunchArgument(
            "autostart",
            default_value="true",
            choices=BOOLEANS,
            description="Whether the tokenizer configures and activates itself; false where a lifecycle manager does.",
        ),
        "model_locked": DeclareLaunchArgument(
            "model_locked",
            default_value="true",
            choices=BOOLEANS,
            description="Whether the tokenizer refuses another model, adapter, device, … while it runs, from any client.",
        ),
        "log_level": DeclareLaunchArgument(
            "log_level",
            default_value="info",
            choices=options.LOG_LEVELS,
            description="What the nodes log.",
        ),
        "fastdds_profile": DeclareLaunchArgument(
            "fastdds_profile",
            default_value="true",
            choices=BOOLEANS,
            description="Whether everything started here sends images and tokens through a larger shared memory "
            "(config/fastdds.xml, docs/transport.md). A profile that the environment sets is kept.",
        ),
    }


def argument(context: LaunchContext, name: str) -> str:
    return LaunchConfiguration(name).perform(context).strip()


def check_arguments(context: LaunchContext, declared: Collection[str], launch_file: str) -> list:
    """Names what was given but is not in `declared`: `ros2 launch` takes any argument without a word.

    ValueError for one on the command line of `ros2 launch … launch_file`. Where another launch file includes it, its
    arguments are seen here too, so only those that look like a mistake are named, in a warning.
    """
    file = Path(launch_file).name
    called = any(Path(word).name == file for word in sys.argv)
    words = [word.partition(":=") for word in context.argv if ":=" in word] if called else []
    given = [name for name, _, _ in words] if called else context.launch_configurations
    unknown = [name for name in dict.fromkeys(given) if name not in declared and name not in LAUNCH_OPTIONS]
    advice = {name: _advice(name, declared, 0.6 if called else 0.85) for name in unknown}
    if called and unknown:
        named = "; ".join(f"{name}:= ({advice[name] or 'it has ' + ', '.join(sorted(declared))})" for name in unknown)
        raise ValueError(f"{file} has no argument {named}")
    for name in dict.fromkeys(given):
        values = list(dict.fromkeys(value for other, _, value in words if other == name))
        if len(values) > 1:
            raise ValueError(
                f"{name}:= is there several times ({', '.join(values)}): `ros2 launch` takes the last one alone"
            )
    return [LogInfo(msg=f"warning: {file} has no argument {n}:= ({text})") for n, text in advice.items() if text]


def _advice(name: str, declared: Collection[str], cutoff: float) -> str:
    """What may have been meant; "" if nothing is near."""
    defaults = share("config", "visual_tokenizer.yaml")
    parameters = re.findall(r"^ +(\w+):", defaults.read_text(), re.MULTILINE) if defaults.is_file() else []
    exact = nearest(name, parameters, 1.0)
    if near := nearest(name, declared, 1.0 if exact else cutoff):
        return f"is {near}:= meant?"
    meant = exact or nearest(name, parameters, max(cutoff, 0.8))
    if meant is None:
        return ""
    return f"{meant} is a parameter of the tokenizer: write it into a file and name that in params_file:="


def is_true(context: LaunchContext, name: str) -> bool:
    return argument(context, name) == "true"


def number(context: LaunchContext, name: str, kind: type = float) -> Any:
    """ValueError that names the argument if it is not a number."""
    text = argument(context, name)
    try:
        value = kind(text)
        if not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, OverflowError):
        raise ValueError(f"{name}:={text} is not a {'whole ' if kind is int else ''}number") from None


def parse_cameras(text: str) -> dict[str, str]:
    """front,wrist=/arm/image -> {"front": "", "wrist": "/arm/image"}. ValueError with the form that is expected."""
    cameras: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if not (name.isidentifier() and name.isascii()):
            raise ValueError(f"cameras:={text}: {part!r} is not understood; expected front,wrist or front=…,wrist=…")
        if name in cameras:
            raise ValueError(f"cameras:={text}: {name} is there twice; each camera needs its own name")
        cameras[name] = value.strip()
    return cameras


def fastdds_profile(context: LaunchContext) -> list:
    """Sets the profile for all that is started after it, in the variable that the distribution reads, unless one is set."""
    if not is_true(context, "fastdds_profile"):
        return []
    distro = context.environment.get("ROS_DISTRO", "")
    old = not distro or distro in OLD_PROFILE_DISTROS  # one whose name is not known may be old
    later, earlier = PROFILE_VARIABLES
    for name in PROFILE_VARIABLES:
        if own := context.environment.get(name):
            kept = LogInfo(msg=f"{name}={own} is kept; docs/transport.md says what it should contain")
            if name == later and old and not context.environment.get(earlier):
                return [kept, SetEnvironmentVariable(earlier, own)]  # the one that these distributions read
            return [kept]
    names = PROFILE_VARIABLES if old else PROFILE_VARIABLES[:1]
    return [SetEnvironmentVariable(name, str(share("config", "fastdds.xml"))) for name in names]


def node(
    context: LaunchContext, package: str, executable: str, *, name: str = "", namespace: str = "", **options: Any
) -> Node:
    """A node with its log level. `namespace`: below that of the launch file."""
    name = name or executable
    namespace = "/".join(part.strip("/") for part in (argument(context, "namespace"), namespace) if part.strip("/"))
    logger = ".".join((*namespace.split("/"), name)) if namespace else name
    options.setdefault("output", "screen")
    return Node(
        package=package,
        executable=executable,
        name=name,
        namespace=f"/{namespace}" if namespace else "",
        ros_arguments=["--log-level", f"{logger}:={argument(context, 'log_level')}"],
        **options,
    )


def ends_everything(what: str) -> Callable:
    """For a node's `on_exit`: when it ends, so does the rest; `ros2 launch` ends with 1 if it failed, as a raise does."""

    def on_exit(event, _context) -> list:
        if event.returncode:
            raise RuntimeError(f"{what} has ended with exit code {event.returncode}; what it printed above says why")
        return [Shutdown(reason=f"{what} has ended")]

    return on_exit


def typed(**values: Any) -> dict[str, ParameterValue]:
    """Parameters that keep their types: launch_ros would make an integer of the string "0"."""
    kinds = {list: list[str]}
    return {
        name: ParameterValue(value, value_type=kinds.get(type(value), type(value))) for name, value in values.items()
    }


def tokenizer(
    context: LaunchContext,
    cameras: dict[str, str],
    *,
    image_transport: str = "",
    use_sim_time: bool | None = None,
    remappings: Sequence[tuple[str, str]] = (),
) -> list:
    """The tokenizer and, if wanted, the viewer. `cameras`: name -> topic (empty: <name>/image_raw); {}: by the file."""
    params_file = Path(os.path.expanduser(argument(context, "params_file")))
    if not params_file.is_file():
        raise ValueError(f"params_file:={params_file}: there is no such file")
    sim = is_true(context, "use_sim_time") if use_sim_time is None else use_sim_time
    given: dict[str, Any] = {
        key: argument(context, key) for key in ("model", "device", "compute_dtype") if argument(context, key)
    }
    if image_transport:
        given["image_transport"] = image_transport
    shared = {key: given[key] for key in ("image_transport",) if key in given}
    if cameras:
        given["cameras"] = list(cameras)
    respawn = is_true(context, "respawn")
    remappings = [*((f"{name}/image_raw", topic) for name, topic in cameras.items() if topic), *remappings]
    actions: list = [
        node(
            context,
            "vla_perception",
            "visual_tokenizer",
            parameters=[
                str(params_file),
                typed(
                    **given,
                    autostart=is_true(context, "autostart"),
                    model_locked=is_true(context, "model_locked"),
                    use_sim_time=sim,
                ),
            ],
            remappings=remappings,
            # Without it nothing here is of use: it is started again, or all ends.
            **(
                {"respawn": True, "respawn_delay": RESPAWN_SEC}
                if respawn
                else {"on_exit": ends_everything("visual_tokenizer")}
            ),
        )
    ]
    if is_true(context, "view"):
        actions.append(
            node(
                context,
                "vla_perception",
                "token_viewer",
                parameters=[str(params_file), typed(**shared, use_sim_time=sim)],
                remappings=remappings,
            )
        )
    return actions


def require_package(package: str, why: str, debian: str = "") -> None:
    """RuntimeError that says how to install a ROS package which is not there."""
    try:
        get_package_prefix(package)
    except PackageNotFoundError:
        distro = os.environ.get("ROS_DISTRO", "$ROS_DISTRO")
        name = debian or package.replace("_", "-")
        raise RuntimeError(
            f"{why} needs the package {package}, which is not installed: sudo apt install ros-{distro}-{name}"
        ) from None


_LIST_TOPICS = """
import json, sys
try:
    from vla_perception.sources.bags import Bag, BagError
except ImportError as error:
    sys.exit(f"{error} in {sys.executable}, which cannot read bags")
try:
    with Bag(sys.argv[1]) as bag:
        print(json.dumps({name: bag.topics[name].type for name in bag.camera_topics()}))
except (BagError, OSError, ValueError) as error:
    sys.exit(str(error))
"""


def bag_camera_topics(bag: str) -> dict[str, str]:
    """Topic -> type of what cameras published in a bag. RuntimeError with the reason if it cannot be read."""
    python = shutil.which("python3") or "python3"  # as the nodes' executables choose it: mcap is there
    result = subprocess.run([python, "-c", _LIST_TOPICS, bag], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"python3 ended with {result.returncode}"]
        raise RuntimeError(f"bag:={bag}: {lines[-1]}")
    return json.loads(result.stdout.splitlines()[-1])
