"""Which settings of a command line and of parameter files are warned as ignored, against what rclpy itself takes."""

from __future__ import annotations

import ast

import pytest
from node_sources import PAGES, node_source

rclpy = pytest.importorskip("rclpy")

from rcl_interfaces.msg import ParameterDescriptor  # noqa: E402
from ros_harness import RosContext, RosProcess, free_domain  # noqa: E402

from vla_perception.nodes.ignored_parameters import warn_of_ignored, warn_of_ignored_qos  # noqa: E402

DECLARED = ("model", "pool", "max_rate_hz", "sync_slop_sec", "compute_dtype", "cameras")


class Log:
    def __init__(self):
        self.warnings, self.infos = [], []
        self.warning, self.info = self.warnings.append, self.infos.append


@pytest.fixture(scope="module")
def domain():
    return free_domain()


@pytest.fixture
def warned(domain, tmp_path, monkeypatch):
    """What a node with these arguments warns of; FILE among them stands for a parameter file with the text."""

    def run(*arguments, text="", name="visual_tokenizer", others=(), qos=()):
        (tmp_path / "file.yaml").write_text(text)
        arguments = ["program", "--ros-args", *(str(tmp_path / "file.yaml") if a == "FILE" else a for a in arguments)]
        log = Log()
        with RosContext(domain, arguments) as ros:
            node = ros.node(name, start_parameter_services=False)
            monkeypatch.setattr(node, "get_logger", lambda: log)
            for parameter in (*DECLARED, *qos):
                node.declare_parameter(parameter, "", ParameterDescriptor(dynamic_typing=True))
            warn_of_ignored(node, name, others=others, qos=False, arguments=arguments)
            warn_of_ignored_qos(node, arguments=arguments)
            taken = {p for p in DECLARED if node.get_parameter(p).value != ""}
        return log, taken

    return run


def section(key, *names):
    lines, depth = [], 0
    for part in key.split(" "):  # a space stands for a level of its own
        lines.append(f"{'  ' * depth}{part}:")
        depth += 1
    lines.append(f"{'  ' * depth}ros__parameters:")
    lines += [f"{'  ' * (depth + 1)}{name}: 3" for name in names]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("modell", "model"),
        ("Model", "model"),
        ("MODEL", "model"),
        ("MaxRateHz", "max_rate_hz"),
        ("pol", "pool"),
        ("max_rate", "max_rate_hz"),
        ("max-rate-hz", "max_rate_hz"),
        ("sync_slop_secs", "sync_slop_sec"),
        ("camera", "cameras"),
        ("computedtype", "compute_dtype"),
        ("tokenizer.model", "model"),
        ("frobnicate", None),
    ],
)
def test_a_misspelt_parameter_is_named_with_the_nearest(warned, given, meant):
    for arguments, text in (
        (("-p", f"{given}:=3"), ""),
        (("--param", f"visual_tokenizer:{given}:=3", "-p", "pool:=2"), ""),
        (("--params-file", "FILE"), section("visual_tokenizer", "pool", given)),
        (("--params-file", "FILE"), section("/**/visual_tokenizer", given)),
    ):
        if "-hz" in given and not text:
            continue  # rcl refuses it on the command line, with its own words
        log, _ = warned(*arguments, text=text)
        (warning,) = log.warnings
        assert f"/visual_tokenizer has no parameter {given}, so it is ignored" in warning
        assert (f"is {meant} meant?" in warning) if meant else ("ros2 param list" in warning)
        assert ("file.yaml" in warning) == bool(text)


def test_what_is_for_several_nodes_may_be_for_another(warned):
    text = section("/**", "pool", "modell", "frame_rate", "camera")
    log, taken = warned("--params-file", "FILE", text=text, others=("camera",))
    assert taken == {"pool"}
    assert len(log.warnings) == 1 and "no parameter modell, so it is ignored; is model meant?" in log.warnings[0]
    assert len(log.infos) == 1 and "no parameter frame_rate" in log.infos[0]


KEYS = [
    "visual_tokenizer",
    "/visual_tokenizer",
    "/robot/visual_tokenizer",
    "robot/visual_tokenizer",
    "robot visual_tokenizer",
    "/robot visual_tokenizer",
    "/**/visual_tokenizer",
    "/*/visual_tokenizer",
    "/robot/arm/visual_tokenizer",
    "/robot/**/visual_tokenizer",
    "/**/arm/visual_tokenizer",
    "visual_tokeniser",
    "/robot/visual_tokenzer",
    "VisualTokenizer",
    "VISUAL_TOKENIZER",
]


