"""What people have on disk beside OpenVLA's directories: each layout written here at small size, and compared with
what timm's own modules compute from the same weights."""

import json

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")
import checkpoints  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from vla_perception.tokenizer import CheckpointError, EncoderConfig, VisualTokenizer  # noqa: E402
from vla_perception.tokenizer import presets as presets_module  # noqa: E402
from vla_perception.tokenizer.checkpoints import hub  # noqa: E402

IMAGE = checkpoints.image()
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # huggingface_hub has read its environment already.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def parts():
    models = checkpoints.towers()
    weights = checkpoints.projector(sum(model.embed_dim for model in models))
    return models, weights, checkpoints.openvla_tensors(models, weights)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_computes(tokenizer, models, weights):
    pixel_values = tokenizer.preprocess(IMAGE)
    close(tokenizer.encode(pixel_values).tokens, checkpoints.reference(models, weights, pixel_values)[1])


# LoRA, OpenVLA-OFT


def write_adapter(folder, tensors, base, *, rank=4, settings=None, seed=3):
    """peft's adapter for every linear layer and the patch embeddings; returns the merged tensors."""
    generator = torch.Generator().manual_seed(seed)
    entries = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "base_model_name_or_path": str(base),
        **(settings or {}),
    }
    scale = entries["lora_alpha"] / (rank**0.5 if entries.get("use_rslora") else rank)
    merged, adapter = dict(tensors), {}
    for name, value in tensors.items():
        linear = value.ndim == 2 and name.endswith(".weight") and not name.startswith("language_model")
        if not linear and not name.endswith("patch_embed.proj.weight"):
            continue
        a = torch.randn(rank, *value.shape[1:], generator=generator) * 0.1
        b = torch.randn(value.shape[0], rank, *[1] * (value.ndim - 2), generator=generator) * 0.1
        module = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        # peft's own formulas: B A for linear layers; for convolutions the 1 × 1 product of the two kernels.
        if value.ndim == 2:
            delta = b @ a
        else:
            delta = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
        merged[name] = value + scale * delta
    adapter["base_model.model.language_model.lm_head.lora_A.weight"] = torch.zeros(rank, 16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    return merged


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_a_lora_adapter_equals_the_merged_model(parts, tmp_path, settings):
    base = checkpoints.write(tmp_path / "base", parts[2])
    merged = write_adapter(tmp_path / "adapter", parts[2], base, settings=settings)
    whole = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "merged", merged))
    by_argument = VisualTokenizer.from_checkpoint(base, adapter=tmp_path / "adapter")
    by_itself = VisualTokenizer.from_checkpoint(tmp_path / "adapter")  # names its base model
    plain = VisualTokenizer.from_checkpoint(base)
    close(by_argument(IMAGE).tokens, whole(IMAGE).tokens)
    assert torch.equal(by_itself(IMAGE).tokens, by_argument(IMAGE).tokens)
    assert by_itself.fingerprint == by_argument.fingerprint != plain.fingerprint
    assert not torch.allclose(plain(IMAGE).tokens, whole(IMAGE).tokens, rtol=1e-2)


def test_openvla_oft_directories(parts, tmp_path):
    """Merged weights beside ``lora_adapter/`` are taken as they are; unmerged ones, or none, get the adapter."""
    base = checkpoints.write(tmp_path / "base", parts[2])
    merged = write_adapter(tmp_path / "merged" / "lora_adapter", parts[2], base)
    unmerged = write_adapter(tmp_path / "unmerged" / "lora_adapter", parts[2], base)
    alone = write_adapter(tmp_path / "alone" / "lora_adapter", parts[2], base)
    assert all(torch.equal(merged[name], other[name]) for other in (unmerged, alone) for name in merged)
    checkpoints.write(tmp_path / "merged", merged)
    checkpoints.write(tmp_path / "unmerged", parts[2])
    (tmp_path / "alone" / "action_head--150000_checkpoint.pt").write_bytes(b"not looked at")
    expected = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "whole", merged))(IMAGE).tokens
    for name in ("merged", "unmerged", "alone"):
        tokenizer = VisualTokenizer.from_checkpoint(tmp_path / name)
        close(tokenizer(IMAGE).tokens, expected)
        assert tokenizer.model == name
    without = VisualTokenizer.from_checkpoint(tmp_path / "unmerged", adapter="none")
    assert_computes(without, *parts[:2])


