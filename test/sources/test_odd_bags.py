"""Sound bags that are unlike those of a recorder that ended well, and bags that say of themselves what is not so."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("rosbags")
pytest.importorskip("mcap")

import lz4.frame
import zstandard
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vla_perception.images.decode import ENCODINGS
from vla_perception.sources.bags import Bag, BagError, header_stamp_ns, image_encoding, is_camera_image
from vla_perception.tokens import FORMAT

TYPES = get_typestore(Stores.ROS2_JAZZY)
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
TOPIC = "/front/image_raw/compressed"
T0, DT = 1_700_000_000_000_000_000, 100_000_000
JPEG = b"\xff\xd8\xff\xe0 a jpeg begins so"
QOS = Qos(
    QosHistory.KEEP_LAST,
    10,
    QosReliability.RELIABLE,
    QosDurability.VOLATILE,
    QosTime(9223372036, 854775807),
    QosTime(9223372036, 854775807),
    QosLiveliness.AUTOMATIC,
    QosTime(9223372036, 854775807),
    False,
)


def header(ns: int, frame_id: str = "eye"):
    stamp = TYPES.types["builtin_interfaces/msg/Time"](*divmod(ns, 10**9))
    return TYPES.types["std_msgs/msg/Header"](stamp, frame_id)


def compressed(ns: int, format: str = "jpeg", data: bytes = JPEG) -> bytes:
    message = TYPES.types[COMPRESSED](header(ns), format, np.frombuffer(data, np.uint8))
    return bytes(TYPES.serialize_cdr(message, COMPRESSED))


def image(ns: int, encoding: str, frame_id: str = "eye", little_endian: bool = True) -> bytes:
    message = TYPES.types[IMAGE](header(ns, frame_id), 2, 2, encoding, 0, 4, np.zeros(8, np.uint8))
    return bytes(TYPES.serialize_cdr(message, IMAGE, little_endian=little_endian))


SERIES = [(T0 + i * DT, compressed(T0 + i * DT)) for i in range(10)]


def mcap(path: Path, messages=SERIES, *, topic=TOPIC, kind=COMPRESSED, profile="ros2", others=(), **options) -> Path:
    """An MCAP file by its reference library. others: (topic, schema, schema encoding, message encoding)."""
    with path.open("wb") as file:
        writer = McapWriter(file, **options)
        writer.start(profile=profile, library="test")
        for name, schema, schema_encoding, message_encoding in others:
            schema = writer.register_schema(schema, schema_encoding, b"{}")
            channel = writer.register_channel(name, message_encoding, schema)
            writer.add_message(channel, T0, b"{}", T0)
        channel = writer.register_channel(topic, "cdr", writer.register_schema(kind, "ros2msg", b""))
        for ns, cdr in messages:
            writer.add_message(channel, ns, cdr, ns)
        writer.finish()
    return path


def metadata(folder: Path, files: list[str], *, topics=((TOPIC, COMPRESSED, 10),), qos="", **more) -> Path:
    entries = [
        {
            "topic_metadata": {
                "name": name,
                "type": kind,
                "serialization_format": "cdr",
                "offered_qos_profiles": qos,
                "type_description_hash": "",
            },
            "message_count": count,
        }
        for name, kind, count in topics
    ]
    info = {
        "version": 9,
        "storage_identifier": "mcap",
        "duration": {"nanoseconds": 9 * DT},
        "starting_time": {"nanoseconds_since_epoch": T0},
        "message_count": 10,
        "compression_format": "",
        "compression_mode": "",
        "topics_with_message_count": entries,
        "relative_file_paths": files,
    } | more
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": info}))
    return folder


def read(path: Path) -> list[tuple[int, bytes]]:
    with Bag(path) as bag:
        assert bag.image_topics() == [TOPIC]
        return [(message.time_ns, message.cdr) for message in bag.messages([TOPIC])]


# Sound files


@pytest.mark.parametrize(
    "options",
    [
        {"profile": ""},
        {"profile": "px4"},
        {"others": [("/json", "X", "jsonschema", "json"), ("/pb", "foxglove.X", "protobuf", "protobuf")]},
        {"others": [("/f", "X", "flatbuffer", "flatbuffer"), ("/odd", "Y", "", "")], "profile": ""},
        {"compression": CompressionType.ZSTD},
        {"compression": CompressionType.LZ4},
        {"compression": CompressionType.NONE, "chunk_size": 400},
        {"use_chunking": False},
        {"index_types": IndexType.NONE},  # no chunk index, no message index
        {"index_types": IndexType.CHUNK},  # chunks, but nobody says which topics are in them
        {"use_statistics": False},
        {"repeat_channels": False, "repeat_schemas": False},
        {"use_statistics": False, "index_types": IndexType.NONE, "repeat_channels": False, "repeat_schemas": False},
        {"use_statistics": False, "use_summary_offsets": False, "use_chunking": False, "repeat_channels": False},
    ],
    ids=repr,
)
def test_mcap_as_other_tools_write_it(tmp_path, options):
    assert read(mcap(tmp_path / "bag.mcap", **options)) == SERIES
    folder = metadata(tmp_path, ["bag.mcap"], storage_identifier="")  # as `ros2 bag reindex` of Humble leaves it
    assert read(folder) == SERIES
    with Bag(folder) as bag:
        assert (bag.start_ns, bag.end_ns, bag.topics[TOPIC].messages) == (T0, T0 + 9 * DT, 10)
        assert [m.time_ns for m in bag.messages([TOPIC], start_ns=T0 + 5 * DT)] == [ns for ns, _ in SERIES[5:]]


def mcap_of_chunks(path: Path, *chunks: tuple[str, list[bytes]]) -> Path:
    """An MCAP file record by record, for what the reference library does not write. Chunks: compression, frames."""
    text = lambda said: struct.pack("<I", len(said)) + said.encode()  # noqa: E731
    record = lambda opcode, data: struct.pack("<BQ", opcode, len(data)) + data  # noqa: E731
    content = b"\x89MCAP0\r\n" + record(1, text("ros2") + text("test")) + record(0x90, b"of a later version")
    content += record(3, struct.pack("<H", 1) + text(COMPRESSED) + text("ros2msg") + bytes(4))
    content += record(4, struct.pack("<HH", 1, 1) + text(TOPIC) + text("cdr") + bytes(4))
    decompress = {"": bytes, "zstd": lambda data: zstandard.decompress(data), "lz4": lz4.frame.decompress}
    for compression, frames in chunks:
        size, data = sum(len(decompress[compression](frame)) for frame in frames), b"".join(frames)
        head = struct.pack("<QQQI", 0, 0, size, 0) + text(compression)
        content += record(6, head + struct.pack("<Q", len(data)) + data)
    path.write_bytes(content + record(15, bytes(4)) + record(2, bytes(20)) + b"\x89MCAP0\r\n")
    return path


def test_chunks_of_several_frames_and_of_nothing(tmp_path):
    messages = [struct.pack("<BQHIQQ", 5, len(cdr) + 22, 1, 0, ns, ns) + cdr for ns, cdr in SERIES]
    parts = [struct.pack("<BQ", 0x95, 3) + b"odd", *(b"".join(messages[i : i + 3]) for i in range(0, 10, 3))]
    for compression, compress in (("", bytes), ("zstd", zstandard.compress), ("lz4", lz4.frame.compress)):
        empty, whole = (compression, [compress(b"")]), (compression, [compress(part) for part in parts])
        assert read(mcap_of_chunks(tmp_path / "x.mcap", empty, (compression, []), whole, empty)) == SERIES
        assert read(mcap_of_chunks(tmp_path / "x.mcap", (compression, [compress(b"".join(parts))]))) == SERIES


def test_messages_that_are_not_cdr_are_named(tmp_path):
    file = mcap(tmp_path / "x.mcap", others=[("/json", "X", "jsonschema", "json")])
    with Bag(file) as bag, pytest.raises(BagError, match=r"no topic /json .* other than CDR.*/json \(json\)"):
        bag.messages(["/json"])
    with pytest.raises(BagError, match="ROS 1 messages: `rosbags-convert`"):
        Bag(mcap(tmp_path / "one.mcap", profile="ros1"))


def test_messages_out_of_order(tmp_path):
    """By their time, as they were recorded, whether in chunks that overlap or in none."""
    mixed = [SERIES[i] for i in (3, 0, 1, 9, 2, 8, 4, 7, 5, 6)]
    for number, options in enumerate(({"use_chunking": False}, {"chunk_size": 300}, {"chunk_size": 1}, {})):
        assert read(mcap(tmp_path / f"{number}.mcap", mixed, **options)) == SERIES


def test_split_files_are_merged_by_time(tmp_path):
    mcap(tmp_path / "a_0.mcap", SERIES[5:])  # listed in another order than recorded, with an overlap
    mcap(tmp_path / "a_1.mcap", [SERIES[0], *SERIES[2:5]])
    mcap(tmp_path / "a_2.mcap", [SERIES[1]])
    (tmp_path / "a_3.mcap").touch()  # the recorder was killed just after it had begun the file
    folder = metadata(tmp_path, ["old/a_0.mcap", "a_1.mcap", "a_2.mcap", "a_3.mcap", "a_1.mcap"])
    assert read(folder) == SERIES
    (tmp_path / "a_1.mcap").unlink()
    with pytest.raises(BagError, match="metadata.yaml lists a_1.mcap, not there: copy") as caught:
        Bag(folder)
    assert "cut off" not in str(caught.value)


def test_files_outside_of_the_folder_are_not_read(tmp_path):
    mcap(tmp_path / "secret.mcap")
    folder = tmp_path / "bag"
    folder.mkdir()
    with pytest.raises(BagError, match="lists secret.mcap, not there"):
        Bag(metadata(folder, ["../secret.mcap"]))
    with pytest.raises(BagError, match="lists secret.mcap, not there"):
        Bag(metadata(folder, [str(tmp_path / "secret.mcap")]))


@pytest.mark.parametrize(
    ("storage", "mode"),
    [
        (StoragePlugin.MCAP, CompressionMode.FILE),
        (StoragePlugin.MCAP, CompressionMode.MESSAGE),
        (StoragePlugin.MCAP, CompressionMode.STORAGE),
        (StoragePlugin.SQLITE3, CompressionMode.FILE),
        (StoragePlugin.SQLITE3, CompressionMode.MESSAGE),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["metadata", "alone"])
def test_compressed_bags(tmp_path, storage, mode, told):
    """As rosbags' writer compresses them; and without metadata.yaml, where nothing but the bytes tells."""
    writer = Writer(tmp_path / "bag", version=9, storage_plugin=storage)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection(TOPIC, COMPRESSED, typestore=TYPES)
        for ns, cdr in SERIES:
            writer.write(connection, ns, cdr)
    if not told:
        (tmp_path / "bag" / "metadata.yaml").unlink()
    assert read(tmp_path / "bag") == SERIES
    (file,) = [file for file in (tmp_path / "bag").iterdir() if file.name != "metadata.yaml"]
    assert read(file) == SERIES


