"""Images as messages: what they hold is what OpenCV and NumPy read from their bytes, and what `decode_image` gives."""

import cv2
import numpy as np
import pytest

pytest.importorskip("sensor_msgs.msg")

from std_msgs.msg import Header

from vla_perception.images.decode import decode_image
from vla_perception.images.encode import to_image, to_jpeg

pytestmark = pytest.mark.ros

HEADER = Header(frame_id="eye")
RAMP = np.stack([*np.mgrid[:48, :64], np.full((48, 64), 200)], axis=2).astype(np.uint8) * np.uint8(3)


@pytest.mark.parametrize("encoding, order", [("rgb8", [0, 1, 2]), ("bgr8", [2, 1, 0])])
def test_raw_images(encoding, order):
    message = to_image(RAMP[:, ::2], HEADER, encoding)  # not contiguous
    assert (message.height, message.width, message.step, message.encoding) == (48, 32, 96, encoding)
    assert message.header.frame_id == "eye"
    assert bytes(message.data) == RAMP[:, ::2].tobytes()
    assert np.array_equal(decode_image(message), RAMP[:, ::2][:, :, order])


@pytest.mark.parametrize("encoding, order", [("rgb8", [0, 1, 2]), ("bgr8", [2, 1, 0])])
def test_jpeg_images(encoding, order):
    smooth = cv2.GaussianBlur(RAMP, (0, 0), 3)
    message = to_jpeg(smooth, HEADER, encoding, quality=95)
    assert message.format == f"{encoding}; jpeg compressed bgr8" and message.header.frame_id == "eye"
    bgr = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(bgr[:, :, ::-1].astype(int) - smooth[:, :, order]).mean() < 4
    assert np.array_equal(decode_image(message), bgr[:, :, ::-1])
    assert len(to_jpeg(smooth, HEADER, encoding, quality=10).data) < len(message.data)
