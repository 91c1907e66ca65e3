"""Damaged and hostile files: each ends in one clear CheckpointError, at once and in little memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
from ros_harness import ROOT  # noqa: E402

SHARD = "model.safetensors"
CPU_SECONDS, MIB = 1.0, 64

#: Loads each path, one after the other in one process, and prints what that took beyond the level before.
LOADER = """
import json, re, sys, time
from vla_perception.tokenizer import CheckpointError, VisualTokenizer

def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024

VisualTokenizer.from_preset("tiny-random")  # whatever is imported late is imported now
try:
    VisualTokenizer.load("/nowhere/run/checkpoints/x.pt")
except CheckpointError:
    pass
for path in sys.argv[1:]:
    before, begun = peak(reset=True), time.process_time()
    try:
        VisualTokenizer.from_checkpoint(path)
        kind, text = "loaded", ""
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    print(json.dumps([path, kind, text, time.process_time() - begun, peak() - before]), flush=True)
"""


def header(entries: object, payload: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(start: int, stop: int, shape=None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


NAMES = ("projector.fc1.weight", "projector.fc1.bias")
SAFETENSORS = {
    "empty": (b"", "too short"),
    "a few bytes": (b"\x08\0\0", "too short"),
    "a header longer than the file": (header({}, length=10_000), "claims 10000 bytes"),
    "a header of exabytes": (header({}, length=1 << 62), "claims 4611686018427387904 bytes"),
    "no JSON": (header(b"\xff\xfe{{{"), "JSON"),
    "JSON of another kind": (header([1, 2]), "JSON object"),
    "JSON nested without end": (header(b'{"a":' * 100_000), "JSON"),
    "an entry that is none": (header({NAMES[0]: 7}), "is not a tensor's"),
    "negative offsets": (header({NAMES[0]: entry(-8, 8)}, bytes(16)), "numbers that cannot be"),
    "offsets backwards": (header({NAMES[0]: entry(8, 4, [1])}, bytes(16)), "are not F32"),
    "offsets beyond the file": (header({NAMES[0]: entry(0, 4096)}, bytes(16)), "truncated"),
    "overlapping offsets": (header({NAMES[0]: entry(0, 16), NAMES[1]: entry(8, 24)}, bytes(24)), "overlap"),
    "bytes that are not the shape's": (header({NAMES[0]: entry(0, 16, [1 << 40, 1 << 40])}, bytes(16)), "are not F32"),
    "a shape that overflows": (header({NAMES[0]: entry(0, 16, [1 << 61] * 16)}, bytes(16)), "are not F32"),
    "a dtype that nobody knows": (header({NAMES[0]: entry(0, 16, dtype="F7")}, bytes(16)), "wrong shape or dtype"),
    "a dtype that is none": (
        header({NAMES[0]: entry(0, 16, dtype="f32; rm -r")}, bytes(16)),
        "dtype or numbers that cannot",
    ),
    "a dtype without end": (
        header({NAMES[0]: entry(0, 16, dtype="F" * 100_000)}, bytes(16)),
        "dtype or numbers that cannot",
    ),
    "unknown bytes backwards": (header({NAMES[0]: entry(8, 4, [1], dtype="F7")}, bytes(16)), "are not F7"),
    "unknown bytes that overlap": (
        header({NAMES[0]: entry(0, 8, dtype="F7"), NAMES[1]: entry(4, 8, dtype="F7")}, bytes(8)),
        "overlap",
    ),
    "unknown bytes beyond the file": (header({NAMES[0]: entry(0, 4096, dtype="F7")}, bytes(16)), "truncated"),
    "half a dtype": (
        header({NAMES[0]: {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        "dtype or numbers that cannot",
    ),
    "weights as integers": (header({NAMES[0]: entry(0, 16, dtype="I32")}, bytes(16)), "wrong shape or dtype"),
    "names that fill pages": (header({"x" * 200_000: entry(0, 16)}, bytes(16)), "belong to no known part"),
}


class Runs:
    """A pickle that would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def archive(
    pickled: bytes,
    compression: int = zipfile.ZIP_STORED,
    records: dict[str, bytes] | None = None,
    others: dict[str, bytes] | None = None,
) -> bytes:
    """A zip archive as torch.save writes it, and `others` in it by their whole names."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in (others or {}).items():
            file.writestr(name, content)
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/version", b"3\n")
        for name, content in (records or {}).items():
            file.writestr(f"archive/data/{name}", content)
    return stream.getvalue()


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def with_claim(claimed: int) -> bytes:
    """A tensor of four values whose pickle claims more of them."""
    stream = io.BytesIO()
    torch.save({"model": {"projector": {"projector.0.weight": torch.zeros(4)}}}, stream)
    with zipfile.ZipFile(stream) as file:
        pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    # Both the storage's size and the tensor's: 4 as a one-byte integer, `K\x04`.
    return archive(pickled.replace(b"K\x04", b"J" + claimed.to_bytes(4, "little")), records={"0": bytes(16)})


def torchscript() -> bytes:
    """What torch.jit.save writes."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


