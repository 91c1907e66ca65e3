"""Tokens: messages, what lies in shared memory, answers of the service `encode`, token files and the index of a run."""

from __future__ import annotations

import array
import contextlib
import functools
import os
import shutil
from types import SimpleNamespace

import fake_tokenizer
import numpy as np
from engine import Target, scratch
from mutations import change_json, change_safetensors

from vla_perception.offline import run_index, verify
from vla_perception.offline.recordings import SourceError
from vla_perception.offline.run_index import RunIndexError
from vla_perception.offline.token_dataset import TokenDataset
from vla_perception.offline.token_file import TokenFile
from vla_perception.tokens import (
    FORMAT,
    FingerprintMismatchError,
    TokenFormatError,
    VisualTokens,
    encode_service,
    from_message,
    shared_memory,
)
from vla_perception.tokens.fingerprint import difference

#: A map takes 8 bytes for each pixel that the message says the image has.
_MAP_PIXELS = 1 << 20


def exercise(tokens: VisualTokens) -> None:
    """What a policy does with a message that was accepted."""
    again = VisualTokens.from_bytes(tokens.to_bytes())
    assert again.views == tokens.views and again.grid == tokens.grid and again.fingerprint == tokens.fingerprint
    assert again.data.tobytes() == tokens.data.tobytes()
    assert tokens.float32().shape == tokens.shape
    tokens.age(0)
    for view, camera in enumerate(tokens.cameras):
        assert tokens.select(camera).shape == (1, *tokens.shape[1:])
        with contextlib.suppress(ValueError):  # of cls tokens alone
            token = tokens.token_at(10.0, 5.0, view)
            assert token is None or 0 <= token < tokens.shape[1]
            tokens.patch_corners(0, view)
        pixels = tokens.views[view].height * tokens.views[view].width
        if pixels <= _MAP_PIXELS or pixels > 1 << 26:
            with contextlib.suppress(ValueError):  # of a large image
                tokens.token_map(view)
    for encoder in tokens.encoders:
        with contextlib.suppress(ValueError):  # of projected tokens
            tokens.encoder(str(encoder["name"]))
    with contextlib.suppress(ValueError):
        tokens.as_grid()
    difference("ab" * 32, None, tokens.fingerprint_inputs, tokens.fingerprint)
    tokens.check_finite()


def message(data: bytes) -> None:
    exercise(from_message(SimpleNamespace(format=FORMAT, data=array.array("B", data))))


def message_seeds() -> list[bytes]:
    stamp = 1_700_000_000_123_456_789
    features = np.zeros((2, 12, 9), np.float32)
    words = np.arange(72, dtype=np.uint16).reshape(1, 12, 6)
    made = [
        fake_tokenizer.make_tokens(7, stamp_ns=stamp),
        fake_tokenizer.make_tokens(7, stamp_ns=stamp, cameras=("front", "wrist"), features=features),
        fake_tokenizer.make_tokens(7, stamp_ns=stamp, data=words, dtype="bfloat16"),
        fake_tokenizer.make_tokens(7, stamp_ns=stamp, data=words.view(np.float16), dtype="float16"),
        fake_tokenizer.make_tokens(7, stamp_ns=stamp, data=np.ones((1, 1, 6), np.float32), token_strategy="cls"),
    ]
    return [tokens.to_bytes() for tokens in made]


@functools.cache
def _shared_memory():
    topic, domain = f"/fuzz_{os.getpid()}", 77
    return shared_memory.TokenReader(topic, domain), shared_memory.TokenWriter(topic, domain)


def payload(data: bytes) -> None:
    """Another process of this user has written it."""
    reader, writer = _shared_memory()
    if not data:
        return
    assert writer.write(SimpleNamespace(to_parts=lambda: [data])) == 1
    taken = reader.take()
    assert taken is not None and bytes(taken[0]) == data
    exercise(VisualTokens.from_bytes(taken[0]))


def answer(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    sequence = encode_service.published_sequence(text)
    assert sequence is None or sequence >= 0
    encode_service.is_final(text)


def answer_seeds() -> list[bytes]:
    texts = [encode_service.published(3, 10**18), "no image yet", "refused: inactive", "sequence: 5", "sequence ²"]
    return [text.encode() for text in texts]


# Files of `vla-perception tokenize`


@functools.cache
def _run():
    """The folder of a run over two recordings."""
    import offline_runs

    folder = scratch() / "sources"
    folder.mkdir()
    out = scratch() / "run"
    offline_runs.tokenize(out, [offline_runs.write_drive(folder / "one"), offline_runs.write_drive(folder / "two")])
    return out


def token_file(data: bytes) -> None:
    path = scratch() / "x.safetensors"
    path.write_bytes(data)
    with TokenFile(path) as file:
        assert len(file) == len(file.tokens) == len(file.stamps_ns) == len(file.timestamps)
        for index in {0, len(file) // 2, len(file) - 1}:
            exercise(file.frame(index))
            file.is_sound(index)
        file.read(0, 2)


def token_file_seeds() -> list[bytes]:
    return [min(path.read_bytes() for path in _run().glob("*.safetensors")), *message_seeds()[:2]]


def index(data: bytes) -> None:
    (_run() / "index.json").write_bytes(data)
    said = run_index.read(_run())
    run_index.differences(said, said)
    dataset = TokenDataset(_run(), history=2)
    assert len(dataset) > 0 and dataset[0]["tokens"].ndim == 4


@functools.cache
def index_seeds() -> list[bytes]:
    return [(_run() / "index.json").read_bytes()]


def verified(data: bytes) -> None:
    """An index, as `vla-perception verify` reads it: alone, and beside another run and a file."""
    whole = _run()
    changed = scratch() / "changed"
    if not changed.exists():
        shutil.copytree(whole, changed)
    (changed / "index.json").write_bytes(data)
    (whole / "index.json").write_bytes(index_seeds()[0])
    other, file = verify.Stored(whole), verify.Stored(next(whole.glob("*.safetensors")))
    for report in (
        verify.check(verify.Stored(changed)),
        verify.compare(verify.Stored(changed), other),
        verify.compare(file, verify.Stored(changed)),
    ):
        lines = [report.worst_at, *report.problems, *report.settings]
        assert all(line.isprintable() and len(line) <= 5000 for line in lines), lines


TARGETS = [
    Target("token_message", message, message_seeds, (TokenFormatError,), (change_safetensors,), max_bytes=8192),
    Target("shared_memory", payload, message_seeds, (TokenFormatError,), (change_safetensors,), max_bytes=8192),
    Target("encode_answer", answer, answer_seeds, (), max_bytes=512),
    Target("token_file", token_file, token_file_seeds, (TokenFormatError,), (change_safetensors,)),
    Target(
        "run_index",
        index,
        index_seeds,
        (RunIndexError, TokenFormatError, FingerprintMismatchError, ValueError),
        (change_json,),
    ),
    Target("verify", verified, index_seeds, (RunIndexError, SourceError), (change_json,), cost=4),
]
