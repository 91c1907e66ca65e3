"""The pages of docs/ name the nodes' parameters with types, defaults, ranges and when they change; commands name what exists."""

import re
from pathlib import Path

import pytest
from node_sources import PAGES, parameter_specs_of

pytest.importorskip("rclpy")

from vla_perception.nodes.parameters import Changes

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    (path.name, re.sub(r"\\\n\s*", "", command))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").glob("*.py"))]
    for command in re.findall(
        r"ros2 (?:run|launch) vla_perception (?:[^\n`\\]|\\\n)*", path.read_text(encoding="utf-8")
    )
]


def table(node):
    """The rows of a node's parameters on its page: name → column's heading → text."""
    text = (ROOT / "docs" / PAGES[node]).read_text()
    sections = re.search(rf"^## `{node}`\n(.*?)(?=^## `|\Z)", text, re.DOTALL | re.MULTILINE)
    lines = (sections.group(1) if sections else text).partition("### Parameters")[2].partition("\n#")[0].splitlines()
    lines = [line[1:-1] for line in lines if line.startswith("| ") and not line.startswith("| -")]
    cells = [[cell.strip() for cell in re.split(r"(?<=\s)\|(?=\s)", line)] for line in lines]
    headings, rows = cells[0], {}
    for row in cells[1:]:
        names = re.findall(r"`(\w+)`", row[0])
        for index, name in enumerate(names):
            rows[name] = dict(zip(headings, row, strict=True))
            defaults = rows[name]["default"].replace("`", "").split(", ")
            rows[name]["default"] = defaults[index] if len(defaults) == len(names) else defaults[0]
    return rows


def written(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]" if any(value) or value == [0] else '[""]'
    return str(value)


@pytest.mark.parametrize("node", PAGES)
def test_parameters(node):
    expected = {name: written(spec.ros_default) for name, spec in parameter_specs_of(node).items()}
    stated = {name: row["default"] for name, row in table(node).items()}
    stated = {name: "" if default in ('""', "–") else default for name, default in stated.items()}
    assert len(expected) > 4 and stated == expected


TYPES = {bool: "bool", int: "integer", float: "double", str: "string"}


@pytest.mark.parametrize("node", PAGES)
def test_types_ranges_and_when_they_change(node):
    rows = table(node)
    for name, spec in parameter_specs_of(node).items():
        row, default = rows[name], spec.ros_default
        element = default[0] if isinstance(default, list) else default
        assert row["type"] == TYPES[type(element)] + "[]" * isinstance(default, list), name
        if spec.choices:
            assert row["range"] == ", ".join(f"`{choice}`" for choice in spec.choices if choice), name
        elif spec.high is not None:
            assert row["range"] == f"{spec.low:g}–{int(spec.high)}", name
        elif spec.low is not None:
            assert re.fullmatch(rf"(at least|above) {spec.low:g}", row["range"]), name
        if "changes" in row:
            assert row["changes"] == spec.changes.value, name
        else:
            assert ("*Run time.*" in row["what"]) == (spec.changes is Changes.RUN_TIME), name


def test_what_a_locked_model_locks():
    stated = re.findall(r"`(\w+)`", table("visual_tokenizer")["model_locked"]["what"].partition(" keep")[0])
    assert sorted(stated) == sorted(n for n, spec in parameter_specs_of("visual_tokenizer").items() if spec.locked)


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
        known = set(parameter_specs_of(what)) | {"use_sim_time", "__ns"}
    assert given <= known, f"{page}: {command}"
