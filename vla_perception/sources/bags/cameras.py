"""Which of a bag's topics are a camera's, and what the cameras are called.

Standard library only: the launch files use it in the Python of `ros2`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vla_perception.sources.bags.cdr import compressed_data, compressed_format, image_encoding
from vla_perception.sources.bags.contents import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, BagMessage

#: Message type -> image transport.
IMAGE_TRANSPORTS = {IMAGE: "raw", COMPRESSED_IMAGE: "compressed"}

# What the `format` of a token message of any schema version starts with.
TOKEN_FORMAT_PREFIX = "safetensors;"

#: Encodings of sensor_msgs/image_encodings with a color or a brightness in them. 16UC1, 32FC1 (depth), 32SC1 (labels)
#: and the like have none.
CAMERA_ENCODING = re.compile(
    r"(rgb|bgr|rgba|bgra|mono)(8|16)|8UC[134]|16UC[34]|bayer_[rgb]{4}(8|16)"
    r"|yuv422(_yuy2)?|uyvy|yuyv|yuv420|i420|nv\d\d",
    re.IGNORECASE,
)

#: What other image transports send as CompressedImage.
_OTHER_TRANSPORTS = ("/compressedDepth", "/zstd")
#: Words in the names of topics whose images have a camera's encoding, and are not what a policy sees.
_NOT_COLOR = re.compile(
    r"(?<![a-z])(depth|disparity|infra(red)?|ir|thermal|confidence|labels?|mask|seg|segmentation|semantic)(?![a-z])"
    r"|depth|infra",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BagCamera:
    """A camera of a bag.

    Attributes:
        name: as the tokenizer and its views call it ("front").
        topic: the base topic ("/front/image_raw"), which image_transport's topics follow.
        topics: image transport, "raw" or "compressed" -> the topic that was recorded ("/front/image_raw/compressed").
        info_topic: its CameraInfo, None if none was recorded.
    """

    name: str
    topic: str
    topics: Mapping[str, str]
    info_topic: str | None = None


def find_cameras(types: Mapping[str, str], wanted: Mapping[str, str] | None = None) -> dict[str, BagCamera]:
    """The cameras of a bag by name, in the order of their views.

    Args:
        types: topic -> message type of what cameras published (`Bag.camera_topics`).
        wanted: name -> base topic of the cameras to find; an empty topic means "/NAME/image_raw". Without any, all are
            found whose name does not say depth, infrared, labels or the like, in the order of their topics.

    Raises:
        ValueError: there is none, or none of that topic; says which there are.
    """
    found: dict[str, dict[str, str]] = {}
    for topic, kind in types.items():
        if kind in IMAGE_TRANSPORTS and not topic.endswith(_OTHER_TRANSPORTS):
            base = topic.removesuffix("/compressed") if kind == COMPRESSED_IMAGE else topic
            found.setdefault(base, {})[IMAGE_TRANSPORTS[kind]] = topic
    if not found:
        raise ValueError("no image topic has a camera's encoding (16UC1, 32FC1 and the like are depth)")
    wanted = wanted or _named(found)
    cameras = {}
    for name, topic in wanted.items():
        base = "/" + (topic or f"{name}/image_raw").strip("/").removesuffix("/compressed")
        if base not in found:
            raise ValueError(f"{base} is not in the bag; it has {', '.join(sorted(found))}")
        info = f"{base.rpartition('/')[0]}/camera_info"
        cameras[name] = BagCamera(name, base, found[base], info if types.get(info) == CAMERA_INFO else None)
    return cameras


def _named(bases: Collection[str]) -> dict[str, str]:
    """Name -> base topic of the color cameras among `bases`."""
    named: dict[str, str] = {}
    for base in sorted(bases):
        stem = re.sub(r"/image(_raw|_color|_rect|_rect_color)?$", "", base).strip("/")
        name = re.sub(r"\W", "_", stem) or "camera"
        if not _NOT_COLOR.search(base) and name not in named:
            named[name if not name[0].isdigit() else f"camera_{name}"] = base
    if not named:
        listed = ", ".join(bases)
        raise ValueError(f"only depth, infrared or label images, by name: {listed}; name those to use")
    return named


def common_transport(cameras: Collection[BagCamera], wanted: str = "") -> str:
    """The image transport that every camera was recorded with: `wanted`, or raw where both will do. ValueError if none."""
    common = [kind for kind in IMAGE_TRANSPORTS.values() if all(kind in camera.topics for camera in cameras)]
    if wanted and wanted not in common:
        raise ValueError(f"image transport {wanted}: not every camera has such a topic in the bag")
    if not common:
        listed = ", ".join(topic for camera in cameras for topic in camera.topics.values())
        raise ValueError(f"the cameras are recorded partly raw, partly compressed ({listed}): choose some")
    return wanted or common[0]


def is_camera_image(message: BagMessage) -> bool | None:
    """Whether an Image or CompressedImage is a camera's, by its encoding; None if it does not say."""
    if message.type == IMAGE:
        encoding = image_encoding(message.cdr)
        return bool(CAMERA_ENCODING.fullmatch(encoding.strip())) if encoding.strip() else None
    if message.type != COMPRESSED_IMAGE:
        return False
    said = compressed_format(message.cdr)
    first = said.split(";")[0].strip()
    if said.startswith(TOKEN_FORMAT_PREFIX) or "compresseddepth" in said.lower():
        return False
    if CAMERA_ENCODING.fullmatch(first):  # "bgr8; jpeg compressed bgr8"
        return True
    if re.fullmatch(r"(8|16|32|64)[USF]C\d+", first, re.IGNORECASE):  # "16UC1; png compressed 16UC1"
        return False
    data = compressed_data(message.cdr)
    if data[:4] == b"\x89PNG":  # 16 bits of grey: depth, unless the format has said mono16
        return len(data) > 25 and not (data[24] == 16 and data[25] == 0)
    if data[:2] == b"\xff\xd8":
        return True
    return (first.lower() in ("jpeg", "jpg", "png", "")) if data else None
