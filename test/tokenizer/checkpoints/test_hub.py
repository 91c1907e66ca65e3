"""Hugging Face ids: only the vision part crosses the network, whatever the network does, and loads without it afterwards."""

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
import lerobot_checkpoints  # noqa: E402
from hub_server import COMMIT, Hub  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.checkpoints import CheckpointError, hub  # noqa: E402
from vla_perception.tokenizer.checkpoints import http_range as ranges  # noqa: E402
from vla_perception.tokenizer.checkpoints.open import read_config  # noqa: E402

ID = "someone/some-vla"
MIB = 1 << 20


def noise(seed: int, count: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


#: Two shards. In the first the vision part lies in two places, with the language model before and between them.
VISION = {
    "vision_backbone.featurizer.a": noise(0, MIB // 8),
    "vision_backbone.featurizer.b": noise(1, MIB // 4, torch.bfloat16),
    "vision_backbone.fused_featurizer.c": noise(2, 101, torch.bfloat16),
    "projector.fc1.weight": noise(3, MIB // 16),
}
SHARDS = (
    {
        "language_model.a": torch.zeros(MIB),
        "language_model.b": torch.zeros(2 * MIB, dtype=torch.bfloat16),
        **{name: value for name, value in VISION.items() if name.startswith("vision")},
    },
    {"language_model.c": torch.zeros(MIB), "projector.fc1.weight": VISION["projector.fc1.weight"]},
    {"language_model.d": torch.zeros(MIB)},
)
VISION_BYTES = sum(value.numel() * value.element_size() for value in VISION.values())
#: What a download may take beside: headers, and how far a server gets ahead of a client that stops reading.
BESIDE = 300_000


def repository(**changes: bytes | None) -> dict[str, bytes]:
    names = [f"model-{index:05d}-of-00003.safetensors" for index in (1, 2, 3)]
    index = {"weight_map": {tensor: name for name, shard in zip(names, SHARDS) for tensor in shard}}
    files: dict[str, bytes | None] = {
        "config.json": json.dumps({"timm_model_ids": ["x"]}).encode(),
        "preprocessor_config.json": b"{}",
        "README.md": b"no part of it",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{name: save(shard) for name, shard in zip(names, SHARDS)},
    }
    return {name: content for name, content in (files | changes).items() if content is not None}


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path, monkeypatch):
    """Caches and tokens of the test alone, and no waiting between tries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(ranges, "PAUSES", (0.0, 0.0))


@pytest.fixture
def serve(monkeypatch):
    """Starts the server on a repository's files."""
    running = []

    def start(files: dict[str, bytes], **settings) -> Hub:
        server = Hub(ID, files, **settings).__enter__()
        running.append(server)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return server

    yield start
    for server in running:
        server.__exit__()


def assert_vision_part(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    assert held.keys() == VISION.keys()
    for name, value in VISION.items():
        assert held[name].dtype == value.dtype and torch.equal(held[name], value), name


@pytest.mark.parametrize(
    "text, expected",
    [
        ("openvla/openvla-7b", True),
        ("openvla/openvla-7b@main", True),
        ("openvla/openvla-7b@refs/pr/3", True),
        ("openvla-7b", False),
        ("./models/openvla-7b", False),
        ("/models/openvla-7b", False),
        ("~/openvla-7b", False),
        ("models/openvla/openvla-7b", False),
        ("../openvla-7b", False),
        ("a b/c", False),
        ("openvla/openvla-7b@../../x y", False),
    ],
)
def test_what_an_id_is(text, expected):
    assert hub.is_id(text) is expected


def test_a_folder_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "openvla" / "openvla-7b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not hub.is_id("openvla/openvla-7b")


def test_only_the_vision_part_is_fetched(serve):
    server = serve(repository())
    folder = hub.fetch(ID)
    assert_vision_part(folder)
    assert VISION_BYTES < server.sent() < VISION_BYTES + BESIDE
    assert not any("00003-of" in path or "README" in path for _, path, _, _ in server.requests)
    assert folder.name == "some-vla"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["commit"] == COMMIT


def test_of_a_lerobot_policy_tower_and_connector_are_fetched(serve, tmp_path):
    """Beside statistics of states and actions, which LeRobot keeps in safetensors files of their own."""
    folder = lerobot_checkpoints.write(tmp_path / "policy", "smolvla", tiny_smolvla(), 32)
    expert = {"model.vlm_with_expert.lm_expert.norm.weight": torch.zeros(MIB)}
    tensors = load_file(folder / "model.safetensors") | expert
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"model.safetensors": save(tensors)}
    server = serve(files)
    fetched = hub.fetch(ID)
    vision = tiny_smolvla()
    assert set(load_file(fetched / "model.safetensors")) == set(vision)
    assert server.sent() < sum(value.nbytes for value in vision.values()) + BESIDE
    assert VisualTokenizer.load(ID, device="cpu").config.pixel_shuffle == 2
    assert read_config(ID).output_channels == 8  # what was fetched has the shapes


def test_a_policy_that_cannot_be_served_is_refused_before_weights_are_fetched(serve):
    config = {"type": "pi05", "use_visual_memory": True}
    server = serve({"config.json": json.dumps(config).encode(), "model.safetensors": save({"a": torch.zeros(MIB)})})
    with pytest.raises(CheckpointError, match="use_visual_memory"):
        hub.fetch(ID)
    assert server.sent() < BESIDE


@pytest.mark.parametrize("part", ["expert", "vision"])
def test_an_adapter_of_a_policy_of_lerobots(serve, tmp_path, part):
    """As LeRobot saves it, with the policy's configuration beside it; the base model is here."""
    base = lerobot_checkpoints.write(tmp_path / "base", "smolvla", tiny_smolvla(), 32)
    inner = {"expert": "lm_expert.layers.0", "vision": "vlm.model.vision_model.encoder.layers.0"}[part]
    module = f"base_model.model.model.vlm_with_expert.{inner}.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 64), f"{module}.lora_B.weight": torch.ones(64, 4)}
    settings = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(base)}
    files = {"config.json": (base / "config.json").read_bytes(), "adapter_config.json": json.dumps(settings).encode()}
    serve(files | {"adapter_model.safetensors": save(tensors)})
    if part == "vision":
        with pytest.raises(CheckpointError, match="2 tensors that change the vision tower.*merge it"):
            VisualTokenizer.load(ID, device="cpu")
    else:
        assert (
            VisualTokenizer.load(ID, device="cpu").fingerprint == VisualTokenizer.load(base, device="cpu").fingerprint
        )


def test_a_model_that_is_not_cut_behind_vision_is_refused_for_that_and_not_for_its_files(serve):
    serve({"config.json": b'{"model": {"observation_tokenizers": {}}}', "300000/default/checkpoint": b""})
    with pytest.raises(CheckpointError, match="Octo has no vision part"):
        hub.fetch(ID)


def test_the_configuration_of_a_policy_of_which_only_that_is_fetched(serve):
    serve({"config.json": b'{"type": "pi05"}', "model.safetensors": save({"a": torch.zeros(MIB)})})
    assert read_config(ID).output_channels == 2048  # π0's published tower: of the weights nothing is read


def tiny_smolvla() -> dict[str, torch.Tensor]:
    root, width = "model.vlm_with_expert.vlm.model.", 64
    tensors = {
        f"{root}connector.modality_projection.proj.weight": noise(1, 8 * 4 * width).view(8, 4 * width),
        f"{root}vision_model.embeddings.patch_embedding.weight": noise(2, width * 768).view(width, 3, 16, 16),
        f"{root}vision_model.embeddings.patch_embedding.bias": noise(3, width),
        f"{root}vision_model.embeddings.position_embedding.weight": noise(4, 4 * width).view(4, width),
        f"{root}vision_model.post_layernorm.weight": noise(5, width),
        f"{root}vision_model.post_layernorm.bias": noise(6, width),
    }
    layer = f"{root}vision_model.encoder.layers.0."
    for name in (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"):
        tensors |= {
            f"{layer}{name}.weight": noise(7, width**2).view(width, width),
            f"{layer}{name}.bias": noise(8, width),
        }
    for name in ("layer_norm1", "layer_norm2"):
        tensors |= {f"{layer}{name}.weight": noise(9, width), f"{layer}{name}.bias": noise(10, width)}
    return tensors


def test_progress_is_reported(serve, caplog, monkeypatch):
    monkeypatch.setattr(hub, "_PROGRESS_SEC", -1.0)
    serve(repository())
    with caplog.at_level("INFO", logger="vla_perception"):
        hub.fetch(ID)
    assert f"fetching the vision part, {VISION_BYTES / 1e6:.0f} MB" in caplog.text
    parts = [int(part) for part in re.findall(r"some-vla: (\d+) of \d+ MB", caplog.text)]
    assert parts == sorted(parts) and parts[-1] == round(VISION_BYTES / 1e6)


def test_two_that_fetch_at_once_fetch_once(serve):
    server = serve(repository())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(hub.fetch, [ID, ID])
    assert first == second
    assert_vision_part(first)
    assert server.sent() < VISION_BYTES + BESIDE


def test_neighbours_come_in_one_request(serve):
    server = serve(repository())
    hub.fetch(ID)
    first = [asked for method, path, asked, _ in server.requests if "00001-of" in path and "/storage/" in path]
    # The header; the float32 tensor; the two bfloat16 tensors side by side.
    assert len(first) == 3


def test_the_second_time_needs_no_network(serve, monkeypatch):
    server = serve(repository())
    folder = hub.fetch(ID)
    server.requests.clear()
    assert hub.fetch(ID) == folder
    assert [path for _, path, _, _ in server.requests] == [f"/api/models/{ID}/revision/main?blobs=true"]
    server.requests.clear()
    assert hub.fetch(f"{ID}@{COMMIT}") == folder
    assert server.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(ID) == folder
    assert server.requests == []


def test_a_hub_that_cannot_be_reached_is_done_without(serve, monkeypatch):
    serve(repository())
    folder = hub.fetch(ID)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        assert hub.fetch(ID) == folder
        with pytest.raises(CheckpointError, match="cannot be fetched from http://127.0.0.1"):
            hub.fetch(f"{ID}@v1")


def test_a_connection_that_breaks_is_taken_up_where_it_broke(serve):
    server = serve(repository(), breaks=[1 << 16, 200_000, 17, 300_000])
    assert_vision_part(hub.fetch(ID))
    assert server.breaks == []
    assert server.sent() < VISION_BYTES + BESIDE


def test_a_passing_failure_is_tried_again(serve):
    server = serve(repository(), failures=[503, 429])
    assert_vision_part(hub.fetch(ID))
    assert server.failures == []


def test_an_attempt_that_gave_up_is_resumed(serve):
    server = serve(repository(), breaks=[1 << 16, 1 << 16, 400_000, 0, 0])
    with pytest.raises(CheckpointError, match="What has arrived is kept"):
        hub.fetch(ID)
    assert server.breaks == []
    assert not list(Path(hub.cache_directory()).rglob("model.safetensors"))
    before = server.sent()
    assert before > 400_000
    assert_vision_part(hub.fetch(ID))
    assert server.sent() < VISION_BYTES + BESIDE + 2 * (1 << 17)  # two headers were read again


def test_bytes_that_may_not_have_reached_the_disk_are_fetched_again(serve):
    """After a power failure a file may be longer than what was written to it lastingly."""
    server = serve(repository(), breaks=[1 << 16, 1 << 16, 400_000, 0, 0])
    with pytest.raises(CheckpointError):
        hub.fetch(ID)
    (partial,) = Path(hub.cache_directory()).rglob("model.safetensors.partial")
    with open(partial, "ab") as stream:
        stream.write(bytes(50_000))
    assert_vision_part(hub.fetch(ID))
    assert server.sent() < VISION_BYTES + BESIDE + 2 * (1 << 17)


def test_a_damaged_count_starts_over(serve):
    serve(repository(), breaks=[1 << 16, 1 << 16, 400_000, 0, 0])
    with pytest.raises(CheckpointError):
        hub.fetch(ID)
    (counted,) = Path(hub.cache_directory()).rglob("*.partial.bytes")
    counted.write_text("999999999")
    assert_vision_part(hub.fetch(ID))


def test_a_server_that_refuses_ranges(serve, caplog):
    server = serve(repository(), ranges=False)
    assert_vision_part(hub.fetch(ID))
    assert "sends whole files" in caplog.text
    whole = sum(len(content) for name, content in server.files.items() if "00003-of" not in name)
    assert VISION_BYTES < server.sent() < 3 * whole  # the header, and once per dtype


def test_a_server_that_refuses_ranges_and_breaks_off(serve):
    serve(repository(), ranges=False, breaks=[MIB, MIB, 5 * MIB])
    assert_vision_part(hub.fetch(ID))


@pytest.mark.parametrize("claims", ["bytes 5-10/20", "bytes 0-65535/*", "", "pages 0-1/2"])
def test_a_server_that_sends_something_else_than_was_asked_for(serve, claims):
    serve(repository(), claims=claims)
    with pytest.raises(CheckpointError, match="asked for bytes from"):
        hub.fetch(ID)


def hostile(length: int) -> bytes:
    return length.to_bytes(8, "little") + b"{" + bytes(100)


@pytest.mark.parametrize(
    "content, reason",
    [
        (hostile(1 << 40), "header claims"),
        (hostile(50), "JSON"),
        (b"abc", "too short"),
        (save({"vision_backbone.x": torch.zeros(1000)})[:-100], "truncated"),
    ],
)
def test_a_file_that_is_no_safetensors_file(serve, content, reason):
    files = repository(**{"model.safetensors.index.json": None})
    files = {name: value for name, value in files.items() if not name.startswith("model-")}
    serve(files | {"model.safetensors": content})
    with pytest.raises(CheckpointError, match=reason):
        hub.fetch(ID)


@pytest.mark.parametrize(
    "says",
    [
        b"{}",
        b"[1]",
        b"nothing",
        b'{"id": 5, "sha": ["x"], "siblings": [{"rfilename": "config.json"}]}',
        b'{"id": "a/b", "sha": "%s", "siblings": 7}' % COMMIT.encode(),
        b'{"id": "a/b", "sha": "%s", "siblings": [{"rfilename": {}, "size": []}]}' % COMMIT.encode(),
    ],
)
def test_a_description_that_cannot_be_read_is_an_error(serve, says):
    serve(repository(), says=says)
    with pytest.raises(CheckpointError):
        hub.fetch(ID)


@pytest.mark.parametrize(
    "settings",
    [{"headers": {"Content-Encoding": "gzip"}}, {"headers": {"Content-Encoding": "deflate"}}, {"circles": True}],
)
def test_a_body_that_is_not_what_its_headers_say_and_redirections_without_end_are_errors(serve, settings):
    serve(repository(), **settings)
    with pytest.raises(CheckpointError, match="cannot be fetched from"):
        hub.fetch(ID)


def test_a_large_file_in_the_place_of_a_small_one_is_not_fetched(serve):
    server = serve(repository(**{"config.json": b" " * (33 * MIB)}))
    with pytest.raises(CheckpointError, match="config.json has 34603008 bytes, which no checkpoint needs"):
        hub.fetch(ID)
    assert server.sent("config.json") == 0


def test_a_token_is_needed(serve, monkeypatch):
    server = serve(repository(), token="hf_secret")
    with pytest.raises(CheckpointError, match="HF_TOKEN"):
        hub.fetch(ID)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert_vision_part(hub.fetch(ID))
    assert server.sent() > 0


def test_no_such_model_or_revision(serve):
    serve(repository())
    with pytest.raises(CheckpointError, match="neither a folder someone/else here nor a model"):
        hub.fetch("someone/else")
    with pytest.raises(CheckpointError, match="no revision 'v2'"):
        hub.fetch(f"{ID}@v2")
    assert_vision_part(hub.fetch(f"{ID}@v1"))


def test_offline_without_it(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        hub.fetch(ID)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"config.json": b'{"architecture": "vit_base"}'}, "hf-hub:someone/some-vla"),
        ({"config.json": b'{"model_type": "llama"}'}, "no timm_model_ids"),
        ({"vision_backbone--10000_checkpoint.pt": b""}, "FiLM"),
        ({"model-00002-of-00003.safetensors": None}, "lacks files that its index names"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}', "../b": b""}, "lacks files"),
    ],
)
def test_what_cannot_become_tokens_is_refused_before_weights_are_fetched(serve, changes, reason):
    server = serve(repository(**changes))
    with pytest.raises(CheckpointError, match=reason):
        hub.fetch(ID)
    assert server.sent() == 0