def test_a_film_file_that_cannot_be_read_and_an_adapter_beside_one(parts, tmp_path):
    """Never the encoders without it: they would be others."""
    folder = checkpoints.write(tmp_path / "film", parts[2])
    (folder / "vision_backbone--150000_checkpoint.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="vision_backbone--150000_checkpoint.pt is not a zip archive"):
        VisualTokenizer.from_checkpoint(folder)
    write_adapter(folder / "lora_adapter", parts[2], folder)
    with pytest.raises(CheckpointError, match="with FiLM; give the folder above it"):
        VisualTokenizer.from_checkpoint(folder / "lora_adapter")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"peft_type": "IA3"}, "only plain LoRA"),
        ({"use_dora": True}, "only plain LoRA .* merge it"),
        ({"lora_alpha": "much"}, "adapter_config.json"),
        ({"base_model_name_or_path": "/nowhere/openvla"}, "trained on '/nowhere/openvla', which is not here"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
    ],
)
def test_adapters_that_cannot_be_added(parts, tmp_path, settings, words):
    base = checkpoints.write(tmp_path / "base", parts[2])
    write_adapter(tmp_path / "adapter", parts[2], base)
    entries = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=words):
        VisualTokenizer.from_checkpoint(tmp_path / "adapter")


def test_an_adapter_for_another_model(parts, tmp_path):
    base = checkpoints.write(tmp_path / "base", parts[2])
    write_adapter(tmp_path / "adapter", {"other_tower.fc.weight": torch.zeros(8, 8)}, base)
    with pytest.raises(CheckpointError, match="fit no part: base_model.model.other_tower.fc.lora_A.weight"):
        VisualTokenizer.from_checkpoint(base, adapter=tmp_path / "adapter")


# Prismatic


@pytest.fixture
def small_backbones(monkeypatch):
    """Prismatic's names for encoders of hundreds of millions of weights stand for small ones here."""
    siglip = {"dinosiglip-vit-so-224px": 112, "siglip-vit-so400m": 112}
    small = {
        "dinosiglip-vit-so-224px": (("dinov2", checkpoints.TIMM_IDS[0], 98), ("siglip", "test_vit3.r160_in1k", 112)),
        "dinov2-vit-l": (("dinov2", checkpoints.TIMM_IDS[0], 98),),
        "siglip-vit-so400m": (("siglip", "test_vit3.r160_in1k", siglip["siglip-vit-so400m"]),),
    }
    monkeypatch.setattr(presets_module, "PRISMATIC_BACKBONES", small)


def write_run(folder, backbone, models, mlp, *, config=None, vision=True, **changes):
    """A run directory as prismatic-vlms writes it; the language model's tensors are there, too."""
    prefixes = ["featurizer."] if len(models) == 1 else ["dino_featurizer.", "siglip_featurizer."]
    state = {
        f"{prefix}{name}": value
        for prefix, model in zip(prefixes, models)
        for name, value in model.state_dict().items()
    }
    entries = {"projector": mlp, "llm_backbone": {"llm.lm_head.weight": torch.zeros(8, 4)}}
    entries |= {"vision_backbone": state} if vision else {}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"model": entries | changes}, folder / "checkpoints" / "latest-checkpoint.pt")
    default = {"model": {"vision_backbone_id": backbone, "image_resize_strategy": "letterbox"}}
    (folder / "config.json").write_text(json.dumps(config or default))
    return folder


def layers(*widths):
    torch.manual_seed(5)
    chain = []
    for source, target in zip(widths, widths[1:]):
        chain += [nn.Linear(source, target), nn.GELU()]
    return nn.Sequential(*chain[:-1])


def prismatic_reference(models, chain, pixel_values):
    with torch.inference_mode():
        features = [
            model.get_intermediate_layers(pixels, n={len(model.blocks) - 2})[0]
            for model, pixels in zip(models, pixel_values)
        ]
        return chain(torch.cat(features, dim=-1))


def named(chain):
    return {f"projector.{name}": value for name, value in chain.state_dict().items()}