def test_a_compressed_file_is_gone_when_the_bag_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    plain = mcap(tmp_path / "x.mcap")
    (tmp_path / "x.mcap.zstd").write_bytes(zstandard.compress(plain.read_bytes()))
    with Bag(tmp_path / "x.mcap.zstd"):
        assert list((tmp_path / "scratch").rglob("x.mcap"))
    assert not list((tmp_path / "scratch").iterdir())


def sqlite_bag(path: Path, messages=SERIES, *, qos: str | None = "", journal="DELETE", kill=False) -> Path:
    """A .db3 file in rosbag2's schema. kill: by a process that is killed after it wrote, so journals stay."""
    script = f"""
import os, pickle, sqlite3, sys
messages, qos = pickle.load(sys.stdin.buffer)
base = sqlite3.connect({str(path)!r}, isolation_level=None)
base.execute("PRAGMA journal_mode={journal}")
base.execute("CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL, "
             "serialization_format TEXT NOT NULL" + (", offered_qos_profiles TEXT NOT NULL" if qos is not None else "") + ")")
base.execute("CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL, "
             "data BLOB NOT NULL)")
base.execute("INSERT INTO topics VALUES(1, {TOPIC!r}, {COMPRESSED!r}, 'cdr'" + (", ?)" if qos is not None else ")"),
             (qos,) if qos is not None else ())
for index, (ns, cdr) in enumerate(messages):
    base.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES(1, ?, ?)", (ns, cdr))
    if index == 3 and {journal!r} == "WAL":
        base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
if {kill}:
    os.kill(os.getpid(), 9)
base.close()
"""
    import pickle

    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps((messages, qos)), capture_output=True)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return path


