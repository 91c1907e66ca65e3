"""Where a tokenizer computes if nobody says so: `devices.place` on machines that are made up, and on this one."""

import logging

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from vla_perception import cli  # noqa: E402
from vla_perception.tokenizer import (  # noqa: E402
    VisualTokenizer,
    devices,
    weights,
)
from vla_perception.tokenizer.devices import place  # noqa: E402

first_that_works = devices._first_that_works  # conftest.py replaces it later where there is a GPU

AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)  # the second before PyTorch 2.8
NO_KERNEL = AcceleratorError(
    "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronous"
)
FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has 10 MiB free.")
OLD_DRIVER = RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update")


@pytest.fixture
def machine(monkeypatch):
    """Makes up the GPUs of a machine: (name, capability, what an operation raises) each."""

    def make(*gpus, initialising=None, driver_files=()):
        def init():
            if initialising is not None:
                raise initialising

        def operate(device):
            if device.type != "cuda":
                return real(device)
            if device.index >= len(gpus):
                raise AcceleratorError("CUDA error: invalid device ordinal")
            if gpus[device.index][2] is not None:
                raise gpus[device.index][2]

        real = devices._operate
        monkeypatch.setattr(devices, "_first_that_works", first_that_works)
        monkeypatch.setattr(devices, "_operate", operate)
        monkeypatch.setattr(devices, "_DRIVER_FILES", driver_files)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[device.index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpus[device.index][1])

    return make


@pytest.mark.parametrize(
    "capability, dtype",
    [
        ((6, 1), "float16"),
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((8, 7), "bfloat16"),
        ((9, 0), "bfloat16"),
        ((10, 0), "bfloat16"),
        ((12, 1), "bfloat16"),
    ],
)
def test_a_gpu_that_works_is_taken_in_the_precision_that_it_is_fast_in(machine, capability, dtype):
    machine(("A chip", capability, None))
    placement = place()
    assert placement.device == torch.device("cuda", 0)
    assert placement.compute_dtype == dtype and placement.dtype == getattr(torch, dtype)
    assert placement.warnings == ()
    number = ".".join(map(str, capability))
    assert str(placement) == f"cuda:0 in {dtype}: A chip, compute capability {number}, a CUDA device that works"


def test_the_first_gpu_that_works_is_taken_and_why_not_the_one_before_is_said(machine):
    machine(("Old", (3, 5), NO_KERNEL), ("Full", (9, 0), FULL), ("Good", (9, 0), None))
    placement = place()
    assert placement.device == torch.device("cuda", 2) and placement.compute_dtype == "bfloat16"
    assert placement.warnings == (
        "not used: cuda:0: CUDA error: no kernel image is available for execution on the device",
        "not used: cuda:1: CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has 10 MiB free",
    )


@pytest.mark.parametrize("failure", [NO_KERNEL, FULL])
def test_without_a_gpu_that_works_the_cpu_is_taken_with_a_warning(machine, failure):
    machine(("Broken", (9, 0), failure))
    placement = place()
    assert placement.device.type == "cpu" and placement.compute_dtype == "float32"
    (warning,) = placement.warnings
    assert "has a GPU that cannot be used" in warning and str(failure).splitlines()[0].rstrip(".") in warning
    with pytest.raises(ValueError, match="device 'cuda' cannot be used .*(kernel image|out of memory)"):
        place("cuda")


@pytest.mark.parametrize(
    "error", [OLD_DRIVER, AssertionError("Torch not compiled with CUDA enabled")], ids=["old driver", "CPU wheel"]
)
def test_a_driver_or_a_torch_that_cannot_use_the_gpu_of_this_machine_is_a_warning(machine, tmp_path, error):
    machine(initialising=error, driver_files=(tmp_path / "none", tmp_path))
    placement = place()
    assert placement.device.type == "cpu" and str(error)[:30] in placement.warnings[0]


