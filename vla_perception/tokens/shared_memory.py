"""Tokens through shared memory, between the processes of one machine: what a message's `data` holds, and no more.

Per topic one iceoryx2 service carries the bytes and another one of the same name wakes the readers; docs/wire_format.md
describes both. Nothing in here knows ROS. The `TokenWriter` belongs to the tokenizer's node, a `TokenReader` to each
policy. None of them waits for another one: a reader that does not keep up loses its oldest messages, and the remains of
a killed process are removed by any other one (`cleanup_dead_nodes`).

iceoryx2 is optional (the extra `shm`; it has no wheels for aarch64). Every failure raises `SharedMemoryError`; callers
fall back to the topic.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from vla_perception.tokens.codec import SCHEMA
from vla_perception.tokens.shared_memory_services import (
    DEPTH,
    LENT,
    WRITE_DONE,
    WRITE_STARTED,
    EmptyFileError,
    SharedMemoryError,
    allocate_pages,
    check_before_opening,
    check_files,
    open_services,
    require_room,
)
from vla_perception.tokens.visual_tokens import VisualTokens

__all__ = [
    "WRITE_STARTED",
    "DEPTH",
    "LENT",
    "WRITE_DONE",
    "SharedMemoryError",
    "TokenReader",
    "TokenWriter",
    "unavailable_reason",
    "service_name",
]


def service_name(topic: str, domain: int) -> str:
    """The iceoryx2 services' name for a resolved topic of a ROS domain: ``vla_tokens/1/ros_domain_0/robot/tokens``."""
    return f"{SCHEMA}/ros_domain_{domain}{topic}"


def unavailable_reason() -> str:
    """Why iceoryx2 cannot be imported; empty if it can."""
    try:
        import iceoryx2  # noqa: F401
    except ImportError as error:
        return f"{error}; run `pip install '.[shm]'` in vla_perception's sources"
    return ""


@contextlib.contextmanager
def _raising_shared_memory_error(what: str) -> Iterator[None]:
    """Turns every exception of iceoryx2 into a SharedMemoryError that says what failed."""
    try:
        yield
    except SharedMemoryError:
        raise
    except BaseException as error:
        # A panic in iceoryx2's Rust is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SharedMemoryError(f"{what}: {type(error).__name__}: {error}") from error


class _Services:
    """Both services of a topic, as one process has them open."""

    def __init__(self, topic: str, domain: int) -> None:
        if reason := unavailable_reason():
            raise SharedMemoryError(reason)
        name = service_name(topic, domain)
        with _raising_shared_memory_error(f"no shared memory for {topic}"):
            check_before_opening(name)
            self._node, self._messages, self._events = open_services(name)

    def cleanup_dead_nodes(self) -> None:
        """Removes the remains of killed processes, which count as readers and writers until then."""
        with _raising_shared_memory_error("killed processes cannot be cleaned up after"):
            try:
                check_files()
            except EmptyFileError:
                return  # of a process that is starting, or of one that was killed: the next call will see
            if (node := self._node) is not None:
                node.try_cleanup_dead_nodes()

    def close(self) -> None:
        """Releases the services."""
        self._messages = self._events = self._node = None


