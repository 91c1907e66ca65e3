"""OpenVLA cut in two at the projector: this half takes visual tokens from a topic and publishes actions.

    python examples/openvla_policy.py --model ~/openvla-7b --instruction "pick up the black bowl" \
        --unnorm-key bridge_orig --device cuda --expect-fingerprint 6f1c09ab…

The other half is the node `visual_tokenizer` with the same checkpoint. Of the checkpoint directory only the tensors
`language_model.*`, `config.json` and `tokenizer.json` are read here. Needs torch and transformers.

Publishes `action` (sensor_msgs/JointState): stamp and frame of the image that was acted on, names x, y, z, roll,
pitch, yaw, gripper, and the de-normalised values as positions, in the units of the data set that the statistics are of.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from vla_perception.tokens import FingerprintMismatchError, TokenFormatError, TokenSubscriber, VisualTokens

PROMPT = "In: What action should the robot take to {}?\nOut:"
#: What Llama's tokenizer makes of the space between "Out:" and the first action in training.
EMPTY_TOKEN = 29871
PREFIX = "language_model."
#: Entries of `text_config` that decide what the language model computes.
LLAMA_SHAPE = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
#: Its name in transformers 5, and before.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
AXES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass(frozen=True)
class Action:
    """What the language model said.

    Attributes:
        values: [dimensions], de-normalised.
        normalized: [dimensions], −1 to 1.
        token_ids: [dimensions].
        logits: float32 [dimensions, vocabulary], what the ids were chosen from.
    """

    values: np.ndarray
    normalized: np.ndarray
    token_ids: tuple[int, ...]
    logits: torch.Tensor


class LanguageModel:
    """OpenVLA without its eyes: visual tokens and an instruction in, an action out.

    Args:
        folder: an OpenVLA checkpoint directory.
        unnorm_key: data set whose action statistics are used; may be left out where there is only one.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        unnorm_key: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        prompt: str = PROMPT,
    ) -> None:
        folder = Path(folder).expanduser()
        config = json.loads((folder / "config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The shape alone: among the other entries are some by which transformers fetches code from the hub.
        shape = {key: value for key, value in config["text_config"].items() if key in LLAMA_SHAPE}
        self._llama = _load_llama(folder, LlamaConfig(**shape), device, dtype)
        self._prompt = prompt
        self.device, self.dtype = torch.device(device), dtype
        self.width = self._llama.config.hidden_size

        statistics = config["norm_stats"]
        if unnorm_key is None and len(statistics) == 1:
            (unnorm_key,) = statistics
        if unnorm_key not in statistics:
            raise ValueError(f"choose the data set of the action statistics: one of {', '.join(sorted(statistics))}")
        action = statistics[unnorm_key]["action"]
        self._low, self._high = np.array(action["q01"]), np.array(action["q99"])
        self._mask = np.array(action.get("mask", [True] * len(self._low)))
        # Action tokens are the last ones of the vocabulary, without what pads it to a multiple of 64.
        self._vocabulary = self._llama.config.vocab_size - config.get("pad_to_multiple_of", 64)
        edges = np.linspace(-1, 1, config.get("n_action_bins", 256))
        self._centers = (edges[:-1] + edges[1:]) / 2

    def prompt_ids(self, instruction: str) -> list[int]:
        """[BOS] and the prompt, with the empty token behind it that was there in training."""
        ids = self._tokenizer.encode(self._prompt.format(instruction.lower())).ids
        return ids if ids[-1] == EMPTY_TOKEN else [*ids, EMPTY_TOKEN]

    def embed(self, tokens: VisualTokens, instruction: str) -> torch.Tensor:
        """[1, length, width]: [BOS], the tokens of every view one after the other, the prompt."""
        if tokens.shape[2] != self.width:
            raise ValueError(
                f"the tokens of {tokens.model!r} have {tokens.shape[2]} channels, this language model takes "
                f"{self.width}: start the tokenizer with the same checkpoint"
            )
        embeddings = tokens.torch(self.device).to(self.dtype).flatten(0, 1)[None]
        ids = torch.tensor([self.prompt_ids(instruction)], device=self.device)
        text = self._llama.get_input_embeddings()(ids)
        return torch.cat([text[:, :1], embeddings, text[:, 1:]], dim=1)

    @torch.inference_mode()
    def act(self, tokens: VisualTokens, instruction: str) -> Action:
        """One action, its tokens decoded greedily one by one."""
        inputs = {"inputs_embeds": self.embed(tokens, instruction)}
        cache, logits = {CACHE: DynamicCache()}, []
        for _ in self._low:
            output = self._llama.model(**inputs, **cache, use_cache=True)
            logits.append(self._llama.lm_head(output.last_hidden_state[:, -1]).float())
            inputs = {"input_ids": logits[-1].argmax(-1, keepdim=True)}
        scores = torch.cat(logits).cpu()
        ids = scores.argmax(-1).numpy()
        bins = np.clip(self._vocabulary - ids - 1, 0, len(self._centers) - 1)
        normalized = self._centers[bins]
        values = np.where(self._mask, (normalized + 1) / 2 * (self._high - self._low) + self._low, normalized)
        return Action(values, normalized, tuple(int(i) for i in ids), scores)

    def is_action(self, token_id: int) -> bool:
        """Whether a token stands for a bin; another one is a sign that something is wrong with the input."""
        return 0 <= self._vocabulary - token_id - 1 <= len(self._centers)


def _load_llama(folder: Path, config: LlamaConfig, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """The language model alone; the files' other tensors are not read."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted({file for name, file in weight_map.items() if name.startswith(PREFIX)})
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    state = {}
    for file in files:
        with safe_open(folder / file, framework="pt", device=device) as tensors:
            for name in tensors.keys():
                if name.startswith(PREFIX):
                    state[name.removeprefix(PREFIX)] = tensors.get_tensor(name).to(dtype)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict(state, assign=True)
    # Its frequencies are computed, not stored, so they are still on the meta device.
    llama.model.rotary_emb = LlamaRotaryEmbedding(config=config).to(device)
    return llama.eval().requires_grad_(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="OpenVLA checkpoint directory")
    parser.add_argument("--instruction", required=True, help='for example "pick up the black bowl"')
    parser.add_argument("--unnorm-key", help="data set of the action statistics, where the checkpoint has several")
    parser.add_argument("--device", default="cpu", help="of the language model (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--views", type=int, default=1, help="cameras that the model was trained with")
    parser.add_argument("--expect-fingerprint", help="reject tokens of any other tokenizer")
    parser.add_argument("--max-age", type=float, default=1.0, help="seconds; no action on older images")
    parser.add_argument("--request", action="store_true", help="for a tokenizer with trigger: on_request")
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from rclpy.utilities import remove_ros_args
    from sensor_msgs.msg import JointState

    options = parser.parse_args(remove_ros_args(sys.argv)[1:])
    model = LanguageModel(
        options.model, unnorm_key=options.unnorm_key, device=options.device, dtype=getattr(torch, options.dtype)
    )
    rclpy.init()
    node = rclpy.create_node("openvla_policy")
    log = node.get_logger()
    actions = node.create_publisher(JointState, "action", 1)
    try:
        with TokenSubscriber(node, expect_fingerprint=options.expect_fingerprint) as subscriber:
            log.info(f"waiting for {subscriber.topic}")
            while True:
                # No action if anything is wrong with the tokens: the robot's controller must hold.
                try:
                    tokens = subscriber.request() if options.request else subscriber.wait(5.0)
                except FingerprintMismatchError as error:
                    log.fatal(str(error))
                    return 1
                except (TimeoutError, TokenFormatError, RuntimeError) as error:
                    log.error(f"no action: {error}")
                    continue
                if len(tokens.views) != options.views or not all(tokens.valid):
                    log.error(f"no action: views {tokens.cameras}, valid {tokens.valid}, wanted {options.views}")
                    continue
                if not -0.1 <= (age := subscriber.age(tokens)) <= options.max_age:
                    log.error(f"no action: the image is {age:.2f} s old (--max-age {options.max_age})")
                    continue
                action = model.act(tokens, options.instruction)
                if not all(map(model.is_action, action.token_ids)):
                    log.error(f"no action: the language model said {action.token_ids}, which is none")
                    continue
                message = JointState(position=action.values.tolist())
                message.header.stamp.sec, message.header.stamp.nanosec = divmod(tokens.stamp_ns, 10**9)
                message.header.frame_id = tokens.views[0].frame_id
                message.name = list(AXES) if len(AXES) == len(action.values) else []
                actions.publish(message)
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    finally:
        with contextlib.suppress(RuntimeError):  # Ctrl-C: rclpy may be shutting down at this moment
            rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