def test_a_machine_without_a_gpu_is_no_reason_to_warn(machine, tmp_path):
    machine(initialising=RuntimeError("Found no NVIDIA driver on your system."), driver_files=(tmp_path / "none",))
    placement = place()
    assert str(placement) == "cpu in float32: no CUDA device (Found no NVIDIA driver on your system)"
    assert placement.warnings == ()
    assert place(compute_dtype="bfloat16").compute_dtype == "bfloat16"


def test_a_choice_that_costs_gets_a_warning_and_is_kept(machine):
    machine(("New", (8, 0), None), ("Old", (7, 5), None))
    slow = place("cuda", "float32")
    assert slow.compute_dtype == "float32" and "4 to 6 times as long as bfloat16" in slow.warnings[0]
    assert "as long as float16" in place("cuda:1", "float32").warnings[0]
    assert "no instructions" in place("cuda:1", "bfloat16").warnings[0]
    for device, dtype in (("cuda", "bfloat16"), ("cuda", "float16"), ("cuda:1", "float16"), ("cpu", "float32")):
        placement = place(device, dtype)
        assert placement.compute_dtype == dtype and placement.warnings == ()
    assert place("cuda").device == torch.device("cuda", 0) and place("cpu").compute_dtype == "float32"


@pytest.mark.parametrize("device", ["tpu", "cuda:2", "cuda:-1", "", "meta", "GPU", "cuda:", "auto:1"])
def test_devices_that_do_not_work_are_refused(machine, device):
    machine(("One", (8, 0), None), ("Two", (8, 0), None))
    with pytest.raises(ValueError, match="cannot be used .*choose auto, cpu, cuda or cuda:N"):
        place(device)


@pytest.mark.parametrize("dtype", ["half", "", "bf16", "Float32", "int8"])
def test_precisions_that_there_are_not_are_refused(dtype):
    with pytest.raises(ValueError, match="choose one of auto, float32, bfloat16, float16"):
        place("cpu", dtype)


def test_this_machine(monkeypatch):
    """On a GPU the one that computes, elsewhere the CPU, whatever the reason."""
    monkeypatch.setattr(devices, "_first_that_works", first_that_works)
    placement = place()
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert placement.device.type == expected
    assert torch.ones(1, device=placement.device, dtype=placement.dtype).item() == 1


def test_a_tokenizer_is_loaded_into_the_gpu_in_bfloat16_unless_told_otherwise(machine, monkeypatch, caplog):
    machine(("A chip", (9, 0), None))
    asked = []
    real = weights._fill

    def fill(network, tensors, digest, device, dtype):
        asked.append((device, dtype))
        real(network, tensors, digest, torch.device("cpu"), dtype)  # there is none to fill

    monkeypatch.setattr(weights, "_fill", fill)
    with caplog.at_level(logging.INFO, logger="vla_perception"):
        tokenizer = VisualTokenizer.load("tiny-random")
    assert asked == [(torch.device("cuda", 0), torch.bfloat16)]
    assert "computes on cuda:0 in bfloat16: A chip, compute capability 9.0" in caplog.text
    assert tokenizer.compute_dtype == tokenizer.metadata()["compute_dtype"] == "bfloat16"
    caplog.clear()
    VisualTokenizer.load("tiny-random", compute_dtype="float32")
    assert asked[1] == (torch.device("cuda", 0), torch.float32)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "4 to 6 times" in caplog.text


def test_every_way_in_leaves_it_open():
    """Command line and Python; test_options.py has the node, test_launch.py the launch files."""
    import inspect

    from vla_perception import bench

    for function in (
        VisualTokenizer.load,
        VisualTokenizer.from_checkpoint,
        VisualTokenizer.from_preset,
        bench.run,
        place,
    ):
        parameters = inspect.signature(function).parameters
        assert {parameters[name].default for name in ("device", "compute_dtype")} == {"auto"}, function
    given = []
    for command in (["tokenize", "a.png", "--model", "tiny-random", "--out", "o"], ["bench", "--model", "tiny-random"]):
        name = f"_{command[0]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, name, lambda options: given.append((options.device, options.compute_dtype)))
            assert cli.main(command) == 0
    assert given == [("auto", "auto")] * 2
