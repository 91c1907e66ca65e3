"""Encoders in float8: kernels in Triton's interpreter, blocks beside an emulation in PyTorch, and who is refused.

The interpreter rounds float8 wrongly (127 becomes 64), so there kernels write float32 and PyTorch rounds; bfloat16 is
wrong there as well, and float16 stands in.
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from ros_harness import ROOT  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception import baseline, bench  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer, devices, float8, runtime, tokenizer  # noqa: E402
from vla_perception.tokenizer.devices import Placement, place  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_KERNELS = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs Triton, and a CUDA device or TRITON_INTERPRET=1",
)


def relative(found, expected):
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def noise(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture
def kernels(monkeypatch):
    from vla_perception.tokenizer import float8_kernels

    if DEVICE == "cpu":
        multiply = float8.Float8Linear.forward
        monkeypatch.setattr(float8_kernels, "FLOAT8", torch.float32)
        monkeypatch.setattr(
            float8.Float8Linear,
            "forward",
            lambda self, values, scales: multiply(self, values.to(torch.float8_e4m3fn), scales),
        )
    return float8_kernels


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import float8_error

    return float8_error


def check_quantized(found, exact):
    """Of [rows, channels]: scales exactly, values within half of float8's last place, the largest one as 448."""
    exact = exact.double().flatten(0, -2)
    largest = exact.abs().amax(-1, keepdim=True)
    assert found.values.shape == exact.shape and found.scales.shape == (len(exact), 1)
    assert found.scales.dtype == torch.float32 and found.values.is_contiguous() and found.scales.is_contiguous()
    torch.testing.assert_close(found.scales.double() * 448, largest, rtol=1e-4, atol=1e-28)
    rounded = found.values.to(torch.float8_e4m3fn).double()
    assert rounded.abs().amax(-1).eq(448).logical_or(largest[:, 0] == 0).all()
    error = (rounded * found.scales.double() - exact).abs()
    assert (error <= exact.abs() * 2**-4 * 1.001 + largest * (2**-9 / 448)).all()  # normal numbers, and subnormal ones


@WITH_KERNELS
@pytest.mark.parametrize("shape", [(2, 3, 384), (1, 2, 4304), (5, 16), (1, 1, 1152), (3, 100)])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 300.0])
@torch.inference_mode()
def test_rows_are_quantized(kernels, shape, magnitude):
    values = noise(*shape, dtype=torch.float32) * magnitude
    check_quantized(kernels.quantize(values), values)
    check_quantized(kernels.gelu(values), functional.gelu(values.double()))
    check_quantized(kernels.gelu(values, True), functional.gelu(values.double(), approximate="tanh"))


