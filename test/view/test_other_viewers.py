"""What goes to Rerun, and that the files for Foxglove and RViz name what exists."""

import json
import sys
import types

import numpy as np
import pytest
from fake_feed import HEIGHT, WIDTH, FakeFeed, random_tokens
from ros_harness import ROOT

from vla_perception.view.rerun_sink import RerunSink

TOPICS = {"/front/image_raw", "/wrist/image_raw", "/token_image", "/diagnostics", "/rosout"}


@pytest.fixture
def rerun(monkeypatch):
    """In the place of rerun-sdk: keeps what is logged, by its path."""
    pytest.importorskip("simplejpeg")
    module = types.ModuleType("rerun")
    module.logged = {}
    module.init = module.spawn = lambda *_args, **_options: None
    module.save = lambda file: None
    module.set_time = lambda timeline, timestamp: None
    module.new_entity_path = lambda parts: "/".join(part.replace("/", "\\/") for part in parts)
    module.log = lambda path, value: module.logged.setdefault(path, []).append(value)
    module.EncodedImage = lambda contents, media_type: (media_type, contents)
    module.Image = module.Scalars = lambda value: value
    module.TextLog = lambda text, level: (level, text)
    monkeypatch.setitem(sys.modules, "rerun", module)
    return module


def test_images_colors_curves_and_log_go_to_rerun(rerun, tmp_path):
    feed = FakeFeed()
    feed.publish(random_tokens(1, ("front", "a/b")))
    feed.diagnose()
    feed.health.sample(1.0)
    feed.log.add(40, "node", "something", 0.0)
    RerunSink(tmp_path / "x.rrd").run(feed, 1000.0, rounds=range(3))
    logged = rerun.logged
    assert logged["tokens/front/image"][0][0] == "image/jpeg"
    assert len(logged["tokens/front/image"]) == 1, "what was sent is not sent again"
    for space in ("dinov2", "siglip", "encoders joined", "projected tokens"):
        (painted,) = logged[f"tokens/a\\/b/{space}"]
        assert painted.shape == (HEIGHT, WIDTH, 3) and len(np.unique(painted.reshape(-1, 3), axis=0)) > 20
    assert logged["log"] == [("ERROR", "node: something")]
    assert feed.readers == []


def test_without_rerun_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ValueError, match="pip install rerun-sdk"):
        RerunSink()


def test_the_foxglove_layout_shows_what_there_is():
    layout = json.loads((ROOT / "config" / "foxglove.json").read_text())
    placed = []

    def collect(part):
        if isinstance(part, str):
            placed.append(part)
        else:
            collect(part["first"])
            collect(part["second"])

    collect(layout["layout"])
    assert sorted(placed) == sorted(layout["configById"]), "every panel has its place, once"
    named = {
        panel.get("imageMode", {}).get("imageTopic") or panel["topicToRender"]
        for panel in layout["configById"].values()
    }
    assert named == TOPICS


def test_the_rviz_configuration_shows_what_there_is():
    yaml = pytest.importorskip("yaml")
    manager = yaml.safe_load((ROOT / "config" / "view.rviz").read_text())["Visualization Manager"]
    assert {display["Topic"]["Value"] for display in manager["Displays"]} == TOPICS - {"/diagnostics", "/rosout"}
    assert {display["Class"] for display in manager["Displays"]} == {"rviz_default_plugins/Image"}
