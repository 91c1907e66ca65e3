"""opencv_camera: video files, streams that break, devices that are not there; then the node over DDS."""

import os
import signal
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from vla_perception.sources.video import SourceError, VideoSource

cv2 = pytest.importorskip("cv2")

HEIGHT, WIDTH, FRAMES = 48, 64, 8


def level(index):
    """What frame `index` of the test video is filled with: blue, green, red."""
    return 40, 20 + 25 * index, 200


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("video") / "frames.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (WIDTH, HEIGHT))
    for index in range(FRAMES):
        writer.write(np.full((HEIGHT, WIDTH, 3), level(index), np.uint8))
    writer.release()
    return path


def index_of(bgr):
    """Which frame of the test video this is; asserts that it is one."""
    mean = bgr.reshape(-1, 3).mean(axis=0)
    index = round((mean[1] - 20) / 25)
    assert np.abs(mean - level(index)).max() < 6
    return index


def test_a_file_plays_once_in_order(video):
    source = VideoSource(video, loop=False, rate_hz=1000)
    source.open()
    shown = []
    while (frame := source.read()) is not None:
        shown.append(index_of(frame.pixels))
    source.close()
    assert shown == list(range(FRAMES))


def test_a_file_loops(video):
    source = VideoSource("file://" + video, rate_hz=1000)
    source.open()
    shown = [index_of(source.read().pixels) for _ in range(2 * FRAMES + 1)]
    source.close()
    assert shown == [*range(FRAMES), *range(FRAMES), 0]


def with_rate(video, path, rate, scale):
    """The test video with other frames per second in its header (AVI: rate / scale)."""
    content = bytearray(open(video, "rb").read())
    at = content.index(b"strh") + 8 + 20
    content[at : at + 8] = struct.pack("<II", scale, rate)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(("rate", "scale"), [(1_000_000, 1), (90_000, 1), (1000, 1), (1, 1000), (2**31, 1), (0, 0)])
def test_frames_per_second_that_no_camera_has(video, tmp_path, rate, scale):
    odd = with_rate(video, tmp_path / "odd.avi", rate, scale)
    capture = cv2.VideoCapture(odd)
    said = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    source = VideoSource(odd, loop=False)
    source.open()
    assert source.remark if not 0.1 <= said <= 480 else not source.remark
    if source.remark:
        assert f"says that it has {said:g} frames per second" in source.remark
        assert source._rate_hz == 30
    assert [index_of(source.read().pixels) for _ in range(FRAMES)] == list(range(FRAMES))
    source.close()
    asked = VideoSource(odd, rate_hz=500.0)
    asked.open()
    assert asked.remark == "" and asked._rate_hz == 500
    asked.close()


@pytest.mark.parametrize("said", [0.0, -1.0, -25.0, float("nan"), float("inf"), 1e6, 1e300, 481.0, 1e-9, 0.09])
def test_paces_that_opencv_may_report(video, said):
    source = VideoSource(video)
    source._set_pace(said)
    assert source._rate_hz == 30 and source.remark
    source._set_pace(23.976)
    assert source._rate_hz == 23.976 and not source.remark


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, 1e-300, 1e-9])
def test_a_rate_that_is_none_is_refused(video, rate):
    with pytest.raises(SourceError, match="rate_hz"):
        VideoSource(video, rate_hz=rate)


@pytest.mark.parametrize("loop", [True, False])
def test_a_file_without_a_frame_is_an_error(tmp_path, loop):
    path = str(tmp_path / "empty.avi")
    cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 30, (WIDTH, HEIGHT)).release()
    source = VideoSource(path, loop=loop)
    with pytest.raises(SourceError, match="holds no frame"):
        source.open()
        source.read()


def test_a_file_that_cannot_be_rewound_loops(tmp_path):
    """JPEGs one after the other: OpenCV does not seek in it."""
    path = tmp_path / "frames.mjpeg"
    images = [np.full((HEIGHT, WIDTH, 3), level(index), np.uint8) for index in range(FRAMES)]
    path.write_bytes(b"".join(cv2.imencode(".jpg", image)[1].tobytes() for image in images))
    source = VideoSource(str(path), rate_hz=1000.0)
    source.open()
    assert [index_of(source.read().pixels) for _ in range(2 * FRAMES + 1)] == [*range(FRAMES), *range(FRAMES), 0]
    path.write_bytes(b"no film any more")
    with pytest.raises(SourceError, match="cannot read|holds no frame"):
        for _ in range(FRAMES):
            source.read()


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="is a pipe"):
        VideoSource(str(tmp_path / "pipe")).open()


def test_without_opencv_there_is_a_sentence(monkeypatch, video):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SourceError, match="pip install opencv-python-headless"):
        VideoSource(video).open()


def test_kinds_of_sources():
    assert VideoSource("0").source == "/dev/video0" and VideoSource("0").kind == "device"
    assert VideoSource("rtsp://camera/1").kind == "stream"
    assert VideoSource("/tmp/film.mp4").kind == "file"


