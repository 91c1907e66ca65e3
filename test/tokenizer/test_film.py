"""OpenVLA-OFT with FiLM against results of its own wrapper, and what a condition is to whoever encodes."""

import json
import threading

import checkpoints
import film_checkpoints
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from parity import relative_error  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception import cli  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.checkpoints import CheckpointError  # noqa: E402
from vla_perception.tokens import tokenize  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def reference():
    return film_checkpoints.reference()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    state = film_checkpoints.lora_wrapped(film_checkpoints.film_state())
    return film_checkpoints.write(tmp_path_factory.mktemp("film") / "oft", state)


@pytest.fixture(scope="module", params=DEVICES)
def tokenizer(request, folder):
    """Of which `test_nothing_is_encoded_before_a_condition_came` comes first: conditions stay."""
    return VisualTokenizer.load(folder, device=request.param, compute_dtype="float32")


def pixel_values(reference) -> list[torch.Tensor]:
    return [torch.from_numpy(reference[f"coffee.pixels{index}"])[None] for index in range(2)]


def projected(values: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """OpenVLA's fused-gelu-mlp."""
    for index in (1, 2, 3):
        values = functional.gelu(values) if index > 1 else values
        values = functional.linear(values, weights[f"fc{index}.weight"], weights[f"fc{index}.bias"])
    return values


def test_every_key_of_the_reference_is_in_the_file(reference):
    keys = {name.replace(".gamma", ".scale_factor") for name in reference["keys"]}
    assert keys == set(film_checkpoints.film_state())


def test_nothing_is_encoded_before_a_condition_came(tokenizer, reference):
    assert tokenizer.condition_channels == 96 and tokenizer.condition is None
    tokenizer.warm_up(views=1, size=(40, 50))
    with pytest.raises(ValueError, match="Call set_condition"):
        tokenizer.encode(pixel_values(reference))
    with pytest.raises(ValueError, match="Call set_condition"):
        tokenizer([checkpoints.image()])


def test_agrees_with_openvla_oft(tokenizer, reference):
    """With LoRA merged; tokens by the projector of the directory."""
    condition = reference["condition"][0]
    np.testing.assert_allclose(reference["language_embeddings"].mean(axis=1)[0], condition, rtol=1e-6)
    digest = tokenizer.set_condition(condition)
    output = tokenizer.encode(pixel_values(reference), features=True)
    features = output.features[0].cpu().numpy()
    assert relative_error(features, reference["coffee.features"]) < 1e-4
    assert output.condition == digest == tokenizer.condition
    expected = projected(torch.from_numpy(features), checkpoints.projector(features.shape[1]))
    assert relative_error(output.tokens[0].cpu().numpy(), expected.numpy()) < 1e-4


def test_without_lora_the_same(tmp_path, reference):
    plain = film_checkpoints.write(tmp_path / "oft", film_checkpoints.film_state())
    tokenizer = VisualTokenizer.load(plain, device="cpu", compute_dtype="float32")
    tokenizer.set_condition(reference["condition"][0])
    features = tokenizer.encode(pixel_values(reference), features=True).features[0].numpy()
    assert relative_error(features, reference["coffee.features"]) < 1e-4


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({"r": 32, "lora_alpha": 16}, 0.5),  # as openvla-oft's code sets it
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"qkv": 8, "proj": 8, "fc1": 8, "fc2": 8, "fc3": 8}}, 2.0),
    ],
    ids=["oft", "rslora", "alpha_pattern"],
)
def test_beside_an_adapter_that_is_not_merged(settings, scale, tmp_path, reference):
    """Without weights in the directory: encoders of their own file, LoRA's projector on the base model's."""
    state = film_checkpoints.lora_wrapped(film_checkpoints.film_state(), settings["r"], scale)
    models = checkpoints.towers(seed=7)
    projector = checkpoints.projector(sum(model.num_features for model in models))
    base = checkpoints.write(tmp_path / "base", checkpoints.openvla_tensors(models, projector))
    folder = tmp_path / "oft"
    (folder / "lora_adapter").mkdir(parents=True)
    torch.save(state, folder / "vision_backbone--100_checkpoint.pt")
    entries = {"peft_type": "LORA", "base_model_name_or_path": str(base), "init_lora_weights": "gaussian"} | settings
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps(entries))
    generator = torch.Generator().manual_seed(3)
    # peft's names of the encoders inside of FiLM's wrapper; their values must not matter.
    adapter = {
        f"base_model.model.vision_backbone.{name.replace('.default.', '.')}": torch.full_like(value, 9.0)
        for name, value in state.items()
        if ".lora_" in name
    }
    for index in (1, 2, 3):
        weight = projector[f"fc{index}.weight"]
        a = torch.randn(settings["r"], weight.shape[1], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], settings["r"], generator=generator) * 0.1
        adapter |= {f"base_model.model.projector.fc{index}.lora_{half}.weight": x for half, x in (("A", a), ("B", b))}
        projector[f"fc{index}.weight"] = weight + scale * (b @ a)
    save_file(adapter, folder / "lora_adapter" / "adapter_model.safetensors")

    tokenizer = VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")
    tokenizer.set_condition(reference["condition"][0])
    output = tokenizer.encode(pixel_values(reference), features=True)
    features = output.features[0].numpy()
    assert relative_error(features, reference["coffee.features"]) < 1e-4
    expected = projected(torch.from_numpy(features), projector)
    assert relative_error(output.tokens[0].numpy(), expected.numpy()) < 1e-4
    with pytest.raises(CheckpointError, match="with FiLM; give the folder above it"):
        VisualTokenizer.load(base, adapter=folder / "lora_adapter")


