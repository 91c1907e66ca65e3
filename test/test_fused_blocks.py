"""Triton's kernels and the blocks made of them, beside PyTorch: in Triton's interpreter on a CPU, and on a GPU.

The interpreter cuts float32 off to bfloat16 where a GPU rounds, and multiplies bfloat16 wrongly: float16 stands in.
"""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer, fused_blocks, triton_kernels, triton_products  # noqa: E402
from vla_perception.tokenizer.fused_blocks import FusedBlock, fuse_blocks  # noqa: E402

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
    values, delta, gamma = noise(*shape, dtype=dtype) * 3 + 1, noise(*shape, dtype=dtype, seed=1), noise(channels, dtype=dtype)
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
    found, exact = triton_kernels.gelu(values), functional.gelu(values.double())
    assert relative(found, exact) < ROUNDING[dtype]
    odd = torch.tensor([float("inf"), float("nan"), -20.0, 0.0], device=DEVICE, dtype=dtype)
    assert torch.equal(torch.isnan(triton_kernels.gelu(odd)), torch.tensor([False, True, False, False], device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows, columns, depth", [(70, 88, 72), (16, 32, 32), (1, 8, 104), (129, 40, 16)])
@torch.inference_mode()
def test_linear_layers_in_blocks(monkeypatch, dtype, gelu, rows, columns, depth):
    """Of whole blocks and not, beside the same in float64."""
    monkeypatch.setattr(triton_products, "BLOCKS_OF_FEW_ROWS", {"fc1": (32, 32, 32, 4, 3)})
    monkeypatch.setattr(triton_products, "MAX_WASTE", 31.0)
    layer = nn.Linear(depth, columns, device=DEVICE, dtype=dtype)
    values = noise(1, rows, depth, dtype=dtype) * 3
    found = triton_products.linear(values, layer, "fc1", gelu)
    exact = functional.linear(values.double(), layer.weight.double(), layer.bias.double())
    assert found.shape == exact.shape
    assert relative(found, functional.gelu(exact) if gelu else exact) < ROUNDING[dtype]


@torch.inference_mode()
def test_linear_layers_that_blocks_cannot_do_are_pytorchs(monkeypatch):
    monkeypatch.setattr(triton_products, "product", None)
    monkeypatch.setattr(triton_products, "BLOCKS_OF_FEW_ROWS", {"qkv": (16, 16, 16, 1, 1), "proj": None})
    for name, channels, dtype, rows in (
        ("qkv", 100, torch.float16, 16), ("qkv", 64, torch.float32, 16), ("proj", 64, torch.float16, 16),
        ("qkv", 64, torch.float16, 33),  # 48 in blocks
    ):  # fmt: skip
        layer, values = nn.Linear(channels, 64, device=DEVICE, dtype=dtype), noise(1, rows, channels, dtype=dtype)
        assert torch.equal(triton_products.linear(values, layer, name), layer(values))


@torch.inference_mode()
def test_blocks_of_few_and_of_many_rows(monkeypatch):
    few, many = (16, 16, 16, 1, 1), (32, 16, 16, 1, 1)
    monkeypatch.setattr(triton_products, "BLOCKS_OF_FEW_ROWS", {"fc2": few})
    monkeypatch.setattr(triton_products, "BLOCKS_OF_MANY_ROWS", {"fc2": many})
    monkeypatch.setattr(triton_products, "product", lambda values, weight, bias, blocks, gelu: blocks)
    layer = nn.Linear(16, 16, device=DEVICE, dtype=torch.float16)
    for views, blocks in ((1, few), (2, few), (3, many)):
        assert triton_products.linear(noise(views, 256, 16, dtype=torch.float16), layer, "fc2") == blocks


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "views, tokens, heads, width", [(1, 70, 2, 64), (2, 16, 3, 72), (1, 1, 2, 32), (2, 65, 1, 128), (3, 64, 1, 16)]
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
    return VisualTokenizer.load("small", runtime="eager", device=DEVICE, **{"image_size": [56, 64]} | choices)


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
    assert all(torch.equal(value, plain.network.state_dict()[name]) for name, value in fused.network.state_dict().items())
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


def test_kernels_that_compute_something_else_are_not_used(monkeypatch):
    tokenizer = load(encoders=["siglip"], image_size=64)
    monkeypatch.setattr(triton_kernels, "gelu", functional.relu)
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
        lambda block: setattr(block.mlp, "act", nn.GELU(approximate="tanh")),
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
    pixels = noise(2, 3, 30, 42)
    for _ in range(2):
        torch.testing.assert_close(product(pixels), convolution(pixels), rtol=1e-3, atol=1e-4)
    assert product._padded.shape == (20, 592) and not product._padded[:, 588:].any()
    assert set(product.state_dict()) == {"weight", "bias"}


#: Compiles kernels for a GPU that need not be there: the interpreter accepts more than the compiler.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vla_perception.tokenizer import triton_kernels as kernels, triton_products as products

dependent = bool(int(sys.argv[1]))
rows, keys, warps, stages = kernels.ATTENTION_BLOCKS
for kernel, constants, options in (
    (kernels._add_layer_norm_kernel, dict(channels=1152, has_delta=True, has_gamma=True, block=2048), {}),
    (kernels._gelu_kernel, dict(block=1024), {}),
    (kernels._attention_kernel, dict(heads=16, width=72, padded=128, rows=rows, keys=keys),
     dict(num_warps=warps, num_stages=stages)),
    (products._linear_kernel, dict(with_gelu=True, block_rows=128, block_columns=128, block_depth=64),
     dict(num_warps=8, num_stages=4)),
):
    constants["dependent"] = dependent
    kinds = {"epsilon": "fp32", "scale": "fp32"} | dict.fromkeys(("tokens", "length", "rows", "columns", "depth"), "i32")
    if kernel is products._linear_kernel:
        kinds |= dict.fromkeys(("values", "weight"), "tensordesc<bf16[128,64]>") | {"result": "tensordesc<bf16[128,128]>"}
    kinds = {name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in kernel.arg_names}
    source = ASTSource(kernel, kinds, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options | dict(launch_pdl=dependent))
    assert compiled.asm["cubin"] and ("griddepcontrol.wait" in compiled.asm["ptx"]) == dependent
    if kernel is products._linear_kernel:
        assert "wgmma" in compiled.asm["ptx"] and "cp.async.bulk.tensor" in compiled.asm["ptx"]
"""


@pytest.mark.parametrize("dependent", ["0", "1"])
def test_kernels_compile_for_hopper(dependent):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, dependent], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("compute_dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_the_graph_runtime_uses_them(compute_dtype, tolerance):
    exact = load(compute_dtype="float32")
    tokenizer = VisualTokenizer.load(
        "small", image_size=[56, 64], device="cuda", runtime="graph", compute_dtype=compute_dtype
    )
    assert tokenizer._runtime.kernels == "triton"
    pixel_values = [noise(2, 3, encoder.image_size, encoder.image_size) for encoder in exact.config.encoders]
    assert relative(tokenizer.encode(pixel_values).tokens, exact.encode(pixel_values).tokens) < tolerance
