"""A miniature π0.5 and SmolVLA, cut in two behind the connector, act as the whole ones.

The whole: transformers' own tower, connector and language model, a random action head, and LeRobot's order of views. The
split: this package's tokenizer on the same weights, examples/lerobot_policy.py in the place of `embed_image`.
"""

import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("transformers")
import checkpoints  # noqa: E402
import lerobot_checkpoints  # noqa: E402
from parity import relative_error  # noqa: E402
from ros_harness import ROOT  # noqa: E402

sys.path.insert(0, str(ROOT / "examples"))
from lerobot_policy import SplitPolicy  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokens import View, VisualTokens, tokenize  # noqa: E402

VIEWS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STEPS, ACTIONS, OUT = 5, 7, 48


class Embedder(torch.nn.Module):
    """As `paligemma_with_expert` and `vlm_with_expert` are: a module with a vision-language model."""

    def __init__(self, vlm: torch.nn.Module) -> None:
        super().__init__()
        self.vlm = vlm

    def embed_image(self, image: torch.Tensor) -> torch.Tensor:
        return lerobot_checkpoints.computed(self.vlm, image)[1]


class Miniature:
    """As LeRobot's policies are seen from outside: `config`, `model`, `predict_action_chunk`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.vlm = lerobot_checkpoints.paligemma(out=OUT) if kind == "pi05" else lerobot_checkpoints.smolvlm(out=OUT)
        self.size = 56 if kind == "pi05" else 128
        shape = (3, self.size, self.size)
        features = {f"observation.images.{view}": SimpleNamespace(shape=shape) for view in VIEWS}
        self.config = SimpleNamespace(image_features=features)
        embedder = Embedder(self.vlm)
        part = "paligemma_with_expert" if kind == "pi05" else "vlm_with_expert"
        self.model = SimpleNamespace(**{part: embedder})
        self._embedder = embedder
        generator = torch.Generator().manual_seed(5)
        self._head = torch.randn(OUT, STEPS * ACTIONS, generator=generator)
        language = self.vlm.language_model if kind == "pi05" else self.vlm.text_model
        self._embed, self._language = language.get_input_embeddings(), language

    @torch.inference_mode()
    def predict_action_chunk(self, batch) -> torch.Tensor:
        """Views that are there in the policy's order, then an image of -1 for each that is missing, masked."""
        there = [batch[key] for key in self.config.image_features if key in batch]
        images = there + [torch.full_like(there[0], -1.0)] * (len(VIEWS) - len(there))
        embedded = [self._embedder.embed_image(image) for image in images]
        mask = torch.cat(
            [torch.full(part.shape[:2], int(index < len(there))) for index, part in enumerate(embedded)], dim=1
        )
        scale = OUT**0.5 if self.kind == "smolvla" else 1.0  # the policy's, not the connector's
        text = self._embed(batch["observation.language.tokens"])
        inputs = torch.cat([part * scale for part in embedded] + [text], dim=1)
        mask = torch.cat([mask, torch.ones(text.shape[:2], dtype=mask.dtype)], dim=1)
        hidden = self._language(inputs_embeds=inputs, attention_mask=mask).last_hidden_state[:, -1]
        return (hidden @ self._head).view(1, STEPS, ACTIONS)


@pytest.fixture(scope="module", params=["pi05", "smolvla"])
def cut(request, tmp_path_factory):
    """(the whole policy, the split one, the tokenizer)"""
    kind = request.param
    whole, other = Miniature(kind), Miniature(kind)
    tensors = lerobot_checkpoints.vision_tensors(kind, whole.vlm)
    folder = lerobot_checkpoints.write(tmp_path_factory.mktemp("policy") / kind, kind, tensors, whole.size)
    return whole, SplitPolicy(other), VisualTokenizer.load(folder, device="cpu", compute_dtype="float32")


def text(seed: int) -> torch.Tensor:
    return torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(seed))


def test_split_and_whole_give_the_same_actions(cut):
    whole, split, tokenizer = cut
    found = []
    for seed in range(3):
        shown = {view: checkpoints.image(10 * seed + index, 60 + index, 90) for index, view in enumerate(VIEWS)}
        (pixels,) = tokenizer.preprocess(list(shown.values()))
        images = {f"observation.images.{view}": pixels[index : index + 1] for index, view in enumerate(VIEWS)}
        language = {"observation.language.tokens": text(seed)}
        expected = whole.predict_action_chunk(images | language)
        tokens = tokenize(tokenizer, shown)
        actions = split.act(tokens, split.images(tokens) | language)
        assert actions.shape == (1, STEPS, ACTIONS)
        assert relative_error(actions.numpy(), expected.numpy()) < 1e-4
        swapped = dict(zip(VIEWS, reversed(shown.values())))  # otherwise agreement would prove nothing
        other = split.act(tokenize(tokenizer, swapped), split.images(tokens) | language)
        assert relative_error(other.numpy(), expected.numpy()) > 1e-3
        found.append(actions)
    assert not torch.allclose(found[0], found[1])


def test_a_view_without_a_camera(cut):
    """`cameras: [base_0_rgb, left_wrist_0_rgb, none]` in the node."""
    whole, split, tokenizer = cut
    shown = [checkpoints.image(index) for index in range(2)]
    (pixels,) = tokenizer.preprocess(shown)
    images = {f"observation.images.{view}": pixels[index : index + 1] for index, view in enumerate(VIEWS[:2])}
    language = {"observation.language.tokens": text(1)}
    expected = whole.predict_action_chunk(images | language)
    values = torch.cat([tokenizer.encode([pixels]).tokens, tokenizer.encode_empty().tokens])
    names = (*VIEWS[:2], "none")
    views = [View(name, "", 0, 90, 130, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), valid=name != "none") for name in names]
    tokens = VisualTokens.from_torch(values, sequence=0, views=views, **tokenizer.metadata())
    batch = split.images(tokens) | language
    assert set(batch) == {*images, *language}
    assert relative_error(split.act(tokens, batch).numpy(), expected.numpy()) < 1e-4
    with pytest.raises(ValueError, match="the policy takes base_0_rgb"):
        split.act(tokens.select("base_0_rgb"), language)


def test_views_in_the_policys_order(cut):
    assert cut[1].views == VIEWS


def test_tokens_have_the_dtype_of_the_policys_vision():
    """Not that of the images: LeRobot feeds images in float32 to towers in bfloat16."""
    policy = Miniature("pi05")
    policy.vlm.bfloat16()
    image = torch.zeros(1, 3, policy.size, policy.size)
    expected = policy._embedder.embed_image(image.bfloat16())
    split = SplitPolicy(policy)
    policy.predict_action_chunk = lambda batch: policy._embedder.embed_image(next(iter(batch.values())))
    values = torch.arange(3.0 * 16 * OUT).view(3, 16, OUT)
    views = [View(name, "", 0, 90, 130, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)) for name in VIEWS]
    metadata = VisualTokenizer.from_preset("tiny-random").metadata() | {"grid": (4, 4)}
    tokens = VisualTokens.from_torch(values, sequence=0, views=views, **metadata)
    found = split.act(tokens, {f"observation.images.{view}": image for view in VIEWS})
    assert found.dtype == expected.dtype == torch.bfloat16 and found.shape == expected.shape
    assert torch.equal(found[0], values[0].bfloat16())