@pytest.mark.parametrize("namespace", ["", "/robot", "/robot/arm"])
@pytest.mark.parametrize("key", KEYS)
def test_a_section_is_named_where_rclpy_does_not_take_it(warned, key, namespace):
    arguments = ("-r", f"__ns:={namespace}") if namespace else ()
    log, taken = warned("--params-file", "FILE", *arguments, text=section(key, "model", "pool"))
    assert taken in (set(), {"model", "pool"})
    if taken:
        assert not log.warnings
    else:
        (warning,) = log.warnings
        assert (
            "(model, pool) are ignored" in warning and f"because this node is {namespace}/visual_tokenizer" in warning
        )
        written = "/" + "/".join(part.strip("/") for part in key.split(" "))
        assert f"the parameters for {written.replace('//', '/')} " in warning


@pytest.mark.parametrize("key", ["/**", "/*", "/**/*", "token_viewer", "/other/opencv_camera", "/**/bag_player"])
def test_sections_for_others_are_not(warned, key):
    log, _ = warned("--params-file", "FILE", text=section(key, "pool", "model"))
    assert not log.warnings and not log.infos
    log, _ = warned("--params-file", "FILE", text=section(key, "pool") + section("/**/camera", "x"))
    assert not log.warnings


@pytest.mark.parametrize(
    "key", ["tokenizer", "/robot/*", "/robot/**", "/**/camera", "vla_perception", "/visual_tokenizer/x"]
)
def test_a_file_that_has_nothing_for_the_node(warned, key):
    log, taken = warned("--params-file", "FILE", text=section(key, "pool", "model"))
    (warning,) = log.warnings
    assert (
        not taken and "file.yaml: nothing in it is for this node, /visual_tokenizer; it has parameters for /" in warning
    )
    log, taken = warned("--params-file", "FILE", text=section(key, "model") + section("visual_tokenizer", "pool"))
    assert taken == {"pool"} and not log.warnings


def test_a_file_for_several_robots(warned):
    text = section("/robot1/visual_tokenizer", "model") + section("/robot2/visual_tokenizer", "pool")
    log, taken = warned("--params-file", "FILE", "-r", "__ns:=/robot2", text=text)
    assert taken == {"pool"} and not log.warnings
    log, taken = warned("--params-file", "FILE", "-r", "__ns:=/robot3", text=text)
    assert not taken and len(log.warnings) == 2


def test_a_node_of_another_name(warned):
    log, taken = warned("--params-file", "FILE", "-r", "__node:=eyes", text=section("visual_tokenizer", "model"))
    assert not taken and "because this node is /eyes: write /eyes, or /**/eyes" in log.warnings[0]
    log, taken = warned("-r", "__ns:=/robot", "-p", "visual_tokenizer:model:=base", "-p", "other:x:=1")
    assert not taken and "-p visual_tokenizer:model:=base: the parameters for /visual_tokenizer" in log.warnings[0]
    assert len(log.warnings) == 2 and "-p other:x:=1: nothing in it is for this node" in log.warnings[1]


def test_overrides_of_qos(warned):
    right = "qos_overrides./front/image_raw.subscription.reliability"
    for given, expected in ((right, False), (right.replace("front", "fornt"), True), (right[:-1] + "i", True)):
        log, _ = warned("-p", f"{given}:=reliable", qos=(right,))
        assert [f"no parameter {given}, so it is ignored; is {right} meant?" in text for text in log.warnings] == [
            True
        ] * expected


def test_settings_that_have_an_effect_are_not_named(warned):
    text = section("visual_tokenizer", "model", "use_sim_time").replace("use_sim_time: 3", "use_sim_time: true")
    log, taken = warned("--params-file", "FILE", "-p", "pool:=2", "-p", "use_sim_time:=true", text=text)
    assert taken == {"model", "pool"} and not log.warnings and not log.infos


@pytest.mark.parametrize("node", PAGES)
def test_every_node_warns(node):
    """With its own name; `NodeParameters` does so when all parameters are declared."""
    tree = ast.parse(node_source(node).read_text())
    calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
    (made,) = [call for call in calls if getattr(call.func, "id", "") == "NodeParameters"]
    assert ast.literal_eval(made.args[2]) == node
    assert not [call for call in calls if getattr(call.func, "attr", "") == "declare_parameter"]


@pytest.mark.ros
def test_a_process_warns_before_it_ends_for_want_of_what_was_misspelt(tmp_path):
    (tmp_path / "file.yaml").write_text("/robot/bag_player:\n  ros__parameters: {loop: true}\n")
    arguments = ["-p", "bga:=examples/sample_bag", "--params-file", str(tmp_path / "file.yaml")]
    with RosProcess(["-m", "vla_perception.nodes.bag_player", "--ros-args", *arguments], free_domain()) as process:
        assert process.wait(60) == 1
    assert "/bag_player has no parameter bga, so it is ignored; is bag meant?" in process.output
    assert "the parameters for /robot/bag_player (loop) are ignored, because this node is /bag_player" in process.output