@pytest.mark.parametrize(
    "backbone, width",
    [
        ("dinosiglip-vit-so-224px", 48),
        ("dinosiglip-vit-so-224px", 896),
        ("dinov2-vit-l", 48),
        ("siglip-vit-so400m", 48),
    ],
)
def test_prismatic_runs(parts, tmp_path, small_backbones, backbone, width):
    """Both towers (MiniVLA's width among them) with a fused-gelu-mlp, one tower with a gelu-mlp."""
    models = {"dinosiglip-vit-so-224px": parts[0], "dinov2-vit-l": parts[0][:1], "siglip-vit-so400m": parts[0][1:]}[
        backbone
    ]
    channels = sum(model.embed_dim for model in models)
    chain = layers(channels, 4 * channels, width, width) if len(models) == 2 else layers(channels, width, width)
    run = write_run(tmp_path / "run", backbone, models, named(chain))
    for path in (run, run / "checkpoints" / "latest-checkpoint.pt"):
        tokenizer = VisualTokenizer.from_checkpoint(path)
        assert (tokenizer.model, tokenizer.channels, tokenizer.notes) == ("run", width, ())
        assert tokenizer.config.projector == ("fused-gelu-mlp" if len(models) == 2 else "gelu-mlp")
        assert {encoder.resize_strategy for encoder in tokenizer.config.encoders} == {"letterbox"}
        pixel_values = tokenizer.preprocess(IMAGE)
        close(tokenizer.encode(pixel_values).tokens, prismatic_reference(models, chain, pixel_values))
    # Statistics of both families, as prismatic-vlms takes them from timm.
    means = {"dinov2": (0.485, 0.456, 0.406), "siglip": HALF}
    assert all(encoder.mean == means[encoder.name] for encoder in tokenizer.config.encoders)
    with_cls_token = VisualTokenizer.from_checkpoint(run, token_strategy="cls", projector="none")
    with torch.inference_mode():
        expected = torch.cat([model(pixels) for model, pixels in zip(models, with_cls_token.preprocess(IMAGE))], dim=-1)
    close(with_cls_token(IMAGE).tokens[:, 0], expected)


def test_cogacts_run_has_an_action_model_beside_the_vlm(parts, tmp_path, small_backbones):
    config = {"vla": {"type": "prism-dinosiglip-224px+oxe", "base_vlm": "prism-dinosiglip-224px+7b"}}
    config |= {"action_model_type": "DiT-B", "future_action_window_size": 15}
    run = write_run(tmp_path / "CogACT-Base", "", parts[0], named(layers(480, 1920, 48, 48)), config=config)
    file = run / "checkpoints" / "latest-checkpoint.pt"
    expected = VisualTokenizer.from_checkpoint(run)
    state = torch.load(file, weights_only=True)
    extra = {"net.x_embedder.linear.weight": torch.zeros(2, 2)}
    state["model"] |= {
        "action_model": extra,
        "ema_diffusion": extra,
        "llm_backbone": {"llm.norm.weight": torch.zeros(2)},
    }
    torch.save(state, file)
    found = VisualTokenizer.from_checkpoint(run)
    assert found.fingerprint == expected.fingerprint and torch.equal(found(IMAGE).tokens, expected(IMAGE).tokens)


def test_weights_that_are_stored_transposed_are_laid_out_row_by_row(parts, tmp_path, small_backbones):
    """Kernels that are given a weight's address read it so."""
    run = write_run(tmp_path / "run", "dinosiglip-vit-so-224px", parts[0], named(layers(480, 1920, 48, 48)))
    expected = VisualTokenizer.from_checkpoint(run)
    file = run / "checkpoints" / "latest-checkpoint.pt"
    state = torch.load(file, weights_only=True)
    for tensors in state["model"].values():
        tensors |= {name: value.t().contiguous().t() for name, value in tensors.items() if value.ndim == 2}
    assert not state["model"]["projector"]["projector.0.weight"].is_contiguous()
    torch.save(state, file)
    found = VisualTokenizer.from_checkpoint(run)
    assert all(value.is_contiguous() for value in found.network.state_dict().values())
    assert found.fingerprint == expected.fingerprint and torch.equal(found(IMAGE).tokens, expected(IMAGE).tokens)


def test_vla_adapters_and_univlas_directories(parts, tmp_path):
    """OpenVLA's layout, with learned action queries among the tensors, and heads in files beside them."""
    expected = VisualTokenizer.from_checkpoint(checkpoints.write(tmp_path / "plain", parts[2]))
    adapter = parts[2] | {"action_queries.weight": torch.zeros(64, 48), "module.value_head.weight": torch.zeros(2, 2)}
    folder = checkpoints.write(
        tmp_path / "VLA-Adapter", adapter, config={"text_config": {"hidden_size": 48, "model_type": "qwen2"}}
    )
    for beside in ("action_head--150000_checkpoint.pt", "proprio_projector--150000_checkpoint.pt"):
        (folder / beside).write_bytes(b"not looked at")
    univla = checkpoints.write(tmp_path / "univla-7b", parts[2], shards=1, config={"model_type": "openvla"})
    (univla / "action_decoder-10000.pt").write_bytes(b"not looked at")
    for path in (folder, univla):
        assert_computes(VisualTokenizer.from_checkpoint(path), *parts[:2])
        assert VisualTokenizer.from_checkpoint(path).weights_digest == expected.weights_digest


