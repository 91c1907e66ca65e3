"""The pages of docs/ name the parameters that the nodes declare, with their defaults; commands name what exists."""

import ast
import re
from pathlib import Path

import pytest
from node_sources import PAGES, node_source

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    (path.name, re.sub(r"\\\n\s*", "", command))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").glob("*.py"))]
    for command in re.findall(
        r"ros2 (?:run|launch) vla_perception (?:[^\n`\\]|\\\n)*", path.read_text(encoding="utf-8")
    )
]


def declared(node):
    """name -> default of every `declare(self, name, default, ...)` in a node's source, and of what SETTINGS lists."""
    tree = ast.parse(node_source(node).read_text())
    found = {}
    for call in (c for c in ast.walk(tree) if isinstance(c, ast.Call)):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        arguments = call.args[1:] if name == "declare" else call.args
        if name in ("declare", "_parameter", "_number") and isinstance(arguments[0], ast.Constant):
            found[arguments[0].value] = ast.literal_eval(arguments[1])
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and statement.target.id == "SETTINGS":
            for name, made in zip(statement.value.keys, statement.value.values, strict=True):
                found[name.value] = ast.literal_eval(made.args[0])
    return found


def documented(node):
    text = (ROOT / "docs" / PAGES[node]).read_text()
    sections = re.search(rf"^## `{node}`\n(.*?)(?=^## `|\Z)", text, re.DOTALL | re.MULTILINE)
    table = (sections.group(1) if sections else text).partition("### Parameters")[2].partition("\n#")[0]
    found = {}
    for names, default in re.findall(r"^\| (`[^|]*`) \|[^|]*\|([^|]*)\|", table, re.MULTILINE):
        names, defaults = re.findall(r"`(\w+)`", names), default.replace("`", "").strip().split(", ")
        found.update(zip(names, defaults * len(names) if len(defaults) == 1 else defaults))
    return found


def written(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]" if any(value) or value == [0] else '[""]'
    return str(value)


@pytest.mark.parametrize("node", PAGES)
def test_parameters(node):
    expected = {name: written(default) for name, default in declared(node).items()}
    stated = {name: "" if default in ('""', "–") else default for name, default in documented(node).items()}
    assert len(expected) > 4 and stated == expected


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_commands(page, command):
    """`ros2 launch` with a file and arguments of it, `ros2 run` with an executable and parameters of it."""
    kind, what = command.split()[1], (command.split()[3:] or ["…"])[0]
    given = set(re.findall(r"(?:^|[\s\"'])([a-z_]+):=", command))
    if what == "…":
        return
    if kind == "launch":
        text = (ROOT / "launch" / what).read_text() + (ROOT / "vla_perception" / "launch_utils.py").read_text()
        known = set(re.findall(r'(?:DeclareLaunchArgument|declare)\(\s*"(\w+)"', text))
    else:
        known = set(declared(what)) | {"use_sim_time", "__ns"}
    assert given <= known, f"{page}: {command}"
