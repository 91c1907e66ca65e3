"""Tuned products: what takes them, what they depend on, and files that must not be believed. The search: test_product_search.py."""

import json
import os
import stat
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import fake_cublaslt  # noqa: E402
import fake_cuda  # noqa: E402
import numpy as np  # noqa: E402
from fake_cublaslt import choice, load  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception.tokenizer import cublaslt, runtime, tuned_products  # noqa: E402
from vla_perception.tokenizer.checkpoints import CheckpointError  # noqa: E402
from vla_perception.tokenizer.cublaslt import CublasLtError  # noqa: E402
from vla_perception.tokenizer.tuned_products import TunedLinear, digest, groups_of  # noqa: E402

#: Of the preset `tiny-random`.
NAMES = [
    f"{encoder} {layer}"
    for encoder in ("dinov2", "siglip")
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]
HALVES = choice(1, 66)
OTHER_KERNEL = "cuBLASLt proposes another one in its place; run vla-perception tune again"
OTHER_VALUES = "it gives other values than PyTorch's; run vla-perception tune again"


@pytest.fixture
def lt(monkeypatch, tmp_path):
    """A CPU that passes for a GPU with cuBLASLt, and an empty cache folder."""
    lt = fake_cublaslt.install(monkeypatch, tmp_path)
    with fake_cuda.one_thread():
        yield lt


def written(lt, network, chosen):
    """The file that has these choices for the network."""
    key = tuned_products.key_of(lt, groups_of(network))
    file = tuned_products.file_of(key)
    tuned_products.write(file, key, chosen)
    return file


# --- modules


def test_layers_keep_their_weights_and_names(lt):
    network = load().network
    before, linear = network.state_dict(), network.encoders["siglip"].vit.blocks[0].mlp.fc2
    groups = groups_of(network)
    assert [group.name for group in groups] == NAMES
    assert [(group.tokens, len(group.layers)) for group in groups] == [(16 + 5, 1)] * 4 + [(16, 1)] * 4
    after = network.state_dict()
    assert list(after) == list(before) and all(after[name] is not None for name in before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    layer = network.encoders["siglip"].vit.blocks[0].mlp.fc2
    assert isinstance(layer, TunedLinear) and layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
    again = groups_of(network)
    assert [group.products for group in again] == [{}] * 8
    assert all(one.products is other.products for one, other in zip(groups, again))
    assert not [module for module in network.projector.modules() if isinstance(module, TunedLinear)]


def test_layers_that_are_no_linear_layers_are_left(lt):
    network = load().network
    for block in network.encoders["dinov2"].vit.blocks:
        block.mlp.fc1 = nn.Sequential(block.mlp.fc1)
        del block.attn
    assert [group.name for group in groups_of(network)] == ["dinov2 mlp.fc2", *NAMES[4:]]


def test_only_rows_that_were_tuned_take_another_product(lt):
    linear = nn.Linear(32, 48).bfloat16().requires_grad_(False)
    rows = []

    def product(values, weight, bias):
        assert weight is linear.weight and bias is linear.bias
        rows.append(values.shape)
        return functional.linear(values, weight, bias) + 1

    tuned = TunedLinear(linear, {6: product})
    for shape in ((6, 32), (2, 3, 32), (5, 32), (1, 7, 32)):
        values = torch.randn(shape).bfloat16()
        expected = linear(values) + (1 if values.numel() == 6 * 32 else 0)
        assert torch.equal(tuned(values), expected)
    assert rows == [(6, 32), (2, 3, 32)]
    with torch.autocast("cpu", torch.bfloat16):  # which makes float32 of some operations' results
        assert torch.equal(tuned(torch.ones(6, 32)), linear(torch.ones(6, 32)))


def test_products_that_are_wrong_or_unsteady_are_told_apart(lt):
    layer = TunedLinear(nn.Linear(32, 48).bfloat16().requires_grad_(False), {})
    right, other, wrong, refused, unsteady = lt.proposals(10, layer.weight, layer.bias)
    found = [tuned_products.gives_the_product(each, layer, 10) for each in (right, other, wrong, unsteady)]
    assert found == [True, True, False, False]
    with pytest.raises(CublasLtError):
        tuned_products.gives_the_product(refused, layer, 10)
    nan = fake_cublaslt.Product(lambda *given: functional.linear(*given) * float("nan"), choice(9))
    assert not tuned_products.gives_the_product(nan, layer, 10)


# --- at a start


@torch.inference_mode()
def test_what_was_found_is_in_use_at_the_next_start_and_says_so(lt, caplog):
    caplog.set_level("INFO")
    untuned = load()
    chosen = {1: dict.fromkeys(NAMES, HALVES), 4: {"siglip mlp.fc2": HALVES}}
    file = written(lt, untuned.network, chosen)
    tokenizer = load()
    text = tuned_products.use(tokenizer.network)
    assert text == f"tuned products {digest(chosen)} for 1, 4 view(s)"
    assert f"{text} of {file}; `vla-perception tune --forget` removes them" in caplog.text
    used = {group.name: sorted(group.products) for group in groups_of(tokenizer.network)}
    assert used == {name: [16, 64] if name == "siglip mlp.fc2" else [16 + 5 * (name[0] == "d")] for name in NAMES}
    found, expected = {}, {}
    for views in (1, 2):
        pixel_values = [torch.randn(views, 3, 56, 56), torch.randn(views, 3, 64, 64)]
        found[views], expected[views] = (each.encode(pixel_values).tokens for each in (tokenizer, untuned))
        assert torch.equal(found[views], tokenizer.encode(pixel_values).tokens)
    assert torch.equal(found[2], expected[2])
    difference = float((found[1].double() - expected[1].double()).norm() / expected[1].double().norm())
    assert 0 < difference < 2e-2
    assert tuned_products.forget() == 1 and not file.exists()
    assert tuned_products.use(load().network) == "" and tuned_products.forget() == 0


def test_without_a_file_nothing_changes(lt, monkeypatch, tmp_path, caplog):
    network = load().network
    monkeypatch.setattr(cublaslt, "open_library", None)  # nobody looks for it
    assert tuned_products.use(network) == ""
    assert not [module for module in network.modules() if isinstance(module, TunedLinear)]
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "")
    assert tuned_products.use(network) == "" and not caplog.records


