"""The wire format, against safetensors' own reader, the page that describes it, and hostile bytes."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tokenizer import make_tokens

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402

from vla_perception.tokens import (  # noqa: E402
    FORMAT,
    TokenFormatError,
    View,
    VisualTokens,
    from_message,
    is_token_message,
    to_message,
)
from vla_perception.tokens.message import check_header  # noqa: E402
from vla_perception.tokens.torch_tensors import all_finite, queue_to_host  # noqa: E402

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


def test_files(tmp_path):
    _, visual = make(torch.bfloat16)
    visual.save(tmp_path / "message.safetensors")
    assert (tmp_path / "message.safetensors").read_bytes() == visual.to_bytes()
    read = VisualTokens.load(str(tmp_path / "message.safetensors"))
    assert read.views == visual.views and read.to_bytes() == visual.to_bytes()
    assert not read.data.flags.writeable and np.shares_memory(read.data, read.numpy())
    (tmp_path / "empty").touch()
    with pytest.raises(TokenFormatError, match="too few"):
        VisualTokens.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        VisualTokens.load(tmp_path / "nothing")
    (tmp_path / "cut").write_bytes(visual.to_bytes()[:-1])
    with pytest.raises(TokenFormatError, match="truncated"):
        VisualTokens.load(tmp_path / "cut")


def test_the_reader_on_the_page_works():
    page = (Path(__file__).parents[2] / "docs" / "wire_format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
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


def spoil_view(**changes):
    def spoil(data):
        views = json.loads(header_of(data)[0]["__metadata__"]["vla_tokens"])["views"]
        return spoil_metadata(views=[views[0] | changes, views[1]])(data)

    return spoil


def spoil_text(old: bytes, new: bytes):
    """In the header as it is written, where a JSON writer would not do it."""

    def spoil(data):
        length = int.from_bytes(data[:8], "little")
        assert old in data[8 : 8 + length]
        return with_header(data[8 : 8 + length].replace(old, new, 1), data[8 + length :])

    return spoil


def move(start, tail=b""):
    """The tensor's bytes `start` further on."""

    def spoil(data):
        header, payload = header_of(data)
        header["tokens"]["data_offsets"] = [start, start + len(payload)]
        return with_header(header, bytes(start) + payload + tail)

    return spoil


