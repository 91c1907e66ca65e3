"""A bag's cameras into the tokenizer.

ros2 launch vla_perception replay_bag.launch.py bag:=examples/sample_bag
ros2 launch vla_perception replay_bag.launch.py bag:=drive.mcap loop:=true rate:=2.0 cameras:=front=/camera/color/image_raw
"""

import re

from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, TimerAction

from launch import LaunchDescription
from vla_perception.launch_parts import (
    BOOLEANS,
    argument,
    bag_camera_topics,
    ends_everything,
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
#: What other image transports send as CompressedImage.
NO_PICTURES = ("/compressedDepth", "/zstd")
#: Seconds that the last frames get to become tokens, when the player has ended, which waits for acknowledgements first.
#: Not so many that the tokenizer begins to complain of silent cameras.
LINGER_SEC = 2.0
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
    DeclareLaunchArgument(
        "image_transport",
        default_value="",
        choices=["", *IMAGES.values()],
        description="raw or compressed: which recorded topics are played. Empty: as the cameras were recorded, raw "
        "where both are there.",
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
        if kind in IMAGES and not topic.endswith(NO_PICTURES):
            base = topic.removesuffix("/compressed") if IMAGES[kind] == "compressed" else topic
            found.setdefault(base, {})[IMAGES[kind]] = topic
    if not found:
        raise ValueError(f"bag:={bag} has no image topic")
    if not wanted:
        wanted = {}
        for base in sorted(found):
            name = re.sub(r"\W", "_", re.sub(r"/image(_raw|_color|_rect|_rect_color)?$", "", base).strip("/")) or "camera"
            if not re.search("depth|infra", base, re.IGNORECASE) and name not in wanted:
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
    # A camera that sends nothing but JPEG may leave out the suffix that the tokenizer expects.
    suffixes = {topic: f"{topic}/compressed" for topic in images if not topic.endswith("/compressed")}
    infos = [f"{base.rpartition('/')[0]}/camera_info" for base, _ in cameras.values()]

    sim = is_true(context, "use_sim_time")

    def on_exit(event, context):
        return [TimerAction(period=LINGER_SEC, actions=ends_everything("bag_player")(event, context))]

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
        remappings=list(suffixes.items()) if transport == "compressed" else [],
        on_exit=on_exit,
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
    common = tokenizer_arguments(cameras=None, image_transport=None, use_sim_time=None)
    return LaunchDescription([*ARGUMENTS, *common, OpaqueFunction(function=start)])