@pytest.mark.parametrize("alpha", ["much", None, {}, 1e40])
def test_an_adapters_scale_that_cannot_be(alpha, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "lora_adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere", "lora_alpha": alpha}
    (tmp_path / "lora_adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        VisualTokenizer.load(tmp_path, device="cpu")


@pytest.mark.parametrize("vector", [np.zeros(95), np.zeros((1, 96)), np.full(96, np.nan), np.full(96, np.inf)])
def test_what_is_no_condition_is_refused_and_the_last_one_stays(tokenizer, vector):
    digest = tokenizer.set_condition(np.ones(96))
    with pytest.raises(ValueError, match="condition must be a vector of"):
        tokenizer.set_condition(vector)
    assert tokenizer.condition == digest
    assert tokenizer([checkpoints.image()]).condition == digest


def test_models_without_film_take_none():
    tokenizer = VisualTokenizer.load("tiny-random", device="cpu")
    with pytest.raises(ValueError, match="no FiLM"):
        tokenizer.set_condition(np.zeros(96))
    assert tokenizer.condition_channels == 0 and tokenizer([checkpoints.image()]).condition is None


def test_the_message_carries_the_digest_and_the_fingerprint_does_not(tokenizer):
    messages = []
    for value in (0.0, 1.0, 0.0):
        tokenizer.set_condition(np.full(96, value))
        messages.append(tokenize(tokenizer, {"full": checkpoints.image()}))
    assert messages[0].condition == messages[2].condition != messages[1].condition
    assert np.array_equal(messages[0].data, messages[2].data) and not np.array_equal(messages[0].data, messages[1].data)
    assert len({message.fingerprint for message in messages}) == 1
    again = type(messages[0]).from_bytes(messages[1].to_bytes())
    assert again.condition == messages[1].condition


def test_tokenize_takes_the_condition_for_one_file_of_tokens_too(folder, tmp_path, capsys):
    Image.fromarray(checkpoints.image()).save(tmp_path / "a.png")
    out, vector = tmp_path / "tokens.safetensors", np.linspace(-1, 1, 96, dtype=np.float32)
    command = ["tokenize", str(tmp_path / "a.png"), "--model", str(folder), "--out", str(out), "--device", "cpu"]
    assert cli.main(command) == 1 and "--condition FILE.npy" in capsys.readouterr().err
    np.save(tmp_path / "condition.npy", vector)
    assert cli.main([*command, "--condition", str(tmp_path / "condition.npy")]) == 0
    tokenizer = VisualTokenizer.load(folder, device="cpu")
    digest = tokenizer.set_condition(vector)
    with safe_open(out, "pt") as file:
        torch.testing.assert_close(file.get_tensor("tokens"), tokenizer([checkpoints.image()]).tokens)
        assert json.loads(file.metadata()["vla_perception"])["condition"] == digest


def test_no_tokens_are_of_two_conditions(tokenizer):
    """Conditions change while another thread encodes: every output is that of the condition whose digest it has."""
    image = checkpoints.image()
    conditions = [np.full(96, value) for value in (-1.0, 0.5, 2.0)]
    expected = {}
    for vector in conditions:
        digest = tokenizer.set_condition(vector)
        expected[digest] = tokenizer([image]).tokens.cpu()
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for vector in conditions:
                tokenizer.set_condition(vector)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        outputs = [tokenizer([image]) for _ in range(12)]
    finally:
        ended.set()
        thread.join()
    for output in outputs:
        torch.testing.assert_close(output.tokens.cpu(), expected[output.condition], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"vision_backbone.other.weight": torch.zeros(2)}, "belong to no known part"),
        ({"vision_backbone.featurizer.blocks.0.block.attn.qkv.lora_B.default.weight": None}, "one half of a pair"),
        ({"vision_backbone.featurizer.blocks.0.shift.weight": torch.zeros(384, 95)}, "do not take one condition"),
        ({"vision_backbone.featurizer.blocks.3.scale.bias": None}, "missing tensors: dinov2.blocks.3.scale.bias"),
    ],
)
def test_files_that_do_not_fit(change, match, folder, tmp_path):
    """By their names and shapes: the numbers are few."""
    state = torch.load(folder / "vision_backbone--100_checkpoint.pt") | change
    for path in folder.iterdir():
        if path.suffix != ".pt":
            (tmp_path / path.name).symlink_to(path)
    torch.save(
        {name: value for name, value in state.items() if value is not None},
        tmp_path / "vision_backbone--1_checkpoint.pt",
    )
    with pytest.raises(CheckpointError, match=match):
        VisualTokenizer.load(tmp_path, device="cpu")


