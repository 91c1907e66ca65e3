"""What a policy is told when tokens of another tokenizer come: the values on both sides, where they can be known."""

import json

import pytest
from fake_tokenizer import MODEL, make_tokens

pytest.importorskip("torch")
pytest.importorskip("timm")
from vla_perception.fingerprint_inputs import fingerprint
from vla_perception.tokenizer import VisualTokenizer, presets
from vla_perception.tokens import FingerprintMismatchError, LocalTokenizer, TokenFormatError, VisualTokens
from vla_perception.tokens.fingerprint import difference

WEIGHTS, OTHER = "12" * 32, "34" * 32


def made(model="openvla-7b", weights=WEIGHTS, **choices):
    """(fingerprint as the tokenizer computes it, its inputs as they come out of a message)."""
    settings = presets.PRESETS[model].with_options(trained=False, **choices).settings()
    inputs = {"settings": settings, "weights": weights}
    return fingerprint(inputs), json.loads(json.dumps(inputs))


def test_the_message_says_what_its_fingerprint_is_made_of():
    tokenizer = VisualTokenizer.from_preset("tiny-random", image_transforms=["rotate180"], pool=2)
    inputs = tokenizer.metadata()["fingerprint_inputs"]
    assert (
        fingerprint(inputs) == tokenizer.fingerprint
        and fingerprint(json.loads(json.dumps(inputs))) == tokenizer.fingerprint
    )
    sent = make_tokens(0, fingerprint=tokenizer.fingerprint, fingerprint_inputs=inputs)
    assert VisualTokens.from_bytes(sent.to_bytes()).fingerprint_inputs == json.loads(json.dumps(inputs))
    assert VisualTokens.from_bytes(make_tokens(0).to_bytes()).fingerprint_inputs is None
    assert "fingerprint_inputs" not in VisualTokenizer.from_preset("tiny-random").metadata()
    policy = source(tokenizer.fingerprint)
    assert not policy.push(make_tokens(0, weights="random"))
    with pytest.raises(
        FingerprintMismatchError,
        match=r"random weights of a preset without options came: pool 1, image_transforms \[\]",
    ):
        policy.latest  # noqa: B018


def test_fingerprints_are_those_of_0_1_0():
    """Image transforms and `crop` had other names then, which the hash is over: a policy's pinned fingerprint stays."""
    pinned = "c39c89222b23c8756cd91e99b3d31cf31522eaf29e85dad04814dbb19b6c9087"  # computed by 0.1.0
    steps = ["rotate180", "wrist=crop:10,20,60,50", "jpeg"]
    got, inputs = made(image_transforms=steps, pool=2)
    assert got == fingerprint(inputs) == pinned
    assert inputs["settings"]["prepare"]["wrist"] == ["rotate180", "region:10,20,60,50", "jpeg:95"]
    text = difference(made(pool=2)[0], made(pool=2)[1], inputs, got)
    assert 'image_transforms.wrist (expected none, got ["rotate180", "crop:10,20,60,50", "jpeg:95"])' in text


@pytest.mark.parametrize(
    "inputs",
    [
        7,
        [],
        {},
        {"settings": {}},
        {"settings": {}, "weights": 7},
        {"settings": [], "weights": WEIGHTS},
        {"settings": {}, "weights": "ab"},
    ],
)
def test_garbled_inputs_are_refused(inputs):
    with pytest.raises(TokenFormatError, match="fingerprint_inputs"):
        VisualTokens.from_bytes(make_tokens(0, fingerprint_inputs=inputs).to_bytes())


OFT = ["rotate180", "jpeg", "lanczos3", "center_crop_tf"]


@pytest.mark.parametrize(
    "wanted, got, words",
    [
        (
            {},
            {"image_transforms": OFT},
            [
                'image_transforms (expected [], got ["rotate180", "jpeg:95", "lanczos3:224", "center_crop_tf:224"])',
                "weights are the expected",
            ],
        ),
        (
            {"image_transforms": OFT},
            {},
            ['image_transforms (expected ["rotate180", "jpeg:95", "lanczos3:224", "center_crop_tf:224"], got [])'],
        ),
        (
            {"image_transforms": ["lanczos3"]},
            {"image_transforms": ["crop:0,0,9,9"]},
            ['expected ["lanczos3:224"], got ["crop:0,0,9,9"]'],
        ),
        (
            {"image_transforms": ["center_crop_pil"]},
            {"image_transforms": ["front=rotate180"]},
            ['expected ["center_crop_pil"]'],
        ),
        ({"pool": 2}, {}, ["pool (expected 2, got 1)", "weights are the expected"]),
        (
            {"model": "pi05", "image_transforms": ["resize_with_pad_pil"]},
            {"model": "pi05", "image_transforms": ["rotate180"]},
            [
                'image_transforms (expected [], got ["rotate180"])',
                'siglip.resize_strategy (expected "resize_with_pad_pil", got "resize_with_pad_torch")',
            ],
        ),
        (
            {},
            {"pool": 4, "image_transforms": ["lanczos3"]},
            ["pool (expected 1, got 4)", 'image_transforms (expected [], got ["lanczos3:224"])'],
        ),
        (
            {"token_strategy": "cls"},
            {"token_strategy": "cls+patch"},
            ['token_strategy (expected "cls", got "cls+patch")'],
        ),
    ],
)
def test_the_expected_options_are_found_from_the_hash_alone(wanted, got, words):
    (expected, _), (fingerprint_, inputs) = made(**wanted), made(**got)
    for digits in (expected, expected[:16]):
        text = difference(digits, None, inputs, fingerprint_)
        assert all(word in text for word in words), text
        assert "weights (expected" not in text


