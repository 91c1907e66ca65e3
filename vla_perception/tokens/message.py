"""ROS message ↔ `VisualTokens`: a ``sensor_msgs/CompressedImage`` whose data is a token file (`codec`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vla_perception.byte_array import byte_array
from vla_perception.tokens.codec import FORMAT, FORMAT_OF_ANY_VERSION, TokenFormatError, string
from vla_perception.tokens.visual_tokens import VisualTokens

if TYPE_CHECKING:
    from sensor_msgs.msg import CompressedImage
    from std_msgs.msg import Header


def to_message(tokens: VisualTokens) -> CompressedImage:
    """The token message; its header is the first view's."""
    from sensor_msgs.msg import CompressedImage

    message = CompressedImage()
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(tokens.stamp_ns, 10**9)
    message.header.frame_id = tokens.views[0].frame_id
    message.format = FORMAT
    message.data = byte_array(*tokens.to_parts())
    return message


def from_message(message: CompressedImage) -> VisualTokens:
    """The tokens of a message, as read-only views of its data.

    Raises:
        TokenFormatError: it carries an image, another schema version, or damaged bytes.
    """
    if message.format != FORMAT:
        advice = (
            "it was written by another version of vla_perception; use the same one on both sides"
            if is_token_message(message)
            else "it is not a token message; subscribe to the tokenizer's `tokens` topic"
        )
        raise TokenFormatError(f"format {message.format!r} is not {FORMAT!r}: {advice}")
    return VisualTokens.from_bytes(message.data)


def is_token_message(message: CompressedImage) -> bool:
    """Whether a CompressedImage carries tokens (of any schema version) rather than an image."""
    return message.format.startswith(FORMAT_OF_ANY_VERSION)


def check_header(header: Header) -> None:
    """ValueError, with the reason, for an image's header that no token message can carry."""
    sec, nanosec = header.stamp.sec, header.stamp.nanosec
    if sec < 0 or nanosec >= 10**9:
        raise ValueError(
            f"its stamp, {sec} s and {nanosec} ns, is not a time; a driver has to stamp with seconds from 0 and "
            "nanoseconds below 1000000000"
        )
    try:
        string(header.frame_id)
    except ValueError as error:
        raise ValueError(f"its frame_id cannot go into a token message: {error}") from None
