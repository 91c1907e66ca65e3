"""Writes docs/api.md: the public names, from the sources' signatures and docstrings. Nothing is imported.

python docs/make_api.py            writes the page
python docs/make_api.py --check    ends with 1 if it would be another one
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import mdformat

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
#: What is public: heading → module → names; None: its `__all__`. All else may change without notice.
PUBLIC: dict[str, dict[str, tuple[str, ...] | None]] = {
    "Tokens in a policy": {"vla_perception.tokens": None},
    "Images to tokens": {
        "vla_perception.tokenizer": None,
        "vla_perception.synchronizer": ("SetSynchronizer", "Frame", "Counts"),
    },
    "Images and recordings": {
        "vla_perception.images.decode": ("decode_image",),
        "vla_perception.sources.bags": None,
    },
    "Tokens of recordings": {
        "vla_perception.offline.token_dataset": ("TokenDataset", "Episode"),
        "vla_perception.offline.token_file": ("TokenFile",),
    },
}
INTRODUCTION = """# Python API

The public names, with the summary of each; `help()` has shapes, errors and the rest. Other names may change without
notice. `python docs/make_api.py` writes this page from the sources.
"""
Definition = ast.ClassDef | ast.FunctionDef


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def declared(module: str) -> list[str]:
    """A module's `__all__`."""
    for node in tree(file_of(module)).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise SystemExit(f"{module} has no __all__")


def find(name: str, path: Path) -> tuple[Definition, Path] | None:
    """Where a name that a module has is defined: there, in what it imports it from, or in its package."""
    for node in ast.walk(tree(path)):
        if isinstance(node, Definition) and node.name == name and node in tree(path).body:
            return node, path
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vla_perception"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(alias.name, file_of(node.module))
    if path.name == "__init__.py":  # it loads the name when it is first used
        for other in sorted(path.parent.rglob("*.py")):
            for node in tree(other).body:
                if isinstance(node, Definition) and node.name == name:
                    return node, other
    return None


def summary(node: Definition) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def spaced(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}{equals + ast.unparse(default) if default else ''}"


def arguments(function: ast.FunctionDef, skip_first: bool) -> list[str]:
    """`self` or `cls` left out with `skip_first`."""
    given = function.args
    positional = given.posonlyargs + given.args
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    parts = [spaced(*pair) for pair in zip(positional, defaults, strict=True)][skip_first:]
    if given.vararg or given.kwonlyargs:
        parts.append(f"*{spaced(given.vararg, None) if given.vararg else ''}")
    parts += [spaced(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*parts, *([f"**{spaced(given.kwarg, None)}"] if given.kwarg else [])]


def returned(function: ast.FunctionDef) -> str:
    return f" -> {ast.unparse(function.returns)}" if function.returns else ""


def field(part: ast.AnnAssign) -> str:
    """One of a dataclass, with its default; one that a factory makes is `…`."""
    default = part.value
    if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
        given = {keyword.arg: keyword.value for keyword in default.keywords}
        factory = ast.Constant(...) if "default_factory" in given else None
        default = given.get("default", factory)
    return spaced(ast.arg(ast.unparse(part.target), part.annotation), default)


def call(name: str, parts: list[str], returns: str = "") -> str:
    """As code, an argument per line where they do not fit into one."""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])
    return f"```python\n{line}\n```\n"


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(each).split("(")[0].rpartition(".")[2] for each in node.decorator_list}


def bases(node: ast.ClassDef, path: Path) -> Iterator[tuple[ast.ClassDef, Path]]:
    """The class and those of the package that it inherits from, nearest first."""
    yield node, path
    for base in node.bases:
        found = find(ast.unparse(base).split("[")[0], path)
        if found and isinstance(found[0], ast.ClassDef):
            yield from bases(*found)


def constructor(node: ast.ClassDef, path: Path) -> list[str] | None:
    """Its arguments; None where they are those of a class that is not this package's."""
    for each, _ in bases(node, path):
        for member in each.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return arguments(member, True)
        if "dataclass" in decorators(each):
            fields = [part for part in each.body if isinstance(part, ast.AnnAssign)]
            return [field(part) for part in fields if not ast.unparse(part.target).startswith("_")]
    return None


def members(node: ast.ClassDef, path: Path) -> Iterator[tuple[str, str]]:
    """What follows the dot, and its summary; private ones and those without a docstring left out."""
    seen = set()
    for each, _ in bases(node, path):
        for member in each.body:
            if not isinstance(member, ast.FunctionDef) or member.name.startswith("_") or member.name in seen:
                continue
            seen.add(member.name)
            marks = decorators(member)
            if "setter" in marks or not ast.get_docstring(member):
                continue
            if marks & {"property", "cached_property"}:
                yield member.name, summary(member)
            else:
                given = ", ".join(arguments(member, "staticmethod" not in marks))
                yield f"{member.name}({given}){returned(member)}", summary(member)


def page() -> str:
    """The whole page, as mdformat writes it."""
    parts = [INTRODUCTION]
    for heading, modules in PUBLIC.items():
        parts.append(f"## {heading}\n")
        for module, names in modules.items():
            parts.append(f"From `{module}`:\n")
            names = names or declared(module)
            if constants := [f"`{name}`" for name in names if name.isupper()]:
                parts.append(f"Constants: {', '.join(constants)}.\n")
            for name in names:
                if name.isupper():
                    continue
                found = find(name, file_of(module))
                if found is None:
                    raise SystemExit(f"{module} has no {name}: change PUBLIC in {__file__}")
                node, path = found
                parts.append(f"### `{name}`\n")
                if isinstance(node, ast.FunctionDef):
                    parts += [call(name, arguments(node, False), returned(node)), f"{summary(node)}\n"]
                    continue
                given = constructor(node, path)
                parts += [call(name, given)] if given is not None else []
                parts.append(f"{summary(node)}\n")
                rows = [f"| `{escaped(what)}` | {escaped(text)} |" for what, text in members(node, path)]
                if rows:
                    parts.append("\n".join(["| member | what |", "| -- | -- |", *rows]) + "\n")
    options = {"wrap": 120, "number": True, "plugin": {"tables": {"compact_tables": True}}}
    return mdformat.text("\n".join(parts), options=options, extensions={"gfm", "tables"})


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif page() != PAGE.read_text(encoding="utf-8"):
        sys.exit("docs/api.md is older than the sources: make format")
