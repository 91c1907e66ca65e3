"""Small recordings for tests: bags, videos, folders of images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np


def numbered_image(index: int, height: int = 24, width: int = 36) -> np.ndarray:
    """uint8 RGB of smooth content that every index has of its own."""
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [(x * 7 + index * 13) % 256, (y * 9 + index * 29) % 256, np.full_like(x, index * 41 % 256)], axis=-1
    ).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def write_images(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        (folder / f"image_{index}.png").write_bytes(png(numbered_image(index)))
    return folder


def write_bag(
    path: Path, frames, *, plugin="mcap", values=(), types="sensor_msgs/msg/Image", sort=True, qos=None
) -> Path:
    """A bag of (topic, stamp ns, image or None for a damaged one) messages, recorded 5 ms after their stamps; and of
    (topic, time ns, numbers) `values`, as std_msgs/Float64MultiArray. Not `sort`: written as they come, one at a time.
    `qos`: topic → the QoS profiles of its publishers."""
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    new = store.types

    def messages():
        for topic, stamp_ns, image in frames:
            header = new["std_msgs/msg/Header"](
                stamp=new["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9)),
                frame_id=f"{topic.split('/')[1]}_optical",
            )
            if types.endswith("CompressedImage"):
                data = np.frombuffer(png(image) if image is not None else b"\x89PNG damaged", np.uint8)
                message = new[types](header=header, format="png", data=data)
            else:
                height, width = (24, 36) if image is None else image.shape[:2]
                data = np.zeros(5, np.uint8) if image is None else image.reshape(-1)
                message = new[types](
                    header=header,
                    height=height,
                    width=width,
                    encoding="rgb8",
                    is_bigendian=0,
                    step=width * 3,
                    data=data,
                )
            yield stamp_ns + 5_000_000, topic, types, message
        for topic, time_ns, numbers in values:
            layout = new["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
            kind = "std_msgs/msg/Float64MultiArray"
            yield time_ns, topic, kind, new[kind](layout=layout, data=np.array(numbers, np.float64))

    in_order = sorted(messages(), key=lambda entry: entry[:2]) if sort else messages()
    with Writer(path, version=9, storage_plugin=StoragePlugin[plugin.upper()]) as bag:
        connections = {}
        for time_ns, topic, kind, message in in_order:
            if topic not in connections:
                connections[topic] = bag.add_connection(
                    topic, kind, typestore=store, offered_qos_profiles=(qos or {}).get(topic, ())
                )
            bag.write(connections[topic], time_ns, store.serialize_cdr(message, kind))
    return path


def write_video(path: Path, count: int, rate: int = 10, codec: str = "mpeg4") -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 36, 24, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(count):
            for packet in stream.encode(av.VideoFrame.from_ndarray(numbered_image(index), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