@WITH_KERNELS
@pytest.mark.parametrize("shape", [(2, 5, 384), (1, 3, 1152), (3, 112)])
@pytest.mark.parametrize("parts", ["values", "delta", "gamma"])
@torch.inference_mode()
def test_sum_and_layer_norm_are_quantized(kernels, shape, parts):
    """The sum has the bits of bfloat16's kernel, and what is normalized and quantized is that sum."""
    from vla_perception.tokenizer import triton_kernels

    values, delta, gamma = noise(*shape) * 3 + 1, noise(*shape, seed=1), noise(shape[-1], seed=2)
    norm = nn.LayerNorm(shape[-1], eps=1e-6, device=DEVICE, dtype=torch.float16)
    norm.weight.copy_(noise(shape[-1], seed=3))
    norm.bias.copy_(noise(shape[-1], seed=4))
    pending = values, None if parts == "values" else delta, gamma if parts == "gamma" else None
    total, normal = kernels.add_layer_norm(*pending, norm)
    assert torch.equal(total, triton_kernels.add_layer_norm(*pending, norm)[0])
    check_quantized(
        normal, functional.layer_norm(total.double(), shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
    )


@WITH_KERNELS
@torch.inference_mode()
def test_rows_of_zeros_and_what_is_not_finite(kernels):
    values = noise(4, 32, dtype=torch.float32)
    values[0], values[1, 5], values[2, 7] = 0, float("nan"), float("inf")
    linear = float8.Float8Linear(
        nn.Linear(32, 16, device=DEVICE, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float16)
    )
    for quantized in (kernels.quantize(values), kernels.gelu(values)):
        result = linear(*quantized)
        torch.testing.assert_close(result[0], linear.bias, rtol=1e-2, atol=1e-3)
        assert result[1:3].isnan().all() and result[3].isfinite().all()


@torch.inference_mode()
def test_weights_have_a_scale_per_output_channel():
    weight = noise(48, 64, dtype=torch.float32) * torch.logspace(-4, 2, 48, device=DEVICE)[:, None]
    weight[7] = 0
    quantized, scales = float8.quantize_rows(weight)
    assert quantized.dtype == torch.float8_e4m3fn
    check_quantized(SimpleNamespace(values=quantized, scales=scales), weight)


@WITH_KERNELS
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_products(kernels, emulation, bias):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    linear, values = nn.Linear(112, 48, bias=bias, device=DEVICE, dtype=dtype), noise(2, 21, 112, dtype=dtype)
    expected = emulation.EmulatedLinear(linear)(values)
    found = float8.Float8Linear(linear)(*kernels.quantize(values))
    assert found.shape == (42, 48) and found.dtype == dtype
    assert relative(found.view_as(expected), expected) < 5e-3
    assert 1e-2 < relative(expected, linear(values)) < 5e-2


def load(**choices):
    dtype = "bfloat16" if DEVICE == "cuda" else "float16"
    return VisualTokenizer.load(
        "tiny-random",
        **{"runtime": "eager", "device": DEVICE, "image_size": [56, 64], "compute_dtype": dtype} | choices,
    )


def block_in_double(block, values, multiply):
    """A block in float64, rounded to the dtype of `values` where the kernels store; `multiply(layer, input)`."""
    attn, dtype = block.attn, values.dtype

    def normalize(norm, total):
        return functional.layer_norm(
            total.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps
        )

    def add(total, delta, scale):
        gamma = scale.gamma.double() if hasattr(scale, "gamma") else 1.0
        return (total.double() + delta.double() * gamma).to(dtype)

    views, tokens, channels = values.shape
    projected = multiply(attn.qkv, normalize(block.norm1, values)).to(dtype).double()
    query, key, value = projected.view(views, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale).transpose(1, 2).flatten(2)
    values = add(values, multiply(attn.proj, attended.to(dtype).double()).to(dtype), block.ls1)
    wide = multiply(block.mlp.fc1, normalize(block.norm2, values)).to(dtype).double()
    return add(values, multiply(block.mlp.fc2, functional.gelu(wide)).to(dtype), block.ls2)


def multiplied(layer, values):
    return functional.linear(values, layer.weight.double(), layer.bias.double())


@WITH_KERNELS
@pytest.mark.parametrize("name, size, views", [("dinov2", 56, 2), ("siglip", 64, 1)])
@torch.inference_mode()
def test_a_block_computes_what_the_emulation_does(kernels, emulation, name, size, views):
    def multiply_rounded(layer, values):
        kept = emulation.dequantized(values).double()
        return functional.linear(kept, emulation.dequantized(layer.weight).double(), layer.bias.double())

    block = load(encoders=[name], image_size=size).network.encoders[name].vit.blocks[0]
    values = noise(views, 21, block.norm1.weight.shape[0], dtype=block.norm1.weight.dtype)
    expected = block_in_double(block, values, multiply_rounded)
    exact = block_in_double(block, values, multiplied)
    assert relative(block(values), exact) < 5e-3  # so this is timm's block
    found = float8.Float8Block(block, hand_on=False)(values)
    # Of what the block adds. Sums in another order now and then become float8's neighbour.
    change, error = exact.double() - values.double(), exact.double() - expected.double()
    assert 1e-2 < float(error.norm() / change.norm()) < 1e-1
    assert float((found.double() - expected.double()).norm() / error.norm()) < 0.25


@WITH_KERNELS
@pytest.mark.parametrize("choices", [{"token_strategy": "cls+patch"}, {"encoders": ["siglip"], "image_size": 64}])
@torch.inference_mode()
def test_encoders_in_float8(kernels, emulation, choices):
    """As far from the exact ones as the emulation is; the two are no nearer to each other behind several blocks."""
    exact, emulated, quantized = (load(**choices) for _ in range(3))
    emulation.emulate(emulated.network)
    float8.quantize_encoders(quantized.network)
    blocks = [block for encoder in quantized.network.encoders.values() for block in encoder.vit.blocks]
    assert {type(block) for block in blocks} == {float8.Float8Block}
    layers = [module for module in quantized.network.modules() if isinstance(module, float8.Float8Linear)]
    assert len(layers) == 4 * len(blocks) and all(layer.weight.dtype == torch.float8_e4m3fn for layer in layers)
    pixel_values = [noise(2, 3, encoder.image_size, encoder.image_size) for encoder in exact.config.encoders]
    found, like, expected = (each.encode(pixel_values, features=True) for each in (quantized, emulated, exact))
    for part in ("features", "tokens"):
        error = relative(getattr(found, part), getattr(expected, part))
        assert error < baseline.TOLERANCES["float8"]
        assert 0.8 < error / relative(getattr(like, part), getattr(expected, part)) < 1.25
        assert relative(getattr(found, part), getattr(like, part)) < error
        assert (
            functional.cosine_similarity(getattr(found, part).double(), getattr(expected, part).double(), -1).min()
            > 0.99
        )
    assert found.tokens.dtype == expected.tokens.dtype


@WITH_KERNELS
def test_kernels_that_fail_or_compute_something_else_are_refused(kernels, monkeypatch):
    def fails(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    choices = {"encoders": ["siglip"], "image_size": 64}
    quantize = kernels.quantize
    monkeypatch.setattr(kernels, "gelu", fails)
    with pytest.raises(
        ValueError, match="does not run here, encoder siglip: RuntimeError: Failed to find C compiler.; "
    ):
        float8.quantize_encoders(load(**choices).network)
    monkeypatch.setattr(
        kernels, "gelu", lambda values, _tanh: kernels.Quantized(quantize(values).values, quantize(values).scales * 9)
    )
    with pytest.raises(ValueError, match="wrong values here, encoder siglip: relative L2 of a block .*choose bfloat16"):
        float8.quantize_encoders(load(**choices).network)


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda block: setattr(block.mlp, "act", nn.SiLU()),
            "does not know the blocks of encoder siglip",
        ),
        (lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(64)), "does not know the blocks of encoder siglip"),
        (lambda block: setattr(block.mlp, "fc1", nn.Linear(384, 1000)), "multiples of 16, and those of .* 1000"),
    ],
)
def test_blocks_that_it_does_not_know_are_refused(change, reason):
    small = load(encoders=["siglip"], image_size=64)
    change(small.network.encoders["siglip"].vit.blocks[0])
    with pytest.raises(ValueError, match=f"{reason}.*choose bfloat16"):
        float8.quantize_encoders(small.network)