def test_two_files_are_one_too_many(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "vision_backbone--200_checkpoint.pt").symlink_to(folder / "vision_backbone--100_checkpoint.pt")
    with pytest.raises(CheckpointError, match="2 vision_backbone files"):
        VisualTokenizer.load(tmp_path, device="cpu")


class Whole:
    """A miniature OpenVLA-OFT with FiLM from pixels to actions, in timm's and transformers' own modules."""

    def __init__(self, state: dict[str, torch.Tensor], width: int = 96) -> None:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(3)
        self.state, self.width = state, width
        self.towers = checkpoints.towers()
        for prefix, tower in zip(("featurizer", "fused_featurizer"), self.towers):
            head = f"vision_backbone.{prefix}."
            own = {name.removeprefix(head): value for name, value in state.items() if name.startswith(head)}
            own = {name.replace(".block.", ".").replace("scale_factor", "gamma"): value for name, value in own.items()}
            tower.load_state_dict({name: value for name, value in own.items() if name in tower.state_dict()})
        channels = sum(tower.num_features for tower in self.towers)
        self.projector = checkpoints.projector(channels, width)
        config = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        self.llama = transformers.LlamaModel(transformers.LlamaConfig(**config)).eval()
        self.head = torch.randn(width, 7)

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        return self.llama.get_input_embeddings()(ids)

    def features(self, pixel_values: list[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        """FiLMedVisionTransformerBlock's forward, block by block up to the second-to-last."""
        results = []
        for prefix, tower, pixels in zip(("featurizer", "fused_featurizer"), self.towers, pixel_values):
            x = tower._pos_embed(tower.patch_embed(pixels))
            for index, block in enumerate(tower.blocks[:-1]):
                layers = (f"vision_backbone.{prefix}.blocks.{index}.{name}" for name in ("scale", "shift"))
                gamma, beta = (
                    functional.linear(condition, self.state[f"{layer}.weight"], self.state[f"{layer}.bias"])
                    for layer in layers
                )
                x = x + block.ls1(block.attn(block.norm1(x)))
                x = x * (1 + gamma[:, None]) + beta[:, None]
                x = x + block.ls2(block.mlp(block.norm2(x)))
            results.append(x[:, tower.num_prefix_tokens :])
        return torch.cat(results, dim=2)

    def tokens(self, pixel_values: list[torch.Tensor], condition: torch.Tensor) -> torch.Tensor:
        return projected(self.features(pixel_values, condition), self.projector)

    def act(self, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        text = self.embeddings(ids)
        inputs = torch.cat([text[:, :1], tokens.flatten(0, 1)[None], text[:, 1:]], dim=1)
        return self.llama(inputs_embeds=inputs).last_hidden_state[:, -1] @ self.head


@torch.inference_mode()
def test_split_and_whole_give_the_same_actions(tmp_path):
    """Two views, and an instruction that changes: the policy sends the mean of its embeddings, and nothing else of it."""
    state = film_checkpoints.film_state()
    whole = Whole(state)
    models = checkpoints.towers(seed=7)
    folder = tmp_path / "oft"
    checkpoints.write(folder, checkpoints.openvla_tensors(models, whole.projector), width=whole.width)
    torch.save(state, folder / "vision_backbone--100_checkpoint.pt")
    tokenizer = VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")
    pixels = tokenizer.preprocess([checkpoints.image(1), checkpoints.image(2)])
    found = []
    for seed in range(2):
        ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(seed))
        condition = whole.embeddings(ids).mean(dim=1)
        expected = whole.act(whole.tokens(pixels, condition), ids)
        tokenizer.set_condition(condition[0].numpy())
        actions = whole.act(tokenizer.encode(pixels).tokens, ids)
        assert relative_error(actions.numpy(), expected.numpy()) < 1e-4
        found.append(tokenizer.encode(pixels).tokens)
    assert not torch.allclose(found[0], found[1])
