"""Cameras and the tokenizer.

ros2 launch vla_perception real_camera.launch.py cameras:="front=/dev/video0,wrist=/dev/video2"
ros2 launch vla_perception real_camera.launch.py cameras:=front=rtsp://192.168.0.7/stream1
ros2 launch vla_perception real_camera.launch.py driver:=realsense2_camera cameras:="front=123456789012,wrist="
"""

from launch.actions import OpaqueFunction

from launch import LaunchDescription
from vla_perception.launch_utils import (
    argument,
    check_arguments,
    declare,
    ends_everything,
    fastdds_profile,
    node,
    number,
    parse_cameras,
    require_package,
    tokenizer,
    tokenizer_arguments,
    typed,
)

DRIVERS = ["opencv", "v4l2_camera", "usb_cam", "realsense2_camera"]  # see PARTS

ARGUMENTS = dict(
    [
        declare(
            "cameras",
            default_value="front=/dev/video0",
            description="name=source, comma-separated. A source is a device (/dev/video0); with driver:=opencv also an "
            "RTSP or HTTP stream or a video file; with driver:=realsense2_camera a serial number, or nothing for the "
            "first camera found.",
        ),
        declare(
            "driver",
            default_value="opencv",
            choices=DRIVERS,
            description="What reads the cameras. opencv comes with this package, the others are packages of the "
            "distribution.",
        ),
        declare("width", default_value="0", description="Pixels; 0: the driver's own."),
        declare("height", default_value="0", description="Pixels; 0: the driver's own."),
        declare("rate_hz", default_value="0.0", description="Images per second; 0: the driver's own."),
        declare(
            "camera_params_file",
            default_value="",
            description="Parameter file for the drivers (calibration, exposure, …); it wins over the arguments here.",
        ),
    ]
)


def declared():
    return ARGUMENTS | tokenizer_arguments(cameras=None, use_sim_time=None)


# Per driver: package, executable, node name, parameters, and the topic within the camera's namespace. Images keep
# the driver's own topic, and the tokenizer is remapped: that moves the compressed topic as well, with any driver.


def opencv(name, source, size, rate):
    options = {"source": source, "frame_id": f"{name}_optical_frame"}
    if all(size):
        options |= {"width": size[0], "height": size[1]}
    if rate:
        options["rate_hz"] = rate
    return "vla_perception", "opencv_camera", "opencv_camera", typed(**options), "image_raw"


def v4l2_camera(name, source, size, rate):
    options = typed(video_device=source, camera_frame_id=f"{name}_optical_frame")
    if all(size):
        options["image_size"] = list(size)
    if rate:
        options["time_per_frame"] = [1, round(rate)]
    return "v4l2_camera", "v4l2_camera_node", "v4l2_camera", options, "image_raw"


def usb_cam(name, source, size, rate):
    options = {"video_device": source, "camera_name": name, "frame_id": f"{name}_optical_frame"}
    if all(size):
        options |= {"image_width": size[0], "image_height": size[1]}
    if rate:
        options["framerate"] = rate
    return "usb_cam", "usb_cam_node_exe", "usb_cam", typed(**options), "image_raw"


def realsense2_camera(name, source, size, rate):
    options = {"camera_name": "camera", "enable_depth": False}
    if source:
        options["serial_no"] = source
    if all(size):
        options["rgb_camera.color_profile"] = f"{size[0]}x{size[1]}x{round(rate) or 30}"
    return "realsense2_camera", "realsense2_camera_node", "camera", typed(**options), "camera/color/image_raw"


PARTS = {
    "opencv": opencv,
    "v4l2_camera": v4l2_camera,
    "usb_cam": usb_cam,
    "realsense2_camera": realsense2_camera,
}


def start(context):
    warnings = check_arguments(context, declared(), __file__)
    driver = argument(context, "driver")
    if driver != "opencv":
        require_package(driver, f"driver:={driver}")
    cameras = parse_cameras(argument(context, "cameras"))
    if not cameras:
        raise ValueError("cameras:= names no camera; expected for example front=/dev/video0,wrist=/dev/video2")
    for name, source in cameras.items():
        if not source and driver != "realsense2_camera":
            raise ValueError(f"cameras: {name} has no source; expected for example {name}=/dev/video0")
    size = (number(context, "width", int), number(context, "height", int))
    if any(size) and not all(size):
        raise ValueError("width and height go together: give both or none")
    rate = number(context, "rate_hz")
    params = [path] if (path := argument(context, "camera_params_file")) else []

    left = set(cameras)

    def ended(name):
        """One camera less goes on, and the tokenizer reports it; none at all does not."""

        def on_exit(event, context):
            left.discard(name)
            return None if left else ends_everything("the last camera")(event, context)

        return on_exit

    drivers, topics = [], {}
    for name, source in cameras.items():
        package, executable, node_name, options, topic = PARTS[driver](name, source, size, rate)
        topics[name] = "" if topic == "image_raw" else f"{name}/{topic}"
        drivers.append(
            node(
                context,
                package,
                executable,
                name=node_name,
                namespace=name,
                parameters=[options, *params],
                on_exit=ended(name),
            )
        )
    return [
        *warnings,
        *fastdds_profile(context),
        *drivers,
        *tokenizer(context, topics, image_transport=argument(context, "image_transport"), use_sim_time=False),
    ]


def generate_launch_description():
    return LaunchDescription([*declared().values(), OpaqueFunction(function=start)])