def test_without_the_library_products_stay(lt, monkeypatch, caplog):
    written(lt, load().network, {1: {NAMES[0]: HALVES}})

    def fails(device):
        raise CublasLtError("this cuBLASLt has no cublasLtMatmul")

    monkeypatch.setattr(cublaslt, "open_library", fails)
    assert tuned_products.use(load().network) == ""
    (record,) = caplog.records
    assert record.getMessage() == ("tuned products are not used: this cuBLASLt has no cublasLtMatmul")


@pytest.mark.parametrize(
    "other, reason",
    [
        (choice(1, 66, tile=7), OTHER_KERNEL),
        (replace(HALVES, multiprocessors=0), OTHER_KERNEL),
        (replace(HALVES, index=40), OTHER_KERNEL),
        (choice(2, 0), OTHER_VALUES),
        (choice(3, 66), "cublasLtMatmul ended with status 15"),
        (choice(4, 0), OTHER_VALUES),
    ],
    ids=["tile", "multiprocessors", "index", "wrong", "refused", "unsteady"],
)
def test_a_product_that_is_not_what_was_tuned_stays_as_it_is(lt, caplog, other, reason):
    written(
        lt, load().network, {2: {"dinov2 attn.qkv": other, "siglip mlp.fc1": HALVES}, 3: {"dinov2 attn.qkv": other}}
    )
    network = load().network
    text = tuned_products.use(network)
    assert text == f"tuned products {digest({2: {'siglip mlp.fc1': HALVES}})} for 2 view(s)"
    assert {group.name: list(group.products) for group in groups_of(network) if group.products} == {
        "siglip mlp.fc1": [32]
    }
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"the tuned product of dinov2 attn.qkv for {views} view(s) is not used: {reason}" for views in (2, 3)
    ]


def test_a_check_that_the_memory_does_not_suffice_for_ends_no_start(lt, monkeypatch, caplog):
    """Another number of views may have been tuned than is used."""
    written(lt, load().network, {64: {NAMES[0]: HALVES}, 1: {NAMES[0]: HALVES}})
    check = tuned_products.gives_the_product

    def full(product, layer, rows):
        if rows > 1000:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee documentation")
        return check(product, layer, rows)

    monkeypatch.setattr(tuned_products, "gives_the_product", full)
    assert tuned_products.use(load().network).endswith(" for 1 view(s)")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"the tuned product of {NAMES[0]} for 64 view(s) is not used: CUDA out of memory. Tried to allocate 20 GiB."
    )


