"""The iceoryx2 services of a topic: where their files lie, and whether they may be opened without harm.

iceoryx2 trusts what it finds. Where `/dev/shm` is full, Linux ends the process with SIGBUS in the middle of making a
service; a file that a killed process or another user has left empty is waited for without end, with Python's global
lock held. So everything is checked before, and a separate process, which may die or hang, opens the services first.

That process runs this file as a program: it imports nothing of the package, and iceoryx2 only inside functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

#: Messages that wait for a reader at most; then its oldest one makes room.
DEPTH = 10
#: Messages that a reader holds without having copied them at most.
LENT = 4
#: Readers of one topic. A further one stays with the topic.
READERS = 8
#: Writers of one topic: one, its successor while messages grow, and a killed one whose remains were not removed yet.
WRITERS = 4
#: Event identifiers: a message was written; a writer has come, has gone, was found dead; a message is being written.
WRITE_DONE, WRITER_CAME, WRITER_LEFT, WRITER_DIED, WRITE_STARTED = range(5)

#: Where Linux has POSIX shared memory; iceoryx2 cannot be given another place.
FOLDER = "/dev/shm"
#: Bytes that must be left beside what is written: other processes write, too, between the check and the writing.
_MARGIN = 2**20
#: Bytes that services, ports and connections of a process take, generously (measured: 52 KiB).
SERVICES_BYTES = 2**18
#: iceoryx2 gives a new file its size within microseconds. What is empty for longer was left so.
_EMPTY_SEC = 1.0
#: Seconds for the process that opens the services first; 0.05 to 0.1 are usual, a busy machine takes more.
_PROBE_SEC = 10
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_LIBC = ctypes.CDLL(None, use_errno=True)


class SharedMemoryError(RuntimeError):
    """Shared memory cannot be used (any more); the text says why."""


def root() -> str:
    """The folder of iceoryx2's small files.

    It lies in `/dev/shm` itself, so that processes share it exactly where they share the memory: a container with a
    separate `/dev/shm` would take all services for remains if only this folder were shared.
    """
    return f"{FOLDER}/vla_perception-{os.geteuid()}/"


def prefix() -> str:
    """What the names of iceoryx2's files in `/dev/shm` begin with."""
    return f"vla_{os.geteuid()}_"


def open_services(name: str) -> tuple:
    """A node of iceoryx2, and both services: publish-subscribe and event.

    Exceptions of iceoryx2 come through. Call `check_before_opening` first.
    """
    import iceoryx2

    # Its advice goes to stderr and is about what is handled here; IOX2_LOG_LEVEL brings it back.
    iceoryx2.set_log_level_from_env_or(iceoryx2.LogLevel.Fatal)
    # Not from files in the home or working directory: both ends must have the same.
    config = iceoryx2.config.default()
    config.global_cfg.root_path = iceoryx2.Path.new(root())
    config.global_cfg.prefix = iceoryx2.FileName.new(prefix())
    # SIGINT and SIGTERM are the process's own.
    builder = iceoryx2.NodeBuilder.new().config(config).signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled)
    node = builder.create(iceoryx2.ServiceType.Ipc)
    restrict_files()
    service = iceoryx2.ServiceName.new(name)
    messages = (
        node.service_builder(service)
        .publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
        .max_publishers(WRITERS)
        .max_subscribers(READERS)
        .max_nodes(2 * (WRITERS + READERS))
        .history_size(0)
        .subscriber_max_buffer_size(DEPTH)
        .subscriber_max_borrowed_samples(LENT + 1)
        .enable_safe_overflow(True)
        .open_or_create()
    )
    events = (
        node.service_builder(service)
        .event()
        .max_notifiers(WRITERS + READERS)
        .max_listeners(READERS)
        .max_nodes(2 * (WRITERS + READERS))
        .event_id_max_value(WRITE_STARTED)
        .notifier_created_event(iceoryx2.EventId.new(WRITER_CAME))
        .notifier_dropped_event(iceoryx2.EventId.new(WRITER_LEFT))
        .notifier_dead_event(iceoryx2.EventId.new(WRITER_DIED))
        .open_or_create()
    )
    return node, messages, events


def check_before_opening(name: str) -> None:
    """SharedMemoryError if opening the services of that name could end or hang this process, or harm others."""
    _make_folder()
    end = time.monotonic() + 2 * _EMPTY_SEC
    while True:
        try:
            check_files()
            break
        except EmptyFileError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
    require_room(SERVICES_BYTES)
    _open_in_trial_process(name)
    require_room(SERVICES_BYTES)


class EmptyFileError(SharedMemoryError):
    """A process is making a file, or was killed while it did: iceoryx2 would wait for it."""


def check_files() -> None:
    """SharedMemoryError if iceoryx2 must not touch its files in `/dev/shm` now. Removes those that were left empty."""
    for path, state in _files():
        if state.st_uid != os.geteuid() or not stat.S_ISREG(state.st_mode):
            raise SharedMemoryError(
                f"{path} is not a file of this user (but of {state.st_uid}): its owner must remove it"
            )
        if not state.st_size:
            if time.time() - state.st_ctime < _EMPTY_SEC:
                raise EmptyFileError(f"{path} is empty")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def restrict_files() -> None:
    """Removes other users' rights: iceoryx2 makes one file that all users may write, and so empty."""
    for path, state in _files():
        if state.st_uid == os.geteuid() and stat.S_ISREG(state.st_mode) and state.st_mode & 0o077:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(path, state.st_mode & 0o700)


