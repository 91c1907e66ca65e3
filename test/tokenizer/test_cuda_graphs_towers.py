"""CUDA graphs of the towers that are not OpenVLA's: π0's, SmolVLA's, and those that FiLM modulates; recorded on the CPU."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
import fake_cuda  # noqa: E402
import film_checkpoints  # noqa: E402
import lerobot_checkpoints  # noqa: E402
import numpy as np  # noqa: E402
from parity import relative_error  # noqa: E402

from vla_perception.options import RESIZE_WITH_PAD  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.fused_blocks import patches_as_products, scale_in_one  # noqa: E402


@pytest.fixture
def cuda(monkeypatch):
    fake_cuda.let_plans_be_captured(monkeypatch)
    with fake_cuda.one_thread():
        yield fake_cuda.install(monkeypatch)


def load(folder, **options):
    return VisualTokenizer.load(folder, device="cpu", compute_dtype="float32", runtime="eager", **options)


def in_graph(folder, **options):
    tokenizer = load(folder, **options)
    patches_as_products(tokenizer.network)
    scale_in_one(tokenizer.network)
    return fake_cuda.in_graph(tokenizer)


def images(seed: int) -> list[np.ndarray]:
    return [checkpoints.image(seed), checkpoints.image(seed + 50, 60, 40)]


@pytest.mark.parametrize(
    "kind, resize", [("smolvla", None), ("pi05", None), *(("pi05", resize) for resize in RESIZE_WITH_PAD)]
)
def test_resize_tower_and_connector_are_one_graph(kind, resize, cuda, tmp_path):
    """Final norm, GELU by tanh, pixel shuffle; and what resizes images in float32."""
    folder = lerobot_checkpoints.written(tmp_path / kind, kind)
    options = {"image_transforms": [resize]} if resize else {}
    exact, tokenizer = load(folder, **options), in_graph(folder, **options)
    for seed in range(4):
        found, expected = (made(images(seed), features=True) for made in (tokenizer, exact))
        torch.testing.assert_close(found.features, expected.features)
        torch.testing.assert_close(found.tokens, expected.tokens)
    assert [recorder.replays for recorder in cuda.captures] == [4]
    assert tokenizer.runtime == "graph" and not tokenizer.runtime_fallback


def test_a_graph_reads_the_condition_that_was_set_last(cuda, tmp_path):
    """Captured with one condition, replayed with others; on a GPU each side waits for what the other has queued."""
    folder = film_checkpoints.write(tmp_path / "oft", film_checkpoints.film_state())
    exact, tokenizer = load(folder), in_graph(folder)
    tokenizer._condition._done = torch.cuda.Event()
    results = []
    for seed, value in enumerate((0.5, -1.0, 0.5, 2.0)):
        vector = np.full(96, value, np.float32)
        assert tokenizer.set_condition(vector) == exact.set_condition(vector)
        del cuda.order[:]
        found, expected = tokenizer(images(seed)), exact(images(seed))
        assert relative_error(found.tokens.numpy(), expected.tokens.numpy()) < 1e-5
        assert found.condition == expected.condition
        results.append((found.tokens, expected.tokens.numpy()))
        event = id(tokenizer._condition._done)
        own = [kind for kind, *about in cuda.order if event in about]
        assert own == ["wait event", "record"]
        assert event in cuda.order[0] and event in cuda.order[-1]  # around all that the encoders do
    assert [recorder.replays for recorder in cuda.captures] == [4]
    for found, expected in results:  # no later condition writes into them
        assert relative_error(found.numpy(), expected) < 1e-5


def test_a_condition_is_no_reason_to_break_a_capture_of_the_callers(cuda, tmp_path):
    """There, an event from outside must not be waited for, and one that is recorded is of no use outside."""
    tokenizer = in_graph(film_checkpoints.write(tmp_path / "oft", film_checkpoints.film_state()))
    tokenizer.set_condition(np.full(96, 0.5, np.float32))
    tokenizer._condition._done = torch.cuda.Event()
    pixel_values = tokenizer.preprocess(images(0))
    expected = tokenizer.encode(pixel_values).tokens
    del cuda.order[:]
    cuda.capturing_elsewhere = True
    torch.testing.assert_close(tokenizer.encode(pixel_values).tokens, expected)
    assert not cuda.order


def test_an_empty_view_has_a_graph_from_the_start(cuda, tmp_path):
    folder = lerobot_checkpoints.written(tmp_path / "pi05")
    exact, tokenizer = load(folder), in_graph(folder)
    tokenizer.warm_up(2, empty_view=True)
    assert len(cuda.captures) == 2
    torch.testing.assert_close(tokenizer.encode_empty().tokens, exact.encode_empty().tokens)
    pixels = exact.preprocess(images(0))
    torch.testing.assert_close(tokenizer.encode(pixels).tokens, exact.encode(pixels).tokens)
    assert len(cuda.captures) == 2
    for views, runtime in ((1, tokenizer), (2, exact)):  # the same shape; nothing is made per number of views
        runtime.warm_up(views, empty_view=True)
    assert len(cuda.captures) == 2