def two_directories(seen: bytes, hidden: bytes) -> bytes:
    """One file of two archives of one length: Python reads the directory before the end record, torch the one that it
    names."""
    return hidden[:-22] + seen[:-22] + hidden[-22:]


SAME_LENGTH = ("data/00000000", "constants.pkl")


def test_two_directories_are_what_they_say():
    data = two_directories(*(archive(pickle.dumps({}, 2), others={f"archive/{name}": b""}) for name in SAME_LENGTH))
    assert "archive/constants.pkl" not in zipfile.ZipFile(io.BytesIO(data)).namelist()
    assert "constants.pkl" in torch._C.PyTorchFileReader(io.BytesIO(data)).get_all_records()


def moved_end(saved_archive: bytes) -> bytes:
    """torch's archive whose zip64 locator leads somewhere else than to what stands before it."""
    changed = bytearray(saved_archive)
    (at,) = struct.unpack_from("<Q", changed, len(changed) - 34)
    struct.pack_into("<Q", changed, len(changed) - 34, at - 8)
    return bytes(changed)


def pickles(marker) -> dict[str, tuple[bytes, str]]:
    wide = torch.zeros(1).expand(1 << 20, 1 << 20)
    module = {"projector.0.weight": wide, "projector.0.bias": torch.zeros(1).expand(1 << 20)}
    plain = pickle.dumps({}, 2)
    state = saved({"model": {"projector": {"projector.0.weight": torch.zeros(4, 4)}, "vision_backbone": {}}})
    return {
        "a pickle that runs code": (archive(pickle.dumps(Runs(f"touch {marker}"), 2)), "is refused: its pickle calls"),
        "the same, protocol 4": (archive(pickle.dumps(Runs(f"touch {marker}"), 4)), "is refused: its pickle calls"),
        "the same, of before torch 1.6": (pickle.dumps(Runs(f"touch {marker}"), 2), "not a zip archive"),
        "names from where they cannot be told": (
            archive(b"\x80\x02X\x05\0\0\0torchX\x04\0\0\0Size\x93."),
            "is refused: its pickle calls 'STACK_GLOBAL'",
        ),
        "a TorchScript archive": (torchscript(), "is refused: it holds .* TorchScript"),
        **{
            f"weights, and {name}": (archive(plain, others={name: b"x"}), "is refused: it holds .* can run code")
            for name in (
                "archive/constants.pkl",
                "archive/code/__torch__.py",
                "archive/code/",
                "archive/model.json",
                "archive/x/constants.pkl",
                "constants.pkl",
                "archive/data/0/constants.pkl",
                "archive//constants.pkl",
                "archive/attributes.pkl",
                "archive/data/../constants.pkl",
                "archive/constants.pkl\0x",
            )
        },
        "two archives in one": (archive(plain, others={"other/data/0": b"x"}), "several archives in one"),
        "two pickles": (archive(plain, others={"archive/data.pkl": plain}), "one data.pkl"),
        "a directory for torch alone": (
            two_directories(*(archive(plain, others={f"archive/{name}": plain}) for name in SAME_LENGTH)),
            "its directory is not",
        ),
        "something before the archive": (b"#!/bin/sh\n" + state, "not a zip archive"),
        "something behind the archive": (state + b"\0" * 8, "its directory is not|no zip archive"),
        "a wide end record elsewhere": (moved_end(state), "its directory is not"),
        "empty": (b"", "not a zip archive"),
        "truncated": (state[: len(state) // 2], "not a zip archive"),
        "a compressed bomb": (archive(b"\x80\x02" + b"0" * 300_000_000, zipfile.ZIP_DEFLATED), "is compressed"),
        "no pickle within": (archive(b""), "cannot be read|damaged"),
        "an endless pickle": (archive(b"\x80\x02" + b"(" * 900_000), "cannot be read|damaged"),
        "not a dict": (saved([torch.zeros(2)]), "no dict"),
        "no projector": (saved({"model": {"vision_backbone": {}}}), "no model.projector"),
        "terabytes out of one value": (saved({"model": {"projector": module}}), "more than it holds"),
        "a storage larger than the file": (with_claim(1 << 30), "cannot be read|more than it holds"),
    }


def write_pickles(folder, marker) -> list[tuple[str, str]]:
    cases = []
    for index, (content, words) in enumerate(pickles(marker).values()):
        run = folder / f"run{index}"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"model": {"vision_backbone_id": "dinov2-vit-l"}}))
        (run / "checkpoints" / "latest-checkpoint.pt").write_bytes(content)
        cases.append((str(run), words))
    return cases