def encoders(*ranges):
    return [{"name": name, "channels": channels} for name, channels in ranges]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda data: b"", "too few"),
        (lambda data: data[:5], "too few"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:100], "truncated"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "truncated"),
        (lambda data: data + b"more", "take 576 bytes, and there are 580"),
        (lambda data: with_header(b"[" * 100_000, b""), "not JSON"),
        (lambda data: with_header(b"[" + b"[]," * 400_000 + b"0]", b""), "more than 1048576"),
        (lambda data: with_header([1], b""), "not a JSON object"),
        (lambda data: with_header({"tokens": {}}, b""), "no 'vla_tokens' entry"),
        (lambda data: with_header(json.dumps(header_of(data)[0]).encode("utf-16"), header_of(data)[1]), "not UTF-8"),
        (lambda data: with_header({"__metadata__": {"vla_tokens": "[" * 100_000}}, b""), "not JSON"),
        (
            spoil_text(b'"tokens":', b'"tokens":{"data_offsets":[0,576],"dtype":"F32","shape":[2,12,6]},"tokens":'),
            "twice",
        ),
        (spoil_text(b'\\"valid\\":true', b'\\"valid\\":true,\\"valid\\":true'), "twice"),
        (spoil_text(b"0.1", b"NaN"), "NaN is not JSON"),
        (spoil_entry(dtype="I64"), "BF16, F16 or F32"),
        (spoil_entry(shape=[2, 12, 2**31]), "does not fit"),
        (spoil_entry(shape=[2, 12, 2**62]), "wrongly"),
        (spoil_entry(shape=[-2, -12, 6]), "wrongly"),
        (spoil_entry(shape="abc"), "wrongly"),
        (spoil_entry(shape=[24, 6]), "non-empty"),
        (spoil_entry(shape=[1] * 9 + [144]), "non-empty"),
        (spoil_entry(shape=[1] * 99 + [144]), "of 100 dimensions"),  # more than NumPy has
        (spoil_entry(shape=[0, 12, 6]), "does not fit"),
        (spoil_entry(shape=[12, 2, 6]), "12 views|features"),
        (spoil_entry(data_offsets=[0, 2**40]), "wrongly"),
        (spoil_entry(data_offsets=[0, 2**31]), "truncated"),
        (spoil_entry(data_offsets=[400, 0]), "overlap or leave a gap"),
        (spoil_entry(data_offsets=[0.0, 576.0]), "wrongly"),
        (move(8), "overlap or leave a gap"),
        (move(0, b"12345678"), "take 576 bytes"),
        (lambda data: with_header({"__metadata__": {"vla_perception": "{}"}}, b""), "load_file reads it"),
        (spoil_metadata(schema="vla_tokens/2"), "vla_tokens/2"),
        (spoil_metadata(schema=None), "schema None"),
        (spoil_metadata(fingerprint=None), "fingerprint"),
        (spoil_metadata(fingerprint=7), "string"),
        (spoil_metadata(fingerprint="AB" * 32), "hexadecimal"),
        (spoil_metadata(model="\ud800"), "garbled"),
        (spoil_metadata(model="m" * 100_000), "at most 1000 characters"),
        (spoil_metadata(sequence="7"), "whole number"),
        (spoil_metadata(sequence=7.5), "whole number"),
        (spoil_metadata(grid=[3, 5]), "do not fill"),
        (spoil_metadata(grid=[-3, -4]), "whole number"),
        (spoil_metadata(grid=3), "garbled"),
        (spoil_metadata(pool=0), "whole number"),
        (spoil_metadata(token_strategy="summary"), "unknown token_strategy"),
        (spoil_metadata(token_strategy="cls"), "do not fill"),
        (spoil_metadata(token_strategy="cls+patch"), "do not fill"),
        (spoil_metadata(projector="none"), "tokens have 6 channels, but the encoders fill 9"),
        (spoil_metadata(views=[]), "0 are described"),
        (spoil_metadata(views=[1, 2]), "garbled"),
        (spoil_metadata(views=[{"camera": "c"}] * 2), "frame_id"),
        (spoil_view(camera="wrist"), "the same camera"),
        (spoil_view(camera=None), "None is not a string"),
        (spoil_view(valid="false"), "neither true nor false"),
        (spoil_view(height=2**32), "whole number"),
        (spoil_view(stamp={"sec": "1", "nanosec": 0}), "whole number"),
        (spoil_view(stamp={"sec": 1, "nanosec": 10**9}), "whole number"),
        (spoil_view(affine=[1e300, 0, 0, 0, 1e300, 0]), "finite"),
        (spoil_view(affine=[0, 0, 5, 0, 1, 0]), "inverted"),
        (spoil_view(affine=[1, 0, 0, 0, 1]), "6 numbers"),
        (spoil_view(affine=["1", 0, 0, 0, 1, 0]), "6 finite numbers"),
        (spoil_view(seen=[0, 0, 40]), "4 numbers"),
        (spoil_view(seen=[30, 0, 10, 30]), "left, top, right, bottom"),
        (spoil_view(seen=None), "4 numbers"),
        (spoil_metadata(encoders=encoders(("x", [5, 5]))), "channels"),
        (spoil_metadata(encoders=encoders(("x", ["0", "5"]))), "whole number"),
        (spoil_metadata(encoders=encoders(("x", [0, 6]), ("y", [5, 9]))), "ends at 6"),
        (spoil_metadata(encoders=encoders(("x", [0, 6]), ("x", [6, 9]))), "the same name"),
        (spoil_metadata(encoders=[{"channels": [0, 9]}]), "name"),
    ],
)
def test_damaged_messages_are_refused(spoil, words):
    data = make(features=False)[1].to_bytes()
    VisualTokens.from_bytes(data)
    with pytest.raises(TokenFormatError, match=words) as error:
        VisualTokens.from_bytes(spoil(data))
    assert len(str(error.value)) < 600


