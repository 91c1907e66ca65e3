"""The texts in the answers of the tokenizer's service `encode`, a std_srvs/Trigger: what the node writes and a policy reads.

The answer has a flag (a message was published) and a text. The policy waits for the message that the text names; a
rejected request is repeated, unless the text says that repeating it is useless.
"""

from __future__ import annotations

import re

#: Begins the reason of a rejection that stands until the tokenizer's settings are changed. Any other reason may be gone
#: a moment later: an image arrives, the node becomes active, discovery completes.
FINAL = "refused: "
_NUMBER = re.compile(r"\d{1,20}", re.ASCII)


def published(sequence: int, stamp_ns: int) -> str:
    """The text of an answer after a message was published."""
    return f"published as sequence {sequence}, stamp {stamp_ns} ns"


def published_sequence(text: str) -> int | None:
    """The sequence number in such a text; None if it has none."""
    words = text.replace(",", " ").replace(":", " ").split()
    for word, following in zip(words, words[1:]):
        if word == "sequence" and _NUMBER.fullmatch(following):
            return int(following)
    return None


def is_final(reason: str) -> bool:
    """Whether repeating the request is useless."""
    return reason.startswith(FINAL)