def test_what_a_killed_recorder_left_beside_the_file(tmp_path):
    """rosbag2's storage preset `resilient` writes a -wal file; sqlite3 and rosbag2 read it, so do we."""
    file = sqlite_bag(tmp_path / "x_0.db3", journal="WAL", kill=True)
    assert (tmp_path / "x_0.db3-wal").stat().st_size
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert read(file) == read(tmp_path) == SERIES
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before  # nothing of it is changed
    assert sqlite3.connect(file).execute("SELECT count(*) FROM messages").fetchone() == (10,)


def test_all_of_it_may_be_in_the_wal(tmp_path):
    file = sqlite_bag(tmp_path / "x_0.db3", SERIES[:3], journal="WAL", kill=True)
    assert read(file) == SERIES[:3]


def test_a_wal_in_a_read_only_folder(tmp_path):
    file = sqlite_bag(tmp_path / "x_0.db3", journal="WAL", kill=True)
    (tmp_path / "x_0.db3-shm").unlink()  # on a medium that was mounted read-only it is not there
    tmp_path.chmod(0o555)
    try:
        assert read(file) == SERIES
    finally:
        tmp_path.chmod(0o755)


def test_a_name_that_is_no_uri(tmp_path):
    folder = tmp_path / "50% of #1?"
    folder.mkdir()
    assert read(sqlite_bag(folder / "x?mode=rw#.db3")) == SERIES
    assert read(mcap(folder / "x?#%20.mcap")) == read(mcap(folder / "X.MCAP")) == SERIES


@pytest.mark.parametrize("images", [0, 1, 9])
def test_a_topic_of_two_types_is_that_of_most_messages(tmp_path, images, caplog):
    """Whichever of them is described first."""
    with (tmp_path / "x.mcap").open("wb") as file:
        writer = McapWriter(file)
        writer.start(profile="ros2", library="test")
        channels = [
            writer.register_channel(TOPIC, "cdr", writer.register_schema(k, "ros2msg", b""))
            for k in (IMAGE, COMPRESSED)
        ]
        for i in range(images):
            writer.add_message(channels[0], T0 - i, image(T0 - i, "rgb8"), T0 - i)
        for ns, cdr in SERIES:
            writer.add_message(channels[1], ns, cdr, ns)
        writer.finish()
    assert read(tmp_path / "x.mcap") == SERIES
    assert (f"recorded as {COMPRESSED}, and {images} as {IMAGE}, which are left out" in caplog.text) == bool(images)


@pytest.mark.parametrize(
    "listed", [[], ["x_0.mcap"], ["x_0.mcap.zstd"], ["x_0.mcap.zstd", "x_0.mcap"], ["x_0.mcap", "bag/x_0.mcap"]]
)
def test_a_file_that_lies_there_twice_is_played_once(tmp_path, listed, caplog):
    """Expanded by somebody who kept the original, and listed in any way."""
    content = mcap(tmp_path / "x_0.mcap").read_bytes()
    (tmp_path / "x_0.mcap.zstd").write_bytes(zstandard.compress(content))
    assert read(metadata(tmp_path, listed)) == SERIES
    (tmp_path / "x_0.mcap").unlink()
    assert read(metadata(tmp_path, listed)) == SERIES and not caplog.records


def test_files_that_are_not_listed_are_named(tmp_path, caplog):
    mcap(tmp_path / "x_0.mcap")
    mcap(tmp_path / "x_1.mcap")
    (tmp_path / "folder.mcap").mkdir()
    assert read(metadata(tmp_path, ["x_0.mcap"])) == SERIES
    assert "x_1.mcap, not listed in metadata.yaml" in caplog.text and "folder" not in caplog.text


# QoS and metadata.yaml

INFINITE = {"sec": 9223372036, "nsec": 854775807}
LISTED = {
    "history": "keep_last",
    "depth": 10,
    "reliability": "reliable",
    "durability": "volatile",
    "deadline": INFINITE,
    "lifespan": INFINITE,
    "liveliness": "automatic",
    "liveliness_lease_duration": INFINITE,
    "avoid_ros_namespace_conventions": False,
}
TEXT = """- history: 1
  depth: 10
  reliability: 1
  durability: 2
  deadline: {sec: 2147483647, nsec: 4294967295}
  lifespan: {sec: 9223372036, nsec: 854775807}
  liveliness: 1
  liveliness_lease_duration: {sec: 9223372036, nsec: 854775807}
  avoid_ros_namespace_conventions: false"""
PROFILES = [
    "",
    [],
    None,
    TEXT,
    [LISTED],
    [LISTED] * 3,
    [LISTED | {"reliability": "best_effort"}],
    [LISTED | {"history": 1, "reliability": 2, "durability": 2, "liveliness": 1}],
    [LISTED | {"depth": "10", "history": "1", "reliability": "1e0", "durability": 2.0}],
    [LISTED | {"deadline": {"nanoseconds": 9223372036854775807}}],
    [LISTED | {"deadline": 9223372036854775807, "lifespan": "infinite"}],
    [{"history": "keep_last"}],
    ["reliable"],
    {"depth": 1},
    "reliable",
    "- [1",
    "{}",
    7,
    "- depth: 0x10\n",
    "\t",
    "!!x 1",
]


@pytest.mark.parametrize("qos", PROFILES, ids=lambda qos: repr(qos)[:40])
def test_any_qos_in_the_metadata(tmp_path, qos):
    mcap(tmp_path / "x_0.mcap")
    assert read(metadata(tmp_path, ["x_0.mcap"], qos=qos)) == SERIES


@pytest.mark.parametrize(
    "qos", [None, *(qos for qos in PROFILES if isinstance(qos, str))], ids=lambda qos: repr(qos)[:40]
)
def test_any_qos_in_the_storage(tmp_path, qos):
    """rosbags parses it, and refuses some: it is not needed here."""
    assert read(sqlite_bag(tmp_path / "x.db3", qos=qos)) == SERIES


KIND, HASH = "my_robot_msgs/msg/Gripper", f"RIHS01_{'5e' * 32}"


def mcap_of_types(path: Path, types, *, metadata=None, summary=True, first=0) -> Path:
    """A file of topics /00, /01, … (or from `first` on) with one message each, and these types (name, schema encoding, schema)."""
    with path.open("wb") as file:
        writer = McapWriter(file, use_statistics=summary)
        writer.start(profile="ros2")
        for index, (kind, encoding, data) in enumerate(types, start=first):
            schema = writer.register_schema(kind, encoding, data)
            channel = writer.register_channel(f"/{index:02}", "cdr", schema, metadata or {})
            writer.add_message(channel, T0, b"\0\1\0\0", T0)
        writer.finish()
    return path