def test_encoders_without_linear_layers_have_nothing_to_be_tuned(lt, monkeypatch, caplog):
    network = load().network
    written(lt, network, {1: {NAMES[0]: HALVES}})  # the folder is not empty
    monkeypatch.setattr(tuned_products, "_LAYERS", ("attn.fused",))
    assert groups_of(network) == [] and tuned_products.use(network) == "" and not caplog.records


def test_only_the_graph_in_16_bits_takes_them(lt, monkeypatch):
    monkeypatch.setattr(tuned_products, "use", lambda network: "tuned products 0123 for 1 view(s)")
    monkeypatch.setattr(runtime, "fuse_blocks", lambda network, dtype: "")
    monkeypatch.setattr(runtime, "quantize_encoders", lambda network: None)
    network, cuda = load().network, torch.device("cuda")

    def kernels(name, dtype, **options):
        return runtime.make_runtime(name, network, cuda, dtype, **options).kernels

    for dtype in (torch.bfloat16, torch.float16):
        assert kernels("graph", dtype) == kernels("auto", dtype) == "triton, tuned products 0123 for 1 view(s)"
        assert kernels("eager", dtype) == "pytorch"
    assert kernels("graph", torch.float32) == kernels("graph", torch.bfloat16, in_float8=True) == "triton"
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert "tuned" not in kernels("compile", torch.bfloat16)
    monkeypatch.setattr(runtime, "fuse_blocks", lambda network, dtype: "no Triton")
    assert kernels("graph", torch.bfloat16) == "pytorch (no Triton), tuned products 0123 for 1 view(s)"


def test_equal_choices_have_one_digest():
    one, other = {1: {"a": HALVES, "b": choice(0)}, 2: {}}, {2: {}, 1: {"b": choice(0), "a": HALVES}}
    assert digest(one) == digest(other)
    assert digest(one) not in (digest({1: {"a": HALVES, "b": choice(3)}, 2: {}}), digest({1: {"a": HALVES}, 2: {}}))


# --- files


def test_the_key_is_of_the_machine_the_versions_and_the_layers(lt, monkeypatch):
    def file(**choices):
        return tuned_products.file_of(tuned_products.key_of(lt, groups_of(load(**choices).network)))

    first = file()
    assert first == file(seed=5) == file(pool=2, token_strategy="cls+patch")  # neither weights nor what is behind
    others = {file(image_size=[70, 80]), file(encoders=["siglip"], image_size=64), file(compute_dtype="float16")}
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "another")
        others.add(file())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        others.add(file())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "99.0")
        others.add(file())
    lt.version += 1
    others.add(file())
    assert len(others | {first}) == 8


def test_a_file_is_its_owners_and_says_again_what_was_written(lt):
    network = load().network
    key = tuned_products.key_of(lt, groups_of(network))
    chosen = {1: {NAMES[0]: HALVES, NAMES[5]: choice(0)}, 4: {}}
    file = written(lt, network, chosen)
    assert tuned_products.read(file, key) == chosen
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert tuned_products.read(file.with_name("none.json"), key) == {}