@pytest.mark.parametrize("prefix", ["model.", "policy.vla.", "base_model.model.model."])
def test_a_model_within_another_is_refused_before_weights_are_fetched(serve, prefix):
    """The language model would come, too: nobody knows it under that name."""
    files = {
        name: value
        for name, value in repository(**{"model.safetensors.index.json": None}).items()
        if "model-" not in name
    }
    tensors = {f"{prefix}{name}": value for shard in SHARDS for name, value in shard.items()}
    tensors[f"{prefix}language_model.embed.weight"] = torch.zeros(2_000_000)
    server = serve(files | {"model.safetensors": save(tensors)})
    with pytest.raises(CheckpointError, match=f"begin with the prefix '{prefix}'"):
        hub.fetch(ID)
    assert server.sent() < 200_000  # its header


def test_prismatic_runs_are_refused_with_what_to_do(serve):
    serve({"prism+7b/config.json": b"{}", "prism+7b/checkpoints/latest-checkpoint.pt": b""})
    with pytest.raises(CheckpointError, match=r"hf download someone/some-vla --include 'prism\+7b/\*'"):
        hub.fetch(ID)


def test_a_lora_adapter(serve):
    layer = "base_model.model.{}.layer.lora_A.weight"
    tensors = {layer.format("language_model"): torch.zeros(MIB), layer.format("projector"): torch.ones(1000)}
    server = serve({"adapter_config.json": b"{}", "adapter_model.safetensors": save(tensors)})
    folder = hub.fetch(ID)
    assert load_file(folder / "adapter_model.safetensors").keys() == {layer.format("projector")}
    assert server.sent() < BESIDE