@pytest.mark.parametrize(
    "source, why",
    [
        ("/dev/video97", "there is no device /dev/video97"),
        ("/no/such/film.mp4", "there is no video file"),
        (__file__, "cannot read"),
        ("", "no source given"),
    ],
)
def test_what_cannot_be_opened_is_refused(source, why):
    with pytest.raises(SourceError, match=why):
        VideoSource(source).open()


class UsbCamera:
    """What OpenCV's V4L2 capture gives for a camera that sends JPEG: [1, bytes] once it is told not to convert."""

    def __init__(self, frames, fourcc=b"MJPG", obeys=True):
        self.frames, self.fourcc, self.obeys, self.converts = iter(frames), fourcc, obeys, True

    def isOpened(self):  # noqa: N802 - OpenCV's name
        return True

    def set(self, name, value):
        if name == cv2.CAP_PROP_CONVERT_RGB and self.obeys:
            self.converts = bool(value)
        return self.obeys

    def get(self, name):
        return float(int.from_bytes(self.fourcc, "little")) if name == cv2.CAP_PROP_FOURCC else 0.0

    def grab(self):
        self.frame = next(self.frames, None)
        return self.frame is not None

    def retrieve(self):
        data = np.frombuffer(self.frame, np.uint8)
        return True, cv2.imdecode(data, cv2.IMREAD_COLOR) if self.converts else data[None]

    def release(self):
        pass


def usb_source(monkeypatch, camera):
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: camera)
    source = VideoSource("/dev/null", pixel_format="MJPG")
    source.open()  # grabs one frame to see whether there are any
    return source


