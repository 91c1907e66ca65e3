"""What a checkpoint's configuration may hand to timm: what shapes a vision transformer, and nothing that loads files."""

import inspect
import json
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
import checkpoints  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from vla_perception.tokenizer import CheckpointError, VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.checkpoints.model_args import checked_model_args  # noqa: E402

ARCHITECTURE = "vit_tiny_patch16_224"


class Marks:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def folder_of(tmp_path, arguments=None, architecture=ARCHITECTURE, facts=None):
    folder = tmp_path / "encoder"
    folder.mkdir()
    entries = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3} | (facts or {})
    (folder / "config.json").write_text(
        json.dumps({"architecture": architecture, "pretrained_cfg": entries, "model_args": arguments or {}})
    )
    return folder


#: Whatever timm.create_model, build_model_with_cfg and the model itself take beside what shapes the network.
LOADERS = {
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "model_name",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "feature_cfg",
    "feature_cls",
    "out_indices",
    "pruned",
    "use_naflex",
    "model_cfg",
    "kwargs_filter",
    "device",
    "dtype",
    "embed_layer",
    "block_fn",
    "mlp_layer",
    "attn_layer",
    "dynamic_img_pad",
    "__class__",
    "Depth",
    "depth ",
    "",
}


@pytest.mark.parametrize("key", sorted(LOADERS))
def test_every_other_argument_is_refused_by_name(tmp_path, key):
    marker, blob = tmp_path / "code-was-run", tmp_path / "blob"
    blob.write_bytes(pickle.dumps(Marks(marker), 2))
    for value in (str(blob), True, None, {"file": str(blob)}):
        with pytest.raises(CheckpointError, match="refused") as caught:
            checked_model_args({key: value, "depth": 3}, "config.json: model_args")
        assert repr(key) in str(caught.value)
    folder = folder_of(tmp_path, {key: str(blob)})
    with pytest.raises(CheckpointError, match="config.json: model_args has"):
        VisualTokenizer.load(f"local-dir:{folder}")
    assert not marker.exists()


def test_what_timm_gains_is_refused_until_it_is_looked_at():
    """Of everything that timm's vision transformer takes, only what is listed passes."""
    taken = set(inspect.signature(VisionTransformer.__init__).parameters) | set(
        inspect.signature(timm.create_model).parameters
    )
    passed = set()
    for key in taken:
        for value in (4, 0.5, True, "token", "learn", "", "gelu", "layernorm"):
            try:
                checked_model_args({key: value}, "")
                passed.add(key)
            except CheckpointError:
                pass
    assert not passed & LOADERS
    assert {"depth", "embed_dim", "num_heads", "mlp_ratio", "global_pool", "init_values", "reg_tokens"} <= passed
    assert passed <= set(inspect.signature(VisionTransformer.__init__).parameters)


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 10**9},
        {"depth": True},
        {"depth": 2.0},
        {"depth": "12"},
        {"depth": -1},
        {"depth": [12]},
        {"embed_dim": 10**7},
        {"num_heads": 0},
        {"in_chans": 4},
        {"patch_size": [16, 16]},
        {"patch_size": 0},
        {"reg_tokens": 10**6},
        {"mlp_ratio": float("nan")},
        {"mlp_ratio": 1e9},
        {"mlp_ratio": 10**400},
        {"mlp_ratio": "4"},
        {"qkv_bias": 1},
        {"qkv_bias": "true"},
        {"act_layer": "os.system"},
        {"act_layer": 7},
        {"act_layer": ["gelu"]},
        {"act_layer": "prelu"},
        {"norm_layer": "batchnorm2d"},
        {"norm_layer": {"a": 1}},
        {"global_pool": "x" * 10_000},
        {"pos_embed": "rope"},
        {"init_values": float("inf")},
    ],
)
def test_values_that_cannot_be(tmp_path, arguments):
    folder = folder_of(tmp_path, arguments)
    with pytest.raises(CheckpointError, match="config.json: model_args: ") as caught:
        VisualTokenizer.load(f"local-dir:{folder}")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_classes": 1000, "img_size": [224, 224]},
        {"depth": 3, "embed_dim": 96, "num_heads": 4},
        {"mlp_ratio": 2, "qkv_bias": False, "init_values": 1e-5, "act_layer": "quick_gelu"},
        {"norm_layer": "rmsnorm", "pre_norm": True, "class_token": True, "reg_tokens": 4, "no_embed_class": True},
        {"drop_path_rate": 0.1, "in_chans": 3, "dynamic_img_size": True, "qk_norm": None},
    ],
)
def test_what_shapes_an_encoder_is_used(tmp_path, arguments):
    """timm's own model of the same arguments gives the same patch features."""
    own = {
        key: value for key, value in arguments.items() if key not in ("num_classes", "img_size") and value is not None
    }
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=0, img_size=64, **own).eval()
    folder = folder_of(tmp_path, arguments)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    tokenizer = VisualTokenizer.load(f"local-dir:{folder}")
    pixel_values = tokenizer.preprocess(checkpoints.image())
    with torch.inference_mode():
        (expected,) = model.get_intermediate_layers(pixel_values[0], n={len(model.blocks) - 2})
    torch.testing.assert_close(tokenizer.encode(pixel_values).tokens, expected.flatten(1, -2), rtol=1e-4, atol=1e-4)


