"""Warnings of settings that were given to a process and have no effect on its node.

rclpy takes from the command line and from parameter files what is for the node, and keeps silent about the rest: a name
that no parameter has, and a section of a file that is for a node of another name or namespace.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from vla_perception.spelling import nearest

if TYPE_CHECKING:
    from rclpy.node import Node

#: This package's nodes: a file for one of them may be given to another one, too, as the launch files do.
_NODES = ("visual_tokenizer", "token_viewer", "bag_player", "opencv_camera", "mujoco_camera")
#: How alike a name must be to a parameter's to be taken for a misspelling in a section that is for several nodes.
_ALIKE = 0.85
_QOS = "qos_overrides."


def warn_of_ignored(
    node: Node,
    name: str,
    *,
    others: Collection[str] = (),
    qos: bool = True,
    arguments: Sequence[str] | None = None,
) -> None:
    """Logs every setting that was given to the process and has no effect on `node`, with the nearest name that has.

    To be called when all parameters are declared.

    Args:
        name: the node's name where it is not remapped.
        others: names that a section for several nodes may have for another one, however like a parameter they look.
        qos: also the `qos_overrides` parameters; false where they are declared later: `warn_of_ignored_qos`.
        arguments: the process's; `sys.argv` where not given.
    """
    sections = list(_sections(sys.argv if arguments is None else arguments))
    _warn_of_unknown(node, sections, others, qos=False)
    if qos:
        _warn_of_unknown(node, sections, others, qos=True)
    own = node.get_fully_qualified_name()
    # Beside parameters for this very node, those for others are for others.
    right = {section.source for section in sections if section.is_for(own) and not section.for_several}
    for section in sections:
        if section.is_for(own) or section.for_several or section.source in right:
            continue
        if section.name == name or nearest(section.name, [node.get_name()], 0.8):
            node.get_logger().warning(
                f"{section.source}: the parameters for {section.node} ({', '.join(section.parameters)}) are ignored, "
                f"because this node is {own}: write {own}, or /**/{node.get_name()} for any namespace"
            )

    for source in dict.fromkeys(section.source for section in sections):
        inside = [section for section in sections if section.source == source]
        if not any(s.is_for(own) or s.name in _NODES or nearest(s.name, [node.get_name()], 0.8) for s in inside):
            node.get_logger().warning(
                f"{source}: nothing in it is for this node, {own}; it has parameters for "
                f"{', '.join(section.node for section in inside)[:300]}"
            )


def warn_of_ignored_qos(node: Node, also: Collection[str] = (), arguments: Sequence[str] | None = None) -> None:
    """The same for `qos_overrides` parameters, when all publishers and subscriptions that take some are there.

    also: those that are only declared where they are given.
    """
    sections = list(_sections(sys.argv if arguments is None else arguments))
    _warn_of_unknown(node, sections, (), qos=True, also=also)


@dataclass(frozen=True)
class _Section:
    """Parameters that are meant for one node, or for several: of a parameter file, or one of the command line."""

    source: str
    node: str  # absolute, where * stands for one part of the name and ** for any number of them
    parameters: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.node.rpartition("/")[2]

    @property
    def for_several(self) -> bool:
        """Whether nodes of any name are meant."""
        return self.name in ("*", "**")

    def is_for(self, node: str) -> bool:
        """As rcl decides it."""
        parts = {"*": r"/\w+", "**": r"(/\w+)*"}
        pattern = "".join(parts.get(part, "/" + re.escape(part)) for part in self.node.split("/")[1:])
        return re.fullmatch(pattern, node) is not None


def _sections(arguments: Sequence[str]) -> Iterator[_Section]:
    """What rcl reads from a command line: `--params-file FILE` and `-p NODE:NAME:=VALUE`."""
    in_ros = False
    for argument, value in zip(arguments, [*arguments[1:], ""]):
        if argument in ("--ros-args", "--"):
            in_ros = argument == "--ros-args"
        elif in_ros and argument == "--params-file":
            try:
                with open(value, encoding="utf-8") as file:
                    content = yaml.safe_load(file)
            except (OSError, ValueError, yaml.YAMLError):
                continue  # rcl has read it in its own way, or said why it cannot
            for node, parameters in _nodes("", content):
                yield _Section(value, node, tuple(_names("", parameters)))
        elif in_ros and argument in ("-p", "--param"):
            node, colon, parameter = value.partition(":=")[0].rpartition(":")
            if colon:
                yield _Section(f"-p {value}", f"/{node.strip('/')}", (parameter,))


def _nodes(prefix: str, content: object) -> Iterator[tuple[str, object]]:
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if key == "ros__parameters":
            yield prefix or "/", value
        else:
            yield from _nodes(f"{prefix}/{str(key).strip('/')}", value)


def _names(prefix: str, parameters: object) -> Iterator[str]:
    for key, value in parameters.items() if isinstance(parameters, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _names(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}"


def _warn_of_unknown(node: Node, sections: Sequence[_Section], others: Collection[str], *, qos: bool, also=()) -> None:
    known = [
        *(parameter for parameter in node.get_parameters_by_prefix("") if parameter.startswith(_QOS) == qos),
        *also,
    ]
    own = node.get_fully_qualified_name()
    for given in sorted(node._parameter_overrides):  # rclpy has no other way to ask for what was given
        if given.startswith(_QOS) != qos or node.has_parameter(given):
            continue
        sources = [section for section in sections if given in section.parameters and section.is_for(own)]
        shared = bool(sources) and all(section.for_several for section in sources)
        if shared and given in others:
            continue
        where = f"{sources[-1].source}: " if sources else ""
        text = f"{where}{own} has no parameter {given}, so it is ignored"
        alike = _ALIKE if shared else 0.6
        meant = nearest(given, known, alike) or (None if qos else nearest(given.rpartition(".")[2], known, alike))
        if meant:
            node.get_logger().warning(f"{text}; is {meant} meant?")
        elif shared:
            node.get_logger().info(text)  # most likely it is for another node
        else:
            node.get_logger().warning(f"{text}; `ros2 param list {own}` tells what there is")