def test_damaged_frames_of_a_usb_camera_are_left_out(monkeypatch):
    pytest.importorskip("simplejpeg")
    whole = [cv2.imencode(".jpg", np.full((HEIGHT, WIDTH, 3), level(k), np.uint8))[1].tobytes() for k in range(4)]
    noisy = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))[1].tobytes()
    hole = noisy[: len(noisy) // 2] + b"\xff\xd9"
    grey = cv2.imencode(".jpg", np.full((HEIGHT, WIDTH), 90, np.uint8))[1].tobytes()
    source = usb_source(monkeypatch, UsbCamera([whole[0], whole[1], hole, hole, whole[2], noisy[:-2], grey, whole[3]]))
    assert [index_of(source.read().pixels) for _ in range(2)] == [
        1,
        2,
    ] and "damaged frames, which are left out" in source.remark
    assert (source.read().pixels == np.full((HEIGHT, WIDTH, 3), 90)).all()
    frame = source.read().pixels
    assert np.array_equal(frame, cv2.imdecode(np.frombuffer(whole[3], np.uint8), cv2.IMREAD_COLOR))
    with pytest.raises(SourceError, match="no more frames"):
        source.read()
    with pytest.raises(SourceError, match="100 damaged frames"):
        usb_source(monkeypatch, UsbCamera([hole] * 200)).read()


@pytest.mark.parametrize("camera", [dict(fourcc=b"YUYV"), dict(obeys=False)])
def test_other_devices_are_left_to_opencv(monkeypatch, camera):
    whole = [cv2.imencode(".jpg", np.full((HEIGHT, WIDTH, 3), level(k), np.uint8))[1].tobytes() for k in range(2)]
    source = usb_source(monkeypatch, UsbCamera(whole, **camera))
    assert index_of(source.read().pixels) == 1 and not source.remark


def test_without_simplejpeg_a_usb_camera_is_left_to_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    whole = [cv2.imencode(".jpg", np.full((HEIGHT, WIDTH, 3), level(k), np.uint8))[1].tobytes() for k in range(2)]
    source = usb_source(monkeypatch, UsbCamera(whole))
    assert index_of(source.read().pixels) == 1 and "pip install simplejpeg" in source.remark


def test_a_device_that_is_no_camera_is_refused():
    with pytest.raises(SourceError, match="busy.*or no camera"):
        VideoSource("/dev/null").open()


@pytest.fixture
def stream():
    """URL of a motion JPEG stream that breaks off after four frames, again for every connection; and their count."""
    image = cv2.imencode(".jpg", np.full((HEIGHT, WIDTH, 3), level(3), np.uint8))[1].tobytes()
    connections = []

    class Camera(BaseHTTPRequestHandler):
        def do_GET(self):
            connections.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for _ in range(4):
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
                self.wfile.write(head.encode() + image + b"\r\n")

        def log_message(self, *_arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/stream.mjpg", connections
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_stream_that_breaks_says_so_and_can_be_opened_again(stream):
    source = VideoSource(stream[0])
    for _ in range(2):
        source.open()
        assert index_of(source.read().pixels) == 3
        with pytest.raises(SourceError, match="no more frames"):
            for _ in range(10):
                source.read()
    source.close()


# The node.

try:
    from calibration import CALIBRATION
    from ros_harness import Listener, RosProcess, free_domain, wait_for_messages
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    from vla_perception.images.decode import compressed_to_rgb, image_to_rgb
except ImportError:  # no ROS here: the tests below are not selected
    pass


def node(domain, **parameters):
    command = ["-m", "vla_perception.nodes.opencv_camera", "--ros-args", "-r", "__ns:=/front"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={value}"]
    return RosProcess(command, domain)


def seconds(stamp):
    return stamp.sec + stamp.nanosec * 1e-9


@pytest.mark.ros
def test_node_publishes_a_video_with_stamps_and_calibration(video, tmp_path):
    calibration = tmp_path / "front.yaml"
    calibration.write_text(CALIBRATION)
    domain = free_domain()
    with Listener(domain) as listener:
        raw = listener.collect(Image, "/front/image_raw")
        compressed = listener.collect(CompressedImage, "/front/image_raw/compressed")
        infos = listener.collect(CameraInfo, "/front/camera_info")
        with node(domain, source=video, camera_info_url=calibration, frame_id="front_optical") as process:
            wait_for_messages(raw, 2 * FRAMES)
            wait_for_messages(compressed, 2 * FRAMES)
            assert process.stop(signal.SIGINT) == 0, process.output
    indices = [index_of(image_to_rgb(message)[:, :, ::-1]) for message in raw]
    assert all((after - before) % FRAMES == 1 for before, after in zip(indices, indices[1:]))
    assert {message.header.frame_id for message in (*raw, *compressed, *infos)} == {"front_optical"}
    by_stamp = {seconds(message.header.stamp): message for message in raw}
    for message in compressed[2:-2]:
        image = image_to_rgb(by_stamp[seconds(message.header.stamp)])
        assert np.abs(image.astype(int) - compressed_to_rgb(message)).max() <= 6
    gaps = np.diff([seconds(message.header.stamp) for message in raw])
    assert 0.04 < np.median(gaps) < 0.06  # 20 frames per second
    assert infos[0].k[0] == 50.5 and (infos[0].width, infos[0].height) == (WIDTH, HEIGHT)


@pytest.mark.ros
def test_node_ends_with_the_video_where_it_does_not_loop(video):
    domain = free_domain()
    with Listener(domain) as listener:
        infos = listener.collect(CameraInfo, "/front/camera_info")
        with node(domain, source=video, loop="false", rate_hz=2.0) as process:
            assert process.wait(30) == 0, process.output
            assert "has ended" in process.output
        assert 0 < len(infos) <= FRAMES  # once through; discovery may take the first ones
        assert infos[0].k[0] == 0


@pytest.mark.ros
def test_node_follows_remapping_of_the_base_name(video):
    domain = free_domain()
    command = ["-m", "vla_perception.nodes.opencv_camera", "--ros-args", "-r", "image_raw:=/top/color"]
    with Listener(domain) as listener, RosProcess([*command, "-p", f"source:={video}"], domain) as process:
        wait_for_messages(listener.collect(CompressedImage, "/top/color/compressed"), 2)
        wait_for_messages(listener.collect(CameraInfo, "/top/camera_info"), 2)
        assert process.stop(signal.SIGTERM) == 0, process.output


@pytest.mark.ros
def test_node_does_not_publish_a_calibration_of_another_size(video, tmp_path):
    calibration = tmp_path / "front.yaml"
    calibration.write_text(CALIBRATION.replace("image_width: 64", "image_width: 640"))
    domain = free_domain()
    with Listener(domain) as listener, node(domain, source=video, camera_info_url=calibration) as process:
        infos = wait_for_messages(listener.collect(CameraInfo, "/front/camera_info"), 3)
        assert all(info.k[0] == 0 and info.width == WIDTH for info in infos)
        assert process.stop() == 0
    assert process.output.count("the calibration is for 640 x 48 pixels") == 1


@pytest.mark.ros
def test_node_reconnects_when_a_stream_breaks(stream):
    url, connections = stream
    domain = free_domain()
    with Listener(domain) as listener, node(domain, source=url, retry_max_sec=0.5) as process:
        images = listener.collect(Image, "/front/image_raw")
        process.wait_for("Next attempt in 0.5 s")
        process.wait_for("delivers frames again")
        wait_for_messages(images, 2)
        assert len(connections) >= 2
        assert process.stop() == 0, process.output


@pytest.mark.ros
def test_node_waits_for_a_stream_that_is_not_there_yet():
    domain = free_domain()
    with node(domain, source="http://127.0.0.1:9/stream.mjpg") as process:
        process.wait_for("is the camera reachable")
        assert process.stop(signal.SIGTERM) == 0, process.output


@pytest.mark.ros
@pytest.mark.parametrize(
    "parameters, why",
    [
        ({"source": "/dev/video97"}, "there is no device /dev/video97"),
        ({"source": 97}, "there is no device /dev/video97"),
        ({"source": "/no/such.mp4"}, "there is no video file /no/such.mp4"),
        ({"source": "/dev/null"}, "busy"),
        ({"source": "/dev/null", "camera_info_url": os.devnull}, "it is not a file"),
        ({"source": "/dev/null", "pixel_format": "JPEG2000"}, "four characters"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
    ],
)
def test_node_that_cannot_start_says_why_in_one_sentence(parameters, why):
    with node(free_domain(), **parameters) as process:
        assert process.wait(30) == 1
    assert why in process.output
    assert "Traceback" not in process.output