def test_a_file_is_replaced_at_once_or_not_at_all(lt, monkeypatch):
    network = load().network
    key = tuned_products.key_of(lt, groups_of(network))
    file = written(lt, network, {1: {NAMES[0]: HALVES}})
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tuned_products.json, "dumps", lambda *given, **options: "x" * 5)
        patch.setattr(os, "replace", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            tuned_products.write(file, key, {2: {}})
    assert file.read_bytes() == before and [entry.name for entry in file.parent.iterdir()] == [file.name]


def changed(**views):
    def change(content):
        content["views"] = views
        return json.dumps(content)

    return change


def field(**changes):
    """A choice with other fields; None leaves one out."""

    def change(content):
        given = content["views"]["1"][NAMES[0]]
        for name, value in changes.items():
            target = given if name in given else given["configuration"]
            target[name] = value
            if value is None:
                del target[name]
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-20],
        lambda content: "[1]",
        lambda content: "[" * 100_000,
        lambda content: json.dumps(content) + " " * (1 << 18),
        lambda content: json.dumps({"key": content["key"]}),
        lambda content: json.dumps(content | {"views": [1]}),
        lambda content: json.dumps(content | {"key": content["key"] | {"device": "another"}}),
        lambda content: json.dumps(content | {"views": {"one": {}}}),
        lambda content: json.dumps(content | {"views": {"0": {}}}),
        lambda content: json.dumps(content | {"views": {"65": {}}}),
        lambda content: json.dumps(content | {"views": {"1": [HALVES.index]}}),
        lambda content: json.dumps(content | {"views": {"1": {NAMES[0]: 1}}}),
        field(index=None),
        field(index=1.5),
        field(index=True),
        field(index="1"),
        field(index=2**40),
        field(tile=None),
        field(tile=[1]),
        field(command="rm"),
    ],
)
def test_a_damaged_file_is_of_no_use_and_the_log_says_so(lt, caplog, damage):
    network = load().network
    file = written(lt, network, {1: {NAMES[0]: HALVES}})
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(CheckpointError, match=str(file)):
        tuned_products.read(file, tuned_products.key_of(lt, groups_of(network)))
    assert tuned_products.use(network) == ""
    assert not any(group.products for group in groups_of(network))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"tuned products are not used: {file}")
    assert len(record.getMessage()) < 500


def test_what_others_may_have_written_is_not_read(lt, tmp_path, caplog):
    network = load().network
    file = written(lt, network, {1: {NAMES[0]: HALVES}})
    text = file.read_text()
    file.chmod(0o620)
    assert tuned_products.use(network) == ""
    file.unlink()
    (tmp_path / "elsewhere").write_text(text)
    file.symlink_to(tmp_path / "elsewhere")
    assert tuned_products.use(network) == ""
    file.unlink()
    os.mkfifo(file, 0o600)  # whose reader would wait for a writer
    assert tuned_products.use(network) == ""
    assert len(caplog.records) == 3 and not any(group.products for group in groups_of(network))


# --- on a device


def other_proposals(lt, network, views):
    """Of every group a proposal that is not the first one, where there is one that is right."""
    chosen = {}
    for group in groups_of(network):
        rows, layer = views * group.tokens, group.layers[0]
        for product in lt.proposals(rows, layer.weight, layer.bias)[1:]:
            if tuned_products.gives_the_product(product, layer, rows):
                chosen[group.name] = product.choice
                break
    return chosen


@pytest.mark.gpu
@pytest.mark.parametrize("compute_dtype, tolerance", [("bfloat16", 2e-2), ("float16", 5e-3)])
def test_a_tuned_tokenizer_gives_the_same_tokens_and_the_same_bits_at_every_start(
    monkeypatch, tmp_path, compute_dtype, tolerance
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def start():
        return load(device="cuda", runtime="graph", compute_dtype=compute_dtype, image_size=[196, 224])

    untuned = start()
    assert "tuned" not in untuned.kernels
    lt = cublaslt.open_library(untuned.device)
    chosen = {views: other_proposals(lt, untuned.network, views) for views in (1, 2)}
    assert all(chosen.values())
    written(lt, untuned.network, chosen)
    tuned, again = start(), start()
    assert tuned.kernels == again.kernels == f"{untuned.kernels}, tuned products {digest(chosen)} for 1, 2 view(s)"
    random = np.random.default_rng(0)
    for views in (1, 2, 3):
        images = [random.integers(0, 256, (120, 160, 3), dtype=np.uint8) for _ in range(views)]
        first, second = (tuned.encode(tuned.preprocess(images)).tokens for _ in range(2))
        assert torch.equal(first, second) and torch.equal(first, again.encode(again.preprocess(images)).tokens)
        for _ in range(3):  # by graphs that preprocess, too
            assert torch.equal(tuned(images).tokens, first)
        before = untuned(images).tokens
        error = float((first.double() - before.double()).norm() / before.double().norm())
        assert error < tolerance and (views < 3 or error == 0)
    assert tuned.runtime == "graph" and not tuned.runtime_fallback