@pytest.mark.parametrize("summary", [True, False])
@pytest.mark.parametrize(
    ("encoding", "data", "definition"),
    [
        ("ros2msg", b"float64 metres", "float64 metres"),
        ("ros2idl", b"module x {}", "module x {}"),
        ("ros2msg", b"float64 m\xff", "float64 m\ufffd"),
        ("ros2msg", b"#" * ((1 << 18) + 1), ""),
        ("protobuf", b"\0", ""),
    ],
    ids=["text", "idl", "not UTF-8", "too long", "of another kind"],
)
def test_what_a_type_is_is_known_from_mcap(tmp_path, encoding, data, definition, summary):
    for said, type_hash in ((HASH, HASH), ("RIHS01_", ""), ("", "")):
        metadata = {"topic_type_hash": said}
        path = mcap_of_types(tmp_path / "x.mcap", [(KIND, encoding, data)], metadata=metadata, summary=summary)
        with Bag(path) as bag:
            topic = bag.topics["/00"]
            assert (topic.type, topic.definition, topic.type_hash) == (KIND, definition, type_hash)


@pytest.mark.parametrize("summary", [True, False])
def test_definitions_take_bounded_memory(tmp_path, summary):
    """A file of many large ones has those of its first topics."""
    types = [(f"x/msg/X{index}", "ros2msg", b"#" * (1 << 18)) for index in range(70)]
    with Bag(mcap_of_types(tmp_path / "x.mcap", types, summary=summary)) as bag:
        assert [len(topic.definition) for topic in bag.topics.values()] == [1 << 18] * 64 + [0] * 6


@pytest.mark.parametrize("summary", [True, False])
def test_qos_takes_bounded_memory(tmp_path, summary):
    """A small file of many channels that compress well has that of its first ones."""
    types = [(f"x/msg/X{index}", "ros2msg", b"") for index in range(1100)]
    metadata = {"offered_qos_profiles": "#" * (1 << 14)}
    with Bag(mcap_of_types(tmp_path / "x.mcap", types, metadata=metadata, summary=summary)) as bag:
        kept = [topic.offered_qos for topic in bag.topics.values()]
    assert len(kept) == 1100 and sum(map(len, kept)) == 1 << 24


def test_definitions_of_many_files_take_no_more_memory_than_of_one(tmp_path):
    """A split recording repeats them in each."""
    for number in range(3):
        types = [(f"x/msg/X{number}_{index}", "ros2msg", b"#" * (1 << 18)) for index in range(30)]
        types.append((KIND, "ros2msg", b"float64 metres"))
        mcap_of_types(tmp_path / f"x_{number}.mcap", types, first=31 * number)
    with Bag(metadata(tmp_path, [f"x_{number}.mcap" for number in range(3)], topics=())) as bag:
        sizes = [len(topic.definition) for topic in bag.topics.values() if topic.type != KIND]
        assert sum(sizes) <= 1 << 24 and sizes.count(1 << 18) == 63 and sizes.count(0) == 27
        assert [topic.definition for topic in bag.topics.values() if topic.type == KIND] == ["float64 metres"] * 3
        held = [channel.definition for file in bag._files for channel in file.channels.values()]
        assert not any(held)


COLUMNS = "id INTEGER PRIMARY KEY, topic_type, encoding, encoded_message_definition, type_description_hash"


@pytest.mark.parametrize(
    ("statements", "definition"),
    [
        ([f"CREATE TABLE message_definitions({COLUMNS})", "INSERT INTO message_definitions VALUES{row}"], "float64 m"),
        ([f"CREATE TABLE message_definitions({COLUMNS})", "INSERT INTO message_definitions VALUES(1, 2, x'00', 3.5, NULL)"], ""),
        (["CREATE VIEW message_definitions AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) "
          "SELECT 'x' AS topic_type, 'ros2msg' AS encoding, 'y' AS encoded_message_definition FROM n"], ""),
        (["CREATE TABLE message_definitions(id)"], ""),
        ([f"CREATE TABLE message_definitions({COLUMNS}, more AS (topic_type || encoding))",
          "INSERT INTO message_definitions VALUES{row}"], ""),
        ([f"CREATE TABLE message_definitions({COLUMNS})",
          "INSERT INTO message_definitions SELECT 1, type, 'ros2msg', printf('%.*c', 262145, '#'), '' FROM topics"], ""),
        ([f"CREATE TABLE message_definitions({COLUMNS})", "INSERT INTO message_definitions "
          "SELECT 1, type, 'ros2msg', 'a' || char(0) || printf('%.*c', 262145, '#'), '' FROM topics"], ""),
        ([f"CREATE TABLE message_definitions({COLUMNS})", "INSERT INTO message_definitions "
          "SELECT 1, type, 'ros2msg', CAST(x'666c6f61743332206123b0' AS TEXT), '' FROM topics"], "float32 a#\ufffd"),
    ],
    ids=["as rosbag2 has it", "odd values", "a view without end", "no columns", "a generated column", "too long",
         "too long behind a zero", "not UTF-8"],
)  # fmt: skip
def test_what_a_type_is_is_known_from_sqlite(tmp_path, statements, definition):
    path = sqlite_bag(tmp_path / "x.db3")
    with closing(sqlite3.connect(path, isolation_level=None)) as base:
        base.execute(f"ALTER TABLE topics ADD COLUMN type_description_hash TEXT NOT NULL DEFAULT '{HASH}'")
        for statement in statements:
            base.execute(statement.replace("{row}", f"(1, '{COMPRESSED}', 'ros2msg', 'float64 m', '{HASH}')"))
    assert read(path) == SERIES
    with Bag(path) as bag:
        assert (bag.topics[TOPIC].definition, bag.topics[TOPIC].type_hash) == (definition, HASH)


def test_texts_that_are_not_utf_8(tmp_path):
    """What a recorder wrote of one topic takes no other one away."""
    path = sqlite_bag(tmp_path / "x.db3")
    with closing(sqlite3.connect(path, isolation_level=None)) as base:
        base.execute("UPDATE topics SET offered_qos_profiles = CAST(x'2d20b0' AS TEXT)")
        base.execute(
            "INSERT INTO topics (id, name, type, serialization_format, offered_qos_profiles) "
            "VALUES (77, CAST(x'2fb0' AS TEXT), CAST(x'78b0' AS TEXT), 'cdr', '')"
        )
    assert read(path) == SERIES
    with Bag(path) as bag:
        assert bag.topics[TOPIC].offered_qos == "- \ufffd"
        assert bag.topics["/\ufffd"].type == "x\ufffd"


