"""Text of a file or a message, in a sentence for a log."""

from __future__ import annotations

import re

#: Characters of an error: what quotes lists of names from a file could fill a log.
MAX_ERROR = 4000
#: What a terminal obeys, ends a line, or turns the direction of writing; and halves of surrogate pairs.
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with escapes (``\\x1b``, ``\\n``, ``\\ud800``) for whatever is not printed.

    A terminal obeys control characters, a line end begins another entry of a log, and rclpy's logger raises TypeError for
    half a surrogate pair, which JSON can hold.
    """
    if text.isprintable():
        return text
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def error_text(text: str) -> str:
    """The text of an error that quotes a file: printable, and of a long one the begin and the end, where the advice is."""
    text = printable(text)
    return text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR - 1000]} … {text[-900:]}"