def test_a_full_disk_is_noticed_before(serve, monkeypatch):
    server = serve(repository())
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: type("Usage", (), {"free": VISION_BYTES}))
    with pytest.raises(CheckpointError, match="make room"):
        hub.fetch(ID)
    assert server.sent() < BESIDE


def test_files_in_hugging_faces_own_cache_are_used(serve):
    server = serve(repository())
    for name in server.files:
        huggingface_hub.hf_hub_download(ID, name, revision=COMMIT)
    server.requests.clear()
    assert_vision_part(hub.fetch(ID))
    assert server.sent() == 0


def test_environment_of_a_new_process(serve, tmp_path):
    """HF_ENDPOINT and HF_TOKEN as a user sets them."""
    server = serve(repository(), token="hf_secret")
    program = f"from vla_perception.tokenizer.checkpoints import hub; print(hub.fetch({ID!r}))"
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "cache of the process"),
    }
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_vision_part(Path(result.stdout.strip()))


def test_tokens_are_those_of_the_whole_checkpoint(serve, tmp_path, monkeypatch):
    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokenizer.checkpoints.open import read_config
    from vla_perception.tokenizer.cost import describe

    timm_ids, sizes = ("test_vit.r160_in1k", "test_vit3.r160_in1k"), (160, 160)
    models = checkpoints.towers(timm_ids, sizes)
    tensors = checkpoints.openvla_tensors(models, checkpoints.projector(sum(model.embed_dim for model in models)))
    tensors["language_model.lm_head.weight"] = torch.zeros(4 * MIB)
    whole = checkpoints.write(tmp_path / "whole", tensors, timm_ids=timm_ids, sizes=sizes)
    server = serve({path.name: path.read_bytes() for path in whole.iterdir()})
    described = describe(read_config(ID))
    assert described["model"] == "some-vla" and server.sent() == 0
    ours = VisualTokenizer.load(ID)
    assert described["parameters"] == sum(value.numel() for value in ours.network.parameters())
    assert server.sent() < sum(value.nbytes for value in tensors.values()) - 15 * MIB + 2 * BESIDE
    expected = VisualTokenizer.from_checkpoint(whole)
    image = checkpoints.image()
    assert ours.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(ours(image).tokens.numpy(), expected(image).tokens.numpy())


def test_configuration_alone(serve):
    server = serve(repository())
    folder = hub.fetch_configuration(ID)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "preprocessor_config.json"]
    assert server.sent() == 0
    assert_vision_part(hub.fetch(ID))
    assert (hub.fetch_configuration(ID) / "model.safetensors").is_file()
