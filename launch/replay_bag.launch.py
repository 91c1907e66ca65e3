"""A bag's cameras into the tokenizer.

ros2 launch vla_perception replay_bag.launch.py bag:=examples/sample_bag
ros2 launch vla_perception replay_bag.launch.py bag:=drive.mcap loop:=true rate:=2.0 cameras:=front=/camera/color/image_raw
"""

import re

from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, Shutdown, TimerAction

from launch import LaunchDescription
from vla_perception.launch_parts import (
    BOOLEANS,
    argument,
    bag_camera_topics,
    fastdds_profile,
    is_true,
    node,
    number,
    parse_cameras,
    tokenizer,
    tokenizer_arguments,
    typed,
)

IMAGES = {"sensor_msgs/msg/Image": "raw", "sensor_msgs/msg/CompressedImage": "compressed"}
#: Seconds that the last frames get to become tokens, when the bag is over.
LINGER_SEC = 3.0
#: Seconds that the player waits for the tokenizer: a large checkpoint takes a while to load.
LOADING_SEC = 900.0

ARGUMENTS = [
    DeclareLaunchArgument("bag", description="Folder with metadata.yaml, .mcap or .db3 file to play."),
    DeclareLaunchArgument(
        "cameras",
        default_value="",
        description="Cameras, comma-separated, in the order of the views: name=<topic in the bag, without "
        "/compressed>; a name alone means /<name>/image_raw. Empty: every image topic of the bag that is not depth or "
        "infrared, by name.",
    ),
    DeclareLaunchArgument("rate", default_value="1.0", description="Speed: 2.0 plays twice as fast."),
    DeclareLaunchArgument(
        "loop", default_value="false", choices=BOOLEANS, description="Whether to start over at the end."
    ),
    DeclareLaunchArgument("start_offset", default_value="0.0", description="Seconds of the bag to leave out."),
    DeclareLaunchArgument(
        "use_sim_time",
        default_value="false",
        choices=BOOLEANS,
        description="Whether the bag's time is published on /clock and used by the nodes.",
    ),
]


def find_cameras(bag, wanted):
    """Camera name -> (base topic, {transport: topic}) for what is in the bag. ValueError if it is not there."""
    found = {}
    topics = bag_camera_topics(bag)
    for topic, kind in topics.items():
        if kind in IMAGES:
            base = topic.removesuffix("/compressed") if IMAGES[kind] == "compressed" else topic
            found.setdefault(base, {})[IMAGES[kind]] = topic
    if not found:
        raise ValueError(f"bag:={bag} has no image topic")
    if not wanted:
        wanted = {}
        for base in sorted(found):
            name = re.sub(r"\W", "_", re.sub(r"/image(_raw|_color|_rect|_rect_color)?$", "", base).strip("/")) or "camera"
            if not re.search("depth|infra", base) and name not in wanted:
                wanted[name if not name[0].isdigit() else f"camera_{name}"] = base
        if not wanted:
            raise ValueError(f"bag:={bag} has only depth or infrared images: {', '.join(found)}; name cameras:=…")
    cameras = {}
    for name, topic in wanted.items():
        base = "/" + (topic or f"{name}/image_raw").strip("/").removesuffix("/compressed")
        if base not in found:
            raise ValueError(f"cameras: {base} is not in the bag; it has {', '.join(sorted(found))}")
        cameras[name] = (base, found[base])
    return cameras, topics


def start(context):
    bag = argument(context, "bag")
    cameras, topics = find_cameras(bag, parse_cameras(argument(context, "cameras")))
    transport = argument(context, "image_transport")
    shared = [kind for kind in IMAGES.values() if all(kind in kinds for _, kinds in cameras.values())]
    if transport and transport not in shared:
        raise ValueError(f"image_transport:={transport}: not every camera has such a topic in the bag")
    if not shared:
        listed = ", ".join(topic for _, kinds in cameras.values() for topic in kinds.values())
        raise ValueError(f"the cameras are recorded partly raw, partly compressed ({listed}): choose with cameras:=…")
    transport = transport or shared[0]
    images = [kinds[transport] for _, kinds in cameras.values()]
    infos = [f"{base.rpartition('/')[0]}/camera_info" for base, _ in cameras.values()]

    sim = is_true(context, "use_sim_time")
    ended = [Shutdown(reason="the bag is over")]
    player = node(
        context,
        "vla_perception",
        "bag_player",
        parameters=[
            typed(
                bag=bag,
                topics=[*images, *(topic for topic in infos if topic in topics)],
                rate=number(context, "rate"),
                loop=is_true(context, "loop"),
                start_offset_sec=number(context, "start_offset"),
                clock=sim,
                wait_for_subscribers=1,
                wait_timeout_sec=LOADING_SEC,
            )
        ],
        on_exit=lambda event, _: ended if event.returncode else [TimerAction(period=LINGER_SEC, actions=ended)],
    )
    listed = ", ".join(f"{name} ({topic})" for name, topic in zip(cameras, images, strict=True))
    # Absolute topics, as they are in the bag, whatever the namespace.
    bases = {name: base for name, (base, _) in cameras.items()}
    return [
        LogInfo(msg=f"cameras of the bag: {listed}"),
        *fastdds_profile(context),
        player,
        *tokenizer(context, bases, image_transport=transport, use_sim_time=sim),
    ]


def generate_launch_description():
    return LaunchDescription(
        [*ARGUMENTS, *tokenizer_arguments(cameras=None, use_sim_time=None), OpaqueFunction(function=start)]
    )