def test_a_vlas_run_names_the_model_that_it_was_trained_on(parts, tmp_path, small_backbones):
    chain = layers(480, 1920, 896, 896)
    config = {
        "vla": {"type": "prism-qwen25-dinosiglip-224px+0_5b", "base_vlm": "prism-qwen25-extra-dinosiglip-224px+0_5b"}
    }
    run = write_run(tmp_path / "run", "", parts[0], named(chain), config=config)
    tokenizer = VisualTokenizer.from_checkpoint(run)
    pixel_values = tokenizer.preprocess(IMAGE)
    close(tokenizer.encode(pixel_values).tokens, prismatic_reference(parts[0], chain, pixel_values))
    assert tokenizer.config.encoders[0].resize_strategy == "resize-naive"


def test_a_frozen_vision_backbone_comes_from_timms_weights(parts, tmp_path, small_backbones, monkeypatch):
    """Absent from the file because it was frozen; timm's loader is asked, and the tokenizer says so."""
    chain = layers(480, 1920, 48, 48)
    run = write_run(tmp_path / "run", "dinosiglip-vit-so-224px", parts[0], named(chain), vision=False)
    with pytest.raises(CheckpointError, match="pretrained weights of .* cannot be had .* give a local file"):
        VisualTokenizer.from_checkpoint(run)
    folder = put_into_hub_cache(tmp_path / "hub", parts[0])
    assert folder.is_dir()
    tokenizer = VisualTokenizer.from_checkpoint(run)
    pixel_values = tokenizer.preprocess(IMAGE)
    close(tokenizer.encode(pixel_values).tokens, prismatic_reference(parts[0], chain, pixel_values))
    assert "holds no vision backbone, as it was frozen" in tokenizer.notes[0]


def put_into_hub_cache(cache, models):
    """What huggingface_hub would have downloaded of timm's weights."""
    for timm_id, model in zip(checkpoints.TIMM_IDS, models):
        repository = timm.get_pretrained_cfg(timm_id).hf_hub_id
        snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        native = timm.get_pretrained_cfg(timm_id).input_size[-1]
        whole = timm.create_model(timm_id.split(".")[0], num_classes=0, img_size=native)
        state = model.state_dict() | {"pos_embed": stretched(model, whole)}
        save_file({name: value.contiguous() for name, value in state.items()}, snapshot / "model.safetensors")
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
        # The reference computes with position embeddings that were resampled by timm.
        with torch.no_grad():
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            model.pos_embed.copy_(
                timm.layers.resample_abs_pos_embed(
                    state["pos_embed"], list(model.patch_embed.grid_size), num_prefix_tokens=prefix
                )
            )
    return snapshot


