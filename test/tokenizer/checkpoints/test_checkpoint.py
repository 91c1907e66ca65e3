"""Checkpoint directories: what is read, what is accepted, what is refused."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from vla_perception.cli import main  # noqa: E402
from vla_perception.tokenizer import (  # noqa: E402
    PRESETS,
    CheckpointError,
    EncoderConfig,
    TokenizerConfig,
    VisualTokenizer,
)
from vla_perception.tokenizer.network import empty_network  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def parts():
    models = checkpoints.towers()
    weights = checkpoints.projector(sum(model.embed_dim for model in models))
    return models, weights, checkpoints.openvla_tensors(models, weights)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_equals_timm(parts, tmp_path, shards):
    models, weights, tensors = parts
    tokenizer = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "model", tensors, shards=shards))
    pixel_values = tokenizer.preprocess([checkpoints.image(0), checkpoints.image(1, 300, 200)])
    features, tokens = checkpoints.reference(models, weights, pixel_values)
    output = tokenizer.encode(pixel_values, features=True)
    assert tokenizer.grid == (7, 7)
    torch.testing.assert_close(output.features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.tokens, tokens, rtol=1e-4, atol=1e-4)
    assert tokenizer.encode(pixel_values).features is None


def test_the_last_block_norm_and_pooling_head_are_neither_needed_nor_read(parts, tmp_path):
    _, _, tensors = parts
    image = checkpoints.image()
    whole = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "whole", tensors))
    depths = {"featurizer": 12, "fused_featurizer": len(parts[0][1].blocks)}
    unused = [
        name
        for name in tensors
        for prefix, depth in depths.items()
        if name.startswith(f"vision_backbone.{prefix}.")
        and name.split(".")[2] in ("norm", "fc_norm", "attn_pool", "blocks")
        and (name.split(".")[2] != "blocks" or name.split(".")[3] == str(depth - 1))
    ]
    assert any("attn_pool" in name for name in unused) and any(".norm." in name for name in unused)
    spoilt = tensors | {name: torch.full_like(tensors[name], float("nan")) for name in unused}
    without = {name: value for name, value in tensors.items() if name not in unused}
    for name, changed in (("spoilt", spoilt), ("without", without)):
        other = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / name, changed))
        assert torch.equal(other(image).tokens, whole(image).tokens)
        assert other.fingerprint == whole.fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(parts, tmp_path, value):
    tensors = {name: tensor.clone() for name, tensor in parts[2].items()}
    tensors["projector.fc2.weight"][3, 5] = value
    with pytest.raises(CheckpointError, match=r"projector\.fc2\.weight has values that are not finite in float32"):
        VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "x", tensors), compute_dtype="float32")


def test_weights_too_large_for_the_compute_dtype_are_refused(parts, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in parts[2].items()}
    tensors["projector.fc2.weight"][3, 5] = 1e6
    folder = checkpoints.write(tmp_path / "x", tensors)
    with pytest.raises(CheckpointError, match="not finite in float16.*large values fit into float32 and bfloat16"):
        VisualTokenizer.from_checkpoint(folder, compute_dtype="float16")
    assert VisualTokenizer.from_checkpoint(folder, compute_dtype="bfloat16").compute_dtype == "bfloat16"


def test_missing_wrong_and_unexpected_tensors_are_one_error_that_lists_them(parts, tmp_path):
    tensors = dict(parts[2])
    del tensors["projector.fc2.bias"]
    tensors["vision_backbone.featurizer.cls_token"] = torch.zeros(1, 1, 3)
    tensors["vision_backbone.featurizer.pos_embed"] = torch.zeros(1, 49, 384, dtype=torch.int32)
    tensors["vision_backbone.featurizer.blocks.0.film.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "model", tensors))
    message = str(caught.value)
    for words in ("1 missing tensors: projector.fc2.bias", "cls_token [1, 1, 3] where [1, 1, 384]", "I32", "film"):
        assert words in message


def test_an_unknown_part_is_refused(parts, tmp_path):
    folder = checkpoints.write(tmp_path / "model", parts[2] | {"other_tower.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="other_tower.weight"):
        VisualTokenizer.from_checkpoint(folder)


def test_the_language_models_files_are_not_opened(parts, tmp_path):
    folder = checkpoints.write(tmp_path / "model", parts[2])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["language_model.layers.0"] = "model-00009-of-00009.safetensors"  # not there
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    VisualTokenizer.from_checkpoint(folder)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "timm_model_ids"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "incomplete"),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").write_bytes(
                (folder / "model-00002-of-00002.safetensors").read_bytes()[:-100]
            ),
            "download it again",
        ),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
            ),
            "git lfs pull",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "download the index"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"projector.fc1.bias": "../secret"}}'
            ),
            "plain file name",
        ),
    ],
)
def test_damaged_directories_are_named(parts, tmp_path, spoil, words):
    folder = checkpoints.write(tmp_path / "model", parts[2])
    spoil(folder)
    with pytest.raises(CheckpointError, match=words):
        VisualTokenizer.from_checkpoint(folder)


def test_a_language_model_without_a_width_is_llama_2_7b(parts, tmp_path):
    """As in the published config.json of openvla-7b."""
    folder = checkpoints.write(tmp_path / "model", parts[2], config={"text_config": {"model_type": "llama"}})
    with pytest.raises(CheckpointError, match=r"projector.fc3.bias \[48\] where \[4096\]"):
        VisualTokenizer.from_checkpoint(folder)


def test_no_directory_and_no_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        VisualTokenizer.from_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither a preset .* nor an encoder that timm knows"):
        VisualTokenizer.load("opnvla-7b")


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_the_tvf_entries_are_in_force(parts, tmp_path, strategy):
    """`image_resize_strategy`, `means` and `stds` say otherwise and lose; without tvf entries they win."""
    tensors = parts[2]
    told = {"image_resize_strategy": "resize-naive", "means": [[0.1] * 3] * 2, "stds": [[0.9] * 3] * 2}
    tvf = VisualTokenizer.from_checkpoint(
        checkpoints.write(tmp_path / "tvf", tensors, strategy=strategy, preprocessor=told)
    )
    assert {encoder.resize_strategy for encoder in tvf.config.encoders} == {strategy}
    assert [list(encoder.mean) for encoder in tvf.config.encoders] == list(checkpoints.MEANS)
    absent = dict.fromkeys(
        ("tvf_resize_params", "tvf_crop_params", "tvf_normalize_params", "tvf_do_letterbox", "tvf_letterbox_fill")
    )
    plain = VisualTokenizer.from_checkpoint(
        checkpoints.write(tmp_path / "plain", tensors, preprocessor=told | absent | {"image_resize_strategy": strategy})
    )
    assert {encoder.resize_strategy for encoder in plain.config.encoders} == {strategy}
    assert [encoder.mean for encoder in plain.config.encoders] == [(0.1, 0.1, 0.1)] * 2
    assert plain.fingerprint != tvf.fingerprint


def test_fingerprint_follows_content_and_nothing_else(parts, tmp_path, cache):
    tensors = parts[2]
    one = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "one", tensors))
    two = VisualTokenizer.from_checkpoint(
        checkpoints.write(tmp_path / "two", tensors, shards=1), compute_dtype="bfloat16"
    )
    assert one.fingerprint == two.fingerprint
    assert len(list((cache / "vla_perception" / "digests").iterdir())) == 2
    again = VisualTokenizer.from_checkpoint(tmp_path / "one")
    assert again.fingerprint == one.fingerprint

    changed = dict(tensors)
    changed["projector.fc3.bias"] = tensors["projector.fc3.bias"] + 1
    checkpoints.write(tmp_path / "one", changed)
    assert VisualTokenizer.from_checkpoint(tmp_path / "one").fingerprint != one.fingerprint
    halved = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    three = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "three", halved))
    assert three.fingerprint != one.fingerprint


def test_digest_can_be_recomputed_by_hand(parts, tmp_path, cache):
    """From the definition in docs/wire_format.md, with hashlib and the file alone."""
    folder = checkpoints.write(tmp_path / "model", parts[2], shards=1)
    VisualTokenizer.from_checkpoint(folder)
    (kept,) = (cache / "vla_perception" / "digests").iterdir()
    depth = len(parts[0][1].blocks)
    canonical = {}
    for name, value in load_file(folder / "model.safetensors").items():
        name = name.replace("vision_backbone.featurizer", "dinov2").replace("scale_factor", "gamma")
        name = name.replace("vision_backbone.fused_featurizer", "test_vit3")
        last = {"dinov2": "11", "test_vit3": str(depth - 1)}.get(name.split(".")[0])
        parts_of = name.split(".")
        if name.startswith("language_model") or parts_of[1] in ("norm", "fc_norm", "attn_pool"):
            continue
        if parts_of[1] == "blocks" and parts_of[2] == last:
            continue
        canonical[name] = value.numpy()
    digest = hashlib.sha256()
    for name in sorted(canonical):
        array = canonical[name]
        digest.update(f"{name}\0F32\0{','.join(str(n) for n in array.shape)}\0".encode() + array.tobytes())
    assert kept.read_text() == digest.hexdigest()


def test_random_weights_are_the_same_on_every_machine():
    """A constant: NumPy promises PCG64's stream, so any other value means that the draw has changed."""
    tokenizer = VisualTokenizer.from_preset("tiny-random")
    assert tokenizer.weights == "random"
    assert tokenizer.fingerprint == "c2495c8e8874c8ded99780c1d2cfddb10383767e5a630b73285e4ac9da4924dc"
    assert tokenizer.fingerprint != VisualTokenizer.from_preset("tiny-random", seed=1).fingerprint
    output = tokenizer(checkpoints.image())
    assert output.tokens.shape == (1, 196, 256)
    assert torch.isfinite(output.tokens).all() and output.tokens.std() > 0.05


