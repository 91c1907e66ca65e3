"""The texts of the service `encode`: what the node writes, a policy reads."""

import pytest

from vla_perception.tokens.encode_service import FINAL, is_final, published, published_sequence


@pytest.mark.parametrize("sequence", [0, 7, 2**62])
def test_what_is_written_is_read(sequence):
    assert published_sequence(published(sequence, 1_700_000_000_123_456_789)) == sequence


@pytest.mark.parametrize(
    ("text", "sequence"),
    [
        ("published as sequence 9, stamp 5 ns", 9),  # 0.1.0's
        ("sequence: 12", 12),
        ("sequence twelve, stamp 5 ns", None),
        ("the sequence -3", None),
        ("sequence", None),
        ("sequence ²", None),
        ("sequence " + "9" * 5000, None),
        ("", None),
    ],
)
def test_sequences_are_found_in_texts(text, sequence):
    assert published_sequence(text) == sequence


def test_only_settings_make_a_rejection_final():
    assert is_final(FINAL + "the parameter trigger is continuous")
    assert not is_final("no image from front yet")
    assert not is_final(published(1, 2))
