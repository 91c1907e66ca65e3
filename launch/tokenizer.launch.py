"""The tokenizer alone, for cameras that already run.

ros2 launch vla_perception tokenizer.launch.py cameras:=front,wrist model:=/models/openvla-7b
ros2 launch vla_perception tokenizer.launch.py cameras:=front=/camera/camera/color/image_raw
"""

from launch.actions import OpaqueFunction

from launch import LaunchDescription
from vla_perception.launch_utils import (
    argument,
    check_arguments,
    fastdds_profile,
    parse_cameras,
    tokenizer,
    tokenizer_arguments,
)


def start(context):
    warnings = check_arguments(context, tokenizer_arguments(), __file__)
    cameras = parse_cameras(argument(context, "cameras"))
    return [
        *warnings,
        *fastdds_profile(context),
        *tokenizer(context, cameras, image_transport=argument(context, "image_transport")),
    ]


def generate_launch_description():
    return LaunchDescription([*tokenizer_arguments().values(), OpaqueFunction(function=start)])
