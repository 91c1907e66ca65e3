"""docs/troubleshooting.md has a row for every warning and error of the node and of a policy's subscriber, and no other."""

import ast
import re

import pytest
from ros_harness import ROOT

PACKAGE = ROOT / "vla_perception"
SOURCES = [
    *(PACKAGE / "nodes" / "visual_tokenizer").glob("*.py"),
    PACKAGE / "nodes" / "ignored_parameters.py",
    PACKAGE / "nodes" / "requests.py",
    *(PACKAGE / "tokenizer").rglob("*.py"),
    *(PACKAGE / "images").glob("*.py"),
    *(PACKAGE / "tokens").glob("*.py"),
]
#: Methods that log at WARN or above (of some the first argument says what it is about), and functions that return messages of /diagnostics.
LOGGING = {"warning", "error", "fatal", "report", "_log_throttled", "_leave_shared_memory", "BrokenImportError"}
SUBJECT_FIRST = {"report", "_log_throttled"}
FINDINGS = {"health_problem", "_several_publishers", "of", "timing_level"}
#: A template with less text of its own is another one handed on.
LEAST = 9


def template(node, assigned):
    """A string with … for what is put in; None if the node is none. `assigned`: variable → what it may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else put_in(part.value, assigned) for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left, assigned) or "…") + (template(node.right, assigned) or "…")
    if isinstance(node, ast.IfExp):
        return template(node.body, assigned)
    return None


def put_in(node, assigned):
    """What stands for a value within a string: the string itself where it is one of the function's own."""
    values = assigned.get(node.id, []) if isinstance(node, ast.Name) else []
    return (len(values) == 1 and isinstance(values[0], ast.JoinedStr) and template(values[0], assigned)) or "…"


def messages_of(path):
    """Line → template of everything that a module logs at WARN or above, or says in /diagnostics."""
    found = {}
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        assigned = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned.setdefault(node.targets[0].id, []).append(node.value)
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LOGGING:
                first = getattr(node.func, "attr", "") in SUBJECT_FIRST
                given = [
                    value
                    for argument in node.args[first : first + 1]
                    for value in (assigned.get(argument.id, []) if isinstance(argument, ast.Name) else [argument])
                ]
                strings = [text for argument in given if (text := template(argument, assigned))]
            elif isinstance(node, ast.Return) and function.name in FINDINGS and node.value is not None:
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                strings = [text for value in values if (text := template(value, assigned))]
            else:
                continue
            for number, text in enumerate(strings):
                if max(map(len, text.split("…"))) >= LEAST:
                    found[f"{path.relative_to(ROOT)}:{node.lineno}" + "'" * number] = " ".join(text.split())
    return found


def rows():
    """The first code span of every row of the page's tables: parts of a message, with … for what is put in."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def covers(row, text):
    return all(part.strip() in text for part in row.split("…"))


MESSAGES = {where: text for path in SOURCES for where, text in messages_of(path).items()}


def test_messages_are_found():
    """Of each kind one."""
    texts = "\n".join(MESSAGES.values())
    for text in (
        "could not be …, so it ends",  # a call
        "tokens could not be published: ",  # a variable
        "start the camera, or remap",  # returned
        "became no tokens",  # with its level
        "is broken, or was never formed",
        "tokens go by the topic alone",
        "without dependent launches",  # with %s
    ):
        assert text in texts, text


@pytest.mark.parametrize("where", MESSAGES)
def test_every_message_has_a_row(where):
    assert any(covers(row, MESSAGES[where]) for row in rows()), f"docs/troubleshooting.md lacks: {MESSAGES[where]}"


def test_every_row_has_a_message():
    assert not [row for row in rows() if not any(covers(row, text) for text in MESSAGES.values())]
