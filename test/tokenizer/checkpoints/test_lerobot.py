"""Policies in LeRobot's layout: names as the releases of transformers write them, what is refused, and the fingerprint."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
from lerobot_checkpoints import OUT, WIDTH, policy, written  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from vla_perception import cli  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.checkpoints import CheckpointError, lerobot  # noqa: E402
from vla_perception.tokenizer.checkpoints.open import read_config  # noqa: E402
from vla_perception.tokens import tokenize  # noqa: E402


def loaded(folder) -> VisualTokenizer:
    return VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return tensors


VARIANTS = {
    "with model. in front": [("paligemma_with_expert", "model.paligemma_with_expert")],
    "newer transformers": [("vision_tower.vision_model.", "vision_tower.")],
    "both": [("vision_tower.vision_model.", "vision_tower."), ("paligemma_with_expert", "model.paligemma_with_expert")],
    "older transformers": [("paligemma.model.", "paligemma.")],
    "without the expert": [("paligemma_with_expert.", "")],
    "without the expert, with model. in front": [("paligemma_with_expert.", "model.")],
    "wrapped in training": [("paligemma_with_expert", "module._orig_mod.paligemma_with_expert")],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_weights_by_every_name_give_the_same_tokens_and_fingerprint(variant, tmp_path):
    plain = loaded(written(tmp_path / "a" / "policy"))
    other = loaded(written(tmp_path / "b" / "policy", tensors=renamed(policy("pi05"), *VARIANTS[variant])))
    assert other.fingerprint == plain.fingerprint
    image = checkpoints.image()
    assert torch.equal(other(image).tokens, plain(image).tokens)


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast", "smolvla"])
def test_every_kind_and_what_is_beside_vision_in_its_file(kind, tmp_path):
    tensors = policy("smolvla" if kind == "smolvla" else "pi05")
    tensors |= {
        "normalize_inputs.buffer_observation_state.mean": torch.zeros(3),
        "value_head.weight": torch.zeros(2, 2),
    }
    tokenizer = loaded(written(tmp_path / kind, kind, tensors))
    output = tokenizer([checkpoints.image()], features=True)
    assert output.tokens.shape == ((1, 4, OUT) if kind == "smolvla" else (1, 16, OUT))
    assert tokenizer.notes == ("the policy takes its views in this order: base_0_rgb, left_wrist_0_rgb",)
    resize = "resize_with_pad_top_left" if kind == "smolvla" else "resize_with_pad_torch"
    assert tokenizer.config.encoders[0].resize_strategy == resize


def test_openpis_own_conversion_is_fed_as_its_server_does_it(tmp_path):
    config = {"type": None, "input_features": None, "normalization_mapping": None, "image_resolution": None}
    config |= {"action_dim": 32, "action_horizon": 10, "paligemma_variant": "gemma_2b", "precision": "bfloat16"}
    tensors = renamed(policy("pi05"))
    tensors["paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.position_embedding.weight"] = (
        torch.zeros(256, WIDTH)
    )
    tokenizer = loaded(written(tmp_path / "openpi", tensors=tensors, **config))
    assert tokenizer.config.encoders[0].resize_strategy == "resize_with_pad_pil"
    assert tokenizer.config.encoders[0].image_size == 224


def test_before_lerobot_0_4_pi0_was_padded_at_the_left_and_top(tmp_path):
    folder = written(tmp_path / "old", "pi0", image_resolution=None, resize_imgs_with_padding=[56, 56])
    assert loaded(folder).config.encoders[0].resize_strategy == "resize_with_pad_top_left"


VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"use_visual_memory": True}, "use_visual_memory: true.*frames before"),
        ({"normalization_mapping": {"VISUAL": "MEAN_STD"}}, "normalizes images by 'MEAN_STD'"),
        ({"image_resolution": [56, 70]}, "not a square"),
        ({"image_resolution": [0, 0]}, "two whole numbers"),
        ({"image_resolution": "56"}, "two whole numbers"),
        ({"image_resolution": [84, 84]}, "position embeddings are for 4 × 4 patches"),
        ({"image_resolution": [4, 4]}, "cannot be cut into patches"),
    ],
)
def test_configurations_that_are_refused_with_the_reason(changes, match, tmp_path):
    with pytest.raises(CheckpointError, match=match):
        loaded(written(tmp_path / "policy", **changes))


def test_smolvla_that_takes_images_as_they_are_is_refused(tmp_path):
    folder = written(tmp_path / "policy", "smolvla")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"resize_imgs_with_padding": None}))
    with pytest.raises(CheckpointError, match="images of every size go into the tower"):
        loaded(folder)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({VISION + "encoder.layers.0.extra.weight": torch.zeros(2)}, "unexpected tensors in the vision tower: .*extra"),
        ({VISION + "embeddings.register.weight": torch.zeros(2)}, "unexpected tensors in the vision tower"),
        ({"paligemma_with_expert.depth_encoder.weight": torch.zeros(2)}, "belong to no known part.*depth_encoder"),
        ({VISION + "encoder.layers.1.self_attn.k_proj.weight": None}, "lacks self_attn.k_proj"),
        ({VISION + "encoder.layers.1.mlp.fc2.bias": None}, "missing tensors: siglip.blocks.1.mlp.fc2.bias"),
        ({VISION + "post_layernorm.weight": None}, "missing tensors: siglip.norm.weight"),
        ({VISION + "embeddings.patch_embedding.weight": None}, "patch_embedding.weight is missing"),
        ({VISION + "embeddings.position_embedding.weight": torch.zeros(15, WIDTH)}, "no square grid"),
        ({VISION + "encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 3)}, "differ in shape or dtype"),
        ({VISION + "encoder.layers.0.mlp.fc1.bias": torch.zeros(3)}, "wrong shape"),
        (
            {"paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight": None},
            "connector's linear layer is missing",
        ),
        ({VISION.replace("vision_model.", "") + "post_layernorm.bias": torch.zeros(WIDTH)}, "are one tensor"),
    ],
)
def test_tensors_too_many_too_few_and_of_other_shapes(changed, match, tmp_path):
    tensors = {name: value for name, value in (policy("pi05") | changed).items() if value is not None}
    with pytest.raises(CheckpointError, match=match):
        loaded(written(tmp_path / "policy", tensors=tensors))


def test_tables_and_heads_that_no_policy_runs_are_left_out(tmp_path):
    tensors = policy("pi05") | {
        VISION + "embeddings.position_ids": torch.zeros(1, 16),
        VISION + "head.probe": torch.zeros(1, 1, WIDTH),
        VISION + "head.attention.in_proj_weight": torch.zeros(3, WIDTH),
    }
    assert (
        loaded(written(tmp_path / "policy", tensors=tensors)).fingerprint
        == loaded(written(tmp_path / "b/policy")).fingerprint
    )


def adapter(folder, base, modules, **settings):
    """peft's adapter of a policy, for linear layers by their names in it."""
    folder.mkdir()
    tensors = {}
    for module, (out, inputs) in modules.items():
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": torch.ones(4, inputs),
            f"base_model.model.{module}.lora_B.weight": torch.ones(out, 4),
        }
    save_file(tensors, folder / "adapter_model.safetensors")
    entries = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(base)} | settings
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    return folder


