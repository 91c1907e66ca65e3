"""The wire format, against safetensors' own reader, the page that describes it, and hostile bytes."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402

from vla_perception.messages.tokens import (  # noqa: E402
    FORMAT,
    TokenFormatError,
    View,
    VisualTokens,
    from_message,
    is_token_message,
    to_message,
)

MODEL = {
    "model": "m",
    "weights": "random",
    "fingerprint": "ab" * 32,
    "compute_dtype": "float32",
    "grid": [3, 4],
    "token_strategy": "patch",
    "pool": 1,
    "encoders": [
        {"name": "dinov2", "timm_id": "a", "layer": 1, "channels": [0, 5], "image_size": 42, "patch_size": 14},
        {"name": "siglip", "timm_id": "b", "layer": 2, "channels": [5, 9], "image_size": 48, "patch_size": 16},
    ],
    "projector": "linear",
}
VIEWS = (
    View("front", "front_optical", 1_700_000_000_123_456_789, 30, 40, (0.1, 0.0, 0.0, 0.0, 0.1, 0.0)),
    View("wrist", "wrist_optical", 1_700_000_000_100_000_000, 60, 40, (0.1, 0.0, 0.0, 0.0, 0.1, -1.5), False),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(dtype=torch.float32, features=True, **changes):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 6, generator=generator).to(dtype)
    extra = torch.randn(2, 12, 9, generator=generator) if features else None
    return tokens, VisualTokens.from_torch(tokens, sequence=7, views=VIEWS, features=extra, **(MODEL | changes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_what_is_written(dtype):
    tokens, visual = make(dtype)
    data = visual.to_bytes()
    loaded = safetensors.torch.load(data)
    assert set(loaded) == {"tokens", "features"}
    assert loaded["tokens"].dtype == dtype and torch.equal(loaded["tokens"], tokens)
    assert loaded["features"].shape == (2, 12, 9) and loaded["features"].dtype == dtype
    assert set(safetensors.torch.load(make(dtype, features=False)[1].to_bytes())) == {"tokens"}
    assert visual.to_bytes() == data


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_safetensors_writes_is_read(dtype):
    tokens, visual = make(dtype, features=False)
    length = int.from_bytes(visual.to_bytes()[:8], "little")
    metadata = json.loads(visual.to_bytes()[8 : 8 + length])["__metadata__"]
    read = VisualTokens.from_bytes(safetensors.torch.save({"tokens": tokens}, metadata))
    assert torch.equal(read.torch(), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype):
    tokens, visual = make(dtype)
    read = VisualTokens.from_bytes(visual.to_bytes())
    for name in ("dtype", "views", "sequence", "model", "weights", "fingerprint", "grid", "encoders", "projector"):
        assert getattr(read, name) == getattr(visual, name), name
    assert torch.equal(read.torch(), tokens)
    np.testing.assert_array_equal(read.float32(), tokens.float().numpy())
    np.testing.assert_array_equal(read.numpy().astype(np.float32), tokens.float().numpy())
    assert read.features_float32().shape == (2, 12, 9)
    assert not read.data.flags.writeable


def test_reading_copies_nothing():
    data = bytearray(make()[1].to_bytes())
    read = VisualTokens.from_bytes(data)
    assert np.shares_memory(read.numpy(), np.frombuffer(data, np.uint8))


def test_the_reader_on_the_page_works():
    page = (Path(__file__).parent.parent / "docs" / "wire_format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    namespace: dict = {}
    exec(code, namespace)
    for dtype in DTYPES:
        tokens, visual = make(dtype)
        values, metadata = namespace["read"](visual.to_bytes())
        np.testing.assert_array_equal(values, tokens.float().numpy())
        for key in [*metadata, *metadata["views"][0], *metadata["encoders"][0]]:
            assert f"`{key}`" in page, key
        assert metadata["views"][0]["stamp"] == {"sec": 1_700_000_000, "nanosec": 123_456_789}


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def spoil_entry(**changes):
    def spoil(data):
        header, payload = header_of(data)
        header["tokens"].update(changes)
        return with_header(header, payload)

    return spoil


def spoil_metadata(**changes):
    def spoil(data):
        header, payload = header_of(data)
        metadata = json.loads(header["__metadata__"]["vla_tokens"])
        metadata = {k: v for k, v in (metadata | changes).items() if v is not None}
        header["__metadata__"]["vla_tokens"] = json.dumps(metadata)
        return with_header(header, payload)

    return spoil


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda data: b"", "too few"),
        (lambda data: data[:5], "too few"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:100], "truncated"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "truncated"),
        (lambda data: with_header(b"[" * 100_000, b""), "not JSON"),
        (lambda data: with_header([1], b""), "not a JSON object"),
        (lambda data: with_header({"tokens": {}}, b""), "no readable"),
        (spoil_entry(dtype="I64"), "BF16, F16 or F32"),
        (spoil_entry(shape=[2, 12, 2**62]), "does not fit"),
        (spoil_entry(shape=[-2, -12, 6]), "wrongly"),
        (spoil_entry(shape="abc"), "wrongly"),
        (spoil_entry(shape=[24, 6]), "non-empty"),
        (spoil_entry(shape=[12, 2, 6]), "12 views|features"),
        (spoil_entry(data_offsets=[0, 2**40]), "does not fit"),
        (spoil_entry(data_offsets=[400, 0]), "does not fit"),
        (spoil_metadata(schema="vla_tokens/2"), "vla_tokens/2"),
        (spoil_metadata(schema=None), "schema None"),
        (spoil_metadata(fingerprint=None), "fingerprint"),
        (spoil_metadata(grid=[3, 5]), "do not fill"),
        (spoil_metadata(grid=3), "lacks or garbles"),
        (spoil_metadata(views=[]), "0 are described"),
        (spoil_metadata(views=[1, 2]), "lacks or garbles"),
        (spoil_metadata(encoders=[{"name": "x", "channels": [5, 5]}]), "channels"),
        (spoil_metadata(views=[{"camera": "c"}] * 2), "frame_id"),
    ],
)
def test_damaged_messages_are_refused(spoil, words):
    data = make(features=False)[1].to_bytes()
    with pytest.raises(TokenFormatError, match=words):
        VisualTokens.from_bytes(spoil(data))


def test_any_flipped_byte_is_read_or_refused_but_never_crashes():
    data = make(features=False)[1].to_bytes()
    generator = np.random.default_rng(0)
    for _ in range(3000):
        spoilt = bytearray(data)
        for position in generator.integers(0, len(data), generator.integers(1, 4)):
            spoilt[position] = generator.integers(0, 256)
        try:
            VisualTokens.from_bytes(spoilt)
        except TokenFormatError:
            pass


def test_places():
    _, visual = make()
    # 30 × 40 pixels on 3 × 4 tokens: ten pixels each.
    assert visual.token_at(0, 0) == 0
    assert visual.token_at(39.9, 0) == 3
    assert visual.token_at(15, 25) == 9
    assert visual.token_at(40, 0) is None and visual.token_at(-0.1, 0) is None
    np.testing.assert_allclose(visual.region(9), [(10, 20), (20, 20), (20, 30), (10, 30)])
    # The second view's first 15 rows are cropped, and what lies beyond row 45 is not covered.
    assert visual.token_at(5, 14, view=1) is None
    assert visual.token_at(5, 16, view=1) == 0
    assert visual.token_at(5, 46, view=1) is None
    with pytest.raises(ValueError, match="not on the grid"):
        visual.region(12)
    for token in range(12):
        corners = np.array(visual.region(token))
        assert visual.token_at(*corners.mean(0)) == token


def test_slices():
    tokens, visual = make()
    wrist = visual.view("wrist")
    assert wrist.shape == (1, 12, 6) and wrist.cameras == ("wrist",) and not wrist.views[0].valid
    np.testing.assert_array_equal(wrist.float32()[0], tokens[1].numpy())
    assert np.shares_memory(wrist.data, visual.data)
    with pytest.raises(KeyError, match="front, wrist"):
        visual.view("left")
    assert visual.encoder_channels("siglip") == slice(5, 9)
    with pytest.raises(KeyError, match="dinov2, siglip"):
        visual.encoder_channels("clip")
    np.testing.assert_array_equal(visual.on_grid()[1, 2, 3], tokens[1, 11].numpy())
    assert np.shares_memory(visual.on_grid(), visual.data)
    assert visual.on_grid(visual.features_float32()).shape == (2, 3, 4, 9)


def test_summary_token_stands_before_the_grid():
    _, visual = make(features=False)
    data = np.concatenate([np.full((2, 1, 6), 9, np.float32), visual.data], axis=1)
    both = replace(visual, data=data, token_strategy="cls+patch")
    assert both.token_at(0, 0) == 1
    np.testing.assert_array_equal(both.on_grid(), visual.on_grid())
    with pytest.raises(ValueError, match="not on the grid"):
        both.region(0)
    alone = replace(visual, data=data[:, :1], token_strategy="cls")
    with pytest.raises(ValueError, match="no place"):
        alone.on_grid()


def test_reading_needs_no_torch(monkeypatch):
    data = make(torch.bfloat16)[1].to_bytes()
    monkeypatch.setitem(sys.modules, "torch", None)
    read = VisualTokens.from_bytes(data)
    assert read.float32().dtype == np.float32
    assert read.numpy().dtype.name == "bfloat16"
    assert read.on_grid().shape == (2, 3, 4, 6)


@pytest.mark.ros
def test_message():
    pytest.importorskip("sensor_msgs")
    from rclpy.serialization import deserialize_message, serialize_message
    from sensor_msgs.msg import CompressedImage

    tokens, visual = make(torch.bfloat16)
    message = to_message(visual)
    assert message.format == FORMAT and is_token_message(message)
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1_700_000_000, 123_456_789)
    assert message.header.frame_id == "front_optical"
    received = deserialize_message(serialize_message(message), CompressedImage)
    assert torch.equal(from_message(received).torch(), tokens)
    assert to_message(visual, stamp_ns=5, frame_id="x").header.frame_id == "x"

    with pytest.raises(TokenFormatError, match="no token message"):
        from_message(CompressedImage(format="jpeg"))
    with pytest.raises(TokenFormatError, match="another version"):
        from_message(CompressedImage(format="safetensors; vla_tokens/2"))
