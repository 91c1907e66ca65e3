"""What is imported when: a start is mostly imports, and which they are does not depend on how busy a machine is."""

import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")

from vla_perception import cli, startup

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> object:
    """Runs code in a process of its own; gives the JSON that it prints last."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_model_that_encodes_has_imported_neither_dynamo_nor_the_other_models_of_timm():
    imported = python("""
import json, sys
from vla_perception.tokenizer import VisualTokenizer
tokenizer = VisualTokenizer.load("tiny-random", token_strategy="cls+patch", device="cpu")
tokenizer.warm_up()
VisualTokenizer.load("base", device="cpu")
print(json.dumps(sorted(sys.modules)))
""")
    assert "timm.models.vision_transformer" in imported and "torch" in imported
    unwanted = (
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "triton",
        "torch.utils.flop_counter",
        "timm.models.beit",
        "timm.data.loader",
    )
    assert not {name for name in imported if name.startswith(unwanted)}


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        (["describe", "tiny-random", "--token-strategy", "cls+patch"], 0, ""),
        (["describe", "openvla-7b", "--pool", "3"], 1, "pool 3 does not divide"),
        (["tokenize", "missing.png", "--model", "tiny-random", "--out", "tokens.safetensors"], 1, "missing.png"),
        (
            ["tokenize", "docs/images/tokens.png", "--model", "tiny-random", "--out", "no/folder/t.safetensors"],
            1,
            "no/folder",
        ),
        (["tokenize", "docs/images/tokens.png", "--model", "/no/model", "--out", "t.safetensors"], 1, "/no/model"),
        (
            ["tokenize", "docs/images/tokens.png", "--model", "tiny-random", "--pool", "0", "--out", "t"],
            1,
            "pool must be",
        ),
        (
            ["tokenize", "docs/images/tokens.png", "--model", "a/b", "--image-transforms", "turn", "--out", "t"],
            1,
            "turn",
        ),
        (
            ["tokenize", "docs/images/tokens.png", "--model", "a/b", "--adapter", "/no", "--out", "t"],
            1,
            "adapter at '/no'",
        ),
        (
            ["tokenize", "docs/images/tokens.png", "--model", "tiny-random", "--device", "GPU 0", "--out", "t"],
            2,
            "not a device",
        ),
        (["bench", "--model", "~/no/model"], 1, "no/model"),
        (["bench", "--model", "no/such/model"], 1, "no/such/model"),
        (["bench", "--model", "tiny-random", "--device", "gpu"], 2, "not a device"),
        (["bench", "--model", "tiny-random", "--json", "no/folder/it.json"], 1, "no/folder"),
        (["bench", "--model", "tiny-random", "--runtime", "fast"], 2, "fast"),
    ],
)
def test_what_needs_no_torch_imports_none(arguments, code, told, monkeypatch, capsys):
    """Descriptions of presets, and everything about arguments and files that can be told before it is needed."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torch", "timm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    try:
        ended = cli.main(arguments)
    except SystemExit as error:
        ended = error.code
    assert (ended, told in capsys.readouterr().err) == (code, True)


def test_other_code_finds_the_timm_that_it_knows():
    told = """
print(json.dumps([timm.__version__, timm.list_models(), dir(timm.data), dir(timm.models), dir(timm)]))
"""
    names = python(f"import json, timm, timm.data\n{told}")
    lean = python(f"import json, vla_perception.tokenizer.timm_import, timm\n{told}")
    assert lean[:2] == names[:2]
    for found, expected in zip(lean[2:], names[2:]):
        assert set(found) >= set(expected)


@pytest.mark.parametrize(
    "code",
    [
        "from timm.data import create_transform\nimport timm.models.resnet\nassert timm.models.resnet.ResNet",
        "from timm.models import *\nassert ResNet and timm.create_model('resnet18')",
        "import torch, torchvision\nassert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2\n"
        "assert torch._dynamo.optimize and torchvision.ops.RoIAlign",
    ],
)
def test_whatever_other_code_asks_for_first(code):
    assert python(
        f"import json\nfrom vla_perception.tokenizer.timm_import import timm\n{code}\nprint(json.dumps(True))"
    )


def test_a_timm_that_is_laid_out_otherwise_is_imported_whole(tmp_path):
    assert python("""
import importlib, json, sys
real = importlib.import_module
def fails_once(name, package=None):
    if name == "timm.models._factory":
        raise ModuleNotFoundError("No module named 'timm.models._factory'", name=name)
    return real(name, package)
importlib.import_module = fails_once
from vla_perception.tokenizer import VisualTokenizer
importlib.import_module = real
import timm
assert "timm.models.beit" in sys.modules and timm.is_model("resnet18")
print(json.dumps(VisualTokenizer.load("tiny-random", device="cpu").grid))
""") == [14, 14]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_timm_s_modules_built_without_values_are_those_built_with_them(dtype):
    """Shapes and names; and the same weights in them give the same output."""
    import timm
    import torch

    from vla_perception.tokenizer.timm_import import create_model, on_meta

    for name in ("test_vit.r160_in1k", "vit_base_patch16_siglip_224"):
        settings = {"num_classes": 0, "img_size": 64} | ({} if name.startswith("test") else {"depth": 2})
        real = timm.create_model(name.split(".")[0], **settings).eval()
        with on_meta():
            empty = create_model(name.split(".")[0], **settings).eval()
        assert all(parameter.is_meta for parameter in empty.parameters())
        shapes = {key: value.shape for key, value in real.state_dict().items()}
        assert {key: value.shape for key, value in empty.state_dict().items()} == shapes
        empty.load_state_dict(real.state_dict(), assign=True)
        pixels = torch.randn(1, 3, 64, 64, dtype=getattr(torch, dtype))
        for model in (real, empty):
            model.to(pixels.dtype)
        assert torch.equal(real(pixels), empty(pixels))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress(stream):
    """A terminal's line is rewritten, and gone in the end; a file gets a line at long intervals, and none of what is short."""
    now = [0.0]
    with startup.Progress(stream, interval_sec=10.0, clock=lambda: now[0]) as progress:
        progress("loading", begins=True)
        for round_ in range(200):
            now[0] += 0.11
            progress(f"round {round_}")
        progress("last", begins=True)
    text = stream.getvalue()
    if stream.isatty():
        assert "\n" not in text and "loading" in text and text.count("round") == 200 and "last" in text
        assert text.endswith("\r\x1b[2K") and max(map(len, text.split("\r"))) < 200
    else:
        assert [line.split()[0] for line in text.splitlines()] == ["round", "round"]


def test_what_is_short_leaves_nothing_in_a_file():
    stream = io.StringIO()
    with startup.Progress(stream) as progress:
        progress("importing", begins=True)
        progress("loading", begins=True)
    assert stream.getvalue() == ""


def test_imports_look_for_no_garbage_and_leave_the_collector_as_it_was():
    with startup.imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), startup.imports():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with startup.imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