def test_no_tensor_passes_for_another():
    _, visual = make()
    header, payload = header_of(visual.to_bytes())
    # Features of the tokens' size would be read as tokens without any other sign that something is wrong.
    features, tokens = header["features"], header["tokens"]
    inside = tokens | {"data_offsets": [0, 576]}
    for entry in (inside, tokens | {"data_offsets": [8, 584]}):
        with pytest.raises(TokenFormatError, match="overlap or leave a gap"):
            VisualTokens.from_bytes(with_header(header | {"tokens": entry}, payload))
    with pytest.raises(TokenFormatError, match="features have 8 channels"):
        VisualTokens.from_bytes(
            with_header(
                header
                | {
                    "features": features | {"shape": [2, 12, 8], "data_offsets": [0, 768]},
                    "tokens": tokens | {"data_offsets": [768, 1344]},
                },
                payload[96:],
            )
        )
    # A tensor that a later version adds is skipped.
    more = {"depth": {"dtype": "I64", "shape": [1], "data_offsets": [len(payload), len(payload) + 8]}}
    read = VisualTokens.from_bytes(with_header(header | more, payload + bytes(8)))
    np.testing.assert_array_equal(read.data, visual.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused_but_where_no_image_was(dtype, value):
    _, visual = make(dtype)
    for name, where in (("data", (0, 11, 5)), ("features", (0, 0, 0))):
        values = torch.from_numpy(getattr(visual, name).view(f"i{visual.data.itemsize}").copy()).view(dtype)
        values[where] = value
        words = values.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy().view(visual.data.dtype)
        with pytest.raises(TokenFormatError, match="of 'front' hold values that are not finite"):
            VisualTokens.from_bytes(replace(visual, **{name: words}).to_bytes())
        # The second view is not valid: nobody reads its tokens.
        VisualTokens.from_bytes(replace(visual, **{name: words[::-1]}).to_bytes())
    largest = torch.finfo(dtype).max
    extremes = VisualTokens.from_torch(
        torch.tensor([largest, -largest, 0.0, -0.0] * 36).view(2, 12, 6).to(dtype), sequence=0, views=VIEWS, **MODEL
    )
    assert VisualTokens.from_bytes(extremes.to_bytes()).float32().max() == largest


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
    np.testing.assert_allclose(visual.patch_corners(9), [(10, 20), (20, 20), (20, 30), (10, 30)])
    # The second view's first 15 rows are cropped, and what lies beyond row 45 is not covered.
    assert visual.token_at(5, 14, view=1) is None
    assert visual.token_at(5, 16, view=1) == 0
    assert visual.token_at(5, 46, view=1) is None
    with pytest.raises(ValueError, match="not on the grid"):
        visual.patch_corners(12)
    for token in range(12):
        corners = np.array(visual.patch_corners(token))
        assert visual.token_at(*corners.mean(0)) == token


def test_places_of_a_image_that_was_turned():
    _, visual = make()
    turned = (-0.1, 0.0, 4.0, 0.0, -0.1, 3.0)
    visual = replace(visual, views=(replace(VIEWS[0], affine=turned), VIEWS[1]))
    assert visual.token_at(0, 0) == 11 and visual.token_at(39.9, 29.9) == 0
    assert visual.token_at(10, 0) == 10  # a border belongs to the right of it in the image, whichever way it is turned
    np.testing.assert_allclose(visual.patch_corners(0), [(40, 30), (30, 30), (30, 20), (40, 20)])
    sideways = replace(visual, grid=(4, 3), views=(replace(VIEWS[0], affine=(0, 0.1, 0, -0.1, 0, 4)), VIEWS[1]))
    assert [sideways.token_at(x, y) for x, y in ((0, 0), (39, 0), (0, 29), (39, 29))] == [9, 0, 11, 2]
    for token in range(12):
        assert sideways.token_at(*np.mean(sideways.patch_corners(token), axis=0)) == token


def test_pixels_that_were_cut_away_have_no_token():
    _, visual = make()
    visual = replace(visual, views=(replace(VIEWS[0], roi=(10.0, 5.0, 40.0, 20.5)), VIEWS[1]))
    read = VisualTokens.from_bytes(visual.to_bytes())
    assert read.views == visual.views and VisualTokens.from_bytes(make()[1].to_bytes()).views[0].roi is None
    assert read.token_at(9.9, 7) is None and read.token_at(15, 4) is None and read.token_at(15, 21) is None
    assert read.token_at(10, 5) == 1 and read.token_at(39, 20) == 11


@pytest.mark.parametrize("strategy", ["patch", "cls+patch"])
@pytest.mark.parametrize(
    "affine",
    [
        (0.1, 0.0, 0.0, 0.0, 0.1, 0.0),
        (0.13, 0.0, -0.7, 0.0, 0.11, 0.4),  # cropped at the left, padded at the top
        (-0.1, 0.0, 4.0, 0.0, -0.1, 3.0),  # by 180°
        (0.0, -0.1, 3.0, 0.1, 0.0, 0.0),  # by 90°
        (0.0713, 0.0417, 0.503, -0.0519, 0.0907, 1.0009),  # sheared
    ],
)
@pytest.mark.parametrize("roi", [None, (3.0, 4.0, 31.0, 22.5)])
def test_token_map_agrees_with_the_patches_corners(strategy, affine, roi):
    """Against polygons: a pixel belongs to the patch whose quadrilateral in the source image holds its centre."""
    tokens = np.zeros((1, 12 + (strategy != "patch"), 6), np.float32)
    view = replace(VIEWS[0], affine=affine, roi=roi)
    visual = replace(make(features=False)[1], data=tokens, views=(view,), token_strategy=strategy)
    first = 1 if strategy == "cls+patch" else 0
    expected = np.full((30, 40), -1)
    left, top, right, bottom = roi or (0, 0, 40, 30)
    for y, x in np.ndindex(30, 40):
        centre = np.array([x + 0.5, y + 0.5])
        for token in range(first, first + 12):
            corners = np.array(visual.patch_corners(token))
            edges, to_centre = np.roll(corners, -1, axis=0) - corners, centre - corners
            sides = edges[:, 0] * to_centre[:, 1] - edges[:, 1] * to_centre[:, 0]
            if (sides > 0).all() and left <= centre[0] < right and top <= centre[1] < bottom:
                expected[y, x] = token
    found = visual.token_map()
    np.testing.assert_array_equal(found, expected)
    assert 0 < (found >= 0).sum() and found.dtype == np.intp
    for y, x in np.ndindex(30, 40):
        assert (visual.token_at(x + 0.5, y + 0.5) if expected[y, x] >= 0 else -1) == expected[y, x]
    patches = np.where(expected < 0, -1, expected - first)
    np.testing.assert_array_equal(
        view.patch_at(np.arange(40) + 0.5, np.arange(10, 12)[:, None] + 0.5, (3, 4)), patches[10:12]
    )


def test_a_token_map_is_bounded():
    _, visual = make(features=False)
    for height, width in ((2**31, 2**31), (2**31, 0), (2**20, 1)):
        huge = replace(visual, views=(replace(VIEWS[0], height=height, width=width), VIEWS[1]))
        with pytest.raises(ValueError, match="too large"):
            huge.token_map()
    for x, y in ((np.nan, 1.0), (np.inf, 1.0), (1e300, 1.0), (1.0, -1e300)):
        assert visual.token_at(x, y) is None


def test_slices():
    tokens, visual = make()
    wrist = visual.select("wrist")
    assert wrist.shape == (1, 12, 6) and wrist.cameras == ("wrist",) and not wrist.views[0].valid
    np.testing.assert_array_equal(wrist.float32()[0], tokens[1].numpy())
    assert np.shares_memory(wrist.data, visual.data)
    with pytest.raises(KeyError, match="front, wrist"):
        visual.select("left")
    assert visual.encoder_channels("siglip") == slice(5, 9)
    with pytest.raises(KeyError, match="dinov2, siglip"):
        visual.encoder_channels("clip")
    np.testing.assert_array_equal(visual.as_grid()[1, 2, 3], tokens[1, 11].numpy())
    assert np.shares_memory(visual.as_grid(), visual.data)
    assert visual.as_grid(visual.features_float32()).shape == (2, 3, 4, 9)


def test_encoder_slices():
    features = np.arange(12 * 9, dtype=np.float32).reshape(1, 12, 9)
    tokens = make_tokens(0, features=features)
    np.testing.assert_array_equal(tokens.encoder("siglip"), features[..., 5:])
    assert np.shares_memory(tokens.encoder("dinov2"), features)
    with pytest.raises(KeyError, match="dinov2, siglip"):
        tokens.encoder("clip")
    with pytest.raises(ValueError, match="publish_features"):
        make_tokens(0).encoder("siglip")
    bare = make_tokens(0, channels=9, projector="none")
    assert bare.encoder("dinov2").shape == (1, 12, 5) and np.shares_memory(bare.encoder("dinov2"), bare.data)


def test_cls_token_stands_before_the_grid():
    _, visual = make(features=False)
    data = np.concatenate([np.full((2, 1, 6), 9, np.float32), visual.data], axis=1)
    both = replace(visual, data=data, token_strategy="cls+patch")
    assert both.token_at(0, 0) == 1
    np.testing.assert_array_equal(both.as_grid(), visual.as_grid())
    with pytest.raises(ValueError, match="not on the grid"):
        both.patch_corners(0)
    alone = replace(visual, data=data[:, :1], token_strategy="cls")
    for read in (alone.as_grid, alone.token_map, lambda: alone.token_at(0, 0)):
        with pytest.raises(ValueError, match="no place"):
            read()
    with pytest.raises(ValueError, match="not on the grid"):
        alone.patch_corners(0)
    assert VisualTokens.from_bytes(alone.to_bytes()).shape == (2, 1, 6)
    # Features have the summary in front, too.
    features = np.concatenate([np.full((2, 1, 9), 7, np.float32), np.zeros((2, 12, 9), np.float32)], axis=1)
    read = VisualTokens.from_bytes(replace(both, features=features).to_bytes())
    assert (read.encoder("siglip")[:, 0] == 7).all() and read.encoder("dinov2").shape == (2, 13, 5)
    assert (read.as_grid(read.encoder("siglip")) == 0).all()


def test_tokens_that_are_on_a_device_are_given_from_there():
    """The source holds other values here, so that it shows; on a GPU they are the same."""
    tokens, visual = make()
    source = tokens + 1
    visual = replace(visual, _source=(visual.data, source))
    given = visual.torch("cpu")
    assert torch.equal(given, source) and given.data_ptr() != source.data_ptr()
    assert torch.equal(visual.select("wrist").torch(), source[1:])
    assert visual.torch("meta").device.type == "meta"
    other = replace(visual, data=visual.data * 2)  # what is no longer a copy of it is not told by it
    assert torch.equal(other.torch(), tokens * 2) and torch.equal(other.select("front").torch(), tokens[:1] * 2)
    assert visual.to_bytes() == make()[1].to_bytes()


def test_tokens_that_another_stream_reads_keep_their_memory(monkeypatch):
    """The policy's stream may be behind when the encoding thread lets go of the message."""
    stream, done = object(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    class OnDevice:
        device, is_cuda = torch.device("cuda", 0), True

        def record_stream(self, given):
            done.append(("recorded", given))

        def clone(self):
            done.append("copied")
            return self

    _, visual = make()
    replace(visual, _source=(visual.data, OnDevice())).torch("cuda:0")
    assert done == [("recorded", stream), "copied"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite(bad, dtype, device):
    good = torch.linspace(-1, 1, 3000, dtype=torch.float64, device=device).mul(torch.finfo(dtype).max).to(dtype)
    assert all_finite([good]) and all_finite([good, good])
    for place in (0, 1, 1500, 2998, 2999):
        odd = good.reshape(3, -1).clone()
        odd.view(-1)[place] = bad
        assert not all_finite([good, odd.view(-1)]) and not all_finite([odd])
        assert not all_finite([odd, good[:4]])


@pytest.mark.gpu
def test_tokens_of_a_gpu_are_copied_to_the_host_once_and_stay_there():
    tokens = torch.randn(2, 12, 6, device="cuda", dtype=torch.bfloat16)
    visual = VisualTokens.from_torch(tokens, sequence=7, views=VIEWS, **MODEL)
    assert torch.equal(visual.torch(), tokens.cpu())
    for device in ("cuda", tokens.device):
        given = visual.torch(device)
        assert torch.equal(given, tokens) and given.data_ptr() != tokens.data_ptr()
    assert torch.equal(queue_to_host(tokens)[:0], tokens.cpu()[:0]) and queue_to_host(tokens).is_pinned()


def test_reading_needs_no_torch(monkeypatch):
    data = make(torch.bfloat16)[1].to_bytes()
    monkeypatch.setitem(sys.modules, "torch", None)
    read = VisualTokens.from_bytes(data)
    assert read.float32().dtype == np.float32
    assert read.numpy().dtype.name == "bfloat16"
    assert read.as_grid().shape == (2, 3, 4, 6)


@pytest.mark.ros
@pytest.mark.parametrize(
    ("sec", "nanosec", "frame_id", "reason"),
    [
        (-1, 0, "camera", "stamp, -1 s and 0 ns"),
        (-(2**31), 0, "camera", "is not a time"),
        (1, 10**9, "camera", "nanoseconds below"),
        (2**31 - 1, 2**32 - 1, "camera", "is not a time"),
        (1, 0, "x" * 1001, "frame_id .* at most 1000"),
        (1, 0, "\ud800", "frame_id"),
        (0, 0, "", None),
        (2**31 - 1, 10**9 - 1, "x" * 1000, None),
        (1, 0, "Kamera für 手首/\0", None),
    ],
)
def test_headers_that_no_token_message_carries(sec, nanosec, frame_id, reason):
    """What passes can be read back; what does not is no time, or what a reader refuses."""
    header = SimpleNamespace(stamp=SimpleNamespace(sec=sec, nanosec=nanosec), frame_id=frame_id)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            check_header(header)
        return
    check_header(header)
    view = replace(VIEWS[0], stamp_ns=sec * 10**9 + nanosec, frame_id=frame_id)
    written = replace(make()[1], views=(view, VIEWS[1]))
    assert VisualTokens.from_bytes(written.to_bytes()).views == written.views


@pytest.mark.parametrize(
    "changes", [{"camera": "x" * 1001}, {"frame_id": "x" * 1001}, {"stamp_ns": 2**31 * 10**9}, {"stamp_ns": -(10**20)}]
)
def test_a_view_that_no_reader_would_take_is_not_made(changes):
    with pytest.raises(ValueError, match="at most 1000|beyond what a message"):
        replace(VIEWS[0], **changes)


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

    with pytest.raises(TokenFormatError, match="not a token message"):
        from_message(CompressedImage(format="jpeg"))
    with pytest.raises(TokenFormatError, match="another version"):
        from_message(CompressedImage(format="safetensors; vla_tokens/2"))


def test_the_header_is_that_of_the_message_it_stands_in():
    """It is kept once it was made, which the node does while the tokens are still being computed."""
    tokens = make_tokens(1)
    tokens.to_parts()
    tokens.data[:] = 3
    changed = replace(tokens, sequence=2, data=tokens.data[:, ::-1])
    for sent, sequence in ((tokens, 1), (changed, 2)):
        read = VisualTokens.from_bytes(sent.to_bytes())
        assert read.sequence == sequence
        np.testing.assert_array_equal(read.data, sent.data)