def test_an_adapter_that_leaves_vision_alone_changes_nothing(tmp_path):
    """LeRobot's own: the action expert's and the projections of state and action, of whatever kind."""
    base = written(tmp_path / "base")
    modules = {
        "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj": (8, 8),
        "model.action_in_proj": (8, 32),
    }
    folder = adapter(tmp_path / "adapter", base, modules, use_dora=True)
    whole, named = loaded(base), loaded(folder)
    given = VisualTokenizer.load(base, adapter=folder, device="cpu", compute_dtype="float32")
    assert named.fingerprint == given.fingerprint == whole.fingerprint
    assert (named.model, given.model) == ("adapter", "base")
    image = checkpoints.image()
    assert torch.equal(named(image).tokens, whole(image).tokens)


@pytest.mark.parametrize(
    "module",
    [
        VISION.removesuffix("vision_model.") + "encoder.layers.0.self_attn.q_proj",
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
        "depth.fc",
    ],
)
def test_an_adapter_that_changes_vision_is_refused_with_the_cure(module, tmp_path):
    base = written(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base, {f"model.{module}": (WIDTH, WIDTH)})
    for model, given in ((folder, None), (base, folder)):
        with pytest.raises(CheckpointError, match="2 tensors that change the vision tower.*merge it into the base"):
            VisualTokenizer.load(model, adapter=given, device="cpu")
    assert VisualTokenizer.load(base, adapter="none", device="cpu").fingerprint == loaded(base).fingerprint