def in_little_memory(folder):
    """Loads an encoder in a process that may take 1 GB more; its last line."""
    code = (
        "import resource, sys\n"
        "from vla_perception.tokenizer import CheckpointError, VisualTokenizer\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))\n"
        "try: VisualTokenizer.load(sys.argv[1], device='cpu')\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, f"local-dir:{folder}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_small_file_does_not_make_a_large_model(tmp_path):
    """In names that are not timm's own the weights go through timm, which builds what the configuration says."""
    folder = folder_of(tmp_path, {"depth": 256, "embed_dim": 16384, "num_heads": 64})
    save_file({"x": torch.zeros(4)}, folder / "model.safetensors")
    assert "too few for the" in in_little_memory(folder)


def test_few_position_embeddings_are_not_spread_over_millions(tmp_path):
    folder = folder_of(tmp_path, {"depth": 2, "patch_size": 1}, facts={"input_size": [3, 4096, 4096]})
    small = timm.create_model(ARCHITECTURE, num_classes=0, img_size=4, depth=2, patch_size=1)
    save_file(small.state_dict(), folder / "model.safetensors")
    assert "has 16777216 patches" in in_little_memory(folder)


@pytest.mark.parametrize(
    "architecture",
    [
        "hf-hub:someone/encoder",
        "hf_hub:someone/encoder",
        "local-dir:/tmp",
        "timm/vit_tiny_patch16_224",
        "../vit",
        7,
        None,
        ["vit_tiny_patch16_224"],
        "vit_tiny_patch16_224.augreg",
        "",
        "vit_nonsense",
    ],
)
def test_an_architecture_is_a_name_and_no_place(tmp_path, architecture):
    folder = folder_of(tmp_path, architecture=architecture)
    with pytest.raises(CheckpointError, match="does not know the encoder|not the configuration|not a configuration"):
        VisualTokenizer.load(f"local-dir:{folder}")


@pytest.mark.parametrize(
    "timm_id", ["hf-hub:someone/encoder", "local-dir:/tmp", "timm/vit_tiny_patch16_224", "resnet18"]
)
def test_nor_is_a_timm_model_id_of_openvlas_configuration(tmp_path, timm_id):
    folder = checkpoints.write(
        tmp_path / "model", {"projector.fc1.bias": torch.zeros(2)}, config={"timm_model_ids": [timm_id, timm_id]}
    )
    with pytest.raises(CheckpointError, match="does not know the encoder|plain vision transformers|must differ"):
        VisualTokenizer.load(folder)


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"tag": "../../x"}, "tag"),
        ({"tag": 7}, "tag"),
        ({"mean": [0.5]}, "three finite numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "three finite"),
        ({"mean": [0.5, float("nan"), 0.5]}, "three finite"),
        ({"input_size": [3, 10**9, 10**9]}, "image size"),
        ({"input_size": "x"}, "cannot build"),
        ({"interpolation": ["bicubic"]}, "cannot build"),
    ],
)
def test_other_facts_of_a_timm_configuration(tmp_path, facts, words):
    with pytest.raises(CheckpointError, match=words):
        VisualTokenizer.load(f"local-dir:{folder_of(tmp_path, facts=facts)}")


@pytest.mark.parametrize(
    "config, preprocessor, words",
    [
        (
            {"timm_override_act_layers": ["os.system", None]},
            {},
            "timm_override_act_layers: act_layer 'os.system' cannot be",
        ),
        ({"timm_override_act_layers": [None, {"a": 1}]}, {}, "timm_override_act_layers: act_layer .* cannot be"),
        ({}, {"tvf_normalize_params": [{"mean": [float("nan")] * 3, "std": [1, 1, 1]}] * 2}, "three finite"),
        ({}, {"tvf_normalize_params": [{"mean": [0, 0, 0], "std": [1, 0, 1]}] * 2}, "three finite"),
        (
            {},
            {"tvf_resize_params": [{"interpolation": 99, "size": [98, 98]}, {"size": [112, 112]}]},
            "interpolation 99",
        ),
        ({}, {"tvf_do_letterbox": True, "tvf_letterbox_fill": [0, 0, 10**9]}, "letterbox_fill"),
        ({}, {"tvf_do_letterbox": True, "tvf_letterbox_fill": [0]}, "letterbox_fill"),
    ],
)
def test_values_of_openvlas_configuration_that_cannot_be(tmp_path, config, preprocessor, words):
    folder = checkpoints.write(
        tmp_path / "model", {"projector.fc1.bias": torch.zeros(2)}, config=config, preprocessor=preprocessor
    )
    with pytest.raises(CheckpointError, match=words):
        VisualTokenizer.load(folder)
