"""Checkpoints as tools of today write them: transformers 5's processors, new dtypes, names in wrappers; and no home."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
from ros_harness import ROOT  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from vla_perception.tokenizer import CheckpointError  # noqa: E402
from vla_perception.tokenizer.checkpoints import hub  # noqa: E402
from vla_perception.tokenizer.checkpoints.files import PickledTensors, SafetensorsFile, parse_header  # noqa: E402
from vla_perception.tokenizer.checkpoints.open import open_checkpoint  # noqa: E402
from vla_perception.tokenizer.checkpoints.openvla import read_config  # noqa: E402
from vla_perception.tokenizer.checkpoints.paths import cache_directory  # noqa: E402
from vla_perception.tokenizer.checkpoints.tensor_names import is_vision, unwrapped  # noqa: E402


@pytest.fixture(scope="module")
def tensors():
    models = checkpoints.towers()
    return checkpoints.openvla_tensors(models, checkpoints.projector(sum(model.embed_dim for model in models)))


@pytest.fixture(scope="module")
def few(tensors):
    """Those that are quickly written, for what looks at names alone."""
    return {name: value for name, value in tensors.items() if value.numel() < 5000}


# processor_config.json


def nested(folder, entries, **changes):
    whole = {"processor_class": "PrismaticProcessor", "image_processor": entries, "tokenizer": {"x": 1}} | changes
    (folder / "processor_config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox"])
def test_processor_config_alone_says_the_same(tmp_path, strategy):
    folder = checkpoints.write(tmp_path / "model", {"projector.fc1.bias": torch.zeros(2)}, strategy=strategy)
    old = folder / "preprocessor_config.json"
    expected, entries = read_config(folder), json.loads(old.read_text())
    nested(folder, entries | {"image_processor_type": "PrismaticImageProcessor"})
    assert read_config(folder) == expected  # both, and they agree
    old.unlink()
    assert read_config(folder) == expected
    assert "processor_config.json" in hub._SMALL_FILES


@pytest.mark.parametrize(
    "key, value",
    [
        ("tvf_normalize_params", [{"mean": [0, 0, 0], "std": [1, 1, 1]}] * 2),
        ("image_resize_strategy", "letterbox"),
        ("interpolations", ["bilinear", "bilinear"]),
        ("means", None),
    ],
)
def test_two_processors_that_differ_are_refused(tmp_path, key, value):
    folder = checkpoints.write(tmp_path / "model", {"projector.fc1.bias": torch.zeros(2)})
    nested(folder, json.loads((folder / "preprocessor_config.json").read_text()) | {key: value})
    with pytest.raises(CheckpointError, match=f"differ in {key}: transformers 4 reads the first"):
        read_config(folder)


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "JSON object"),
        ('{"image_processor": 7}', "must be an object"),
        ("{", "JSON"),
        ('{"image_processor": {}}', "no entry"),
        ('{"processor_class": "x"}', "preprocessor_config.json is missing"),
    ],
)
def test_processor_configs_that_say_nothing(tmp_path, content, words):
    folder = checkpoints.write(tmp_path / "model", {"projector.fc1.bias": torch.zeros(2)})
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        read_config(folder)


# Dtypes


@pytest.mark.parametrize(
    "dtype, bits",
    [
        ("F8_E8M0", 8),
        ("F8_E4M3FNUZ", 8),
        ("F8_E5M2FNUZ", 8),
        ("F4", 4),
        ("F6_E2M3", 6),
        ("F6_E3M2", 6),
        ("C64", 64),
        ("I4", 4),
        ("NF4_OF_TOMORROW", 4),
    ],
)
def test_dtypes_of_tensors_that_are_not_read(tmp_path, dtype, bits):
    weights = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    header = {
        "language_model.scale": {"dtype": dtype, "shape": [16], "data_offsets": [0, 16 * bits // 8]},
        "projector.fc1.weight": {
            "dtype": "F32",
            "shape": [2, 3],
            "data_offsets": [16 * bits // 8, 16 * bits // 8 + 24],
        },
    }
    text = json.dumps(header).encode()
    assert parse_header(text, 16 * bits // 8 + 24) == header
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 * bits // 8) + weights.numpy().tobytes())
    held = SafetensorsFile(file).tensors
    assert held["language_model.scale"].dtype == dtype
    assert torch.equal(held["projector.fc1.weight"].get(), weights)
    with pytest.raises(CheckpointError, match=f"stored as {dtype}, which is not read"):
        held["language_model.scale"].get()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 0, 4)])
def test_tensors_are_read_as_safetensors_reads_them(tmp_path, dtype, shape):
    value = torch.randn(shape).to(dtype)
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "x": value}, tmp_path / "x.safetensors")
    found = SafetensorsFile(tmp_path / "x.safetensors").tensors["x"].get()
    assert found.dtype == dtype and torch.equal(found, value)


# Files that change while they are read


def test_a_file_that_is_cut_short_or_overwritten_is_an_error(tmp_path):
    for name, spoil in (
        ("cut", lambda file: os.truncate(file, 200)),
        ("emptied", lambda file: os.truncate(file, 0)),
        ("overwritten", lambda file: file.write_bytes(bytes(file.stat().st_size))),
    ):
        file = tmp_path / f"{name}.safetensors"
        save_file({"x": torch.ones(1 << 16)}, file)
        os.utime(file, ns=(1, 1))
        held = SafetensorsFile(file)
        spoil(file)
        with pytest.raises(CheckpointError, match="was changed while it was read.*rename"):
            held.get("x")
            held.check_unchanged()


def test_a_pt_file_that_is_cut_short_is_an_error(tmp_path):
    """It is mapped, so its length is looked at before each tensor."""
    file = tmp_path / "x.pt"
    torch.save({"model": {"projector": {"x": torch.ones(1 << 16)}}}, file)
    held = PickledTensors(file).part("model", "projector")["x"]
    assert torch.equal(held.get(), torch.ones(1 << 16))
    os.truncate(file, 5000)
    with pytest.raises(CheckpointError, match="was changed while it was read.*rename"):
        held.get()


def test_a_file_that_is_replaced_by_renaming_is_read_to_its_end(tmp_path):
    file, beside = tmp_path / "x.safetensors", tmp_path / "new"
    save_file({"x": torch.ones(1 << 16)}, file)
    held = SafetensorsFile(file)
    save_file({"x": torch.zeros(5)}, beside)
    beside.replace(file)
    assert torch.equal(held.get("x"), torch.ones(1 << 16))
    held.check_unchanged()
    assert torch.equal(SafetensorsFile(file).get("x"), torch.zeros(5))


def test_a_checkpoint_that_is_cut_short_while_it_is_loaded_ends_in_a_sentence(tensors, tmp_path):
    """In a process of its own, because what it guards against is the end of the process."""
    folder = checkpoints.write(tmp_path / "model", tensors, shards=1)
    code = (
        "import os, sys\n"
        "from vla_perception.tokenizer import tokenizer\n"
        "from vla_perception.tokenizer.checkpoints import checkpoint\n"
        "read = checkpoint.Checkpoint.read\n"
        "def cut(self, names):\n"
        "    for index, item in enumerate(read(self, names)):\n"
        "        if index == 3: os.truncate(sys.argv[1] + '/model.safetensors', 100_000)\n"
        "        yield item\n"
        "checkpoint.Checkpoint.read = cut\n"
        "try: tokenizer.VisualTokenizer.load(sys.argv[1])\n"
        "except checkpoint.CheckpointError as error: print(error)\n"
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert process.returncode == 0, process.stderr
    assert "was changed while it was read" in process.stdout


# Names


@pytest.mark.parametrize(
    "name, expected",
    [
        ("module.projector.fc1.bias", "projector.fc1.bias"),
        ("_orig_mod.projector.fc1.bias", "projector.fc1.bias"),
        ("module._orig_mod.projector.fc1.bias", "projector.fc1.bias"),
        ("_orig_mod.module.a.b", "a.b"),
        ("module.module.a", "a"),
        ("vision_backbone._fsdp_wrapped_module.featurizer.x", "vision_backbone.featurizer.x"),
        ("a._checkpoint_wrapped_module.b._orig_mod.c", "a.b.c"),
        ("a.module.b", "a.module.b"),
        ("my_orig_mod.a", "my_orig_mod.a"),
        ("modules.a", "modules.a"),
        ("a", "a"),
        ("", ""),
        ("_orig_mod.", ""),
    ],
)
def test_wrappers(name, expected):
    assert unwrapped(name) == expected


@pytest.mark.parametrize(
    "name, looked_at",
    [
        ("language_model.model.x", False),
        ("module.language_model.x", False),
        ("base_model.model.language_model.x", False),
        ("value_head.head.weight", False),
        ("_orig_mod.v_head.summary.weight", False),
        ("action_head.x", False),
        ("proprio_projector.fc1.weight", False),
        ("projector.fc1.weight", True),
        ("vision_backbone.x", True),
        ("x", True),
        ("value_heads.x", True),
        ("encoder.value_head.x", True),
    ],
)
def test_what_is_looked_at(name, looked_at):
    assert is_vision(name) is looked_at


def renamed(tensors, change):
    return {change(name): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("vision_backbone.", "vision_backbone._fsdp_wrapped_module."),
        lambda name: name.replace(".blocks.1.", ".blocks.1._checkpoint_wrapped_module."),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_wrapped_checkpoints_are_the_same(few, tmp_path, change, shards):
    plain = open_checkpoint(checkpoints.write(tmp_path / "plain", few, shards=shards))
    wrapped = open_checkpoint(checkpoints.write(tmp_path / "wrapped", renamed(few, change), shards=shards))
    assert set(plain.tensors) == set(wrapped.tensors)
    name = "projector.fc1.bias"
    assert torch.equal(plain.tensors[name].get(), wrapped.tensors[name].get())


@pytest.mark.parametrize("shards", [1, 2])
def test_heads_of_policies_are_left_out(few, tmp_path, shards):
    heads = {f"{head}.x.weight": torch.zeros(4) for head in ("value_head", "action_head", "module.v_head", "lm_head")}
    plain = open_checkpoint(checkpoints.write(tmp_path / "plain", few, shards=shards))
    assert set(open_checkpoint(checkpoints.write(tmp_path / "m", few | heads, shards=shards)).tensors) == set(
        plain.tensors
    )


@pytest.mark.parametrize("prefix", ["policy.", "model.", "actor.vla.", "base_model.model.", "ema_model.module."])
def test_other_prefixes_are_named_with_the_cure(few, tmp_path, prefix):
    folder = checkpoints.write(tmp_path / "model", renamed(few, lambda name: prefix + name))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert f"prefix {prefix!r}" in text and "save the model itself" in text and len(text) < 500


def test_other_parts_are_grouped(few, tmp_path):
    more = {f"other_{part}.layer{index}.weight": torch.zeros(2) for part in range(12) for index in range(40)}
    with pytest.raises(CheckpointError, match=r"480 tensors .* other_0\. \(40: .*, …\); .* 4 more parts") as caught:
        open_checkpoint(checkpoints.write(tmp_path / "model", few | more))
    assert len(str(caught.value)) < 2000


def test_one_tensor_in_two_wrappers(few, tmp_path):
    name = "projector.fc1.bias"
    folder = checkpoints.write(tmp_path / "model", few | {f"module.{name}": few[name] + 1})
    with pytest.raises(CheckpointError, match="are one tensor"):
        open_checkpoint(folder)


# No home


def load_in(environment, folder, arguments=()):
    code = (
        "import logging, sys, os\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "import pwd; pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))  # a user without an entry\n"
        "from vla_perception.tokenizer import VisualTokenizer\n"
        "for model in sys.argv[1:]:\n"
        "    try: print(VisualTokenizer.load(model).fingerprint)\n"
        "    except ValueError as error: print('refused:', error)\n"
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        cwd=Path(folder).parent,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), process.stderr


def test_without_a_home_all_but_the_cache_is_there(tensors, tmp_path):
    folder = checkpoints.write(tmp_path / "model", tensors)
    (own, away, tilde), log = load_in({}, folder, ["someone/model", "~/model"])
    assert len(own) == 64 and "no home directory" in log
    assert "set it, or XDG_CACHE_HOME" in away
    assert tilde.startswith("refused: no checkpoint directory at '~/model'")
    assert not list(tmp_path.glob("~*"))
    (again,), _ = load_in({"HOME": str(tmp_path / "nowhere" / "x"), "XDG_CACHE_HOME": "/dev/null/cache"}, folder)
    assert again == own  # a cache that cannot be written


def test_no_home_is_a_sentence(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(CheckpointError, match="HOME is not set"):
        cache_directory()
    with pytest.raises(CheckpointError, match="HOME is not set"):
        hub.fetch("someone/model")


@pytest.mark.parametrize(
    "home, given, expected",
    [
        ("/home/a", "", "/home/a/.cache"),
        ("/home/a", "/cache", "/cache"),
        ("/home/a", "cache", "/home/a/.cache"),
        ("/home/a", "~/cache", "/home/a/.cache"),
        ("/home/a", "./", "/home/a/.cache"),
        ("", "/cache", "/cache"),
        ("here", "/cache", "/cache"),
        ("", "", None),
        ("here", "", None),
        (".", "cache", None),
    ],
)
def test_a_cache_has_an_absolute_path(monkeypatch, home, given, expected):
    """The XDG specification: a relative path is to be ignored. Else every folder in which a node starts has a cache."""
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    if expected is None:
        with pytest.raises(CheckpointError, match="not an absolute path"):
            cache_directory()
    else:
        assert cache_directory() == Path(expected) / "vla_perception"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ],
)
def test_a_pipe_in_place_of_a_file_is_an_error(few, tmp_path, name):
    """Opening one waits for somebody who writes."""
    folder = checkpoints.write(tmp_path / "model", few)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    alarm = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    try:
        if name in ("processor_config.json", "model.safetensors.index.json"):  # as if it were not there
            with contextlib.suppress(CheckpointError):
                open_checkpoint(folder)
        else:
            with pytest.raises(CheckpointError, match="not a file|is missing"):
                open_checkpoint(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)


@pytest.mark.parametrize("file", ["x" * 300, "x" * 5000, "x\0", "\ud800.safetensors", "..", ""])
def test_files_that_an_index_cannot_mean(few, tmp_path, file):
    folder = checkpoints.write(tmp_path / "model", few)
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["projector.fc1.bias"] = file
    index.write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match="is missing") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name, shown",
    [
        ("\x1b[2Jred", r"\x1b[2Jred"),
        ("a\n[INFO] [tokens]: all is well", r"a\n[INFO]"),
        ("\ud800x", r"\ud800x"),
        ("a\0b", r"a\x00b"),
        ("\u202egnp", r"\u202egnp"),
        ("grün", "grün"),
    ],
)
def test_names_in_messages_are_printable(few, tmp_path, name, shown):
    """rclpy's logger raises for half a surrogate pair; a terminal obeys escapes; a line end begins another entry."""
    folder = checkpoints.write(tmp_path / "model", few, shards=1)
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert shown in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.ros
def test_a_node_without_a_home_says_what_to_set(tmp_path):
    """rcl wants a folder for its log, and says no more than that it has none."""
    pytest.importorskip("rclpy")
    code = "import sys; from vla_perception.nodes.token_viewer import main; sys.exit(main())"
    kept = {key: value for key, value in os.environ.items() if key not in ("HOME", "ROS_HOME", "ROS_LOG_DIR")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert process.returncode == 1
    # Jazzy's rcl writes some lines of its own before.
    ours = [line for line in process.stderr.splitlines() if "set HOME, or ROS_LOG_DIR" in line]
    assert len(ours) == 1 and process.stderr.endswith(f"{ours[0]}\n") and "Traceback" not in process.stderr
