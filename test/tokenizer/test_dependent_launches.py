"""Where kernels are launched before the ones in front of them have ended, and what happens where that fails."""

import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from vla_perception.tokenizer import dependent_launches  # noqa: E402

#: Compute capabilities of a machine's devices.
CAPABILITIES = {0: (8, 7), 1: (8, 9), 2: (9, 0), 3: (10, 0), 4: (12, 1)}


@pytest.fixture
def machine(monkeypatch):
    """Devices of several generations, a Triton that knows such launches, and which device is current."""
    current = SimpleNamespace(device=2)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: current.device,
        "get_device_capability": CAPABILITIES.get,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(dependent_launches, "WANTED", True)
    monkeypatch.setitem(sys.modules, "triton.language.extra.cuda", SimpleNamespace(gdc_wait=None))
    dependent_launches._known_to.cache_clear()
    yield current
    dependent_launches._known_to.cache_clear()


def test_from_hopper_on(machine):
    """Each device of a machine is asked for itself."""
    for _ in range(2):
        for machine.device, capability in CAPABILITIES.items():
            options = dependent_launches.launch_options()
            hopper = {"dependent": True, "launch_pdl": True}
            assert options == (hopper if capability >= (9, 0) else {"dependent": False})


@pytest.mark.parametrize(
    "lack",
    [
        lambda patch: patch.setitem(sys.modules, "triton.language.extra.cuda", None),
        lambda patch: patch.setitem(sys.modules, "triton.language.extra.cuda", SimpleNamespace()),  # an older Triton
        lambda patch: patch.setattr(torch.version, "cuda", None),  # AMD's
        lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False),
        lambda patch: patch.setattr(dependent_launches, "WANTED", False),
    ],
)
def test_not_where_something_is_missing(machine, monkeypatch, lack):
    lack(monkeypatch)
    assert not dependent_launches.in_use()
    assert dependent_launches.launch_options() == {"dependent": False}


def failing(*errors):
    """Raises each of these, then returns 7; counts its calls."""

    def action():
        action.calls += 1
        if action.calls <= len(errors):
            raise errors[action.calls - 1]
        return 7

    action.calls = 0
    return action


def test_what_fails_with_them_is_done_without_from_then_on(machine, caplog):
    action = failing(RuntimeError("Triton Error [CUDA]: operation not supported\nmore"))
    assert dependent_launches.attempt(action) == 7 and action.calls == 2
    assert not dependent_launches.in_use()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith("[CUDA]: operation not supported")
    with pytest.raises(KeyError):
        dependent_launches.attempt(failing(KeyError()))


@pytest.mark.parametrize(
    "errors, device, calls",
    [
        ((ValueError("wrong values"), ArithmeticError("still wrong")), 2, 2),
        ((torch.cuda.OutOfMemoryError("CUDA out of memory"),), 2, 1),
        ((KeyboardInterrupt(),), 2, 1),
        ((ValueError("no compiler"),), 0, 1),
    ],
)
def test_what_is_not_their_fault_changes_nothing(machine, caplog, errors, device, calls):
    machine.device = device
    action = failing(*errors)
    with pytest.raises(type(errors[-1])):
        dependent_launches.attempt(action)
    assert action.calls == calls and dependent_launches.WANTED and not caplog.records


def test_what_works_is_done_once(machine):
    action = failing()
    assert dependent_launches.attempt(action) == 7 and action.calls == 1 and dependent_launches.in_use()
