"""camera_info from calibration files: what is read, what is refused, and in which words."""

import os

import pytest
from calibration import CALIBRATION

pytest.importorskip("sensor_msgs.msg")

from vla_perception.images.camera_info import CalibrationError, pinhole, read_calibration, uncalibrated

pytestmark = pytest.mark.ros


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
        ("[50.5,", "[-50.5,", "camera_matrix is not an intrinsic matrix"),
        ("[50.5,", "[.nan,", "other than finite numbers"),
        ("plumb_bob", "plum_bob", "unknown distortion_model 'plum_bob'"),
        ("[0.1, -0.2, 0.001, 0.002, 0]", "[0.1, 0.2]", "plumb_bob takes 4 or 5"),
        ("  rows: 3\n  cols: 4", "  rows: 4\n  cols: 3", "projection_matrix says rows 4 and cols 3, expected 3 and 4"),
        ("  rows: 3\n  cols: 3", "  cols: 3", "camera_matrix says rows [?] and cols 3, expected 3 and 3"),
        ("camera_matrix:", "cameramatrix:", "camera_matrix is missing"),
        ("image_width: 64", "image_width: [", "not YAML"),
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


def with_line(line):
    return f"{CALIBRATION}{line}\n"


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MATRIX = "{rows: 3, cols: 3, data: [500, 0, 320, 0, 500, 240, 0, 0, 1]}"
HOSTILE = {
    "aliases of aliases": ALIASES + CALIBRATION,
    "aliases as a size": ALIASES + CALIBRATION.replace("64", "*i", 1),
    "merged aliases": "a: &a {x: 1}\n" + with_line("b: {<<: [*a, *a]}"),
    "an alias of itself": with_line("a: &a [*a]"),
    "a model that is a list": CALIBRATION.replace("plumb_bob", "[plumb_bob]"),
    "a model that is a dictionary": CALIBRATION.replace("plumb_bob", "{a: 1}"),
    "a model that is nothing": CALIBRATION.replace("plumb_bob", ""),
    "a huge number": CALIBRATION.replace("50.5", "9" * 400),
    "a number with 20 000 digits": CALIBRATION.replace("64", "9" * 20_000, 1),
    "infinity": CALIBRATION.replace("50.5", ".inf"),
    "infinity in Python": CALIBRATION.replace("50.5", "inf"),
    "true": CALIBRATION.replace("50.5", "true"),
    "a list in a list": CALIBRATION.replace("50.5", "[50.5]"),
    "nothing in a list": CALIBRATION.replace("50.5", "~"),
    "a size in quotes of words": CALIBRATION.replace("64", "'sixty'", 1),
    "a size of 0": CALIBRATION.replace("64", "0", 1),
    "a negative size": CALIBRATION.replace("64", "-64", 1),
    "a size with a point": CALIBRATION.replace("64", "64.0", 1),
    "a huge size": CALIBRATION.replace("64", "65537", 1),
    "a date": CALIBRATION.replace("64", "2024-99-99", 1),
    "a matrix of text": CALIBRATION.replace("camera_matrix:\n", "camera_matrix: x\nother:\n"),
    "a matrix without data": CALIBRATION.replace("data: [50.5", "date: [50.5"),
    "a key that is a list": with_line("? [a]\n: b"),
    "nested lists": with_line("a: " + "[" * 5000),
    "nested dictionaries": with_line("a: " + "{a: " * 3000),
    "nested blocks": "\n".join(" " * depth + "-" for depth in range(200)),
    "a large file": CALIBRATION + "# comment\n" * 4000,
    "16 000 coefficients": CALIBRATION.replace("0.1, -0.2", "1," * 16_000 + "2"),
    "two documents": CALIBRATION + "---\n" + CALIBRATION,
    "a NUL": with_line("a: \0"),
    "tabs": "\timage_width: 64\n",
    "an unknown directive": "%YAML:1.0\n---\n" + CALIBRATION,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_few_words(calibration, name):
    with pytest.raises(CalibrationError) as refused:
        read_calibration(calibration(HOSTILE[name]))
    assert len(str(refused.value)) <= 501


@pytest.mark.parametrize(
    "tag", ["!!int x", "!!bool x", "!!timestamp x", "!!float", "!!int ''", "!!binary é", "!unknown x"]
)
def test_tags_make_nothing(calibration, tag):
    assert read_calibration(calibration(with_line(f"note: {tag}"))).width == 64


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system ''"])
def test_no_code_runs(calibration, tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read_calibration(calibration(with_line(f"note: {tag}")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", ["5.05e1", "5.05e+01", "505e-1", "50.5", "+50.5", "'50.5'", "5.05E1", "0.505e+2"])
def test_numbers_as_c_and_python_write_them(calibration, number):
    """YAML 1.1 takes 505e-1 for text: it has no point."""
    assert read_calibration(calibration(CALIBRATION.replace("50.5", number))).k[0] == 50.5


def test_bytes_that_are_no_text_are_refused(tmp_path):
    for data in (b"\xff\xfe\x00", CALIBRATION.encode("utf-16"), b"image_width: \xe9"):
        (tmp_path / "x.yaml").write_bytes(data)
        with pytest.raises(CalibrationError, match="cannot read"):
            read_calibration(str(tmp_path / "x.yaml"))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "/dev/null", "/proc/self/mem"):
        with pytest.raises(CalibrationError, match="cannot read"):
            read_calibration(str(path))


@pytest.mark.parametrize(
    "location",
    [
        "file://%00",
        "/dev/zero\0x",
        "package:///x",
        "package://../x/y",
        "package://no_such_package/x",
        "http://[x",
        "x" * 5000,
        "~no_such_user/x.yaml",
        "\ud800",
        "file://",
        "",
    ],
)
def test_locations_that_name_nothing_are_refused(location):
    with pytest.raises(CalibrationError):
        read_calibration(location)
