"""Where each node's source is, and the page that describes it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: In docs/.
PAGES = {
    "visual_tokenizer": "nodes.md",
    "bag_player": "nodes_bags.md",
    "opencv_camera": "nodes_cameras.md",
    "mujoco_camera": "nodes_cameras.md",
    "token_viewer": "nodes_cameras.md",
}


def node_source(node: str) -> Path:
    """The file of a node, by its executable's name: a module of `nodes/`, or `node.py` of a folder there."""
    nodes = ROOT / "vla_perception" / "nodes"
    return nodes / node / "node.py" if (nodes / node).is_dir() else nodes / f"{node}.py"