@pytest.mark.parametrize(
    "name, tokens, channels", [("openvla-7b", 256, 4096), ("minivla", 256, 896), ("base", 196, 4096)]
)
def test_presets_have_the_published_shapes(name, tokens, channels):
    network = empty_network(PRESETS[name])
    encoders = list(network.encoders.values())
    assert encoders[0].grid[0] * encoders[0].grid[1] == tokens
    assert network.projector.channels == channels


def test_bad_settings_say_what_to_do():
    with pytest.raises(ValueError, match="choose one of"):
        VisualTokenizer.from_preset("huge")
    with pytest.raises(CheckpointError, match="'tiny-random' is the name of a preset, which has random weights and no"):
        VisualTokenizer.from_checkpoint("tiny-random")
    with pytest.raises(ValueError, match="compute dtype"):
        VisualTokenizer.from_preset("tiny-random", compute_dtype="int8")
    with pytest.raises(ValueError, match="device 'tpu'"):
        VisualTokenizer.from_preset("tiny-random", device="tpu")
    half = (0.5, 0.5, 0.5)
    different = TokenizerConfig(
        "different",
        (
            EncoderConfig("a", "vit_tiny_patch16_224", 224, half, half),
            EncoderConfig("b", "vit_tiny_patch16_224", 384, half, half),
        ),
        "none",
        0,
    )
    with pytest.raises(ValueError, match="grids differ .a 14 × 14, b 24 × 24."):
        empty_network(different)


