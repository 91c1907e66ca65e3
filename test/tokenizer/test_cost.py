"""`vla-perception describe`: its arithmetic against modules that are there and forward passes that are counted."""

import json
from dataclasses import astuple, replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
import film_checkpoints  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from vla_perception import cli  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer, vits  # noqa: E402
from vla_perception.tokenizer.checkpoints import files, timm_encoders  # noqa: E402
from vla_perception.tokenizer.checkpoints.open import read_config  # noqa: E402
from vla_perception.tokenizer.cost import LanguageModel, as_text, describe  # noqa: E402
from vla_perception.tokenizer.encoder import PatchEncoder  # noqa: E402
from vla_perception.tokenizer.presets import PRESETS  # noqa: E402
from vla_perception.tokenizer.timm_import import on_meta  # noqa: E402

#: A short timm encoder of each family: registers and no pooling head, and the other way round.
TINY = ("test_vit.r160_in1k", "test_vit3.r160_in1k")


def counted(function) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"token_strategy": "cls+patch"},
        {"token_strategy": "cls", "projector": "linear"},
        {"pool": 2, "projector": "gelu-mlp"},
        {"encoders": ["siglip"], "projector": "none"},
        {"encoders": ["dinov2"], "image_size": [200]},
    ],
    ids=str,
)
def test_operations_parameters_and_bytes_are_those_of_a_real_forward_pass(choices):
    tokenizer = VisualTokenizer.load("tiny-random", runtime="eager", **choices)
    it = describe(read_config("tiny-random", **choices), views=2, dtype="float32")
    pixels = tokenizer.preprocess([checkpoints.image(), checkpoints.image()])
    flops = counted(lambda: tokenizer.encode(pixels))
    assert 2 * it["flops_per_view"] == pytest.approx(flops, rel=0.01)
    output = tokenizer.encode(pixels)
    assert it["bytes"]["message"] == output.tokens.nbytes
    assert [it["tokens_per_view"], it["token_width"]] == list(output.tokens.shape[1:])
    assert tuple(it["grid"]) == tokenizer.grid
    network = tokenizer.network
    assert it["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert it["bytes"]["weights"] == sum(parameter.nbytes for parameter in network.parameters())
    assert it["projector"]["parameters"] == sum(parameter.numel() for parameter in network.projector.parameters())
    assert it["bytes"]["pixel_values_per_view"] * 2 == sum(values.nbytes for values in pixels)


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_operations_of_each_encoder(name, cls_token):
    config = read_config(f"timm:{name}@96", token_strategy="cls+patch" if cls_token else "patch")
    tower = PatchEncoder(config.encoders[0], cls_token=cls_token).eval()
    pixels = torch.zeros(1, 3, 96, 96)
    flops = counted(lambda: tower.forward_both(pixels) if cls_token else tower(pixels))
    (encoder,) = describe(config)["encoders"]
    assert encoder["flops"] == pytest.approx(flops, rel=0.01)
    assert encoder["parameters"] == sum(parameter.numel() for parameter in tower.parameters())


@pytest.mark.parametrize("strategy", ["patch", "cls+patch"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_encoders_are_timms(preset, strategy):
    """What is known of them without timm, and what timm builds."""
    if strategy != "patch" and preset in ("pi0", "pi05", "smolvla"):
        with pytest.raises(ValueError, match="has no cls token"):
            PRESETS[preset].with_options(trained=False, token_strategy=strategy)
        return
    config = PRESETS[preset].with_options(trained=False, token_strategy=strategy)
    for encoder in config.encoders:
        with on_meta():
            tower = PatchEncoder(encoder, cls_token=config.cls_token)
        same_vit(vits.by_name(encoder, config.cls_token), vits.of_module(tower))


def same_vit(known, built):
    assert replace(known, layers=()) == replace(built, layers=())
    assert sorted(map(astuple, known.layers)) == sorted(map(astuple, built.layers))


def test_film_has_parameters_and_no_operations_of_its_own_for_an_image(tmp_path):
    """OpenVLA's encoders by arithmetic, and small ones in a real forward pass."""
    for encoder in PRESETS["openvla-7b"].encoders:
        plain, modulated = encoder, replace(encoder, film=4096)
        with on_meta():
            tower = PatchEncoder(modulated)
        known, without = vits.by_name(modulated, False), vits.by_name(plain, False)
        same_vit(known, vits.of_module(tower))
        assert known.layers == without.layers
        assert known.parameters - without.parameters == 2 * known.blocks * 4097 * known.channels

    folder = film_checkpoints.write(tmp_path / "oft", film_checkpoints.film_state())
    it = describe(read_config(str(folder)))
    tokenizer = VisualTokenizer.load(folder, device="cpu", runtime="eager")
    tokenizer.set_condition([0.5] * 96)
    pixels = tokenizer.preprocess([checkpoints.image()])
    assert it["flops_per_view"] == pytest.approx(counted(lambda: tokenizer.encode(pixels)), rel=0.01)
    assert it["parameters"] == sum(parameter.numel() for parameter in tokenizer.network.parameters())
    assert "  modulated    by FiLM: 2 layers 96 → 384 in each block, computed when the instruction changes" in as_text(
        it
    )


def test_what_is_not_openvlas_own_is_said():
    text = as_text(describe(PRESETS["smolvla"]))
    assert "  resized by   resize_with_pad_top_left" in text
    assert "  runs         12 blocks of 12 heads and the final norm, activation gelu_tanh" in text
    assert "resized by" not in as_text(describe(PRESETS["openvla-7b"]))


@pytest.mark.parametrize("change", [{"image_size": 8}, {"overrides": {"mlp_ratio": 2.0}}, {"timm_id": "test_vit"}])
def test_other_encoders_are_not_guessed(change):
    assert vits.by_name(replace(PRESETS["tiny-random"].encoders[0], **change), False) is None


def test_openvlas_own_numbers_from_torch_on_the_meta_device():
    """The whole of openvla-7b, too large to run here: torch's counter needs no values."""
    from vla_perception.tokenizer.network import empty_network

    network = empty_network(PRESETS["openvla-7b"])
    pixels = [torch.empty(1, 3, 224, 224, device="meta")] * 2
    it = describe(PRESETS["openvla-7b"])
    assert it["flops_per_view"] == pytest.approx(counted(lambda: network(pixels)), rel=0.01)
    assert it["tokens_per_view"] * it["token_width"] == 256 * 4096


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_a_language_models_prefill_and_cache(kv_heads):
    transformers = pytest.importorskip("transformers")
    model = LanguageModel(width=64, layers=3, heads=4, kv_heads=kv_heads)
    settings = model.settings()
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=10,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=settings["kv_heads"],
            intermediate_size=settings["mlp_width"],
            attn_implementation="eager",
        )
    )
    prompt = torch.zeros(1, 200, 64)
    with torch.no_grad():
        total, attention = model.prefill(200)
        flops = counted(lambda: llama(inputs_embeds=prompt))
        cache = llama(inputs_embeds=prompt, use_cache=True).past_key_values
    assert total == pytest.approx(flops, rel=0.01)
    weights = sum(
        parameter.numel() for name, parameter in llama.named_parameters() if ".proj" in name or "_proj" in name
    )
    assert total - attention == 2 * 200 * weights
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert model.cache_bytes(200, 4) == held


def test_llama_2_has_the_width_of_its_mlp():
    assert LanguageModel().settings()["mlp_width"] == 11008
    assert LanguageModel(width=5120, layers=40, heads=40).settings()["mlp_width"] == 13824


def test_arithmetic_is_shown():
    text = as_text(describe(read_config("prism-dinosiglip-384px")))
    assert "384 / 14 = 27.43 → 27 × 27 = 729; 6 pixels at the right and bottom not seen" in text
    assert "1024 + 1152 = 2176" in text
    assert "fused-gelu-mlp 2176 → 8704 → 4096 → 4096" in text
    text = as_text(describe(read_config("base")))
    assert "224 / 16 = 14 → 14 × 14 = 196" in text and "768 + 768 = 1536" in text
    text = as_text(describe(read_config("openvla-7b", pool=4)))
    assert "16 / 4 × 16 / 4 = 4 × 4 = 16 per view" in text


def test_tokens_cost_the_language_model_more_than_in_proportion():
    rows = describe(read_config("openvla-7b"), views=4, text_tokens=0)["downstream"]
    cost = {(row["views"], row["pool"]): row for row in rows}
    assert {views for views, _ in cost} == {1, 2, 4} and {pool for _, pool in cost} == {1, 2, 4, 8}
    assert cost[4, 1]["visual_tokens"] == 4 * 256 and cost[4, 2]["visual_tokens"] == 256
    assert cost[4, 1]["prefill_flops"] > 4 * cost[1, 1]["prefill_flops"]
    assert cost[4, 2]["prefill_flops"] == cost[1, 1]["prefill_flops"]
    assert cost[4, 1]["kv_cache_bytes"] == 4 * cost[1, 1]["kv_cache_bytes"]


def test_a_checkpoint_is_described_by_its_headers(tmp_path, monkeypatch):
    models = checkpoints.towers(TINY, (160, 160))
    weights = checkpoints.projector(sum(model.embed_dim for model in models))
    tensors = checkpoints.openvla_tensors(models, weights)
    folder = checkpoints.write(tmp_path / "model", tensors, timm_ids=TINY, sizes=(160, 160))
    monkeypatch.setattr(files.SafetensorsFile, "get", lambda *_: pytest.fail("a weight was read"))
    it = describe(read_config(str(folder)))
    assert it["model"] == "model" and it["token_width"] == checkpoints.WIDTH
    assert it["grid"] == [10, 10] and len(it["encoders"]) == 2


def test_timms_encoders_are_described_without_their_weights(monkeypatch):
    monkeypatch.setattr(timm_encoders, "_download", lambda *_, **__: pytest.fail("something was fetched"))
    name = "timm:vit_base_patch14_reg4_dinov2.lvd142m@196+vit_base_patch16_siglip_224.webli"
    it = describe(read_config(name))
    assert it["channels"] == 768 + 768 and it["tokens_per_view"] == 196
    assert it["projector"]["kind"] == "none" and "a projector of the policy's own" in as_text(it)
    resized = describe(read_config(name, image_size=[0, 225]))
    assert [encoder["image_size"] for encoder in resized["encoders"]] == [196, 225]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["no-such-model"], "no checkpoint directory at"),
        (["openvla-7b", "--llm-heads", "7"], "heads must divide the width"),
        (["openvla-7b", "--pool", "3"], "pool 3 does not divide"),
        (["openvla-7b", "--views", "0"], "at least 1"),
        (["timm:vit_no_such_thing"], "does not know"),
        (["base", "--image-size", "224", "224"], "grids differ"),
        (["timm:vit_base_patch16_siglip_224.webli", "--image-size", "224", "0"], "one or 1 whole numbers"),
    ],
)
def test_errors_say_why(arguments, reason, capsys):
    assert cli.main(["describe", *arguments]) == 1
    assert reason in capsys.readouterr().err


def test_command(capsys):
    assert cli.main(["describe", "base", "--views", "3", "--rate", "5", "--dtype", "float32"]) == 0
    assert "3 views" in capsys.readouterr().out
    arguments = ["--llm-width", "896", "--llm-layers", "24", "--llm-heads", "14", "--llm-kv-heads", "2", "--json"]
    assert cli.main(["describe", "minivla", "--llm-mlp-width", "4864", *arguments]) == 0
    it = json.loads(capsys.readouterr().out)
    assert it["language_model"] == {
        "width": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "mlp_width": 4864,
        "text_tokens": 32,
    }
    assert it["bytes_per_second"] == 256 * 896 * 2 * 30


def test_the_documentation_shows_what_the_command_prints(capsys):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert cli.main(["describe", "prism-dinosiglip-384px"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(line.rstrip() for line in lines) in page
    assert cli.main(["describe", "openvla-7b", "--views", "4"]) == 0
    table = {line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("   ")}
    shown = (
        page.partition("`vla-perception describe openvla-7b --views 4`, in part:")[2].split("```")[1].splitlines()[2:]
    )
    assert len(shown) == 9 and {line.strip() for line in shown} <= table
