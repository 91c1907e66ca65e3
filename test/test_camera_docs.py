"""docs/nodes_cameras.md names the parameters that the nodes declare, with their defaults."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def declared(node):
    """name -> default of every `declare(self, name, default, ...)` in a node's source."""
    tree = ast.parse((ROOT / f"vla_perception/nodes/{node}.py").read_text())
    calls = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and getattr(c.func, "id", "") == "declare"]
    return {ast.literal_eval(call.args[1]): ast.literal_eval(call.args[2]) for call in calls}


def documented(node):
    text = (ROOT / "docs/nodes_cameras.md").read_text()
    section = re.search(rf"^## `{node}`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE).group(1)
    table = section.partition("### Parameters")[2]
    found = {}
    for names, default in re.findall(r"^\| (`[^|]*`) \| [^|]* \| ([^|]*) \|", table, re.MULTILINE):
        names, defaults = re.findall(r"`(\w+)`", names), default.replace("`", "").strip().split(", ")
        found.update(zip(names, defaults * len(names) if len(defaults) == 1 else defaults))
    return found


def written(value):
    if isinstance(value, bool):
        return str(value).lower()
    return {"": '""', ("",): '[""]'}.get(tuple(value) if isinstance(value, list) else value, str(value))


@pytest.mark.parametrize("node", ["opencv_camera", "mujoco_camera", "token_viewer"])
def test_parameters(node):
    assert documented(node) == {name: written(default) for name, default in declared(node).items()}
