"""What serialised messages say, read from their CDR bytes without knowing the message type's definition."""

from __future__ import annotations

import struct
from types import SimpleNamespace


def header_stamp_ns(cdr: bytes) -> int:
    """The stamp (ns) of a message whose first field is a std_msgs/Header. ValueError on bytes too short for it."""
    order = _byte_order(cdr)
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", cdr, 4)
    return seconds * 1_000_000_000 + nanoseconds


def with_header_stamp(cdr: bytes, stamp_ns: int) -> bytes:
    """The message with another stamp (ns since the epoch) in its header, which must be its first field.

    Everything else stays as it is, byte for byte. ValueError on bytes too short for a header, and on a stamp whose
    seconds do not fit into the 32 bits that the message has for them (until 2038).
    """
    order = _byte_order(cdr)
    if not -(2**31) <= stamp_ns // 1_000_000_000 < 2**31:
        raise ValueError(f"a header cannot hold the stamp {stamp_ns} ns: its seconds have 32 bits")
    return cdr[:4] + struct.pack(f"{order}iI", *divmod(stamp_ns, 1_000_000_000)) + cdr[12:]


def compressed_format(cdr: bytes) -> str:
    """The `format` of a serialised CompressedImage; "" if the bytes are not one."""
    try:
        return _string(cdr, _string(cdr, 12)[1])[0]
    except ValueError:
        return ""


def image_encoding(cdr: bytes) -> str:
    """The `encoding` of a serialised Image; "" if the bytes are not one."""
    try:
        return _string(cdr, _aligned(_string(cdr, 12)[1]) + 8)[0]  # behind frame_id, height and width
    except ValueError:
        return ""


def compressed_data(cdr: bytes) -> bytes:
    """The first bytes of a serialised CompressedImage's `data`; none if the bytes are not one."""
    try:
        start = _aligned(_string(cdr, _string(cdr, 12)[1])[1]) + 4
        return cdr[start : start + 32]
    except ValueError:
        return b""


def read_compressed_image(cdr: bytes) -> SimpleNamespace:
    """A serialised CompressedImage: its `format`, and `data` as a view of the bytes. ValueError if they are too few."""
    form, end = _sequence(cdr, _sequence(cdr, 12)[1])  # behind frame_id
    return SimpleNamespace(format=_text(form), data=_sequence(cdr, end)[0])


def read_image(cdr: bytes) -> SimpleNamespace:
    """A serialised Image without its header, `data` as a view of the bytes. ValueError if they are too few."""
    height, end = _number(cdr, _sequence(cdr, 12)[1])  # behind frame_id
    width, end = _number(cdr, end)
    encoding, end = _sequence(cdr, end)
    step, start = _number(cdr, end + 1)
    return SimpleNamespace(
        height=height,
        width=width,
        encoding=_text(encoding),
        is_bigendian=cdr[end],
        step=step,
        data=_sequence(cdr, start)[0],
    )


def _text(string: memoryview) -> str:
    return str(string[:-1], "utf-8", "replace")


def _sequence(cdr: bytes, position: int) -> tuple[memoryview, int]:
    """The whole sequence of bytes, or string with its zero, whose length is there, and where it ends."""
    length, start = _number(cdr, position)
    if start + length > len(cdr):
        raise ValueError("a message ends too early")
    return memoryview(cdr)[start : start + length], start + length


def _string(cdr: bytes, position: int) -> tuple[str, int]:
    """The string whose length is there, as much of it as there is, and where it ends."""
    length, start = _number(cdr, position)
    return cdr[start : start + length].rstrip(b"\0").decode(), start + length


def _number(cdr: bytes, position: int) -> tuple[int, int]:
    """The number of 32 bits at `position` or at the next aligned place, and where it ends."""
    position = _aligned(position)
    try:
        (value,) = struct.unpack_from(f"{_byte_order(cdr)}I", cdr, position)
    except struct.error:
        raise ValueError("a message ends too early") from None
    return value, position + 4


def _aligned(position: int) -> int:
    return position + -(position - 4) % 4  # CDR aligns relative to the end of its 4 bytes of encapsulation


def _byte_order(cdr: bytes) -> str:
    """ "<" or ">": the second byte of the encapsulation says which."""
    if len(cdr) < 12:
        raise ValueError(f"{len(cdr)} bytes are too few for a message with a header")
    return "<" if cdr[1] & 1 else ">"