def test_qos_that_is_long_behind_a_zero(tmp_path):
    for size, said in ((100, 102), (1 << 14, 0)):
        with Bag(sqlite_bag(tmp_path / f"{size}.db3", qos="a\0" + "#" * size)) as bag:
            assert len(bag.topics[TOPIC].offered_qos) == said


def test_storage_qos_differs_from_the_metadata(tmp_path):
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection(TOPIC, COMPRESSED, typestore=TYPES, offered_qos_profiles=[QOS])
        for ns, cdr in SERIES:
            writer.write(connection, ns, cdr)
    for qos in ("", [LISTED | {"reliability": "best_effort"}], TEXT):
        assert read(metadata(tmp_path / "bag", ["bag.mcap"], qos=qos)) == SERIES


def test_metadata_that_is_written_otherwise(tmp_path):
    """Of all that it says only the names of the files count."""
    mcap(tmp_path / "x_0.mcap")
    for more in (
        {"message_count": "10", "duration": {"nanoseconds": "9e8"}, "version": "9"},
        {"topics_with_message_count": None, "starting_time": None, "duration": None},
        {"topics_with_message_count": [{"message_count": "1_0"}, 3, None, {"topic_metadata": 1, "message_count": []}]},
        {"storage_identifier": "sqlite3"},
        {"storage_identifier": None},
        {"compression_mode": "MESSAGE"},
        {"compression_mode": "file", "compression_format": "lz4"},
        {"compression_mode": None},
        {"version": 99},
        {
            "topics_with_message_count": [
                {"topic_metadata": {"name": TOPIC, "type": COMPRESSED}, "message_count": "1e1"}
            ]
        },
    ):
        assert read(metadata(tmp_path, ["x_0.mcap"], **more)) == SERIES


@pytest.mark.parametrize(
    ("said", "warning"),
    [
        (("/renamed/image_raw/compressed", COMPRESSED, 10), "/renamed/image_raw/compressed has 10 messages"),
        ((TOPIC, IMAGE, 10), f"{TOPIC} is {IMAGE}; it was recorded as {COMPRESSED}"),
        ((TOPIC, COMPRESSED, 10), ""),
        (("/silent", COMPRESSED, 0), ""),
        (("/silent", COMPRESSED, "0x0a"), "/silent has 10 messages"),
        (("/silent", COMPRESSED, "1e5"), "/silent has 100000 messages"),
        (("/silent", COMPRESSED, "0x" + "f" * 6000), ""),
        (("/silent", COMPRESSED, -3), ""),
    ],
)
def test_topics_of_the_metadata_that_are_not_there(tmp_path, caplog, said, warning):
    mcap(tmp_path / "x_0.mcap")
    with caplog.at_level(logging.WARNING):
        assert read(metadata(tmp_path, ["x_0.mcap"], topics=[said])) == SERIES
    assert (warning in caplog.text) if warning else not caplog.records


@pytest.mark.parametrize("name", ["/a\n[INFO] all is well", "/\x1b[2J", "/\u202e", "/\x85"])
def test_names_in_errors_are_printable(tmp_path, name):
    with pytest.raises(BagError) as caught:
        with Bag(mcap(tmp_path / "x.mcap", topic=name)) as bag:
            list(bag.messages([f"{name}x"]))
    assert str(caught.value).isprintable()


def test_metadata_of_names_that_no_file_has_and_of_many(tmp_path):
    mcap(tmp_path / "x_0.mcap")
    for names in (["a" * 255], ["a" * 5000], ["nul\0.mcap"], [f"{number}_{'a' * 100}.mcap" for number in range(1000)]):
        with pytest.raises(BagError, match="metadata.yaml lists .*not there: copy .*`ros2 bag reindex") as caught:
            read(metadata(tmp_path, names))
        assert len(str(caught.value)) <= 4000


def test_a_metadata_file_that_says_nothing(tmp_path):
    mcap(tmp_path / "x_0.mcap")
    for text in (
        "",
        "[]",
        "a: 1",
        "rosbag2_bagfile_information: 3",
        "rosbag2_bagfile_information: [",
        "\0",
        "[" * 5000,
    ):
        (tmp_path / "metadata.yaml").write_text(text)
        with pytest.raises(BagError, match="metadata.yaml: ") as caught:
            Bag(tmp_path)
        assert "cut off" not in str(caught.value) and len(str(caught.value)) < 1000


def bomb_of_aliases(merge: bool) -> str:
    """YAML of a kilobyte that is gigabytes as text, or as a mapping."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [1, 1]"]
    for level in range(1, 12):
        inner = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {{<<: [{inner}]}}" if merge else f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines)


def test_yaml_bombs(tmp_path):
    text = (
        bomb_of_aliases(merge=False)
        + f"""
rosbag2_bagfile_information:
  relative_file_paths: [*a11, x_0.mcap]
  topics_with_message_count:
  - {{topic_metadata: {{name: *a11, type: *a11}}, message_count: *a11}}
  - {{topic_metadata: {{name: {TOPIC}, type: *a11}}, message_count: 3}}
