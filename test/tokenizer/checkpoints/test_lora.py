"""Which of peft's adapters are added, and which are refused by name; what is fetched for one."""

import json
import logging

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")
import checkpoints  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from vla_perception.tokenizer import CheckpointError  # noqa: E402
from vla_perception.tokenizer.checkpoints import hub  # noqa: E402
from vla_perception.tokenizer.checkpoints.lora import check_kind  # noqa: E402
from vla_perception.tokenizer.checkpoints.open import open_checkpoint  # noqa: E402

#: peft 0.21.2's LoraConfig as it is saved, everything at its default.
DEFAULTS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["fc1", "fc2"],
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    models = checkpoints.towers()
    tensors = checkpoints.openvla_tensors(models, checkpoints.projector(sum(model.embed_dim for model in models)))
    few = {name: value for name, value in tensors.items() if value.numel() < 5000 or name == "projector.fc2.weight"}
    return checkpoints.write(tmp_path_factory.mktemp("models") / "base", few)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def adapter(folder, base, settings=None, tensors=None, module="projector.fc2"):
    folder.mkdir(parents=True)
    held = {
        f"base_model.model.{module}.lora_{half}.weight": torch.ones(shape)
        for half, shape in (("A", (4, 1920)), ("B", (48, 4)))
    }
    save_file(held if tensors is None else tensors, folder / "adapter_model.safetensors")
    entries = DEFAULTS | {"base_model_name_or_path": str(base)} | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"bias": "all"},
        {"init_lora_weights": None},
        {"loftq_config": {"loftq_bits": 4}},
        {"target_modules": "all-linear"},
        {"use_rslora": True},
        {"modules_to_save": ["x"]},
        {"something_of_tomorrow": None, "another": False, "list": []},
    ],
)
def test_plain_lora_is_known(settings, tmp_path):
    check_kind(DEFAULTS | settings, tmp_path)
    check_kind({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings, tmp_path)  # older versions write less


@pytest.mark.parametrize(
    "start",
    [
        "pissa",
        "pissa_niter_4",
        "pissa_niter_16",
        "PiSSA",
        "olora",
        "OLoRA",
        "loftq",
        "corda",
        "lora_ga",
        "mica",
        "something_of_tomorrow",
        "",
        1,
        0,
        ["gaussian"],
        {"a": 1},
    ],
)
def test_other_initialisations_are_refused_by_name(start, tmp_path):
    with pytest.raises(CheckpointError, match="merge_and_unload.*path_initial_model_for_weight_conversion") as caught:
        check_kind(DEFAULTS | {"init_lora_weights": start}, tmp_path)
    assert f"init_lora_weights {start!r}" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"lora_bias": True},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 3}},
        {"velora_config": {"num_groups": 1}},
        {"monteclora_config": {"n": 1}},
        {"kasa_config": {"beta": 1.0}},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"megatron_config": {"a": 1}},
        {"target_parameters": ["fc1.weight"]},
        {"use_something_of_tomorrow": True},
    ],
)
def test_variants_are_refused_by_name_with_the_cure(settings, tmp_path):
    ((key, value),) = settings.items()
    with pytest.raises(CheckpointError, match="only plain LoRA can be added.*merge_and_unload") as caught:
        check_kind(DEFAULTS | settings, tmp_path)
    assert f"{key}={value!r}"[:60] in str(caught.value)


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "LOHA", "OFT", "lora", None, 7])
def test_other_methods_are_refused(kind, tmp_path):
    with pytest.raises(CheckpointError, match="only plain LoRA can be added, not"):
        check_kind(DEFAULTS | {"peft_type": kind}, tmp_path)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"lora_alpha": 3}, 0.75),
        ({"alpha_pattern": {"fc2": 2}}, 0.5),
        ({"alpha_pattern": {"fc1": 2}}, 2.0),
        ({"alpha_pattern": {"projector.fc2": 2, "fc2": 6}}, 0.5),
        ({"alpha_pattern": {"c2": 2}}, 2.0),
        ({"r": 64, "rank_pattern": {"fc2": 4}}, 2.0),
    ],
)
def test_scales(base, tmp_path, settings, expected):
    """alpha over the rank that A has (`rank_pattern`), or over its square root."""
    checkpoint = open_checkpoint(adapter(tmp_path / "a", base, settings))
    assert checkpoint.adapters["projector.fc2.weight"].scale == expected


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"r": 8}, "r is 8, but projector.fc2 has the rank 4"),
        ({"r": "4"}, "r is '4'"),
        ({"r": [4]}, "r is"),
        ({"lora_alpha": 1e308}, "not a usable number"),
        ({"lora_alpha": -1e40}, "not a usable number"),
    ],
)
def test_settings_that_the_tensors_contradict(base, tmp_path, settings, words):
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(adapter(tmp_path / "adapter", base, settings))
    for fitting in ({"r": None}, {"r": 8, "rank_pattern": {"fc2": 4}}):
        assert open_checkpoint(adapter(tmp_path / str(len(fitting)), base, fitting)).adapters


