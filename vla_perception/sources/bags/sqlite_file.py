"""SQLite storage files, through Python's own library."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from vla_perception.sources.bags.storage import (
    DEFINITION_LIMIT,
    MAX_NS,
    MESSAGE_LIMIT,
    NAME_LIMIT,
    QOS_LIMIT,
    TEXTS_LIMIT,
    Channel,
    FileError,
    Stored,
    encoding_of,
    require_room,
    type_hash_of,
)

_log = logging.getLogger("vla_perception.sources.bags")


class SqliteFile:
    """The index of a `.db3` file; see `StorageFile`. `scratch()` gives a folder for a copy, where one is needed.

    Topics and messages are read, which all of rosbag2's schema versions have alike, and what newer ones say of a topic's
    QoS and type.
    """

    def __init__(self, path: Path, scratch: Callable[[], Path]):
        self.path = path
        beside = [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal")]
        beside = [file for file in beside if file.is_file() and file.stat().st_size]
        # The file is read as it lies there. What its recorder had not yet moved into it is in the files beside it.
        self._readable = self._copied(beside, scratch) if beside else path
        with closing(self._opened()) as database:
            (pages,), (page,) = (database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
            if pages * page > self._readable.stat().st_size:  # SQLite takes zeros for what is missing of the last page
                raise ValueError("the end of the file is missing")
            _check_tables(database)
            counts = {
                key: rest
                for key, *rest in database.execute(
                    "SELECT topic_id, count(*), min(timestamp), max(timestamp) FROM messages GROUP BY topic_id"
                )
            }
            qos = _text_column(database, "offered_qos_profiles", QOS_LIMIT)
            type_hash = _text_column(database, "type_description_hash", NAME_LIMIT)
            topics = database.execute(
                f"SELECT id, name, type, serialization_format, {qos}, {type_hash} FROM topics ORDER BY id"
            ).fetchall()
            definitions = _definitions(database, {kind for _, _, kind, *_ in topics})
        self.channels = {
            key: Channel(
                name,
                kind,
                encoding_of(encoding),
                counts[key][0] if key in counts else 0,
                offered_qos,
                definitions.get(kind, ""),
                type_hash_of(said),
            )
            for key, name, kind, encoding, offered_qos, said in topics
        }
        spans = [span for key, (_, *span) in counts.items() if key in self.channels]
        self.start_ns = min((start for start, _ in spans), default=None)
        self.end_ns = max((end for _, end in spans), default=None)

    def messages(self, topics: Collection[str], start_ns: int | None) -> Iterator[Stored]:
        """Messages of `topics` at or after `start_ns`, by time."""
        wanted = {key: channel for key, channel in self.channels.items() if channel.topic in topics}
        start = -(2**63) if start_ns is None else min(start_ns, MAX_NS)
        with closing(self._opened()) as database:
            rows = database.execute(
                f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({', '.join('?' * len(wanted))}) "
                "AND timestamp >= ? ORDER BY timestamp, id",
                (*wanted, start),
            )
            for key, time_ns, data in rows:
                yield time_ns, wanted[key].topic, wanted[key].type, data

    def _opened(self) -> sqlite3.Connection:
        uri = f"file:{quote(str(self._readable))}?immutable=1"
        database = sqlite3.connect(uri, uri=True, check_same_thread=False)
        # A comment in a definition may be in Latin-1, which would be an error.
        database.text_factory = lambda text: text.decode(errors="replace")
        return database

    def _copied(self, beside: list[Path], scratch: Callable[[], Path]) -> Path:
        """A copy, with what lies beside the file in it."""
        folder = scratch()
        names = " and ".join(file.name for file in (self.path, *beside))
        _log.warning("%s: a copy of %s is made in %s, and read", self.path, names, folder)
        require_room(folder, sum(file.stat().st_size for file in (self.path, *beside)), f"a copy of {names}")
        for file in (self.path, *beside):
            shutil.copyfile(file, folder / file.name)
        copy = folder / self.path.name
        with closing(sqlite3.connect(copy)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            database.execute("PRAGMA journal_mode=DELETE").fetchall()
        return copy


def _text_column(database: sqlite3.Connection, name: str, limit: int) -> str:
    """What selects this of a topic, as text: older recorders wrote none."""
    if all(column[1] != name for column in database.execute("PRAGMA table_xinfo(topics)")):
        return "''"
    return f"CASE WHEN typeof({name}) = 'text' AND {_bytes(name)} <= {limit} THEN {name} ELSE '' END"


def _bytes(column: str) -> str:
    """The size of a text: its `length` ends at the first zero."""
    return f"length(CAST({column} AS BLOB))"


def _definitions(database: sqlite3.Connection, types: Collection[str]) -> dict[str, str]:
    """The definitions of these message types, where the recorder wrote them (Iron and newer)."""
    name, room, found = "message_definitions", TEXTS_LIMIT, {}
    columns = "topic_type", "encoding", "encoded_message_definition"
    if name not in _plain_tables(database) or not {*columns} <= _plain_columns(database, name):
        return {}
    texts = " AND ".join(f"typeof({column}) = 'text'" for column in columns)
    sizes = f"{_bytes('topic_type')} <= {NAME_LIMIT} AND {_bytes('encoded_message_definition')} <= {DEFINITION_LIMIT}"
    for kind, definition in database.execute(
        f"SELECT topic_type, encoded_message_definition FROM {name} "
        f"WHERE {texts} AND {sizes} AND encoding IN ('ros2msg', 'ros2idl')"
    ):
        if kind in types and kind not in found and len(definition) <= room:
            room -= len(definition)
            found[kind] = definition
    return found


def _check_tables(database: sqlite3.Connection) -> None:
    """FileError where it is not a recording."""
    plain = _plain_tables(database)
    for name in ("topics", "messages"):
        if name not in plain:
            raise FileError(f"it is not a rosbag2 recording: it has no table {name}")
        if not _plain_columns(database, name):
            raise FileError(f"it is not a rosbag2 recording: {name} is not a plain table")
    texts = ("name", "type", "serialization_format")
    (odd,) = database.execute(
        "SELECT count(*) FROM topics WHERE "
        + " OR ".join(f"typeof({column}) <> 'text' OR {_bytes(column)} > {NAME_LIMIT}" for column in texts)
    ).fetchone()
    if odd:
        raise FileError(f"{odd} of its topics have a name, type or format that is not a text, or a long one")
    (odd,) = database.execute(
        "SELECT count(*) FROM messages WHERE typeof(timestamp) <> 'integer' OR typeof(data) <> 'blob' "
        f"OR length(data) > {MESSAGE_LIMIT}"
    ).fetchone()
    if odd:
        raise FileError(f"{odd} of its messages are not bytes with a time, or over {MESSAGE_LIMIT >> 20} MiB")


# A view may be without end, and so may what a generated column expands to.


def _plain_tables(database: sqlite3.Connection) -> set[str]:
    tables = database.execute("SELECT name, type, rootpage FROM sqlite_master")
    return {name for name, kind, page in tables if kind == "table" and page}


def _plain_columns(database: sqlite3.Connection, table: str) -> set[str]:
    """The columns of a table that has no generated ones; of another one, none."""
    columns = database.execute(f"PRAGMA table_xinfo({table})").fetchall()
    return set() if any(column[6] for column in columns) else {column[1] for column in columns}