"""
    )
    for name, content in (("aliases", text), ("merges", bomb_of_aliases(merge=True))):
        (tmp_path / name).mkdir()
        mcap(tmp_path / name / "x_0.mcap")
        (tmp_path / name / "metadata.yaml").write_text(content)
    qos = sqlite_bag(tmp_path / "qos.db3", qos=bomb_of_aliases(merge=True))
    lines = lines_of([tmp_path / "aliases", tmp_path / "merges", qos])
    assert lines[0] == lines[2] == "10" and "metadata.yaml: " in lines[1]


def test_files_that_were_expanded_or_not_yet_compressed(tmp_path):
    mcap(tmp_path / "x_0.mcap")
    assert read(metadata(tmp_path, ["x_0.mcap.zstd"], compression_mode="FILE", compression_format="zstd")) == SERIES
    (tmp_path / "x_0.mcap.zstd").write_bytes(zstandard.compress((tmp_path / "x_0.mcap").read_bytes()))
    (tmp_path / "x_0.mcap").unlink()
    assert read(metadata(tmp_path, ["x_0.mcap"])) == SERIES
    (tmp_path / "metadata.yaml").unlink()
    os.mkfifo(tmp_path / "metadata.yaml")
    with pytest.raises(BagError, match="it is not a file"):
        Bag(tmp_path)


# Counts that are not so


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


def test_a_count_above_0_that_gives_nothing_is_an_error(tmp_path):
    """The statistics have ten messages on a channel of which the chunks hold none."""
    file = mcap(tmp_path / "x.mcap", use_chunking=True, index_types=IndexType.CHUNK, compression=CompressionType.NONE)
    content = file.read_bytes()
    message = struct.pack("<BQHI", 5, len(SERIES[0][1]) + 22, 1, 0)
    assert content.count(message) == 10
    # Other records in the place of the messages, and no checksum.
    content = content.replace(message, struct.pack("<BQHI", 200, len(SERIES[0][1]) + 22, 1, 0))
    chunk = content.index(b"\x06", 8 + 9)
    while struct.unpack_from("<Q", content, chunk + 9)[0] != T0:
        chunk = content.index(b"\x06", chunk + 1)
    content = content[: chunk + 33] + bytes(4) + content[chunk + 37 :]
    file.write_bytes(content)
    with Bag(file) as bag:
        assert bag.image_topics() == []
        with pytest.raises(BagError, match=f"says that it has 10 messages of {TOPIC}, and holds none"):
            list(bag.messages())


def test_fewer_messages_than_said_are_a_warning(tmp_path, caplog):
    file = mcap(tmp_path / "x.mcap", index_types=IndexType.CHUNK)
    patched(file, struct.pack("<HQ", 1, 10), struct.pack("<HQ", 1, 12))
    patched(file, struct.pack("<QHI", 10, 1, 1), struct.pack("<QHI", 12, 1, 1))
    with caplog.at_level(logging.WARNING):
        assert read(file) == SERIES
    assert f"it says that it has 12 messages of {TOPIC}, and holds 10" in caplog.text


def test_messages_that_are_no_cdr_are_skipped(tmp_path, caplog):
    bad = [
        b"",
        b"\0",
        b"garbage!",
        zstandard.compress(b"text"),
        zstandard.compress(SERIES[0][1])[:-9],
        b"\x28\xb5\x2f\xfd",
    ]
    with caplog.at_level(logging.WARNING):
        assert read(mcap(tmp_path / "x.mcap", [*SERIES, *((T0, data) for data in bad)])) == SERIES
    assert f"6 of 16 messages of {TOPIC} are not CDR" in caplog.text
    with Bag(mcap(tmp_path / "y.mcap", [(T0, b"garbage!")])) as bag:
        assert bag.image_topics() == []
        with pytest.raises(BagError, match=f"none of the 1 messages of {TOPIC} "):
            list(bag.messages())


@pytest.mark.parametrize("first", [0, 1, T0 * 5, 2**63 - 1, 2**64 - 1])
def test_times_at_the_ends_of_time(tmp_path, first):
    series = sorted([(first, SERIES[0][1]), *SERIES[1:]])
    assert read(mcap(tmp_path / "x.mcap", series)) == series
    if first < 2**63:
        assert read(sqlite_bag(tmp_path / "x.db3", series)) == series


@pytest.mark.parametrize("index_types", [IndexType.ALL, IndexType.CHUNK])
def test_statistics_that_say_less_than_there_is(tmp_path, index_types):
    """The file is read through instead."""
    for number, counts in enumerate(((10, 0), (0, 10), (0, 0), (7, 7))):
        file = mcap(tmp_path / f"{number}.mcap", index_types=index_types)
        content = file.read_bytes()
        at = content.rindex(struct.pack("<QHI", 10, 1, 1))  # messages, schemas, channels
        of_channel = content.index(struct.pack("<HQ", 1, 10), at)
        content = bytearray(content)
        content[at : at + 8] = struct.pack("<Q", counts[0])
        content[of_channel + 2 : of_channel + 10] = struct.pack("<Q", counts[1])
        file.write_bytes(content)
        assert read(file) == SERIES


@pytest.mark.parametrize("kind", ["sensor_msgs/CompressedImage", "sensor_msgs::msg::dds_::CompressedImage_"])
def test_types_as_other_tools_write_them(tmp_path, kind):
    assert read(mcap(tmp_path / "x.mcap", kind=kind)) == SERIES


def test_damaged_files_raise_bag_errors_alone(tmp_path):
    """Bytes changed, cut out, doubled, zeroed, at a thousand places."""
    import random

    random = random.Random(0)
    files = [
        mcap(tmp_path / "zstd.mcap"),
        mcap(tmp_path / "plain.mcap", compression=CompressionType.NONE, chunk_size=300),
        mcap(tmp_path / "loose.mcap", use_chunking=False),
        sqlite_bag(tmp_path / "x.db3"),
    ]
    outcomes = {"read": 0, "refused": 0}
    for number in range(1000):
        content = bytearray(files[number % 4].read_bytes())
        for _ in range(random.choice((1, 2, 8))):
            at, length = random.randrange(len(content)), random.choice((1, 8, 40))
            change = random.choice((b"", bytes(length), b"\xff" * length, random.randbytes(length), content[:length]))
            content[at : at + random.choice((0, length))] = change
        damaged = tmp_path / f"damaged{files[number % 4].suffix}"
        damaged.write_bytes(content)
        try:
            with Bag(damaged) as bag:
                bag.camera_topics()
                list(bag.messages())
            outcomes["read"] += 1
        except BagError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100


# Hostile ones: each in bounded memory


def bomb(size: int) -> bytes:
    """`size` zero bytes as a zstd frame that does not say how many they are."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    block = bytes(1 << 20)
    parts = [compressor.compress(block) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.flush()])


def in_little_memory(code: str, *arguments: object) -> str:
    """What a Python process that may take 1 GiB prints, the imports behind it."""
    script = (
        "import resource, sys; from vla_perception.sources.bags import Bag, BagError; import vla_perception.sources.bags.mcap_file\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({1 << 30}, {1 << 30}))\n{code}"
    )
    assert hasattr(resource, "RLIMIT_DATA")
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


READ = """
for file in sys.argv[1:]:
    try:
        with Bag(file) as bag:
            print(sum(1 for _ in bag.messages()))
    except BagError as error:
        assert "more memory" not in str(error), error
        print("BagError:", error)
"""


def lines_of(files: list[Path]) -> list[str]:
    """A line for each file, read in little memory: how many messages came, or the error."""
    lines = in_little_memory(READ, *files).splitlines()
    assert len(lines) == len(files)
    return lines


