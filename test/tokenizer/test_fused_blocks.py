"""Triton's kernels and the blocks made of them, beside PyTorch: in Triton's interpreter on a CPU, and on a GPU.

The interpreter cuts float32 off to bfloat16 where a GPU rounds, and multiplies bfloat16 wrongly: float16 stands in.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer, dependent_launches, fused_blocks, triton_kernels  # noqa: E402
from vla_perception.tokenizer.config import TokenizerConfig  # noqa: E402
from vla_perception.tokenizer.fused_blocks import FusedBlock, fuse_blocks  # noqa: E402
from vla_perception.tokenizer.network import TokenizerNetwork  # noqa: E402
from vla_perception.tokenizer.presets import PRESETS  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
#: Relative L2: half a unit in the last place, and some.
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def relative(found, expected):
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 384), (1, 3, 1152), (3, 100), (1, 1, 16)])
@pytest.mark.parametrize("parts", ["values", "delta", "gamma"])
@torch.inference_mode()
def test_sum_and_layer_norm(dtype, shape, parts):
    channels = shape[-1]
    values, delta, gamma = (
        noise(*shape, dtype=dtype) * 3 + 1,
        noise(*shape, dtype=dtype, seed=1),
        noise(channels, dtype=dtype),
    )
    norm = nn.LayerNorm(channels, eps=1e-6, device=DEVICE, dtype=dtype)
    norm.weight.copy_(noise(channels, seed=2))
    norm.bias.copy_(noise(channels, seed=3))
    delta, gamma = None if parts == "values" else delta, gamma if parts == "gamma" else None
    before = values.clone()
    total, normal = triton_kernels.add_layer_norm(values, delta, gamma, norm)
    assert torch.equal(values, before)
    expected = values if delta is None else values + delta if gamma is None else torch.addcmul(values, delta, gamma)
    torch.testing.assert_close(total, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)
    # Of the sum as it was rounded, and better than a dtype's last bit.
    exact = functional.layer_norm(total.double(), (channels,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert relative(normal, exact) < ROUNDING[dtype]


@torch.inference_mode()
def test_layer_norm_of_large_and_constant_rows():
    norm = nn.LayerNorm(384, eps=1e-6, device=DEVICE)
    values = torch.stack([torch.full((384,), 7.0), torch.zeros(384), noise(384).cpu() + 1000.0]).to(DEVICE)
    _, normal = triton_kernels.add_layer_norm(values, None, None, norm)
    assert not normal[:2].any()
    assert relative(normal[2], functional.layer_norm(values[2].double(), (384,), eps=1e-6)) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 700), (1, 1), (2, 2, 1024)])
@torch.inference_mode()
def test_gelu(dtype, shape):
    values = noise(*shape, dtype=dtype) * 4
    odd = torch.tensor([float("inf"), float("nan"), -20.0, 0.0], device=DEVICE, dtype=dtype)
    for tanh, name in ((False, "none"), (True, "tanh")):
        found, exact = triton_kernels.gelu(values, tanh), functional.gelu(values.double(), approximate=name)
        assert relative(found, exact) < ROUNDING[dtype]
        nan = torch.isnan(triton_kernels.gelu(odd, tanh))
        assert torch.equal(nan, torch.tensor([False, True, False, False], device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "views, tokens, heads, width",
    [(1, 70, 2, 64), (2, 16, 3, 72), (1, 1, 2, 32), (2, 65, 1, 128), (3, 64, 1, 16), (1, 40, 2, 80), (1, 40, 1, 112)],
)
@torch.inference_mode()
def test_attention(dtype, views, tokens, heads, width):
    projected = noise(views, tokens, 3 * heads * width, dtype=dtype) * 2
    found = triton_kernels.attention(projected, heads, width**-0.5)
    query, key, value = projected.double().view(views, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    exact = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    assert relative(found, exact) < 2 * ROUNDING[dtype]


@torch.inference_mode()
def test_what_is_not_finite_is_not_hidden():
    projected = noise(1, 20, 96, dtype=torch.float16)
    projected[0, 3, 40] = float("nan")  # a key
    assert triton_kernels.attention(projected, 1, 1.0).isnan().all()
    norm = nn.LayerNorm(96, device=DEVICE, dtype=torch.float16)
    assert triton_kernels.add_layer_norm(projected, None, None, norm)[1].isnan().any(-1).sum() == 1


def load(**choices):
    return VisualTokenizer.load("tiny-random", runtime="eager", device=DEVICE, **{"image_size": [56, 64]} | choices)


@pytest.mark.parametrize(
    "choices",
    [
        {"token_strategy": "cls+patch"},
        {"encoders": ["dinov2"], "image_size": 56, "compute_dtype": "float16"},
    ],
)
@torch.inference_mode()
def test_encoders_of_fused_blocks_give_what_timms_do(choices):
    plain, fused = load(**choices), load(**choices)
    dtype = getattr(torch, fused.compute_dtype)
    assert fuse_blocks(fused.network, dtype) == ""
    for encoder in fused.network.encoders.values():
        assert {type(block) for block in encoder.vit.blocks} == {FusedBlock}
    assert fused.network.state_dict().keys() == plain.network.state_dict().keys()
    assert all(
        torch.equal(value, plain.network.state_dict()[name]) for name, value in fused.network.state_dict().items()
    )
    pixel_values = [noise(2, 3, encoder.image_size, encoder.image_size) for encoder in plain.config.encoders]
    found, expected = (tokenizer.encode(pixel_values, features=True) for tokenizer in (fused, plain))
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    assert 0 < relative(found.features, expected.features) < limit and relative(found.tokens, expected.tokens) < limit


def test_encoders_keep_their_blocks_where_the_kernels_fail(monkeypatch):
    """One of the two only: each is tried for itself."""
    tokenizer = load()
    kept = tokenizer.network.encoders["siglip"].vit.blocks
    attempt = fused_blocks._try

    def fails(block, encoder, dtype):
        if encoder.config.name == "siglip":
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")
        attempt(block, encoder, dtype)

    monkeypatch.setattr(fused_blocks, "_try", fails)
    assert fuse_blocks(tokenizer.network, torch.float32) == "siglip: RuntimeError: Failed to find C compiler."
    assert {type(block) for block in tokenizer.network.encoders["dinov2"].vit.blocks} == {FusedBlock}
    assert {type(block) for block in kept} == {fused_blocks.Block}
    tokenizer.warm_up()


def test_kernels_are_used_without_dependent_launches_where_these_fail(monkeypatch, caplog):
    def fails():
        if dependent_launches.WANTED:
            raise RuntimeError("Triton Error [CUDA]: operation not supported")
        return {"dependent": False}

    monkeypatch.setattr(dependent_launches, "in_use", lambda: dependent_launches.WANTED)
    monkeypatch.setattr(dependent_launches, "WANTED", True)
    if DEVICE == "cuda":  # Triton's interpreter cannot wait by itself
        monkeypatch.setattr(triton_kernels, "launch_options", fails)
    tokenizer = load(encoders=["siglip"], image_size=64)
    assert fuse_blocks(tokenizer.network, torch.float32) == ""
    assert not dependent_launches.WANTED and "without dependent launches" in caplog.text and len(caplog.records) == 1
    tokenizer.warm_up()


def test_kernels_that_compute_something_else_are_not_used(monkeypatch):
    tokenizer = load(encoders=["siglip"], image_size=64)
    monkeypatch.setattr(triton_kernels, "gelu", lambda values, tanh: functional.relu(values))
    reason = fuse_blocks(tokenizer.network, torch.float32)
    assert reason.startswith("siglip: ValueError: Triton's kernels give other values than PyTorch's, relative L2 ")
    assert {type(block) for block in tokenizer.network.encoders["siglip"].vit.blocks} == {fused_blocks.Block}


def test_without_triton_blocks_stay(monkeypatch):
    tokenizer = load(encoders=["siglip"], image_size=64)
    monkeypatch.setitem(sys.modules, "vla_perception.tokenizer.triton_kernels", None)
    monkeypatch.delattr("vla_perception.tokenizer.triton_kernels")
    reason = fuse_blocks(tokenizer.network, torch.float32)
    assert reason.startswith(("siglip: ModuleNotFoundError", "siglip: ImportError"))
    tokenizer.warm_up()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.mlp, "act", nn.SiLU()),
        lambda block: setattr(block.mlp, "norm", nn.LayerNorm(1536)),
        lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(64)),
        lambda block: setattr(block.attn, "gate", nn.Linear(384, 384)),
        lambda block: setattr(block, "norm1", nn.LayerNorm(384, elementwise_affine=False)),
    ],
)
def test_blocks_that_do_something_else_stay(change):
    tokenizer = load(encoders=["siglip"], image_size=64)
    blocks = tokenizer.network.encoders["siglip"].vit.blocks
    change(blocks[1])
    assert fuse_blocks(tokenizer.network, torch.float32) == "siglip: its blocks are unusual"
    assert {type(block) for block in blocks} == {fused_blocks.Block}


@torch.inference_mode()
def test_patches_are_padded_to_what_products_like():
    convolution = nn.Conv2d(3, 20, 14, stride=14, device=DEVICE)
    product = fused_blocks.PatchProduct(convolution)
    assert product._padded is not None  # before it is used, which may be within a capture
    pixels = noise(2, 3, 30, 42)
    for _ in range(2):
        torch.testing.assert_close(product(pixels), convolution(pixels), rtol=1e-3, atol=1e-4)
    assert product._padded.shape == (20, 592) and not product._padded[:, 588:].any()
    assert set(product.state_dict()) == {"weight", "bias"}


#: Compiles kernels for a GPU that need not be there: the interpreter accepts more than the compiler.
COMPILE = """
import sys
from dataclasses import replace
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

