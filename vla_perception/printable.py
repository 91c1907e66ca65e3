"""Text of a file or a message, in a sentence for a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with escapes (``\\x1b``, ``\\n``, ``\\ud800``) for whatever is not printed.

    A terminal obeys control characters, a line end begins another entry of a log, and rclpy's logger raises TypeError for
    half a surrogate pair, which JSON can hold.
    """
    if text.isprintable():
        return text
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)
