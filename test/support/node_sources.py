"""Where each node's source and its table of parameters are, and the page that describes it."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

from vla_perception.nodes.parameters import ParameterSpec, parameter_specs

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


def parameter_specs_of(node: str) -> dict[str, ParameterSpec]:
    """The table of a node's parameters, in its module or `parameters.py` of its folder. Imports rclpy."""
    folder = node_source(node).name == "node.py"
    module = importlib.import_module(f"vla_perception.nodes.{node}" + (".parameters" if folder else ""))
    (table,) = [
        kind
        for name, kind in vars(module).items()
        if name.endswith("Parameters") and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
    ]
    return parameter_specs(table)