class TokenWriter(_Services):
    """The tokenizer's end. Thread-safe."""

    def __init__(self, topic: str, domain: int) -> None:
        super().__init__(topic, domain)
        self._writing = threading.Lock()
        self._publisher: Any = None
        self._capacity = 0
        self._filled: dict[int, int] = {}  # address → bytes: pages that are there already
        with _raising_shared_memory_error(f"no place for a writer of {topic}"):
            import iceoryx2

            self._notifier = self._events.notifier_builder().create()
            self._write_started = iceoryx2.EventId.new(WRITE_STARTED)
            self._discard = iceoryx2.BackpressureStrategy.DiscardData

    def readers(self) -> int:
        """How many readers there are, killed ones included: see `cleanup_dead_nodes`."""
        messages = self._messages
        return messages.dynamic_config.number_of_subscribers if messages is not None else 0

    def write(self, tokens: VisualTokens) -> int:
        """Writes one message and wakes the readers; how many it reached. Never waits for one."""
        with self._writing, _raising_shared_memory_error("tokens could not be written to shared memory"):
            if self._messages is None:
                raise SharedMemoryError("this writer is closed")
            # Readers take half as long to wake up as the message takes to be written.
            self._notifier.notify_with_custom_event_id(self._write_started)
            parts = tokens.to_parts()
            size = sum(map(len, parts))
            require_room(0)  # headers and connections to new readers take some
            if size > self._capacity:
                self._grow(size)
            loan = self._publisher.loan_slice_uninit(size)
            if size > self._filled.get(loan.payload_ptr, 0):
                require_room(size)
                allocate_pages(loan.payload_ptr, size)
                self._filled[loan.payload_ptr] = size
            # Straight into what the readers map: the only copy on this side.
            target = memoryview((ctypes.c_uint8 * size).from_address(loan.payload_ptr)).cast("B")
            start = 0
            for part in parts:
                target[start : start + len(part)] = part
                start += len(part)
            reached = loan.assume_init().send()
            self._notifier.notify()
        return reached

    def _grow(self, size: int) -> None:
        # The header's length varies by some digits. A message that is larger by more means other settings.
        capacity = size + 4096
        successor = (
            self._messages.publisher_builder()
            .initial_max_slice_len(capacity)
            .max_loaned_samples(1)
            .backpressure_strategy(self._discard)
            .create()
        )
        # Only now does the old one go: a reader that sees none returns to the topic.
        if self._publisher is not None:
            self._publisher.delete()
        self._publisher, self._capacity, self._filled = successor, capacity, {}

    def close(self) -> None:
        with self._writing:
            for port in (self._publisher, self._notifier):
                if port is not None:
                    port.delete()
            self._publisher = self._notifier = None
            self._capacity = 0
            super().close()


class _Loan:
    """Holds a sample that iceoryx2 lends; it is returned when this is collected."""

    def __init__(self, sample: object) -> None:
        self.sample = sample


class TokenReader(_Services):
    """A policy's end. One thread reads; `wake` is for the others."""

    def __init__(self, topic: str, domain: int) -> None:
        super().__init__(topic, domain)
        with _raising_shared_memory_error(f"no place for a reader of {topic}"):
            self._listener = self._events.listener_builder().create()
            self._subscriber = self._messages.subscriber_builder().create()
        self._lent: weakref.WeakSet[_Loan] = weakref.WeakSet()

    def writers(self) -> int:
        """How many writers there are, killed ones included: see `cleanup_dead_nodes`."""
        return self._messages.dynamic_config.number_of_publishers

    def wait(self, timeout_sec: float) -> set[int]:
        """Sleeps until something happens to the topic, at most so long; which kinds of events did.

        A signal that the process lives on after (SIGCONT, SIGCHLD, a debugger's) may end it early, with none.
        """
        import iceoryx2

        with _raising_shared_memory_error("waiting for tokens"):
            try:
                events = self._listener.timed_wait(iceoryx2.Duration.from_nanos(int(timeout_sec * 1e9)))
            except iceoryx2.ListenerWaitError as error:
                if str(error) != "InterruptSignal":
                    raise
                return set()
            return {event.id.as_value for event in events}

    def take(self) -> tuple[memoryview | bytes, int] | None:
        """The next waiting message, and a number that only its writer has; None if none waits.

        The bytes lie in shared memory for as long as anything refers to them, also when writer or reader are gone;
        nothing writes there meanwhile. A caller that keeps more than `LENT` messages gets copies of the further ones.
        """
        with _raising_shared_memory_error("taking tokens"):
            sample = self._subscriber.receive()
            if sample is None:
                return None
            header = sample.header
            size, writer = header.number_of_elements, header.node_id.value
            if len(self._lent) >= LENT:
                data = ctypes.string_at(sample.payload_ptr, size)
                sample.delete()
                return data, writer
            array = (ctypes.c_uint8 * size).from_address(sample.payload_ptr)
            array.loan = _Loan(sample)  # returned with the last array that refers to it
            self._lent.add(array.loan)
        return memoryview(array).cast("B").toreadonly(), writer

    def wake(self) -> None:
        """Ends the `wait` of another thread (and, for nothing, those of other readers)."""
        with contextlib.suppress(SharedMemoryError), _raising_shared_memory_error("waking"):
            self._events.notifier_builder().create().delete()

    def close(self) -> None:
        try:
            with _raising_shared_memory_error("releasing shared memory"):
                self._subscriber.delete()
                self._listener.delete()
        finally:
            super().close()
