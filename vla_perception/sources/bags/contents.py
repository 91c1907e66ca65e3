"""What a bag consists of: topics and messages; and the error that says why one cannot be read."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from vla_perception.printable import error_text

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"


class BagError(ValueError):
    """The path is not a bag that can be read, or the bag lacks what was asked for; the text says what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(error_text(text))  # it quotes names of any content


@dataclass(frozen=True)
class BagTopic:
    """A topic of a bag: its name, message type ("sensor_msgs/msg/Image") and number of messages.

    Each "" where the recording says nothing of it:

    offered_qos: what the publishers offered, YAML as the recorder wrote it, unchecked.
    definition: the type's .msg (or .idl) text and those that it consists of, as the recorder wrote it, unchecked.
    type_hash: of the type's description ("RIHS01_" and 64 hexadecimal digits, REP 2011), unchecked.
    """

    name: str
    type: str
    messages: int
    offered_qos: str = field(default="", compare=False)
    definition: str = field(default="", compare=False, repr=False)
    type_hash: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class BagMessage:
    """A recorded message: when it was recorded (ns since the epoch) and its CDR bytes with encapsulation header."""

    topic: str
    type: str
    time_ns: int
    cdr: bytes


def missing_library(error: ImportError) -> BagError:
    """The error for a library of the extra `bags` that this Python lacks."""
    return BagError(
        f"{error} in {sys.executable}; bags are read with the packages mcap and pyyaml: pip install mcap pyyaml"
    )