def _files() -> Iterator[tuple[str, os.stat_result]]:
    begin = prefix()
    with _as_shared_memory_error():
        names = os.listdir(FOLDER)
    for name in names:
        if name.startswith(begin):
            with contextlib.suppress(FileNotFoundError):
                yield f"{FOLDER}/{name}", os.lstat(f"{FOLDER}/{name}")


def require_room(size: int) -> None:
    """SharedMemoryError if `size` more bytes might not fit: Linux would end the process with SIGBUS where it writes."""
    with _as_shared_memory_error():
        state = os.statvfs(FOLDER)
    free = state.f_bavail * state.f_frsize
    # A tmpfs without a limit reports zero blocks.
    if state.f_blocks and free < size + _MARGIN:
        raise SharedMemoryError(
            f"{FOLDER} has {free / 2**20:.1f} MiB left, {(size + _MARGIN) / 2**20:.1f} are needed (containers: --shm-size)"
        )


def allocate_pages(address: int, size: int) -> None:
    """Gets the pages of a part of this process's shared memory; SharedMemoryError, and no SIGBUS, if there are none."""
    begin = address // os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PAGE_SIZE")
    length = ctypes.c_size_t(address + size - begin)
    failed = _LIBC.madvise(ctypes.c_void_p(begin), length, _MADV_POPULATE_WRITE)
    if failed and ctypes.get_errno() not in (22, 38):  # EINVAL, ENOSYS: an older Linux, where the check before must do
        raise SharedMemoryError(f"{FOLDER} has no room for {size / 2**20:.1f} MiB: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def _as_shared_memory_error():
    try:
        yield
    except OSError as error:
        raise SharedMemoryError(str(error)) from error


def check_folder() -> bool:
    """Whether the folder of iceoryx2's small files exists; SharedMemoryError if it, or `/dev/shm`, must not be used."""
    folder = root().rstrip("/")
    with _as_shared_memory_error():
        state = os.stat(FOLDER)
        if state.st_mode & stat.S_IWOTH and not state.st_mode & stat.S_ISVTX:
            raise SharedMemoryError(f"{FOLDER} lets every user remove every file: `chmod 1777 {FOLDER}`")
        try:
            state = os.lstat(folder)
        except FileNotFoundError:
            return False
    if not stat.S_ISDIR(state.st_mode):
        raise SharedMemoryError(f"{folder} is not a folder: remove it")
    if state.st_uid != os.geteuid():
        raise SharedMemoryError(f"{folder} belongs to user {state.st_uid}, who must remove it")
    if state.st_mode & 0o022:
        raise SharedMemoryError(f"others may write to {folder}: remove it, or `chmod 700 {folder}` if none has")
    return True


def _make_folder() -> None:
    if not check_folder():
        with _as_shared_memory_error(), contextlib.suppress(FileExistsError):
            os.mkdir(root().rstrip("/"), 0o700)
        check_folder()


def _open_in_trial_process(name: str) -> None:
    """SharedMemoryError if the services cannot be opened, or not within `_PROBE_SEC`."""
    import iceoryx2

    python = sys.executable or ""
    if not os.path.basename(python).startswith("python"):
        return  # a program that embeds Python: started again it would be that program
    packages = str(Path(iceoryx2.__file__).parents[1])
    # Without site: no other package's start-up code, as that of ROS 2's wheels, which starts Python again.
    command = [python, "-I", "-S", __file__, packages, name, str(_PROBE_SEC)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C would end it while it makes files, and the log ask for their removal
        )
    except OSError as error:
        raise SharedMemoryError(f"{python} could not be started to try shared memory: {error}") from error
    try:
        said, _ = process.communicate(timeout=_PROBE_SEC + 1)  # it ends by itself; a machine may be busy
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    if said == "ok":
        return
    why = {-signal.SIGALRM: f"hung for {_PROBE_SEC} s", -signal.SIGBUS: f"found no room in {FOLDER}"}
    raise SharedMemoryError(
        f"a trial {why.get(process.returncode, f'ended with {process.returncode}') if not said else f'said {said}'}; if "
        f"that stays so, end the processes that use shared memory and remove {root()} and {FOLDER}/{prefix()}*"
    )


def _trial(packages: str, name: str, seconds: str) -> None:
    """Opens the services and says ``ok``, or why not."""
    import types

    # Nothing in Python can end a hang inside iceoryx2, but the kernel can.
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(int(seconds))
    # iceoryx2 imports it for a kind of payload that is not used here, and it imports NumPy.
    flatbuffers = types.ModuleType("flatbuffers")
    setattr(flatbuffers, "Builder", object)  # noqa: B010
    sys.modules["flatbuffers"] = flatbuffers
    sys.path.append(packages)
    try:
        services = open_services(name)
        del services
        said = "ok"
    except SharedMemoryError as error:
        said = str(error)
    except BaseException as error:  # a panic in iceoryx2's Rust is not an Exception
        said = f"{type(error).__name__}: {error}"
    sys.stdout.write(said)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _trial(*sys.argv[1:])