def write_directories(folder) -> list[tuple[str, str]]:
    """OpenVLA's directories with one file spoilt."""
    cases = []

    def write(**changes):
        return checkpoints.write(
            folder / f"model{len(cases)}", {"projector.fc1.bias": torch.zeros(2)}, shards=1, **changes
        )

    for content, words in SAFETENSORS.values():
        directory = write()
        (directory / SHARD).write_bytes(content)
        cases.append((str(directory), words))
    sparse = write() / SHARD
    with open(sparse, "wb") as stream:  # a terabyte that takes no room, all of it said to be header
        stream.truncate(1 << 40)
        stream.write(((1 << 40) - 8).to_bytes(8, "little"))
    cases.append((str(sparse.parent), "are not read"))
    pipe = write() / SHARD
    pipe.unlink()
    os.mkfifo(pipe)  # whoever opens it waits for ever
    cases.append((str(pipe.parent), "missing"))
    for config, words in (
        ({"image_sizes": [10**9, 10**9]}, "image_sizes"),
        ({"image_sizes": [1.5, "x"]}, "image_sizes"),
        ({"timm_model_ids": ["vit_nonsense", "resnet18"]}, "does not know the encoder 'vit_nonsense'"),
        ({"timm_model_ids": "vit" * 50_000}, "timm_model_ids"),
        ({"text_config": {"hidden_size": -1}}, "hidden_size|width"),
        ({"text_config": {"hidden_size": 10**12}}, "hidden_size|width"),
        ({"text_config": [1]}, "config.json"),
    ):
        cases.append((str(write(config=config)), words))
    return cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    marker = folder / "the-code-was-run"
    expected = dict(write_directories(folder) + write_pickles(folder, marker))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-c", LOADER, *expected],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stderr
    found = {path: rest for path, *rest in map(json.loads, process.stdout.splitlines())}
    assert list(found) == list(expected)
    return expected, found, marker


def test_each_is_one_clear_error(outcomes):
    import re

    expected, found, _ = outcomes
    problems = []
    for path, words in expected.items():
        kind, text, *_ = found[path]
        if kind != "CheckpointError" or not re.search(words, text) or "\n" in text or len(text) > 5000:
            problems.append((path, kind, text[:300], words))
    assert not problems, problems


def test_at_once_and_in_little_memory(outcomes):
    _, found, _ = outcomes
    assert not [(path, text, cpu, mib) for path, (_, text, cpu, mib) in found.items() if cpu > CPU_SECONDS or mib > MIB]


def test_no_code_was_run(outcomes):
    assert not outcomes[2].exists()
