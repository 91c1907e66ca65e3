"""Changes of an input that a fuzzer tries: of bytes, and of formats that bytes alone would only break at the surface.

Each takes bytes and a `random.Random`, and gives other bytes; the same draws give the same ones. What cannot be parsed
any more is changed as bytes.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random

Mutation = Callable[[bytes, Random], bytes]

_INTEGERS = (0, 1, -1, 2, 3, 7, 16, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32)
_WIDE = (*_INTEGERS, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**40, -(10**40), 10**400)
_NUMBERS = (*_WIDE, 0.5, -0.0, 1e-320, 1e308, -1e308, 1e6, 224.0, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    "0",
    "²",
    "1e5",
    "a" * 1100,
    "\ud800",
    "\x1b[2J",
    "line\nline",
    "nul\0nul",
    "../../../etc/passwd",
    "/dev/zero",
    "hf-hub:a/b",
    "{0.__class__}",
    "%s%n",
    "ａ１",
    "\u202e",
)


def change_bytes(data: bytes, random: Random) -> bytes:
    """Bits, bytes, numbers, runs: some of them, somewhere."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        size = len(changed)
        at, length = random.randrange(size + 1), random.choice((1, 1, 2, 4, 8, 64, size // 2 + 1))
        if not size:
            changed += random.randbytes(length)
            continue
        kind = random.randrange(9)
        if kind == 0:
            changed[at % size] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at % size] = random.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, random.randrange(256)))
        elif kind == 2:
            changed[at:at] = random.randbytes(length)
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[(other := random.randrange(size)) : other + length]
        elif kind == 5:
            del changed[at:]
        elif kind == 6:
            width, order = random.choice((2, 4, 8)), random.choice(("little", "big"))
            number = random.choice(_WIDE) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, order)
        elif kind == 7:
            changed[at : at + length] = bytes(min(length, size - at))
        else:
            other = random.randrange(size)
            changed[at : at + length] = changed[other : other + length]
    return bytes(changed)


# JSON


def change_json(data: bytes, random: Random) -> bytes:
    """Values of a JSON document, those in strings that are JSON themselves included."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _changed(value, random)
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: object, random: Random) -> object:
    """One value in it, its own, or its keys."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        value = dict(value)
        key = random.choice(list(value))
        kind = random.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.15:
            value[random.choice((key + "x", *_TEXTS))] = value.pop(key)
        elif kind < 0.2:
            value[random.choice(_TEXTS)] = random.choice(list(value.values()))
        else:
            value[key] = _changed(value[key], random)
        return value
    if isinstance(value, list) and value and random.random() < 0.8:
        value = list(value)
        at = random.randrange(len(value))
        kind = random.random()
        if kind < 0.15:
            del value[at]
        elif kind < 0.3:
            value.insert(at, random.choice(value))
        elif kind < 0.35:
            value *= 50
        else:
            value[at] = _changed(value[at], random)
        return value
    if isinstance(value, str) and value.startswith("{") and random.random() < 0.9:
        return change_json(value.encode("utf-8", "surrogatepass"), random).decode("utf-8", "replace")
    return _other(value, random)


def _other(value: object, random: Random) -> object:
    if type(value) in (int, float) and abs(value) < 1e300 and random.random() < 0.6:  # type: ignore[arg-type]
        near = random.choice((value + 1, value - 1, -value, 2 * value, value // 2, value / 2, float(value)))  # type: ignore[operator]
        return random.choice((near, random.choice(_NUMBERS)))
    return random.choice(
        (
            random.choice(_NUMBERS),
            random.choice(_TEXTS),
            f"{value}"[:50] + random.choice(_TEXTS),
            None,
            True,
            False,
            [],
            {},
            [value],
            [value] * 3,
            {"a": value},
            [[[[[]]]]],
        )
    )


# YAML, as a file of lines


def change_lines(data: bytes, random: Random) -> bytes:
    """Lines and words of a text file."""
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(random.choice((1, 1, 2, 3))):
        at, kind = random.randrange(len(lines)), random.randrange(7)
        if kind == 0:
            lines.insert(at, random.choice(lines))
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            lines[at] = " " * random.randrange(9) + lines[at].lstrip()
        elif kind == 4:
            lines[at] += random.choice(
                (" &a [*a]", " !!python/name:os.system", " {", " [", ":", " - x", " |", "\t", " #")
            )
        else:
            words = re.split(r"([\s,:\[\]]+)", lines[at])
            words[random.randrange(len(words))] = str(
                random.choice((*_NUMBERS, *_TEXTS, "null", "~", "[]", "{}", "0x10", "1_0", "2001-01-01", "<<"))
            )
            lines[at] = "".join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# Formats of several parts


def change_safetensors(data: bytes, random: Random) -> bytes:
    """The JSON header of a safetensors file, whose length stays right; or its payload."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8 or random.random() < 0.1:
        return change_bytes(data, random)
    header, payload = data[8 : 8 + length], data[8 + length :]
    if random.random() < 0.15:
        payload = change_bytes(payload, random)
    else:
        header = change_json(header, random)
    return len(header).to_bytes(8, "little") + header + payload


def change_zip(data: bytes, random: Random) -> bytes:
    """One record of a zip archive, whose checksum stays right; or a name in the directory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except Exception:  # noqa: BLE001 - zipfile's ways to fail are many
        return change_bytes(data, random)
    if not records or random.random() < 0.1:
        return change_bytes(data, random)
    names = list(records)
    pickles = [name for name in names if name.endswith(".pkl")]
    name = random.choice(pickles if pickles and random.random() < 0.8 else names)
    kind = random.random()
    if kind < 0.05:
        records.pop(name)
    elif kind < 0.1:
        records[name + random.choice(("x", "/", "\0", "/../x"))] = records[name]
    else:
        records[name] = change_bytes(records[name], random)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def change_png(data: bytes, random: Random) -> bytes:
    """Chunks of a PNG behind a prefix of any length, whose checksums stay right; of the pixels what is compressed."""
    start = data.find(b"\x89PNG\r\n\x1a\n")
    if start < 0:
        return change_bytes(data, random)
    chunks, at = [], start + 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return change_bytes(data, random)
    at = random.randrange(len(chunks))
    kind, content = chunks[at]
    draw = random.random()
    if draw < 0.1:
        chunks.insert(random.randrange(len(chunks)), chunks[at])
    elif draw < 0.2:
        del chunks[at]
    elif draw < 0.3:
        chunks[at] = (random.choice((b"PLTE", b"tRNS", b"acTL", b"IEND", b"eXIf", b"iCCP", b"zTXt")), content)
    elif kind == b"IDAT" and draw < 0.7:
        try:
            chunks[at] = (kind, zlib.compress(change_bytes(zlib.decompress(content), random)))
        except zlib.error:
            chunks[at] = (kind, change_bytes(content, random))
    else:
        chunks[at] = (kind, change_bytes(content, random))
    parts = [data[: start + 8]]
    for kind, content in chunks:
        parts.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)