def test_tokenize_command(parts, tmp_path, capsys):
    models, weights, tensors = parts
    folder = checkpoints.write(tmp_path / "model", tensors)
    files = []
    for seed in range(2):
        files.append(tmp_path / f"{seed}.png")
        Image.fromarray(checkpoints.image(seed, 60 + seed, 80)).save(files[-1])
    tokenizer = VisualTokenizer.from_checkpoint(folder)
    for kind in ("tokens", "features"):
        out = tmp_path / f"{kind}.safetensors"
        assert main(["tokenize", *map(str, files), "--model", str(folder), "--output", kind, "--out", str(out)]) == 0
        written = load_file(out)
        expected = torch.cat(
            [getattr(tokenizer(np.asarray(Image.open(f))[:, :, :3], features=True), kind) for f in files]
        )
        assert list(written) == [kind]
        torch.testing.assert_close(written[kind], expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "note.txt").write_text("no image")
    capsys.readouterr()
    assert main(["tokenize", str(tmp_path / "note.txt"), "--model", "tiny-random", "--out", str(tmp_path / "x")]) == 1
    assert "not an image" in capsys.readouterr().err
    assert main(["tokenize", str(files[0]), "--model", "tiny-random", "--out", str(tmp_path / "x.safetensors")]) == 0
    assert "random weights" in capsys.readouterr().err