def test_other_statistics_and_resizing_are_found_too():
    """The same weights as Prismatic's run (exact statistics) and as OpenVLA's directory (out of bfloat16)."""
    (_, exact_inputs), (rounded, rounded_inputs) = made("prism-dinosiglip-224px"), made("openvla-7b")
    exact_inputs["settings"]["preprocessing"][1]["architecture"] = rounded_inputs["settings"]["preprocessing"][1][
        "architecture"
    ]
    assert "dinov2.mean (expected [0.484375, 0.455078125, 0.40625], got [0.485, 0.456, 0.406])" in difference(
        rounded, None, exact_inputs, fingerprint(exact_inputs)
    )
    assert "dinov2.mean" in difference(fingerprint(exact_inputs), None, rounded_inputs, rounded)
    cropped = json.loads(json.dumps(rounded_inputs))
    for encoder in cropped["settings"]["preprocessing"]:
        encoder["resize_strategy"] = "resize-crop"
    text = difference(fingerprint(cropped), None, rounded_inputs, rounded)
    assert 'siglip.resize_strategy (expected "resize-crop", got "resize-naive")' in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"interpolation": 2}, "siglip.interpolation (expected 2, got 3)"),
        ({"interpolation": 1}, "dinov2.interpolation (expected 1, got 3)"),
        (
            {"resize_strategy": "letterbox", "letterbox_fill": [123, 116, 103]},
            'dinov2.resize_strategy (expected "letterbox"',
        ),
    ],
)
def test_other_interpolations_are_found_too(change, words):
    got, inputs = made("openvla-7b")
    other = json.loads(json.dumps(inputs))
    for encoder in other["settings"]["preprocessing"]:
        encoder.update(change)
    assert words in difference(fingerprint(other), None, inputs, got)


@pytest.mark.parametrize(
    "mine, theirs", [(1, 1.0), (1, True), (0, False), ([0, 0], [0.0, 0.0]), ({}, None), ({"a": {}}, {})]
)
def test_values_that_python_takes_for_equal_are_distinguished(mine, theirs):
    got, inputs = made("openvla-7b")
    ours, others = (json.loads(json.dumps(inputs)) for _ in range(2))
    ours["settings"]["more"], others["settings"]["more"] = mine, theirs
    text = difference(fingerprint(ours), ours, others, fingerprint(others))
    assert "more" in text and "the weights are the expected ones" in text


def test_other_weights_are_named_with_what_came():
    (expected, wanted), (got, inputs) = made(), made(weights=OTHER, image_transforms=["lanczos3"])
    text = difference(expected, None, inputs, got)
    assert "most likely the weights" in text and OTHER[:16] in text and "lanczos3:224" in text
    text = difference(expected, wanted, inputs, got)  # both sides known
    assert f"weights (expected digest {WEIGHTS[:16]}…, got {OTHER[:16]}…)" in text
    assert 'image_transforms (expected [], got ["lanczos3:224"])' in text and "the expected ones" not in text


def test_inputs_that_are_not_the_fingerprints_are_not_believed():
    (expected, _), (got, inputs) = made(), made(image_transforms=["lanczos3"])
    assert "not known" in difference(expected, None, None, got)
    assert "not known" in difference(expected, None, {**inputs, "weights": OTHER}, got)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preprocessing": 7},
        {"preprocessing": [{}, {}]},
        {"preprocessing": [{"image_size": [1]}]},
        {"preprocessing": [{"encoder": ["x"], "image_size": {}}]},
        {"x" * 100_000: "y" * 100_000},
        {"prepare": ["\\ud800", 1e308], "pool": {"a": {"b": [None]}}},
        {str(number): number for number in range(5000)},
    ],
)
def test_any_settings_end_in_a_short_sentence(settings):
    inputs = {"settings": settings, "weights": WEIGHTS}
    assert len(difference("ab" * 32, None, inputs, fingerprint(inputs))) < 4000
    assert len(difference("ab" * 32, made()[1], inputs, fingerprint(inputs))) < 4000


def source(expected):
    tokens = LocalTokenizer(None, expect_fingerprint=expected)
    tokens._log = lambda text, error: None
    return tokens


def test_a_policy_reads_it_in_the_error():
    (expected, wanted), (got, inputs) = made(pool=2), made(image_transforms=["crop:1,2,3,4"], weights=OTHER)
    wrong = make_tokens(1, fingerprint=got, fingerprint_inputs=inputs)
    known = source({**MODEL, "fingerprint": expected, "fingerprint_inputs": wanted})  # VisualTokenizer.metadata()
    taught = source(expected[:16])  # by right tokens that came before
    assert taught.push(make_tokens(0, fingerprint=expected, fingerprint_inputs=wanted))
    for tokens in (known, taught):
        assert not tokens.push(wrong)
        with pytest.raises(
            FingerprintMismatchError, match=r"weights \(expected digest 1212.*pool \(expected 2, got 1\)"
        ):
            tokens.latest  # noqa: B018
    alone = source(expected)
    alone.push(wrong)
    with pytest.raises(FingerprintMismatchError, match=f"{got[:16]}….*{expected[:16]}….*most likely the weights"):
        alone.latest  # noqa: B018


@pytest.mark.parametrize(
    "expected, words",
    [
        ("ab", "at least 8"),
        ({}, "at least 8"),
        ({"fingerprint": 7}, "at least 8"),
        (
            {"fingerprint": "ab" * 32, "fingerprint_inputs": {"settings": {}, "weights": WEIGHTS}},
            "have the fingerprint",
        ),
        ({"fingerprint": "ab" * 32, "fingerprint_inputs": 7}, "fingerprint_inputs"),
    ],
)
def test_an_expectation_that_cannot_be(expected, words):
    with pytest.raises(ValueError, match=words):
        source(expected)