# --- who gets it


@pytest.fixture
def card(monkeypatch):
    """`card(capability)`: a CUDA device of that capability."""
    monkeypatch.setattr(devices, "_operate", lambda device: None)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    return lambda capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (11, 0), (12, 1)])
def test_it_takes_a_card_that_multiplies_float8(card, capability):
    card(capability)
    if capability >= (8, 9):
        placement = place("cuda", "float8")
        assert placement.compute_dtype == "float8" and placement.dtype == torch.bfloat16 and not placement.warnings
    else:
        with pytest.raises(ValueError, match=f"needs compute capability 8.9 or more, and cuda:0 has {capability[0]}"):
            place("cuda", "float8")
    assert place("cuda").compute_dtype != "float8"


def test_it_takes_triton_and_nvidias_cards(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton, which is not installed: pip install triton, or choose auto"):
        place("cuda", "float8")
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm's float8 is another one
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        place("cuda", "float8")


@pytest.mark.parametrize("load_it", [VisualTokenizer.load, VisualTokenizer.from_preset])
def test_a_cpu_is_refused_before_anything_is_loaded(monkeypatch, load_it):
    monkeypatch.setattr(tokenizer, "empty_network", None)
    with pytest.raises(
        ValueError, match="float8 needs an NVIDIA GPU of compute capability 8.9 or more, not cpu; choose auto"
    ):
        load_it("tiny-random", device="cpu", compute_dtype="float8")


def test_the_runtimes_that_it_goes_with(monkeypatch):
    quantized = []
    monkeypatch.setattr(runtime, "quantize_encoders", quantized.append)
    network, cuda = load(image_size=[28, 32], device="cpu").network, torch.device("cuda")
    with pytest.raises(ValueError, match="runtime compile knows no compute_dtype float8; choose auto, graph or eager"):
        runtime.make_runtime("compile", network, cuda, torch.bfloat16, in_float8=True)
    assert not quantized
    eager = runtime.make_runtime("eager", network, cuda, torch.bfloat16, in_float8=True)
    assert quantized == [network] and eager.kernels == "triton"
    assert runtime.make_runtime("eager", network, cuda, torch.bfloat16).kernels == "pytorch" and len(quantized) == 1


def test_messages_say_so_and_the_fingerprint_is_the_same(monkeypatch):
    monkeypatch.setattr(tokenizer, "place", lambda *_: Placement(torch.device("cpu"), "float8", "a test"))
    marked = VisualTokenizer.load("tiny-random", image_size=[28, 32], runtime="eager")
    metadata, other = marked.metadata(), load(image_size=[28, 32], device="cpu").metadata()
    assert metadata["compute_dtype"] == "float8"
    assert metadata | {"compute_dtype": other["compute_dtype"]} == other  # the fingerprint among the rest
    from vla_perception.tokens import tokenize

    tokens = tokenize(marked, {"front": torch.zeros(30, 40, 3, dtype=torch.uint8).numpy()})
    read = type(tokens).from_bytes(tokens.to_bytes())
    assert (read.compute_dtype, read.dtype) == ("float8", "bfloat16")


# --- its bars


@pytest.mark.parametrize("share, cosine, within", [(0.1, True, True), (0.15, True, False), (0.1, False, False)])
def test_bench_holds_it_to_both_bars(share, cosine, within):
    """Relative L2, and the cosine of every single token: one that is lost among many is not in the first."""
    expected = noise(1, 2000, 64, dtype=torch.float32).cpu()
    found = expected * (1 + share)
    if not cosine:
        found[0, 7] = noise(64, dtype=torch.float32, seed=1).cpu()
    model = SimpleNamespace(preprocess=lambda images: images, encode=lambda pixels: expected)
    optimized = SimpleNamespace(preprocess=lambda images: images, encode=lambda pixels: found)
    small = SimpleNamespace(compute_dtype="float8")
    assert bench._agreement(small, optimized, model, model, lambda index: [])["within_tolerance"] is within


def test_bars_are_the_same_everywhere():
    assert baseline.TOLERANCES.keys() == devices.TORCH_DTYPES.keys()
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"| `float8` | {baseline.TOLERANCES['float8']:.1e}".replace("e-0", "e-") in table
    assert f"cosine of every token at least {baseline.LOWEST_COSINES['float8']}" in table


#: Compiles kernels for a GPU that need not be there: the interpreter accepts more than the compiler.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vla_perception.tokenizer import float8_kernels as kernels

for capability in (89, 90):
    for kernel, constants in (
        (kernels._add_layer_norm_kernel, dict(channels=1152, has_delta=True, has_gamma=True, block=2048)),
        (kernels._quantize_kernel, dict(channels=4304, gelu=True, tanh=False, block=8192)),
        (kernels._quantize_kernel, dict(channels=4304, gelu=True, tanh=True, block=8192)),
        (kernels._quantize_kernel, dict(channels=1024, gelu=False, tanh=False, block=1024)),
    ):
        kinds = {"epsilon": "fp32", "quantized": "*fp8e4nv", "scales": "*fp32"}
        kinds = {name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in kernel.arg_names}
        source = ASTSource(kernel, kinds, constexprs=constants)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=4)).asm
        assert code["cubin"] and "cvt.rn.satfinite.e4m3x2.f32" in code["ptx"]
"""


def test_kernels_compile_for_ada_and_hopper():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["graph", "eager"])
def test_on_a_gpu(runtime):
    if devices.float8_unavailable_reason(torch.device("cuda")):
        pytest.skip("needs a GPU with float8: compute capability 8.9 or more")
    exact = load(compute_dtype="float32")
    found = load(compute_dtype="float8", runtime=runtime)
    assert found.runtime == runtime and found.kernels == "triton" and not found.runtime_fallback
    assert found.fingerprint == exact.fingerprint
    for views in (1, 3):
        pixel_values = [noise(views, 3, encoder.image_size, encoder.image_size) for encoder in exact.config.encoders]
        expected, tokens = exact.encode(pixel_values).tokens, found.encode(pixel_values).tokens
        assert relative(tokens, expected) < baseline.TOLERANCES["float8"]
        assert functional.cosine_similarity(tokens.double(), expected.double(), -1).min() > 0.99
        assert torch.equal(found.encode(pixel_values).tokens, tokens)