dependent = bool(int(sys.argv[1]))
if not dependent:  # as in a Triton that does not know it
    del triton.language.extra.cuda.gdc_wait
from vla_perception.tokenizer import triton_kernels as kernels
rows, keys, warps, stages = kernels.ATTENTION_BLOCKS
for kernel, constants, options in (
    (kernels._add_layer_norm_kernel, dict(channels=1152, has_delta=True, has_gamma=True, block=2048), {}),
    (kernels._gelu_kernel, dict(block=1024, tanh=False), {}),
    (kernels._gelu_kernel, dict(block=1024, tanh=True), {}),
    (kernels._attention_kernel, dict(heads=16, width=72, most=64, rest=16, rows=rows, keys=keys),
     dict(num_warps=warps, num_stages=stages)),
):
    constants["dependent"] = dependent
    kinds = {"epsilon": "fp32", "scale": "fp32"} | {"tokens": "i32", "length": "i32"}
    kinds = {name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in kernel.arg_names}
    source = ASTSource(kernel, kinds, constexprs=constants)
    options |= dict(launch_pdl=True) if dependent else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    before, *after = compiled.asm["ptx"].split("griddepcontrol.wait")
    assert compiled.asm["cubin"] and len(after) == dependent and "griddepcontrol.launch" not in before + "".join(after)
    if dependent:  # before that only the weights of the layer norm are read, and nothing is written
        assert "st." not in before and "cp.async" not in before
        assert ("ld.global" in before) == (kernel is kernels._add_layer_norm_kernel)
