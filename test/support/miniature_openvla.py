"""A miniature OpenVLA, whole: small timm encoders, projector and a two-layer Llama, with random weights.

`Miniature.logits` is its uncut forward, from images and token ids to logits. It is written with timm's own
modules, PIL, torchvision and transformers, after OpenVLA's published modelling code, and uses nothing of
vla_perception. `Miniature.write` stores the same weights in the layout in which OpenVLA publishes its checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import checkpoints
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, processors
from torchvision.transforms import functional
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32064  # of which the last 64 are padding, as in OpenVLA
EMPTY_TOKEN = 29871
PRINTABLE = "\n" + "".join(map(chr, range(33, 127)))
STATISTICS = {
    "q01": [-0.05, -0.04, -0.03, -0.2, -0.3, -0.4, 0.0],
    "q99": [0.05, 0.06, 0.07, 0.2, 0.3, 0.5, 1.0],
    "mask": [True] * 6 + [False],
}


class Miniature:
    """The whole model in float32 on the CPU."""

    def __init__(self, seed: int = 0) -> None:
        self.towers = checkpoints.towers(seed=seed)
        channels = sum(model.num_features for model in self.towers)
        self.projector = checkpoints.projector(channels)
        torch.manual_seed(seed + 2)
        self.text_config = {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": checkpoints.WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "initializer_range": 0.2,  # large enough for every input to matter
        }
        self.llama = LlamaForCausalLM(LlamaConfig(**self.text_config)).eval().requires_grad_(False)
        # A trained OpenVLA answers with action tokens; a random one only if its head prefers them.
        actions = slice(VOCABULARY - 64 - 256, VOCABULARY - 64)
        head = self.llama.lm_head.weight
        head *= 0.02
        head[actions] = torch.randn(256, checkpoints.WIDTH)

    def pixel_values(self, images: list[np.ndarray]) -> list[torch.Tensor]:
        """Per encoder [views, 3, side, side]: squeezed by PIL's bicubic, normalised by torchvision."""
        values = []
        for size, mean, std in zip(checkpoints.SIZES, checkpoints.MEANS, checkpoints.STDS):
            resized = [Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC) for p in images]
            values.append(torch.stack([functional.normalize(functional.to_tensor(p), mean, std) for p in resized]))
        return values

    @torch.inference_mode()
    def logits(self, images: list[np.ndarray], ids: list[int]) -> torch.Tensor:
        """[vocabulary]: what is said after these ids, in one forward pass from the pixels on.

        One view as OpenVLA has it; several as OpenVLA-OFT does: each through the encoders on its own, their tokens
        one after the other.
        """
        views = [checkpoints.reference(self.towers, self.projector, self.pixel_values([image]))[1] for image in images]
        text = self.llama.get_input_embeddings()(torch.tensor([ids]))
        embeddings = torch.cat([text[:, :1], *views, text[:, 1:]], dim=1)
        return self.llama(inputs_embeds=embeddings).logits[0, -1]

    def act(self, images: list[np.ndarray], instruction: str) -> tuple[np.ndarray, list[int], torch.Tensor]:
        """(action, token ids, logits [7, vocabulary]): greedy, every step through the whole model again."""
        ids, logits = prompt_ids(instruction), []
        for _ in STATISTICS["q01"]:
            logits.append(self.logits(images, ids))
            ids = [*ids, int(logits[-1].argmax())]
        said = ids[-len(logits) :]
        return action_of(said), said, torch.stack(logits)

    def write(self, folder: Path) -> Path:
        """A checkpoint directory as OpenVLA publishes it, with a tokenizer."""
        tensors = checkpoints.openvla_tensors(self.towers, self.projector)
        del tensors["language_model.lm_head.weight"]  # a stub
        tensors |= {f"language_model.{name}": value for name, value in self.llama.state_dict().items()}
        config = {
            "model_type": "openvla",
            "text_config": self.text_config,
            "norm_stats": {"miniature": {"action": STATISTICS}},
            "n_action_bins": 256,
            "pad_to_multiple_of": 64,
        }
        checkpoints.write(folder, tensors, config=config)
        tokenizer().save(str(folder / "tokenizer.json"))
        return folder


def character_ids() -> dict[str, int]:
    return {character: 3 + index for index, character in enumerate(PRINTABLE)} | {"▁": EMPTY_TOKEN}


def tokenizer() -> Tokenizer:
    """Built like Llama 2's (spaces become ▁, one in front, <s> before everything), one token per character."""
    words = {0: "<unk>", 1: "<s>", 2: "</s>"} | {number: character for character, number in character_ids().items()}
    vocabulary = {words.get(number, f"<{number}>"): number for number in range(VOCABULARY - 64)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def prompt_ids(instruction: str) -> list[int]:
    """What OpenVLA feeds: <s>, the prompt, token 29871."""
    text = f"▁In:▁What▁action▁should▁the▁robot▁take▁to▁{instruction.lower()}?\nOut:".replace(" ", "▁")
    return [1, *(character_ids()[character] for character in text), EMPTY_TOKEN]


def action_of(ids: list[int]) -> np.ndarray:
    """De-tokenised into 255 bin centres, then de-normalised by quantiles but for the gripper."""
    values = []
    for token, low, high, scaled in zip(ids, STATISTICS["q01"], STATISTICS["q99"], STATISTICS["mask"]):
        index = min(max(VOCABULARY - 64 - token - 1, 0), 254)
        center = -1 + (2 * index + 1) / 255
        values.append(0.5 * (center + 1) * (high - low) + low if scaled else center)
    return np.array(values)