def test_a_merged_directory_may_have_any_adapter_beside_it(base, tmp_path):
    """Beside merged weights it is not added; beside the base model's own it would have to be."""
    for name in ("merged", "unmerged"):
        folder = tmp_path / name
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        adapter(folder / "lora_adapter", base, {"init_lora_weights": "pissa"})
    with pytest.raises(CheckpointError, match="pissa"):
        open_checkpoint(tmp_path / "unmerged")
    file = tmp_path / "merged" / "model-00001-of-00002.safetensors"
    for file in (tmp_path / "merged").glob("*.safetensors"):
        from safetensors.torch import load_file

        save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    assert not open_checkpoint(tmp_path / "merged").adapters


def test_two_adapters_are_not_one(base, tmp_path):
    first, second = adapter(tmp_path / "first", base), adapter(tmp_path / "second", base)
    with pytest.raises(CheckpointError, match="has an adapter already, and only one is added"):
        open_checkpoint(first, second)
    on_first = adapter(tmp_path / "third", first)
    with pytest.raises(CheckpointError, match="is an adapter, too; merge that one"):
        open_checkpoint(on_first)


def test_adapters_that_name_each_other_end(tmp_path):
    adapter(tmp_path / "a", tmp_path / "b")
    adapter(tmp_path / "b", tmp_path / "a")
    with pytest.raises(CheckpointError, match="is an adapter, too"):
        open_checkpoint(tmp_path / "a")


def test_a_pair_that_is_there_twice(base, tmp_path):
    tensors = {
        f"base_model.model.projector.fc2.lora_{half}{default}.weight": torch.ones(shape)
        for half, shape in (("A", (4, 1920)), ("B", (48, 4)))
        for default in ("", ".default")
    }
    with pytest.raises(CheckpointError, match="tensors twice"):
        open_checkpoint(adapter(tmp_path / "a", base, tensors=tensors))


@pytest.mark.parametrize(
    "settings, asked",
    [
        ({}, "someone/base"),
        ({"revision": "v1"}, "someone/base@v1"),
        ({"revision": None}, "someone/base"),
        ({"revision": 7}, "someone/base"),
    ],
)
def test_the_base_model_is_fetched_and_said_before(base, tmp_path, monkeypatch, caplog, settings, asked):
    folder = adapter(tmp_path / "a", "someone/base", settings)
    fetched = []

    def fetch(name):
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any(name in text and "HF_HUB_OFFLINE=1" in text and str(folder) in text for text in said)
        fetched.append(name)
        return base

    monkeypatch.setattr(hub, "fetch", fetch)
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(folder)
    assert fetched == [asked]
    assert any(asked in note and "adapter_config.json names" in note for note in checkpoint.notes)
    assert checkpoint.adapters
    # With the base model given nothing is asked for.
    assert open_checkpoint(base, folder).adapters and fetched == [asked]


@pytest.mark.parametrize("named", ["~nobody-of-that-name/base", "~/base", "\0", "x" * 5000, "../../no-such-folder"])
def test_a_base_model_that_cannot_be(tmp_path, named):
    with pytest.raises(CheckpointError, match="which is not here"):
        open_checkpoint(adapter(tmp_path / "a", named))