def test_in_several_files_with_an_index(tmp_path):
    whole = loaded(written(tmp_path / "a" / "policy"))
    folder = written(tmp_path / "b" / "policy")
    tensors = policy("pi05")
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    weight_map["paligemma_with_expert.gemma_expert.model.norm.weight"] = "not-here.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert loaded(folder).fingerprint == whole.fingerprint


def test_no_cls_token_and_features_without_the_connector(tmp_path):
    folder = written(tmp_path / "policy", "smolvla")
    with pytest.raises(ValueError, match="has no cls token"):
        VisualTokenizer.load(folder, token_strategy="cls+patch")
    tokenizer = VisualTokenizer.load(folder, projector="none", device="cpu")
    assert tokenizer.grid == (8, 8) and tokenizer.channels == 128
    features = tokenize(tokenizer, {"base": checkpoints.image()}, features=True)
    shuffled = tokenize(loaded(folder), {"base": checkpoints.image()}, features=True)
    assert np.array_equal(features.data, shuffled.features) and np.array_equal(features.data, features.features)
    assert (features.shape, features.grid, features.pixel_shuffle) == ((1, 64, 128), (8, 8), 1)
    assert (shuffled.shape, shuffled.grid, shuffled.pixel_shuffle) == ((1, 4, OUT), (2, 2), 4)
    last = checkpoints.image().shape[1] - 1, checkpoints.image().shape[0] - 1
    assert (features.token_at(*last), shuffled.token_at(*last)) == (63, 3)
    pooled = VisualTokenizer.load(folder, pool=2, device="cpu")
    assert pooled.grid == (1, 1) and pooled([checkpoints.image()]).tokens.shape == (1, 1, OUT)


def test_describe_reads_the_shapes_and_no_weights(tmp_path, capsys):
    assert cli.main(["describe", str(written(tmp_path / "policy", "smolvla"))]) == 0
    text = capsys.readouterr().out
    assert "4 × 4 patches become one: 4² × 128 = 2048 → 48" in text and "2 × 2 = 4 per view" in text


def test_a_directory_that_holds_the_configuration_alone(tmp_path):
    """As of a Hugging Face id, of which weights are not fetched to describe it."""
    folder = written(tmp_path / "policy", "smolvla", resize_imgs_with_padding=[512, 512])
    (folder / "model.safetensors").unlink()
    config = lerobot.read_config(folder)
    assert (config.name, config.output_channels, config.pixel_shuffle) == ("policy", 960, 4)


def test_orbax_says_how_to_convert(tmp_path):
    folder = tmp_path / "pi0_base"
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "_METADATA").write_text("{}")
    (folder / "assets").mkdir()
    for given in (folder, folder / "params"):
        with pytest.raises(CheckpointError, match="convert_jax_model_to_pytorch.py"):
            loaded(given)
    shutil.rmtree(folder / "params")
    with pytest.raises(CheckpointError, match="config.json is missing"):
        loaded(folder)


def test_the_configuration_of_a_name_is_the_checkpoints(tmp_path):
    folder = written(tmp_path / "policy")
    assert read_config(str(folder)) == loaded(folder).config


@pytest.mark.parametrize(
    "config, match",
    [
        ({"type": "groot"}, "GR00T N1.7 is built on Qwen3-VL.*DeepStack"),
        ({"model_type": "Gr00tN1d7", "architectures": ["Gr00tN1d7"]}, "DeepStack"),
        ({"model_type": "qwen3_vl"}, "Qwen3-VL: features of three layers"),
        ({"architectures": ["Qwen3VLForConditionalGeneration"]}, "Qwen3-VL: features of three layers"),
        ({"type": "molmoact2"}, "overlapping crops"),
        ({"model": {"observation_tokenizers": {}}}, "Octo has no vision part"),
    ],
)
def test_models_that_are_not_cut_behind_vision_are_refused_with_the_reason(config, match, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        loaded(tmp_path)
