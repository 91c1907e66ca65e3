"""A token file → a bag of token messages, as if the node had been recorded: MCAP with metadata.yaml."""

from __future__ import annotations

import heapq
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_perception.offline import run_index
from vla_perception.offline.bag_recordings import typestore
from vla_perception.offline.token_file import TokenFile
from vla_perception.sources.bags import Bag, BagTopic
from vla_perception.tokens.codec import FORMAT

if TYPE_CHECKING:
    from rosbags.interfaces import Qos
    from rosbags.typesys.store import Typestore

TOPIC = "/tokens"
_TYPE = "sensor_msgs/msg/CompressedImage"


def convert(path: Path, source: Path | None, copied: Collection[str] | None) -> None:
    """Puts a bag into a folder of the token file's name, and takes the token file away.

    Every message has the time at which the frame set was recorded, and the stamps of its images.

    Args:
        source: the bag that the tokens are of; None: they are of something else.
        copied: topics of it to copy; None: all but those of its cameras. Empty: none.
    """
    folder, working = path.with_suffix(""), _working(path)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    with TokenFile(path) as file:
        name = str(file.metadata["recording"]["name"])
        _write(file, working / folder.name, source, copied)
        entry = run_index.entry_of(name, file) | {"file": name, "format": "mcap"}
    written = working / folder.name
    (written / run_index.BAG_ENTRY).write_text(json.dumps(entry, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for each in written.iterdir():
        with each.open("rb") as opened:
            os.fsync(opened.fileno())
    written.replace(folder)
    tidy(path)


def tidy(path: Path) -> None:
    """Takes away what a bag that is complete was made from."""
    path.unlink(missing_ok=True)
    shutil.rmtree(_working(path), ignore_errors=True)


def _working(path: Path) -> Path:
    return path.with_name(f"{path.stem}.bag.part")


def _write(file: TokenFile, folder: Path, source: Path | None, copied: Collection[str] | None) -> None:
    from rosbags.rosbag2 import StoragePlugin, Writer

    store = typestore()
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        tokens = bag.add_connection(TOPIC, _TYPE, typestore=store, offered_qos_profiles=[_tokens_qos()])
        connections = {TOPIC: tokens}
        messages: Iterator[tuple[int, str, bytes]] = _token_messages(file, store)
        if source is not None and (copied is None or copied):
            with Bag(source) as recorded:
                topics = _copied(recorded, file, copied)
                for topic in topics:
                    copy = recorded.topics[topic]
                    known = _definition(copy, store)
                    qos = _recorded_qos(copy)
                    connections[topic] = bag.add_connection(topic, copy.type, **known, offered_qos_profiles=qos)
                others = ((message.time_ns, message.topic, message.cdr) for message in recorded.messages(topics))
                # In the order of their times; tokens behind the image message that completed their frame set.
                for time_ns, topic, cdr in heapq.merge(others, messages, key=lambda entry: entry[0]):
                    bag.write(connections[topic], time_ns, cdr)
            return
        for time_ns, topic, cdr in messages:
            bag.write(connections[topic], time_ns, cdr)


#: A type's hash that is not known: players take the type by its name.
_NO_HASH = f"RIHS01_{'0' * 64}"


def _definition(topic: BagTopic, store: Typestore) -> dict[str, Any]:
    """What the writer takes for a copied topic's type: as it was recorded, where the recording says what it is."""
    if topic.type in store.types and not (topic.definition and topic.type_hash):
        return {"typestore": store}
    return {"msgdef": topic.definition, "rihs01": topic.type_hash or _NO_HASH}


def _tokens_qos() -> Qos:
    """As the node's publisher offers it (nodes/visual_tokenizer/token_publisher.py)."""
    from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

    infinite = QosTime(9223372036, 854775807)
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=10,
        reliability=QosReliability.RELIABLE,
        durability=QosDurability.VOLATILE,
        deadline=infinite,
        lifespan=infinite,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=infinite,
        avoid_ros_namespace_conventions=False,
    )


def _recorded_qos(topic: BagTopic) -> list[Qos]:
    """A copied topic's: players repeat /tf_static for late subscribers only if it says so. None where it is unreadable."""
    from rosbags.rosbag2.metadata import parse_qos

    if any(sign in topic.offered_qos for sign in "&*<"):  # recorders write no aliases, which may expand without end
        return []
    try:
        found = parse_qos(topic.offered_qos)
        return found if all(isinstance(profile.depth, int) for profile in found) else []
    except Exception:  # noqa: BLE001 - the library raises whatever odd content leads it to
        return []


def _copied(recorded: Bag, file: TokenFile, copied: Collection[str] | None) -> list[str]:
    if copied is not None:
        topics = [f"/{topic.lstrip('/')}" for topic in copied]
        recorded.messages(topics)  # BagError names what is absent
    else:
        cameras = set(file.metadata["recording"].get("topics", {}).values())
        topics = [topic for topic in recorded.topics if topic not in cameras]
    return [topic for topic in topics if topic != TOPIC]


def _token_messages(file: TokenFile, store) -> Iterator[tuple[int, str, bytes]]:
    new = store.types
    for index in range(len(file)):
        tokens = file.frame(index)
        header = new["std_msgs/msg/Header"](
            stamp=new["builtin_interfaces/msg/Time"](*divmod(tokens.stamp_ns, 10**9)), frame_id=tokens.views[0].frame_id
        )
        data = np.frombuffer(tokens.to_bytes(), np.uint8)
        message = new[_TYPE](header=header, format=FORMAT, data=data)
        yield int(file.times_ns[index]), TOPIC, store.serialize_cdr(message, _TYPE)
