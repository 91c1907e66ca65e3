"""camera_info from calibration files: what is read, what is refused, and in which words."""

import pytest

pytest.importorskip("sensor_msgs.msg")

from vla_perception.messages.camera_info import CalibrationError, pinhole, read_calibration, uncalibrated

pytestmark = pytest.mark.ros

CALIBRATION = """\
image_width: 64
image_height: 48
camera_name: front
camera_matrix:
  rows: 3
  cols: 3
  data: [50.5, 0, 31.5, 0, 51, 23.5, 0, 0, 1]
distortion_model: plumb_bob
distortion_coefficients:
  rows: 1
  cols: 5
  data: [0.1, -0.2, 0.001, 0.002, 0]
rectification_matrix:
  rows: 3
  cols: 3
  data: [1, 0, 0, 0, 1, 0, 0, 0, 1]
projection_matrix:
  rows: 3
  cols: 4
  data: [49, 0, 31, 0, 0, 50, 23, 0, 0, 0, 1, 0]
"""


@pytest.fixture
def calibration(tmp_path):
    def write(text):
        path = tmp_path / "front.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_standard_file(calibration):
    info = read_calibration(calibration(CALIBRATION))
    assert (info.width, info.height, info.distortion_model) == (64, 48, "plumb_bob")
    assert list(info.k) == [50.5, 0, 31.5, 0, 51, 23.5, 0, 0, 1]
    assert list(info.d) == [0.1, -0.2, 0.001, 0.002, 0]
    assert list(info.p) == [49, 0, 31, 0, 0, 50, 23, 0, 0, 0, 1, 0]
    assert read_calibration("file://" + calibration(CALIBRATION)) == info


def test_an_old_file_without_model_and_projection(calibration):
    text = CALIBRATION.replace("distortion_model: plumb_bob\n", "").split("rectification_matrix")[0]
    info = read_calibration(calibration(text))
    assert info.distortion_model == "plumb_bob"
    assert list(info.p) == [50.5, 0, 31.5, 0, 0, 51, 23.5, 0, 0, 0, 1, 0]
    assert list(info.r) == [1, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("image_width: 64", "image_width: wide", "image_width must be a number of pixels"),
        ("image_height: 48", "", "image_height must be"),
        ("51, 23.5, 0, 0, 1]", "51, 23.5, 0, 0]", "camera_matrix must be 3 x 3, got 8"),
        ("[50.5,", "[-50.5,", "camera_matrix is no intrinsic matrix"),
        ("[50.5,", "[.nan,", "other than finite numbers"),
        ("plumb_bob", "plum_bob", "unknown distortion_model 'plum_bob'"),
        ("[0.1, -0.2, 0.001, 0.002, 0]", "[0.1, 0.2]", "plumb_bob takes 4 or 5"),
        ("camera_matrix:", "cameramatrix:", "camera_matrix is missing"),
        ("image_width: 64", "image_width: [", "no YAML"),
    ],
)
def test_a_bad_file_is_refused(calibration, old, new, why):
    assert old in CALIBRATION
    with pytest.raises(CalibrationError, match=why) as refused:
        read_calibration(calibration(CALIBRATION.replace(old, new, 1)))
    assert "front.yaml" in str(refused.value)


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]"])
def test_other_yaml_is_refused(calibration, text):
    with pytest.raises(CalibrationError, match="expected keys"):
        read_calibration(calibration(text))


def test_absent_files_are_refused():
    with pytest.raises(CalibrationError, match="cannot read the calibration file /no/such"):
        read_calibration("/no/such.yaml")
    with pytest.raises(CalibrationError, match="only paths"):
        read_calibration("http://host/front.yaml")


def test_without_a_file():
    assert list(uncalibrated(4, 3).k) == [0] * 9
    info = pinhole(4, 3, 5.0, 6.0, 1.5, 1.0)
    assert list(info.k) == [5, 0, 1.5, 0, 6, 1, 0, 0, 1] and list(info.d) == [0] * 5
