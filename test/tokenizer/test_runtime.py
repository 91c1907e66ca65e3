"""Every runtime computes what eager PyTorch computes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import film_checkpoints  # noqa: E402
import lerobot_checkpoints  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer, fused_blocks  # noqa: E402
from vla_perception.tokenizer import runtime as runtimes  # noqa: E402
from vla_perception.tokenizer.checkpoints.lerobot import smolvlm_positions  # noqa: E402
from vla_perception.tokenizer.runtime import limit_threads, onednn_gains  # noqa: E402


def load(**choices):
    """The preset `tiny-random` on a grid of 4 × 4, which is quick."""
    return VisualTokenizer.load("tiny-random", **{"image_size": [56, 64]} | choices)


def images(views, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (120, 160, 3), dtype=np.uint8) for _ in range(views)]


def distance(found, expected):
    """Relative L2, and the lowest cosine of any token."""
    found, expected = found.double().cpu(), expected.double().cpu()
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1).min()
    return float((found - expected).norm() / expected.norm()), float(cosine)


@pytest.fixture(scope="module")
def expected():
    """Tokens and features of three views in float32, eager."""
    return load(runtime="eager")(images(3), features=True)


@pytest.mark.parametrize("runtime", ["eager", "onednn"])
@pytest.mark.parametrize("compute_dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_runtimes_of_a_cpu_agree_with_float32_eager(expected, runtime, compute_dtype, tolerance):
    if runtime == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    tokenizer = load(runtime=runtime, compute_dtype=compute_dtype)
    assert tokenizer.runtime == runtime
    for _ in range(2):  # the first call may change the modules
        output = tokenizer(images(3), features=True)
        for found, exact in ((output.tokens, expected.tokens), (output.features, expected.features)):
            error, cosine = distance(found, exact)
            assert error < tolerance and cosine > 1 - tolerance
    one = tokenizer(images(3)[1:2])
    assert distance(one.tokens, expected.tokens[1:2])[0] < tolerance


def test_packing_frees_the_weights_as_they_were():
    tokenizer = load(runtime="onednn")
    linear = {name for name, module in tokenizer.network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linear) == 3 + 2 * 2 * 4  # projector; two blocks of two encoders: qkv, proj, fc1, fc2
    tokenizer.warm_up()
    assert not [module for module in tokenizer.network.modules() if isinstance(module, torch.nn.Linear)]


def test_operations_on_packed_weights_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    import vla_perception.bench  # noqa: F401  says how they are counted

    counts = []
    for runtime in ("eager", "onednn"):
        tokenizer = load(runtime=runtime)
        tokenizer.warm_up()
        with FlopCounterMode(display=False) as counter:
            tokenizer(images(2))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_auto_is_the_same_runtime_every_time(monkeypatch):
    """The choice follows a rule, so that tokens do not differ from one start to the next."""
    names = {load().runtime for _ in range(3)}
    assert names == {"onednn" if onednn_gains(torch.float32) else "eager"}
    monkeypatch.setattr(runtimes, "_processor_vendor", lambda: "GenuineIntel")
    assert not onednn_gains(torch.float32)


@pytest.mark.parametrize("name, words", [("fast", "choose one of auto, eager"), ("graph", "needs a CUDA device")])
def test_a_runtime_that_cannot_be_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        load(runtime=name)


def test_patch_embedding_as_a_product_equals_the_convolution():
    convolution = torch.nn.Conv2d(3, 20, 14, stride=14)
    for height, width in ((28, 42), (33, 55)):  # the second has pixels beyond the last whole patch
        pixels = torch.randn(2, 3, height, width)
        product = fused_blocks.PatchProduct(convolution)(pixels)
        torch.testing.assert_close(product, convolution(pixels), rtol=1e-4, atol=1e-5)
    tokenizer = load(runtime="eager")
    names = set(tokenizer.network.state_dict())
    expected = tokenizer(images(2)).tokens
    fused_blocks.patches_as_products(tokenizer.network)
    assert not [module for module in tokenizer.network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert set(tokenizer.network.state_dict()) == names
    torch.testing.assert_close(tokenizer(images(2)).tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quota, cores", [(2.0, 2), (1.5, 2), (0.5, 1), (2.5, 3), (4.0, 3), (None, 3)])
def test_threads_follow_a_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(runtimes, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert limit_threads() == cores == torch.get_num_threads()
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")  # what the user has set stays
        assert limit_threads() == 3
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_blocks_whose_scaling_is_fused_give_what_timms_do():
    tokenizer, fused = load(runtime="eager"), load(runtime="eager")
    fused_blocks.scale_in_one(fused.network)
    kinds = [[type(block) for block in encoder.vit.blocks] for encoder in fused.network.encoders.values()]
    dinov2, siglip = map(set, kinds)
    assert dinov2 == {fused_blocks.ScaledBlock} and siglip == {fused_blocks.Block}  # SigLIP has no LayerScale
    assert fused.network.state_dict().keys() == tokenizer.network.state_dict().keys()
    error, _ = distance(fused(images(2)).tokens, tokenizer(images(2)).tokens)
    assert 0 < error < 1e-6


@pytest.mark.parametrize("runtime", ["eager", "onednn"])
def test_a_callers_autocast_changes_no_token(runtime):
    """Policies run under it; tokens are in the precision that their message says."""
    tokenizer = load(runtime=runtime, compute_dtype="float32")
    tokenizer.warm_up(1)
    expected = tokenizer(images(1), features=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenizer(images(1), features=True), tokenizer.encode(tokenizer.preprocess(images(1)), features=True)
        assert torch.is_autocast_enabled("cpu")
    for output in found:
        assert torch.equal(output.tokens, expected.tokens) and torch.equal(output.features, expected.features)


@pytest.mark.parametrize("kind", ["preset", "smolvla", "oft"])
def test_a_callers_defaults_and_autocast_are_not_the_tokenizers(kind, tmp_path):
    """Policies set them to build their own networks. No value can come out of a tensor of the device `meta`."""
    model = "tiny-random"
    if kind == "smolvla":
        model = lerobot_checkpoints.written(tmp_path / kind, kind)
    if kind == "oft":
        model = film_checkpoints.write(tmp_path / kind, film_checkpoints.lora_wrapped(film_checkpoints.film_state()))

    def tokens():
        tokenizer = VisualTokenizer.load(model, device="cpu", compute_dtype="float32", runtime="eager")
        if tokenizer.condition_channels:
            tokenizer.set_condition(np.ones(tokenizer.condition_channels, np.float32))
        positions = torch.from_numpy(np.array(smolvlm_positions(64, 37)))
        return tokenizer(images(1)).tokens, tokenizer.encode_empty().tokens, positions

    expected = tokens()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            found = tokens()
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["eager", "graph", "compile"])
@pytest.mark.parametrize("compute_dtype, tolerance", [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 5e-3)])
def test_runtimes_of_a_gpu_agree_with_float32_eager(expected, runtime, compute_dtype, tolerance):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tokenizer = load(device="cuda", runtime=runtime, compute_dtype=compute_dtype)
    tokenizer.warm_up(3)
    assert tokenizer.runtime == runtime, tokenizer.runtime_fallback
    outputs = [tokenizer(images(3, seed), features=True) for seed in (0, 1, 2)]
    for found, exact in ((outputs[0].tokens, expected.tokens), (outputs[0].features, expected.features)):
        error, cosine = distance(found, exact)
        assert error < tolerance and cosine > 1 - tolerance
    assert not torch.equal(outputs[0].tokens, outputs[1].tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["eager", "graph"])
def test_a_callers_autocast_on_a_gpu_changes_no_token(runtime):
    with torch.autocast("cuda", torch.float16):
        tokenizer = load(device="cuda", runtime=runtime, compute_dtype="bfloat16")
        found = tokenizer(images(1)).tokens
    assert torch.equal(found, tokenizer(images(1)).tokens) and tokenizer.runtime == runtime


@pytest.mark.gpu
def test_results_of_a_gpu_stay_when_other_threads_and_numbers_of_views_follow():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    eager = load(device="cuda", runtime="eager", compute_dtype="bfloat16")
    exact = [eager(images(1 + seed % 3, seed)).tokens for seed in range(24)]

    def encode(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            tokens = tokenizer(images(1 + seed % 3, seed)).tokens
            torch.cuda.current_stream().synchronize()
            return tokens

    with ThreadPoolExecutor(4) as pool:
        for seed, tokens in enumerate(pool.map(encode, range(24))):
            assert distance(tokens, exact[seed])[0] < 2e-2
