"""Rosbag2 recordings, read without ROS: MCAP and SQLite.

    with Bag("examples/sample_bag") as bag:
        for message in bag.messages(bag.camera_topics()):
            message.topic, message.type, message.time_ns, message.cdr

Messages come as the CDR bytes that were recorded. `header_stamp_ns`, `with_header_stamp`, `compressed_format` and
`image_encoding` look into those bytes without knowing the message type's definition. `Bag.cameras` finds the cameras.

What counts is what the storage files hold. `metadata.yaml` says which files there are and how they are compressed;
where its topics, counts or QoS differ from the files, the files are right, and a warning names what differs.

Words: a bag is a *folder* with *storage files* (`.mcap`, `.db3`) and `metadata.yaml`, or one such file; a *channel* is a
topic of one file. A *camera* has a *base topic* ("/front/image_raw"), recorded by one or both *image transports*.

    contents.py     topics, messages, the error
    bag.py          Bag: all storage files as one recording
    folder.py       metadata.yaml, and which files belong to the bag
    storage.py      what storage files have in common; mcap_file.py, sqlite_file.py: the two kinds
    cameras.py      which topics are a camera's, and the cameras' names
    cdr.py          stamps and encodings in serialised messages
"""

from vla_perception.sources.bags.bag import Bag
from vla_perception.sources.bags.cameras import BagCamera, common_transport, find_cameras, is_camera_image
from vla_perception.sources.bags.cdr import compressed_format, header_stamp_ns, image_encoding, with_header_stamp
from vla_perception.sources.bags.contents import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, BagError, BagMessage, BagTopic

__all__ = [
    "CAMERA_INFO",
    "COMPRESSED_IMAGE",
    "IMAGE",
    "Bag",
    "BagCamera",
    "BagError",
    "BagMessage",
    "BagTopic",
    "common_transport",
    "compressed_format",
    "find_cameras",
    "header_stamp_ns",
    "image_encoding",
    "is_camera_image",
    "with_header_stamp",
]