def mcap_of(path: Path, *parts: bytes) -> Path:
    """An MCAP file of these records, without a summary."""
    ends = record(1, struct.pack("<I4sI", 4, b"ros2", 0)), record(15, bytes(4)), record(2, bytes(20))
    path.write_bytes(b"".join([b"\x89MCAP0\r\n", ends[0], *parts, *ends[1:], b"\x89MCAP0\r\n"]))
    return path


def chunk(size: int, frame: bytes) -> bytes:
    return record(6, struct.pack("<QQQII4sQ", T0, T0, size, 0, 4, b"zstd", len(frame)) + frame)


def test_compressed_bombs(tmp_path):
    frame = bomb(1200 << 20)
    message = mcap(tmp_path / "message.mcap", [(T0, frame), *SERIES])
    modest = mcap_of(tmp_path / "modest.mcap", chunk(1000, frame))
    honest = mcap_of(tmp_path / "honest.mcap", chunk(1 << 40, frame))
    lines = lines_of([message, modest, honest])
    assert lines[0] == "10"
    assert "a chunk does not have the 1000 bytes that it says" in lines[1]
    assert "over the limit of 512 MiB" in lines[2]


def test_a_chunk_takes_room_for_what_it_holds(tmp_path):
    import tracemalloc

    from vla_perception.sources.bags import mcap_file

    content = np.random.default_rng(0).bytes(1000) * 40_000
    for cut in (0, 1):  # as much as it says, and less
        body = chunk(len(content) + cut, zstandard.compress(content))[9:]
        if cut:
            with pytest.raises(ValueError, match="does not have the 40000001 bytes"):
                mcap_file.expanded(body)
        else:
            assert mcap_file.expanded(body) == content
    claims = mcap_of(tmp_path / "claims.mcap", chunk(500 << 20, zstandard.compress(content[:1000])))
    tracemalloc.start()
    try:
        with pytest.raises(BagError, match="does not have"):
            read(claims)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def record(opcode: int, body: bytes) -> bytes:
    return struct.pack("<BQ", opcode, len(body)) + body


def test_records_that_claim_more_than_there_is(tmp_path):
    """In a file that is long, and empty: its blocks take no room on the disk."""
    files = []
    for opcode in (1, 3, 4, 5, 6, 8, 9, 11, 12, 200):
        files.append(tmp_path / f"{opcode}.mcap")
        head = b"\x89MCAP0\r\n" + (record(1, struct.pack("<I4sI", 4, b"ros2", 0)) if opcode != 1 else b"")
        with files[-1].open("wb") as out:
            out.write(head + struct.pack("<BQ", opcode, 8 << 30) + struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0))
            out.seek(9 << 30)
            out.write(record(2, bytes(20)) + b"\x89MCAP0\r\n")
    assert [line[:8] for line in lines_of(files)] == ["BagError"] * len(files)


def test_an_index_that_goes_in_circles(tmp_path):
    """One chunk, named a hundred thousand times: its messages come once."""
    file = mcap(tmp_path / "x.mcap")
    content = file.read_bytes()
    (summary,) = struct.unpack_from("<Q", content, len(content) - 28)
    index = content.index(struct.pack("<B", 8), summary)
    while struct.unpack_from("<Q", content, index + 9)[0] != T0:
        index = content.index(b"\x08", index + 1)
    (size,) = struct.unpack_from("<Q", content, index + 1)
    entry = content[index : index + 9 + size]
    file.write_bytes(content[:index] + entry * 100_000 + content[index:])
    assert lines_of([file]) == ["10"]


def test_chunks_that_all_lie_at_the_same_time(tmp_path, monkeypatch):
    """All of them are open at once: what they take together has a limit, and chunks one after the other do not reach it."""
    from vla_perception.sources.bags import mcap_file

    monkeypatch.setattr(mcap_file, "OPEN_CHUNKS_LIMIT", 5 << 20)
    many = [(ns + i, cdr + bytes(1 << 20)) for ns, cdr in SERIES for i in range(2)]
    with Bag(mcap(tmp_path / "x.mcap", many, chunk_size=1 << 20)) as bag:
        assert len(list(bag.messages())) == 20
    overlapping = mcap(tmp_path / "y.mcap", [(T0, cdr) for _, cdr in many], chunk_size=1 << 20)
    with (
        Bag(overlapping) as bag,
        pytest.raises(BagError, match="chunks of more than 5 MiB overlap in time: `mcap sort`"),
    ):
        list(bag.messages())


SCHEMA = "CREATE TABLE schema(schema_version INTEGER PRIMARY KEY, ros_distro TEXT NOT NULL); INSERT INTO schema VALUES({}, 'x');"
DEFINITIONS = (
    "CREATE TABLE message_definitions(id INTEGER PRIMARY KEY, topic_type TEXT NOT NULL, encoding TEXT NOT NULL, "
    "encoded_message_definition TEXT NOT NULL, type_description_hash TEXT NOT NULL);"
)


@pytest.mark.parametrize(
    "sql",
    [
        *(SCHEMA.format(version) for version in (-1, 0, 1, 2, 3, 4, 5, 99)),  # without the tables that belong to them
        SCHEMA.format(4) + DEFINITIONS,
        # As rosbag2 writes it where it does not find a type's definition.
        SCHEMA.format(4)
        + DEFINITIONS
        + f"INSERT INTO message_definitions VALUES(1, '{COMPRESSED}', 'unknown', '', '');",
        "CREATE TABLE schema(other); CREATE TABLE metadata(other);",
        "CREATE VIEW message_definitions AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT * FROM n;"
        + SCHEMA.format(4),
        "CREATE INDEX timestamp_idx ON messages(timestamp); CREATE TABLE more(a); CREATE VIEW v AS SELECT 1;",
        "ALTER TABLE topics ADD COLUMN type_description_hash TEXT NOT NULL DEFAULT ''; ALTER TABLE topics ADD COLUMN new;",
        "INSERT INTO messages VALUES(1000, 77, 5, x'00010000')",  # of a topic that is not there
    ],
)
def test_sqlite_of_any_schema(tmp_path, sql):
    file = sqlite_bag(tmp_path / "x.db3")
    with closing(sqlite3.connect(file)) as base:
        base.executescript(sql)
    assert read(file) == SERIES
    with Bag(file) as bag:
        assert bag.start_ns == T0


