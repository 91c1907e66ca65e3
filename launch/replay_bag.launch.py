"""A bag's cameras into the tokenizer.

ros2 launch vla_perception replay_bag.launch.py bag:=$(ros2 pkg prefix --share vla_perception)/sample_bag
ros2 launch vla_perception replay_bag.launch.py bag:=drive.mcap loop:=true rate:=2.0 cameras:=front=/camera/color/image_raw
"""

from launch.actions import LogInfo, OpaqueFunction, TimerAction

from launch import LaunchDescription
from vla_perception import options
from vla_perception.launch_utils import (
    BOOLEANS,
    argument,
    bag_camera_topics,
    check_arguments,
    declare,
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
from vla_perception.sources.bags import common_transport, find_cameras

#: Seconds that the last frames get to become tokens, when the player has ended, which waits for acknowledgements first.
#: Not so many that the tokenizer reports silent cameras.
LINGER_SEC = 2.0
#: Seconds that the player waits for the tokenizer: a large checkpoint takes a while to load.
LOADING_SEC = 900.0

ARGUMENTS = dict(
    [
        declare("bag", description="Folder with metadata.yaml, .mcap or .db3 file to play."),
        declare(
            "cameras",
            default_value="",
            description="Cameras, comma-separated, in the order of the views: name=<topic in the bag, without "
            "/compressed>; a name alone means /<name>/image_raw. Empty: every image topic of the bag that is a camera's by "
            "its recorded encoding, and whose name does not say depth, infrared, labels or the like.",
        ),
        declare(
            "image_transport",
            default_value="",
            choices=["", *options.IMAGE_TRANSPORTS],
            description="raw or compressed: which recorded topics are played. Empty: as the cameras were recorded, raw "
            "where both are there.",
        ),
        declare(
            "max_gap",
            default_value="5.0",
            description="Longer silences in the bag are cut down to this, in its seconds; 0: none is.",
        ),
        declare("rate", default_value="1.0", description="Speed: 2.0 plays twice as fast."),
        declare("loop", default_value="false", choices=BOOLEANS, description="Whether to start over at the end."),
        declare("start_offset", default_value="0.0", description="Seconds of the bag to leave out."),
        declare(
            "use_sim_time",
            default_value="false",
            choices=BOOLEANS,
            description="Whether the bag's time is published on /clock and used by the nodes.",
        ),
    ]
)


def declared():
    return ARGUMENTS | tokenizer_arguments(cameras=None, image_transport=None, use_sim_time=None)


def cameras_of(bag, wanted):
    """Name -> BagCamera. ValueError that names the launch file's arguments if they are not there."""
    try:
        return find_cameras(bag_camera_topics(bag), wanted)
    except ValueError as error:
        raise ValueError(f"bag:={bag}: {error} (cameras:=…)") from error


def start(context):
    warnings = check_arguments(context, declared(), __file__)
    bag = argument(context, "bag")
    cameras = cameras_of(bag, parse_cameras(argument(context, "cameras")))
    transport = common_transport(cameras.values(), argument(context, "image_transport"))
    images = [camera.topics[transport] for camera in cameras.values()]
    played = [*images, *(camera.info_topic for camera in cameras.values() if camera.info_topic)]
    # A bag's topics are absolute: without this, two robots' bags in one domain would be played onto the same ones.
    namespace = argument(context, "namespace").strip("/")
    above = f"/{namespace}" if namespace else ""
    # A camera that sends nothing but JPEG may leave out the suffix that the tokenizer expects.
    suffixed = {topic for topic in images if transport == "compressed" and not topic.endswith("/compressed")}
    moved = {topic: above + topic + "/compressed" * (topic in suffixed) for topic in played}
    moved = [(topic, to) for topic, to in moved.items() if topic != to]
    # So is the bag's time. The tokenizer reads it there; what else has use_sim_time needs the same remapping.
    clock = [("/clock", f"{above}/clock")] if namespace else []

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
                topics=played,
                rate=number(context, "rate"),
                loop=is_true(context, "loop"),
                start_offset_sec=number(context, "start_offset"),
                max_gap_sec=number(context, "max_gap"),
                clock=sim,
                wait_for_subscribers=1,
                wait_timeout_sec=LOADING_SEC,
            )
        ],
        remappings=[*moved, *clock],
        on_exit=on_exit,
    )
    listed = ", ".join(f"{name} ({topic})" for name, topic in zip(cameras, images, strict=True))
    bases = {name: above + camera.topic for name, camera in cameras.items()}
    return [
        *warnings,
        LogInfo(msg=f"cameras of the bag: {listed}"),
        *fastdds_profile(context),
        player,
        *tokenizer(context, bases, image_transport=transport, use_sim_time=sim, remappings=clock),
    ]


def generate_launch_description():
    return LaunchDescription([*declared().values(), OpaqueFunction(function=start)])