"""


@pytest.mark.parametrize("dependent", ["0", "1"])
def test_kernels_compile_for_hopper(dependent):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, dependent], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("compute_dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_the_graph_runtime_uses_them(compute_dtype, tolerance):
    exact = load(compute_dtype="float32")
    tokenizer = VisualTokenizer.load(
        "tiny-random", image_size=[56, 64], device="cuda", runtime="graph", compute_dtype=compute_dtype
    )
    assert tokenizer._runtime.kernels == "triton"
    pixel_values = [noise(2, 3, encoder.image_size, encoder.image_size) for encoder in exact.config.encoders]
    assert relative(tokenizer.encode(pixel_values).tokens, exact.encode(pixel_values).tokens) < tolerance


@torch.inference_mode()
def test_blocks_with_the_gelu_of_transformers_are_fused_too(tmp_path):
    """π0's and SmolVLA's: all blocks and the final norm behind them."""
    config = replace(
        PRESETS["tiny-random"].encoders[1],
        image_size=64,
        overrides={"depth": 3, "embed_dim": 384, "num_heads": 6, "act_layer": "gelu_tanh", "global_pool": ""},
        layer=-1,
        final_norm=True,
    )
    network = TokenizerNetwork(TokenizerConfig("tanh", (config,), "none", 0)).to(DEVICE).eval()
    pixel_values = [noise(2, 3, 64, 64)]
    expected, _ = network(pixel_values)
    assert fuse_blocks(network, torch.float32) == ""
    found, _ = network(pixel_values)
    assert 0 < relative(found, expected) < 1e-5
