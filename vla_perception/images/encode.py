"""Color images as camera messages: uint8 [height, width, 3] -> sensor_msgs Image and CompressedImage."""

from __future__ import annotations

import numpy as np
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from vla_perception.byte_array import byte_array
from vla_perception.images import streams


def to_image(pixels: np.ndarray, header: Header, encoding: str = "rgb8") -> Image:
    """A raw image. pixels: uint8 [height, width, 3] in the order that `encoding`, "rgb8" or "bgr8", says."""
    height, width = pixels.shape[:2]
    message = Image(header=header, height=height, width=width, encoding=encoding, step=3 * width)
    message.data = byte_array(np.ascontiguousarray(pixels))
    return message


def to_jpeg(pixels: np.ndarray, header: Header, encoding: str = "rgb8", quality: int = 90) -> CompressedImage:
    """A JPEG image, labelled as image_transport labels it. pixels: as for `to_image`; quality: 1 to 100.

    Raises ImportError where there is no OpenCV; says so.
    """
    cv2 = streams.import_opencv()
    bgr = np.ascontiguousarray(pixels if encoding == "bgr8" else pixels[:, :, ::-1])
    stream = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return CompressedImage(header=header, format=f"{encoding}; jpeg compressed bgr8", data=byte_array(stream))
