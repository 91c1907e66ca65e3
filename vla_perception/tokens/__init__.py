"""Visual tokens as they travel: the message, its transports, and what a policy imports.

    from vla_perception.tokens import LocalTokenizer, TokenSubscriber, VisualTokens

NumPy is enough to read tokens; rclpy, iceoryx2 and torch are imported only where they are used, and this package
imports its modules when one of their names is first asked for.

Words:
    token message: the tokens of all views of one moment, as `VisualTokens` or as bytes (format ``vla_tokens/1``).
    view: one camera's image and where its tokens lie on it (`View`); grid: rows and columns of its patch tokens.
    cls token: one token for a whole view, before its patch tokens.
    roi: region of interest, what was left of an image after cropping.
    sequence: counts a tokenizer's messages; a gap is a loss, a step back a restart.
    fingerprint: identifies weights and preprocessing; it is what a policy expects.
    late: older, by its stamp, than a message that has arrived, and not older than all of the last 8.
    transport: what brings messages, the topic or shared memory; handover: the switch between them.
    rejected: not accepted, because damaged, of another schema, or of another fingerprint than the expected one.
    skipped: accepted, but not given to the callback, because a newer one was there.

Modules, each importing only those above it:
    fingerprint             what differs between two fingerprints
    arrivals                late, lost, set back, restarted, several senders: by stamps and numbers alone
    encode_service          the texts in the answers of the service `encode`, for both ends
    codec                   bytes ↔ metadata and arrays; limits, errors
    view                    View: the map from an image's pixels to patches
    visual_tokens           VisualTokens
    torch_tensors           torch tensors → arrays
    message                 ROS message ↔ VisualTokens
    shared_memory_services  iceoryx2's services, opened only where that cannot end or hang the process
    shared_memory           a message's bytes between processes of one machine
    buffer                  TokenBuffer: the latest messages, for readers in any thread
    handover                topic ↔ shared memory, as a pure state machine
    transports              receivers of both, in threads
    subscriber              TokenSubscriber
    local                   LocalTokenizer, tokenize()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla_perception.tokens.buffer import FingerprintMismatchError, TokenBuffer
    from vla_perception.tokens.codec import FORMAT, SCHEMA, TokenFormatError
    from vla_perception.tokens.local import LocalTokenizer, tokenize
    from vla_perception.tokens.message import from_message, is_token_message, to_message
    from vla_perception.tokens.subscriber import TokenSubscriber
    from vla_perception.tokens.view import View
    from vla_perception.tokens.visual_tokens import VisualTokens

__all__ = [
    "FORMAT",
    "SCHEMA",
    "FingerprintMismatchError",
    "LocalTokenizer",
    "TokenBuffer",
    "TokenFormatError",
    "TokenSubscriber",
    "View",
    "VisualTokens",
    "from_message",
    "is_token_message",
    "to_message",
    "tokenize",
]

_MODULES = {
    "FORMAT": "codec",
    "SCHEMA": "codec",
    "FingerprintMismatchError": "buffer",
    "LocalTokenizer": "local",
    "TokenBuffer": "buffer",
    "TokenFormatError": "codec",
    "TokenSubscriber": "subscriber",
    "View": "view",
    "VisualTokens": "visual_tokens",
    "from_message": "message",
    "is_token_message": "message",
    "to_message": "message",
    "tokenize": "local",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