@pytest.fixture
def tokenize(tmp_path):
    """Runs the command on image files with the preset `tiny-random`, → (exit code, what it wrote)."""

    def run(*files):
        out = tmp_path / "out.safetensors"
        code = main(["tokenize", *map(str, files), "--model", "tiny-random", "--out", str(out)])
        return code, load_file(out)["tokens"] if out.exists() else None

    return run


def test_tokenize_decodes_one_image_after_the_other(tokenize, tmp_path, monkeypatch):
    files, decoded, before_each = [tmp_path / f"{seed}.png" for seed in range(3)], [], []
    for seed, file in enumerate(files):
        Image.fromarray(checkpoints.image(seed)).save(file)
    convert, encode = Image.Image.convert, VisualTokenizer.__call__
    monkeypatch.setattr(Image.Image, "convert", lambda *args: decoded.append(1) or convert(*args))
    monkeypatch.setattr(
        VisualTokenizer,
        "__call__",
        lambda *args, **options: before_each.append(len(decoded)) or encode(*args, **options),
    )
    assert tokenize(*files)[1].shape == (3, 196, 256)
    assert before_each == [1, 2, 3]


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_tokenize_scales_grey_of_16_bits(tokenize, tmp_path, format):
    levels = np.random.default_rng(0).integers(0, 1 << 16, (60, 80), dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"grey.{format}")
    Image.fromarray(np.round(levels / 257).astype(np.uint8)).save(tmp_path / "same.png")
    _, tokens = tokenize(tmp_path / f"grey.{format}", tmp_path / "same.png")
    assert torch.equal(tokens[0], tokens[1])


def test_tokenize_says_which_image_is_at_fault(tokenize, tmp_path, capsys, monkeypatch):
    Image.fromarray(checkpoints.image()).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    Image.fromarray(np.full((60, 80), 0.5, np.float32)).save(tmp_path / "depth.tiff")
    assert tokenize(tmp_path / "whole.png", tmp_path / "half.png") == (1, None)
    assert "half.png cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(VisualTokenizer, "load", lambda *_, **__: pytest.fail("a model was loaded first"))
    assert tokenize(tmp_path / "whole.png", tmp_path / "depth.tiff") == (1, None)
    assert "depth.tiff holds grey values of 32 bits" in capsys.readouterr().err
    assert tokenize(tmp_path / "whole.png", tmp_path / "gone.png") == (1, None)
    assert "gone.png" in capsys.readouterr().err


def test_the_tokenizer_needs_no_ros():
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('rclpy', 'sensor_msgs', 'std_msgs'): raise AssertionError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import vla_perception.tokenizer, vla_perception.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unsafe_files_are_not_opened(tmp_path, parts):
    folder = checkpoints.write(tmp_path / "model", parts[2], shards=1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never from a pickle"):
        VisualTokenizer.from_checkpoint(folder)
    save_file({"projector.fc1.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing tensors: .* and [0-9]+ more"):
        VisualTokenizer.from_checkpoint(folder)
