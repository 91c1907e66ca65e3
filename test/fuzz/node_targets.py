"""What peers ask of a running node: parameters, lifecycle states, the service `encode`, conditions; what nodes are set to, and a simulated scene."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import math
import os
from xml.sax.saxutils import quoteattr

import rclpy
import torch
from engine import Target, scratch
from fake_model import Model
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState
from mutations import change_json
from rcl_interfaces.msg import Parameter, ParameterValue
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.impl import rcutils_logger
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import ChannelFloat32

from vla_perception.images.camera_info import pinhole
from vla_perception.nodes.bag_player import BagPlayerParameters
from vla_perception.nodes.mujoco_camera import MujocoCameraParameters
from vla_perception.nodes.opencv_camera import OpencvCameraParameters
from vla_perception.nodes.parameters import parameter_specs
from vla_perception.nodes.requests import guard_requests
from vla_perception.nodes.token_viewer import TokenViewerParameters
from vla_perception.nodes.visual_tokenizer import loading, token_publisher
from vla_perception.nodes.visual_tokenizer import node as node_module
from vla_perception.nodes.visual_tokenizer.parameters import PARAMETERS, TokenizerParameters
from vla_perception.printable import CONTROL_CHARACTER, MAX_ERROR
from vla_perception.sources import simulation
from vla_perception.sources.simulation import SimulationError
from vla_perception.tokenizer.film import Condition

TABLES = (
    TokenizerParameters,
    BagPlayerParameters,
    MujocoCameraParameters,
    OpencvCameraParameters,
    TokenViewerParameters,
)
#: A client may repeat a list's element so often.
_MOST = 50_000
_STATES = {
    State.PRIMARY_STATE_UNCONFIGURED: "unconfigured",
    State.PRIMARY_STATE_INACTIVE: "inactive",
    State.PRIMARY_STATE_ACTIVE: "active",
    State.PRIMARY_STATE_FINALIZED: "finalized",
}


class _Conditioned(Model):
    """Loaded at once, with FiLM."""

    condition_channels, tokens_per_view, channels, notes = 6, 4, 8, ()
    load = classmethod(lambda cls, _model, **_options: cls())

    def warm_up(self, *_images, **_options):
        """Takes no time."""

    def __init__(self):
        super().__init__()
        self._held = Condition(torch.nn.Module(), 6, torch.device("cpu"), torch.float32)

    @property
    def condition(self):
        return self._held.digest

    def set_condition(self, vector):
        return self._held.set(vector)


class _Logged:
    """What the node logs must be lines that a terminal does not obey."""

    log, odd = rcutils_logger._rclpy.rclpy_logging_rcutils_log, ""

    @classmethod
    def keep(cls, severity, name, message, *place):
        if len(message) > 2 * MAX_ERROR or CONTROL_CHARACTER.search(message.replace("\n", "")):
            cls.odd = message
        return cls.log(severity, name, message, *place)


@functools.cache
def _context() -> rclpy.Context:
    """Of a node that nobody sees: no discovery, nothing in /dev/shm."""
    os.environ |= {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF", "FASTDDS_BUILTIN_TRANSPORTS": "UDPv4"}
    os.environ["ROS_LOG_DIR"] = str(scratch())
    loading._import_tokenizer = lambda: _Conditioned
    rcutils_logger._rclpy.rclpy_logging_rcutils_log = _Logged.keep
    # A collection over PyTorch's objects takes as long as some hundred inputs.
    node_module.release_memory = node_module.freeze_loaded_objects = lambda: None
    token_publisher.unavailable_reason = lambda: "none is wanted here"
    context = rclpy.Context()
    silent = ("--disable-stdout-logs", "--disable-rosout-logs", "--disable-external-lib-logs")
    rclpy.init(args=["--ros-args", *silent], context=context)
    atexit.register(rclpy.try_shutdown, context=context)
    return context


class _Kept:
    """The node, until it is finalized: then there is another one."""

    node: node_module.VisualTokenizerNode | None = None

    @classmethod
    def get(cls) -> node_module.VisualTokenizerNode:
        if cls.node is None:
            cls.node = node_module.VisualTokenizerNode(lambda _code: None, context=_context())
            guard_requests(cls.node)
        return cls.node

    @classmethod
    def reset(cls) -> None:
        """As after the start, as far as inputs may depend on it."""
        node = cls.get()
        for transition in (Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP):
            _call(node, "change_state", ChangeState.Request(transition=Transition(id=transition)))
        if node.lifecycle_state == "finalized":
            node.close()
            node.destroy_node()
            cls.node = None


def _value(content: dict) -> ParameterValue:
    content, times = dict(content), min(int(content.get("times", 1)), _MOST)
    content.pop("times", None)
    for name, value in content.items():
        if isinstance(value, (list, str)) and value:
            content[name] = value[:100] * times
    return ParameterValue(**content)


def _parameters(content: list) -> list[Parameter]:
    return [Parameter(name=item["name"], value=_value(item["value"])) for item in content[:50]]


def _call(node, name: str, request):
    """As the executor does it: what came through DDS goes in, and the response must go through it."""
    service = next(service for service in node.services if service.srv_name.rpartition("/")[2] == name)
    request = deserialize_message(serialize_message(request), type(request))
    response = service.callback(request, service.srv_type.Response())
    serialize_message(response)
    return response


def _request(node, name: str, fields: dict):
    """The request of a service of the node; raises what rclpy does for what it cannot hold."""
    kind = next(service.srv_type for service in node.services if service.srv_name.rpartition("/")[2] == name)
    if kind in (SetParameters, SetParametersAtomically):
        return kind.Request(parameters=_parameters(fields["parameters"]))
    if kind is ChangeState:
        return kind.Request(transition=Transition(**fields))
    return kind.Request(**fields)


def _check(node) -> None:
    """What holds between two requests."""
    assert _STATES[node._state_machine.current_state[0]] == node.lifecycle_state
    assert (node._pipeline is not None) == (node.lifecycle_state in ("inactive", "active"))
    values = node.parameters.values
    for name, spec in PARAMETERS.items():
        assert spec.validate(name, node.get_parameter(name).value) == getattr(values, name), name


def requests(data: bytes) -> None:
    """The input is a list of requests: the name of a service, or `condition`, and its fields; after each, a second passes."""
    try:
        steps = [(str(name), dict(fields)) for name, fields in json.loads(data)[:12]]
    except (ValueError, TypeError, LookupError, RecursionError):  # Python 3.12 looks a slice up in an object
        return
    node = _Kept.get()
    for name, fields in steps:
        try:
            message = ChannelFloat32(**fields) if name == "condition" else _request(node, name, fields)
            serialize_message(message)
        except Exception:  # noqa: BLE001 - what no client can send, for which rclpy has many exceptions
            continue
        if name == "condition":
            node._condition._on_condition(message)
            continue
        response = _call(node, name, message)
        results = getattr(response, "results", [response.result] if name == "set_parameters_atomically" else [])
        for result in results:
            assert result.successful or (result.reason.strip() and result.reason.isprintable()), result.reason
            assert len(result.reason) <= MAX_ERROR, f"a reason of {len(result.reason)} characters"
        _check(node)
        node._on_timer()
    _Kept.reset()
    odd, _Logged.odd = _Logged.odd, ""
    assert not odd, odd


def _default(name: str) -> dict:
    value = rclpy.Parameter(name, value=PARAMETERS[name].ros_default).to_parameter_msg().value
    field = {1: "bool", 2: "integer", 3: "double", 4: "string", 7: "integer_array", 9: "string_array"}[value.type]
    content = getattr(value, f"{field}_value")
    content = content if isinstance(content, (bool, int, float, str)) else list(content)
    return {"name": name, "value": {"type": value.type, f"{field}_value": content, "times": 1}}


def requests_seeds() -> list[bytes]:
    _Kept.get()  # before memory is limited: its threads reserve some
    change = [("change_state", {"id": number, "label": ""}) for number in (1, 3, 4, 2)]
    labels = [
        ("change_state", {"id": 0, "label": label}) for label in ("configure", "activate", "deactivate", "cleanup")
    ]
    defaults = [_default(name) for name, spec in PARAMETERS.items() if spec.changes.value != "at the start"]
    changed = [{"name": "pool", "value": {"type": 2, "integer_value": 2}}]
    changed += [
        {"name": "image_transforms", "value": {"type": 9, "string_array_value": ["rotate180", "front=crop:1,2,3,4"]}},
        {"name": "cameras", "value": {"type": 9, "string_array_value": ["front", "arm/wrist", "none"]}},
        {"name": "image_size", "value": {"type": 7, "integer_array_value": [196, 224], "times": 1}},
        {"name": "encoders", "value": {"type": 9, "string_array_value": ["dinov2"]}},
    ]
    back = ("set_parameters", {"parameters": defaults})
    asked = {"names": ["cameras", "use_sim_time"]}
    several = [
        *((kind, asked) for kind in ("get_parameters", "get_parameter_types", "describe_parameters")),
        ("list_parameters", {"prefixes": ["max"], "depth": 2}),
        ("get_state", {}),
        ("get_available_transitions", {}),
    ]
    condition = ("condition", {"name": "pick up the cup", "values": [0.5] * 6})
    lists = (
        [back, *change[:2], condition, ("encode", {}), *change[2:]],
        [back, *labels],
        [back, ("set_parameters_atomically", {"parameters": changed}), *change[:1], change[3]],
        [back, ("set_parameters", {"parameters": changed[1:3]}), *change[:2], *change[2:]],
        [back, *change[:2], ("set_parameters", {"parameters": defaults[-12:]}), *change[2:]],
        several,
        [back, change[0], ("change_state", {"id": 6, "label": ""})],
    )
    return [json.dumps(steps).encode() for steps in lists]


def values(data: bytes) -> None:
    """Values for one parameter of each node's table, as they come from a launch file, YAML or the command line."""
    try:
        given = dict(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return
    for table in TABLES:
        for name, spec in parameter_specs(table).items():
            if name in given:
                value = given[name]
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    return  # no parameter's
                accepted = spec.validate(name, value)
                assert spec.validate(name, accepted) == accepted, (name, accepted)
                dataclasses.replace(table(), **{name: accepted})


def values_seeds() -> list[bytes]:
    def plain(value):
        return list(value) if isinstance(value, tuple) else value

    return [
        json.dumps({name: plain(spec.default) for name, spec in parameter_specs(table).items()}).encode()
        for table in TABLES
    ]


_FIELDS = (
    *("bool", "integer", "double", "string"),
    *("byte_array", "bool_array", "integer_array", "double_array", "string_array"),
)
_WORDS = (
    *(
        "",
        "front",
        "none",
        "a/b",
        "/",
        "//",
        "__",
        "ü",
        "\0",
        "~\0",
        "~",
        "~nobody",
        "x" * 300,
        "\x1b[2J\n",
        "\u202e",
        "{",
    ),
    *(
        "rotate180",
        "front=rotate180",
        "\x1b[2J=rotate180",
        "a=b=crop:1,2,3,4",
        "crop:9,9,0,0",
        "crop:1,2,3",
        "jpeg:100",
        "jpeg:²",
        "lanczos3:9" * 9,
    ),
    *(
        "resize_with_pad_pil",
        "center_crop_tf:4097",
        "openvla-7b",
        "pi0",
        "org/name@main",
        "timm:a+b",
        "hf-hub:a/b",
        "/dev/zero",
    ),
    *("dinov2", "siglip", "cuda:99999999999999999999", "mps", "meta", "tiny-random", "local-dir:/", "x.pt", "./"),
)
_INTEGERS = (0, 1, -1, 2, 7, 14, 64, 65, 224, 4096, 4097, 10**9, 2**31, 2**63 - 1, -(2**63))
_DOUBLES = (0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e308, 1000.0, 1000.0000001, 3600.0, float("nan"), float("inf"), -1e300)


def _other_parameter(random) -> dict:
    """Any value, most often of the type that the parameter has."""
    name = random.choice((*PARAMETERS, "use_sim_time", "", "no such one"))
    kind, value = random.randrange(len(_FIELDS)), []
    if name in PARAMETERS and random.random() < 0.7:
        kind = _FIELDS.index(next(key for key in _default(name)["value"] if key.endswith("_value"))[:-6])
    one = (
        lambda: random.random() < 0.5,
        lambda: random.choice(_INTEGERS),
        lambda: random.choice(_DOUBLES),
        lambda: random.choice(_WORDS),
    )
    if kind < 4:
        value = one[kind]()
    elif kind > 4:
        value = [one[kind - 5]() for _ in range(random.choice((0, 1, 2, 3)))]
    kinds = (kind + 1, kind + 1, kind + 1, kind + 1, 0, random.randrange(256))
    content = {"type": random.choice(kinds), f"{_FIELDS[kind]}_value": value}
    return {"name": name, "value": content | {"times": random.choice((1, 1, 1, 1, 65, _MOST))}}


def change_requests(data: bytes, random) -> bytes:
    """One more request, of parameters of any type, or of a transition; or other fields of those that are there."""
    if random.random() < 0.3:
        return change_json(data, random)
    try:
        steps = list(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return change_json(data, random)
    if random.random() < 0.3:
        number = random.choice((1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 0, 8, 10, 11, 30, 97, 255))
        label = random.choice(
            ("", "", "", "configure", "transition_success", "transition_error", "shutdown", "\0", "x" * 300)
        )
        step = ("change_state", {"id": number, "label": label})
    else:
        contents = [_other_parameter(random) for _ in range(random.choice((1, 1, 1, 2, 3)))]
        step = (random.choice(("set_parameters", "set_parameters_atomically")), {"parameters": contents})
    # Often where the node is unconfigured, before it is configured.
    steps.insert(random.choice((1, random.randrange(len(steps) + 1))), step)
    while len(steps) > 12:
        del steps[random.randrange(len(steps))]
    return json.dumps(steps).encode()


def change_values(data: bytes, random) -> bytes:
    """Another value for one of the parameters, or JSON changed anyhow."""
    try:
        given = dict(json.loads(data))
        name = random.choice(list(given))
    except (ValueError, TypeError, IndexError, RecursionError):
        return change_json(data, random)
    if random.random() < 0.5:
        return change_json(json.dumps({name: given[name]}).encode(), random)
    choices = (random.choice(_WORDS), random.choice(_INTEGERS), random.choice(_DOUBLES), True, None)
    value = random.choice((*choices, [random.choice(choices) for _ in range(random.randrange(4))]))
    return json.dumps({**(given if random.random() < 0.5 else {}), name: value}).encode()


# Scenes of `mujoco_camera`: an XML file of what this package reads, beside one ball


class _NoRenderer:
    """In the place of MuJoCo's, which needs an OpenGL."""

    def __init__(self, *_arguments):
        """Takes what MuJoCo's does."""


@functools.cache
def _without_opengl() -> None:
    os.environ["MUJOCO_GL"] = "disable"
    import mujoco

    mujoco.Renderer = _NoRenderer
    mujoco.set_mju_user_warning(lambda _text: None)
    simulation._import_mujoco = lambda _gl: mujoco


def _element(tag: str, attributes: dict) -> str:
    named = (f"{name}={quoteattr(str(value)[:2000])}" for name, value in attributes.items())
    return f"<{tag} {' '.join(named)}/>"


def scene(data: bytes) -> None:
    """A JSON object of attributes: of the option, the cameras, the actuators, the keyframe; steps are made of it."""
    _without_opengl()
    try:
        content = {name: [dict(item) for item in items][:80] for name, items in json.loads(data).items()}
        parts = {
            name: "".join(_element(name, {str(key): value for key, value in item.items()}) for item in items)
            for name, items in content.items()
            if name in ("option", "camera", "motor", "key")
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
    text = f"""<mujoco>{parts.get("option", "")}<worldbody>{parts.get("camera", "")}
<body><joint name="hinge"/><geom size=".1"/></body></worldbody>
<actuator>{parts.get("motor", "")}</actuator><keyframe>{parts.get("key", "")}</keyframe></mujoco>"""
    path = scratch() / "scene.xml"
    path.write_text(text, "utf-8", "replace")
    opened = simulation.Simulation(str(path), motion="sine")
    opened.step(3)
    assert 0 <= opened.time_ns <= 3 * 10**9
    for camera in opened.cameras:
        numbers = opened.intrinsics(camera)
        assert numbers is None or (all(map(math.isfinite, numbers)) and min(numbers[:2]) > 0), numbers
        serialize_message(pinhole(320, 240, *map(float, numbers or (1.0,) * 4)))
    assert len(opened.target_ranges) >= 0


def scene_seeds() -> list[bytes]:
    lens = {"focal": "0.004 0.004", "sensorsize": "0.008 0.006", "resolution": "320 240", "principal": "0.0006 0.0004"}
    content = {
        "option": [{"timestep": 0.002}],
        "camera": [{"name": "front", "fovy": 60}, {"name": "lens", **lens}],
        "motor": [{"name": "turn", "joint": "hinge", "ctrllimited": "true", "ctrlrange": "-1 1"}],
        "key": [{"name": "home", "ctrl": "0.5"}],
    }
    flat = {"camera": [{"name": "above", "projection": "orthographic", "fovy": 2.5}]}
    return [json.dumps(content).encode(), json.dumps(flat).encode()]


def change_scene(data: bytes, random) -> bytes:
    """One attribute, most often."""
    try:
        content = {name: [dict(item) for item in items] for name, items in json.loads(data).items()}
        item = random.choice([item for items in content.values() for item in items])
        name = random.choice(list(item))
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
        return change_json(data, random)
    if random.random() < 0.3:
        return change_json(data, random)
    numbers = (
        "0",
        "-1",
        "1e-300",
        "1e300",
        "nan",
        "inf",
        "1e-5",
        "179.999",
        "180",
        "0.5 0.5",
        "0 0",
        "-1 -1",
        "inf inf",
        "1e-9 1e9",
    )
    item[name] = random.choice((*numbers, *_WORDS))
    return json.dumps(content).encode()


TARGETS = [
    Target("node_requests", requests, requests_seeds, (), (change_requests,), memory_mib=96, cpu_sec=2.0, cost=8),
    Target("node_parameters", values, values_seeds, (ValueError,), (change_values,), max_bytes=8192),
    Target("mujoco_scene", scene, scene_seeds, (SimulationError,), (change_scene,), max_bytes=8192),
]