SQL = [
    (
        "DROP TABLE messages; CREATE VIEW messages AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) "
        "SELECT id, 1 AS topic_id, id AS timestamp, x'00010000' AS data FROM n",
        "no table messages",
    ),
    (
        "ALTER TABLE messages RENAME TO m; CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id, timestamp, "
        "data GENERATED ALWAYS AS (zeroblob(900000000))); INSERT INTO messages(topic_id, timestamp) VALUES(1, 1)",
        "messages is not a plain",
    ),
    ("UPDATE messages SET data = zeroblob(320000000) WHERE id = 3", "over 300 MiB"),
    ("UPDATE messages SET timestamp = 'yesterday' WHERE id = 3", "not bytes with a time"),
    ("UPDATE messages SET data = 'text' WHERE id = 3", "not bytes with a time"),
    ("DROP TABLE topics", "no table topics"),
    ("UPDATE topics SET name = x'ff00'", "not a text"),
    ("UPDATE topics SET type = x'00'", "not a text"),
    ("UPDATE topics SET name = printf('/%.*c', 70000, 'a')", "a long one"),
    ("UPDATE topics SET name = '/' || char(0) || printf('%.*c', 70000, 'a')", "a long one"),
]


def test_hostile_databases(tmp_path):
    files = []
    for number, (sql, _) in enumerate(SQL):
        files.append(sqlite_bag(tmp_path / f"{number}.db3"))
        with sqlite3.connect(files[-1]) as base:
            base.executescript(sql)
        base.close()
    for line, (_, sentence) in zip(lines_of(files), SQL, strict=True):
        assert line.startswith("BagError") and sentence in line


def test_no_room_to_decompress(tmp_path, monkeypatch):
    """Neither at the beginning nor, where the file says nothing of its size, in the middle."""
    (tmp_path / "x.mcap.zstd").write_bytes(bomb(300 << 20))
    usage = shutil.disk_usage(tmp_path)
    for free in (1 << 29, (1 << 30) + (50 << 20)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(BagError, match="make room, or set TMPDIR") as caught:
            Bag(tmp_path / "x.mcap.zstd")
        assert "cut off" not in str(caught.value)


# What is a camera


def message_of(kind: str, cdr: bytes):
    from vla_perception.sources.bags import BagMessage

    return BagMessage("/x", kind, T0, cdr)


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_what_the_tokenizer_decodes_is_a_camera(encoding):
    for frame_id in ("", "a", "abcd", "Kamera-Ü"):
        for little in (True, False):
            assert image_encoding(image(T0, encoding, frame_id, little)) == encoding
    assert is_camera_image(message_of(IMAGE, image(T0, encoding))) is True


@pytest.mark.parametrize(
    "encoding", ["16UC1", "32FC1", "64FC1", "32SC1", "16SC1", "8SC1", "32FC3", "8UC2", "16UC2", "TYPE_16UC1", "label"]
)
def test_depth_labels_and_flow_are_no_cameras(encoding):
    assert is_camera_image(message_of(IMAGE, image(T0, encoding))) is False


def png(bits: int, color: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 2, 2, bits, color, 0, 0, 0) + bytes(20)


@pytest.mark.parametrize(
    ("format", "data", "camera"),
    [
        ("jpeg", JPEG, True),
        ("jpg", JPEG, True),
        ("", JPEG, True),
        ("png", png(8, 2), True),
        ("png", png(8, 0), True),
        ("rgb8; jpeg compressed bgr8", JPEG, True),
        ("bgr8; png compressed bgr8", png(8, 2), True),
        ("mono16; png compressed mono16", png(16, 0), True),
        ("JPEG", JPEG, True),
        ("png", png(16, 2), True),
        ("16UC1; png compressed 16UC1", png(16, 0), False),
        ("16UC1; compressedDepth png", bytes(12) + png(16, 0), False),
        ("32FC1; compressedDepth rvl", bytes(40), False),
        ("png", png(16, 0), False),
        (FORMAT, bytes(40), False),
        ("safetensors; vla_tokens/7", bytes(40), False),
        ("h264", bytes(40), False),
        ("32SC1; png", png(8, 0), False),
        ("", b"", None),
        ("jpeg", b"", None),
    ],
)
def test_compressed_cameras(format, data, camera):
    assert is_camera_image(message_of(COMPRESSED, compressed(T0, format, data))) is camera


def test_camera_topics_are_found_by_what_was_recorded(tmp_path):
    recorded = {
        "/oak/rgb/image_raw": (IMAGE, image(T0, "bgr8")),
        "/oak/stereo/image_raw": (IMAGE, image(T0, "16UC1")),
        "/zed/confidence": (IMAGE, image(T0, "32FC1")),
        "/depth_camera/color": (IMAGE, image(T0, "rgb8")),  # its name says depth, and it is a camera
        "/front/image_raw/compressedDepth": (COMPRESSED, compressed(T0, "16UC1; compressedDepth png")),
        "/tokens": (COMPRESSED, compressed(T0, FORMAT)),
        "/wrist/image_raw/compressed": (COMPRESSED, compressed(T0)),
        "/empty_first/image_raw": (COMPRESSED, compressed(T0, "", b"")),
    }
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
        for topic, (kind, cdr) in recorded.items():
            connection = writer.add_connection(topic, kind, typestore=TYPES)
            writer.write(connection, T0, cdr)
            if "empty" in topic:
                writer.write(connection, T0 + 1, compressed(T0 + 1))
    with Bag(tmp_path / "bag") as bag:
        cameras = ["/depth_camera/color", "/empty_first/image_raw", "/oak/rgb/image_raw", "/wrist/image_raw/compressed"]
        assert bag.image_topics() == cameras
        assert all(header_stamp_ns(message.cdr) >= T0 for message in bag.messages(cameras))


def test_more_image_topics_than_a_robot_has(tmp_path):
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for number in range(501):
            writer.write(writer.add_connection(f"/c{number}", COMPRESSED, typestore=TYPES), T0, SERIES[0][1])
    with Bag(tmp_path / "bag") as bag:
        with pytest.raises(BagError, match="501 image topics: name those"):
            bag.image_topics()
        assert len(list(bag.messages(["/c7"]))) == 1


def test_without_the_libraries_there_is_a_sentence(tmp_path):
    file = mcap(tmp_path / "x.mcap")
    (tmp_path / "mcap.py").write_text("raise ModuleNotFoundError(\"No module named 'mcap'\")")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom vla_perception.sources.bags import Bag, BagError\n{READ}", file],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.startswith("BagError: No module named 'mcap' in "), done.stdout + done.stderr
    assert "pip install mcap" in done.stdout