def stretched(model, whole):
    """Position embeddings for the size that timm's weights have."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    return timm.layers.resample_abs_pos_embed(
        model.pos_embed.detach(), list(whole.patch_embed.grid_size), num_prefix_tokens=prefix
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"config": {"model": {"vision_backbone_id": "clip-vit-l"}}}, "'clip-vit-l' is not known; supported are"),
        ({"config": {"vla": {"base_vlm": "some-other-model"}}}, "says nothing about its vision backbone"),
        ({"config": {"model": {}, "vla": {}}}, "names neither model.vision_backbone_id nor vla.base_vlm"),
        ({"projector": {}}, "holds no model.projector"),
        ({"projector": {"projector.1.weight": torch.zeros(2, 2)}}, "belong to no known part: projector.1.weight"),
        ({"vision_backbone": {"clip_featurizer.x": torch.zeros(2)}}, "belong to no known part: clip_featurizer.x"),
        ({"vision_backbone": {"dino_featurizer.x": "text"}}, "is not a state dict of tensors"),
    ],
)
def test_prismatic_runs_that_do_not_fit(parts, tmp_path, small_backbones, change, words):
    run = write_run(tmp_path / "run", "dinosiglip-vit-so-224px", parts[0], named(layers(480, 1920, 48, 48)), **change)
    with pytest.raises(CheckpointError, match=words):
        VisualTokenizer.from_checkpoint(run)


def test_several_checkpoints_of_a_run(parts, tmp_path, small_backbones):
    run = write_run(tmp_path / "run", "dinosiglip-vit-so-224px", parts[0], named(layers(480, 1920, 48, 48)))
    latest = run / "checkpoints" / "latest-checkpoint.pt"
    (run / "checkpoints" / "step-1.pt").write_bytes(latest.read_bytes())
    expected = VisualTokenizer.from_checkpoint(run).fingerprint
    latest.rename(run / "checkpoints" / "step-2.pt")
    with pytest.raises(CheckpointError, match="several checkpoints .step-1.pt, step-2.pt.; give one of them"):
        VisualTokenizer.from_checkpoint(run)
    assert VisualTokenizer.from_checkpoint(run / "checkpoints" / "step-1.pt").fingerprint == expected


# timm's encoders


def test_timms_encoders_by_name_folder_and_file(parts, tmp_path):
    models = parts[0]
    files = []
    for timm_id, model, size in zip(checkpoints.TIMM_IDS, models, checkpoints.SIZES):
        folder = tmp_path / timm_id
        folder.mkdir()
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
        )
        settings = timm.get_pretrained_cfg(timm_id).to_dict()
        facts = {key: settings[key] for key in ("mean", "std", "interpolation", "tag")} | {
            "input_size": [3, size, size]
        }
        entries = {"architecture": timm_id.split(".")[0], "pretrained_cfg": facts, "model_args": {"img_size": size}}
        (folder / "config.json").write_text(json.dumps(entries))
        files.append(folder)
    by_file = VisualTokenizer.load(
        "timm:"
        + "+".join(
            f"{timm_id}@{size}={folder}/model.safetensors"
            for timm_id, size, folder in zip(checkpoints.TIMM_IDS, checkpoints.SIZES, files)
        )
    )
    by_folder = VisualTokenizer.load("+".join(f"local-dir:{folder}" for folder in files))
    for tokenizer in (by_file, by_folder):
        pixel_values = tokenizer.preprocess(IMAGE)
        with torch.inference_mode():
            expected = [
                model.get_intermediate_layers(pixels, n={len(model.blocks) - 2})[0]
                for model, pixels in zip(models, pixel_values)
            ]
        close(tokenizer.encode(pixel_values).tokens, torch.cat(expected, dim=-1))
        assert (tokenizer.config.projector, tokenizer.weights) == ("none", "checkpoint")
    assert by_file.fingerprint == by_folder.fingerprint


def test_timms_encoders_at_another_size(parts, tmp_path):
    """Position embeddings are resampled as timm does it when it loads a file at another size."""
    timm_id, model = checkpoints.TIMM_IDS[0], parts[0][0]
    file = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    tokenizer = VisualTokenizer.load(f"timm:{timm_id}={file}", image_size=154)
    other = timm.create_model(
        timm_id, pretrained=True, num_classes=0, img_size=154, pretrained_cfg_overlay={"file": str(file)}
    ).eval()
    pixel_values = tokenizer.preprocess(IMAGE)
    with torch.inference_mode():
        expected = other.get_intermediate_layers(pixel_values[0], n={10})[0]
    assert tokenizer.grid == (11, 11)
    close(tokenizer.encode(pixel_values).tokens, expected)
    small = VisualTokenizer.load(f"timm:{timm_id}@98={file}")
    assert small.grid == (7, 7) and small.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "model, words",
    [
        ("timm:vit_nonsense_patch14", "does not know the encoder 'vit_nonsense_patch14'"),
        ("timm:resnet18", "cannot build this encoder|only plain vision transformers"),
        ("vit_tiny_patch16_224", "cannot be had"),
        ("local-dir:/nowhere", "config.json is missing"),
        ("no-such-model", "no checkpoint directory at 'no-such-model'"),
    ],
)
def test_encoders_that_cannot_be_had(model, words):
    with pytest.raises(CheckpointError, match=words):
        VisualTokenizer.load(model)


def test_encoder_settings_are_checked():
    with pytest.raises(ValueError, match="unknown resize strategy"):
        EncoderConfig("dinov2", checkpoints.TIMM_IDS[0], 98, HALF, HALF, "squeeze")


#: Of repositories: some that are one, and some that none is.
NAMES = ["a/b", "Org_1/a.b-c", "a/" + "b" * 96, "a/" + "b" * 97, "a/b--c", "a/b..c", "a/b.git", "a/b-", "a-/b", "a/b."]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_that_the_hubs_client_takes(name):
    try:
        huggingface_hub.utils.validate_repo_id(name)
        valid = True
    except ValueError:
        valid = False
    assert hub.is_id(name) == hub.is_id(f"{name}@main") == valid
    if not valid:
        with pytest.raises(CheckpointError, match="is not a Hugging Face id"):
            hub.fetch(name)


def test_a_small_file_that_is_large_is_not_read(tmp_path, monkeypatch):
    large = tmp_path / "config.json"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(large))
    with pytest.raises(CheckpointError, match="a/b: config.json has 1099511627776 bytes"):
        hub._copy("a/b", "0" * 40, "config.json", {"config.json": None}, tmp_path / "target")
