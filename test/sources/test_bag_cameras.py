"""Which cameras a bag has, by topics and types alone; the launch files' tests have more names."""

from pathlib import Path

import pytest

from vla_perception.sources.bags import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    IMAGE,
    Bag,
    BagCamera,
    BagError,
    common_transport,
    find_cameras,
)

SAMPLE_BAG = Path(__file__).resolve().parents[2] / "examples" / "sample_bag"
TYPES = {
    "/camera/color/camera_info": CAMERA_INFO,
    "/camera/color/image_raw": IMAGE,
    "/camera/depth/image_rect_raw": IMAGE,
    "/top/image_raw": IMAGE,
    "/top/image_raw/compressed": COMPRESSED_IMAGE,
}


def test_the_sample_bags_cameras():
    pytest.importorskip("mcap")
    with Bag(SAMPLE_BAG) as bag:
        cameras = bag.cameras()
        assert cameras == {
            name: BagCamera(
                name, f"/{name}/image_raw", {"compressed": f"/{name}/image_raw/compressed"}, f"/{name}/camera_info"
            )
            for name in ("front", "wrist")
        }
        assert common_transport(cameras.values()) == "compressed"
        assert list(bag.cameras({"hand": "/wrist/image_raw", "front": ""})) == ["hand", "front"]
        with pytest.raises(BagError, match="/top/image_raw is not in the bag; it has /front/image_raw, /wrist"):
            bag.cameras({"top": ""})


def test_topics_are_looked_into_once(monkeypatch):
    """However often the cameras of an open bag are asked for, by their names and by topics."""
    pytest.importorskip("mcap")
    looked = []
    real = Bag.messages
    monkeypatch.setattr(Bag, "messages", lambda bag, topics: looked.extend(topics) or real(bag, topics))
    with Bag(SAMPLE_BAG) as bag:
        bag.cameras()
        bag.cameras({"front": ""})
        bag.image_topics().clear()
        assert bag.image_topics() == ["/front/image_raw/compressed", "/wrist/image_raw/compressed"] == sorted(looked)


def test_names_topics_and_camera_infos():
    cameras = find_cameras(TYPES)
    assert list(cameras) == ["camera_color", "top"]
    assert cameras["camera_color"].info_topic == "/camera/color/camera_info" and cameras["top"].info_topic is None
    assert cameras["top"].topics == {"raw": "/top/image_raw", "compressed": "/top/image_raw/compressed"}
    assert find_cameras({"/cam/jpeg": COMPRESSED_IMAGE})["cam_jpeg"].topic == "/cam/jpeg"
    with pytest.raises(ValueError, match="no image topic"):
        find_cameras({"/camera_info": CAMERA_INFO})


def test_the_transport_that_all_cameras_have():
    cameras = find_cameras(TYPES)
    assert common_transport(cameras.values()) == "raw"
    assert common_transport([cameras["top"]], "compressed") == "compressed"
    with pytest.raises(ValueError, match="image transport compressed: not every camera"):
        common_transport(cameras.values(), "compressed")
    mixed = find_cameras({"/a/image_raw": IMAGE, "/b/image_raw/compressed": COMPRESSED_IMAGE})
    with pytest.raises(ValueError, match="partly raw, partly compressed"):
        common_transport(mixed.values())
