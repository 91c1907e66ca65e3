"""What iceoryx2 would die of, hang at or share with others, in a /dev/shm that only one process has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ros_harness import ROOT, ros_environment

from vla_perception.tokens import shared_memory, shared_memory_services
from vla_perception.tokens.shared_memory_services import SharedMemoryError

needs_iceoryx2 = pytest.mark.skipif(
    bool(shared_memory.unavailable_reason()), reason="needs iceoryx2: pip install '.[shm]'"
)

MOUNT = 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"'
#: A mount namespace, of root or of a user who may have one.
NAMESPACES = [["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]]

BEFORE = """
import os, sys
sys.path.insert(0, "test/support")
import iceoryx2
from fake_tokenizer import make_tokens
from vla_perception.tokens import shared_memory_services as services
from vla_perception.tokens.shared_memory import SharedMemoryError, TokenReader, TokenWriter
from vla_perception.tokens import VisualTokens

def free():
    state = os.statvfs("/dev/shm")
    return state.f_bavail * state.f_frsize

def fill(leave=0):
    with open("/dev/shm/filler", "ab") as file:
        if free() > leave:
            os.posix_fallocate(file.fileno(), file.tell(), free() - leave)
    assert free() <= leave

def empty():
    os.unlink("/dev/shm/filler")

def attempt(make):
    try:
        return make()
    except SharedMemoryError as error:
        return str(error)

def files():
    return [os.path.join(folder, name) for folder, _, names in os.walk("/dev/shm") for name in names]
"""


def namespace() -> list[str] | None:
    for words in NAMESPACES:
        command = [*words, "sh", "-c", MOUNT, "1m", "true"]
        try:
            if subprocess.run(command, capture_output=True, timeout=20).returncode == 0:
                return words
        except FileNotFoundError:
            return None
    return None


@pytest.fixture(scope="module")
def own_shm():
    """Runs Python in a separate /dev/shm and returns what it printed; it must end with 0, in time."""
    words = namespace()
    if words is None:
        pytest.skip("needs mount namespaces: root, or unprivileged user namespaces")

    def run(code: str, size: str = "16m", timeout: float = 60.0) -> str:
        ended = subprocess.run(
            [*words, "sh", "-c", MOUNT, size, sys.executable, "-c", BEFORE + code],
            cwd=ROOT,
            env=ros_environment(0),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert ended.returncode == 0, (ended.returncode, ended.stdout, ended.stderr[-3000:])
        return ended.stdout

    return run


# Room


@needs_iceoryx2
def test_whatever_is_left_of_dev_shm_nothing_dies_of_it(own_shm):
    """Before anything is there, with a writer there, and with both; and it works as soon as there is room again."""
    code = """
for leave in (0, 4096, 8192, 40960, 2**16, 2**18, 2**19, 2**20 + 2**18 - 4096):
    fill(leave)
    for kind in (TokenWriter, TokenReader):
        assert "/dev/shm has" in attempt(lambda: kind("/tokens", 0)), leave
    empty()
    writer = TokenWriter("/tokens", 0)
    fill(leave)
    assert "/dev/shm has" in attempt(lambda: TokenReader("/tokens", 0)), leave
    empty()
    reader = TokenReader("/tokens", 0)
    fill(leave)
    written = attempt(lambda: writer.write(make_tokens(0)))
    assert written == 1 or "/dev/shm has" in written, written
    empty()
    writer.write(make_tokens(1))
    fill(leave)
    for sequence in range(2, 30):  # more sets than there are pages for, and larger ones
        written = attempt(lambda: writer.write(make_tokens(sequence, channels=60 * sequence)))
        assert written == 1 or "/dev/shm has" in written, written
        while (taken := reader.take()) is not None:
            VisualTokens.from_bytes(taken[0])
    reader.cleanup_dead_nodes()
    empty()
    for sequence in range(30, 60):
        assert writer.write(make_tokens(sequence)) == 1
    assert reader.take() is not None
    reader.close(), writer.close()
print("lived")
"""
    assert own_shm(code) == "lived\n"


@needs_iceoryx2
def test_pages_are_taken_or_refused_but_never_a_bus_error(own_shm):
    code = """
import ctypes, mmap
with open("/dev/shm/memory", "w+b") as file:
    file.truncate(2**22)
    memory = mmap.mmap(file.fileno(), 2**22)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fill(2**20)
services.allocate_pages(address + 5000, 2**19)
memory[5000:5000 + 2**19] = bytes(2**19)
print(attempt(lambda: services.allocate_pages(address + 2**20, 2**21)))
"""
    assert "no room for 2.0 MiB" in own_shm(code)


def test_a_dev_shm_without_a_limit_is_not_full(monkeypatch):
    state = list(os.statvfs("/dev/shm"))
    state[2] = state[3] = state[4] = 0  # blocks, free, available: as a tmpfs with size=0 says
    monkeypatch.setattr(shared_memory_services.os, "statvfs", lambda _path: os.statvfs_result(state))
    shared_memory_services.require_room(2**30)
    state[2] = 100
    with pytest.raises(SharedMemoryError, match="/dev/shm has 0.0 MiB left"):
        shared_memory_services.require_room(0)


# Files that were left, or laid, there

EMPTIED = """
services._EMPTY_SEC = 0.2
kinds = (".global_mgmt", ".dynamic", ".data", ".connection", ".event_mgmt", ".service", ".details", "_context")
for state in ("alive", "killed"):
    for kind in kinds:
        # The holder's memory is spoiled, so it is a process of its own.
        ready, told = os.pipe()
        if not (holder := os.fork()):
            writer, reader = TokenWriter("/tokens", 0), TokenReader("/tokens", 0)
            writer.write(make_tokens(0))
            reader.take()
            os.write(told, b"x")
            os.kill(os.getpid(), 19 if state == "alive" else 9)
        os.read(ready, 1)
        os.waitpid(holder, os.WUNTRACED)
        spoiled = [name for name in files() if name.endswith(kind)]
        assert spoiled, (state, kind)
        for name in spoiled:
            os.chmod(name, 0o600)
            os.truncate(name, 0)
        if not (second := os.fork()):
            found = attempt(lambda: TokenReader("/tokens", 0))
            if not isinstance(found, str):
                found.cleanup_dead_nodes()
            print(state, kind, found if isinstance(found, str) else "opened", flush=True)
            os._exit(0)
        _, status = os.waitpid(second, 0)
        assert status == 0, (state, kind, status)
        if state == "alive":
            os.kill(holder, 9)
            os.waitpid(holder, 0)
        for name in files():
            os.unlink(name)
"""


@needs_iceoryx2
def test_no_emptied_file_is_waited_for(own_shm):
    """Four kinds of files hang iceoryx2 if empty, with Python's lock held: the time limit here is the process's."""
    lines = own_shm(EMPTIED, timeout=120).splitlines()
    assert len(lines) == 16
    for line in lines:
        assert "opened" in line or "remove /dev/shm/vla_perception-" in line, line
    for state in ("alive", "killed"):  # nothing of this is anybody's yet: it is made anew
        assert f"{state} .global_mgmt opened" in lines


@needs_iceoryx2
def test_a_trial_that_hangs_is_ended(own_shm):
    """Were something to hang that no look finds: as an empty file does where it is not looked for."""
    code = """
TokenReader("/tokens", 0).close()
for name in files():
    if name.endswith(".global_mgmt"):
        os.truncate(name, 0)
services._PROBE_SEC = 1
print(attempt(lambda: services._open_in_trial_process("name")))
"""
    assert own_shm(code).startswith("a trial hung for 1 s; if that stays so, end the processes")


@needs_iceoryx2
def test_ctrl_c_does_not_reach_the_trial(monkeypatch, tmp_path):
    """A terminal sends SIGINT to the whole foreground group: it said that files are to be removed, and left some."""
    trial = tmp_path / "trial.py"
    trial.write_text("import os; print('ok' if os.getsid(0) == os.getpid() else 'I hear it', end='')")
    monkeypatch.setattr(shared_memory_services, "__file__", str(trial))
    shared_memory_services._open_in_trial_process("name")


@needs_iceoryx2
def test_no_other_user_may_write_what_iceoryx2_leaves(own_shm):
    code = """
os.umask(0)
writer, reader = TokenWriter("/tokens", 0), TokenReader("/tokens", 0)
writer.write(make_tokens(0))
for name in files():
    print(oct(os.lstat(name).st_mode & 0o077), name)
print(oct(os.lstat(services.root()).st_mode))
print(os.path.exists("/tmp/iceoryx2") and os.listdir("/tmp/iceoryx2"))
"""
    *lines, folder, _elsewhere = own_shm(code).splitlines()
    in_memory = [line for line in lines if "/dev/shm/vla_perception-" not in line]
    assert any("global_mgmt" in line for line in in_memory)
    assert all(line.startswith("0o0 ") for line in in_memory), in_memory
    assert folder == "0o40700"


@needs_iceoryx2
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
def test_users_neither_reach_nor_mix_with_each_other(own_shm):
    code = """
sys.executable = ""  # may lie where only root comes to: no trial

def as_user(user, call):
    if not (child := os.fork()):
        os.setgroups([]), os.setresgid(user, user, user), os.setresuid(user, user, user)
        print(user, attempt(call) or "nothing")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)

def reach():
    for name in [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if name.startswith("vla_")]:
        for call in (lambda: open(name, "rb"), lambda: open(name, "r+b"), lambda: os.unlink(name), lambda: os.listdir(name)):
            try:
                return call(), name
            except OSError:
                pass

def opened():
    return bool(TokenReader("/tokens", 0)) and "opened"

if not (root := os.fork()):
    writer, reader = TokenWriter("/tokens", 0), TokenReader("/tokens", 0)
    writer.write(make_tokens(0))
    as_user(1001, reach)
    as_user(1002, opened)
    as_user(1002, lambda: TokenWriter("/tokens", 0).readers())  # root's reader is none of its own
    os._exit(0)
os.waitpid(root, 0)
os.mkdir("/dev/shm/vla_perception-1003", 0o700)
as_user(1003, opened)
open("/dev/shm/vla_1004_x", "w").close()
as_user(1004, opened)
"""
    lines = own_shm(code).splitlines()
    assert len(lines) == 5, lines
    reached, opened, readers, folder, file = lines
    assert (reached, opened, readers) == ("1001 nothing", "1002 opened", "1002 nothing")
    assert folder == "1003 /dev/shm/vla_perception-1003 belongs to user 0, who must remove it"
    assert file.startswith("1004 /dev/shm/vla_1004_x is not a file of this user (but of 0)")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Stands for /dev/shm."""
    monkeypatch.setattr(shared_memory_services, "FOLDER", str(tmp_path))
    tmp_path.chmod(0o1777)
    return tmp_path


def test_the_folder_is_made_for_the_user_alone_and_found_again(folder):
    shared_memory_services._make_folder()
    (made,) = folder.iterdir()
    assert made.stat().st_mode & 0o777 == 0o700 and str(made) + "/" == shared_memory_services.root()
    shared_memory_services._make_folder()


def link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")


SPOILED = {
    "link": (link, "is not a folder"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is not a folder"),
    "file": (Path.touch, "is not a folder"),
    "pipe": (os.mkfifo, "is not a folder"),
    "everybody's": (lambda path: (path.mkdir(), path.chmod(0o777)), "others may write"),
    "everybody's, sticky": (lambda path: (path.mkdir(), path.chmod(0o1777)), "others may write"),
    "the group's": (lambda path: (path.mkdir(), path.chmod(0o770)), "others may write"),
    "no /dev/shm": (lambda path: path.parent.rmdir(), "No such file"),
    "/dev/shm not sticky": (lambda path: path.parent.chmod(0o777), "chmod 1777"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_is_not_ours_alone_is_refused(folder, case):
    spoil, message = SPOILED[case]
    spoil(Path(shared_memory_services.root().rstrip("/")))
    with pytest.raises(SharedMemoryError, match=message):
        shared_memory_services._make_folder()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_belongs_to_another_user_is_refused_by_name(folder, monkeypatch, kind):
    path = shared_memory_services.root() if kind == "folder" else f"{folder}/{shared_memory_services.prefix()}x"
    other = os.lstat(folder).st_uid + 1
    names = [f"vla_perception-{other}", f"vla_{other}_x"]
    os.mkdir(folder / names[0], 0o700) if kind == "folder" else (folder / names[1]).write_bytes(b"1")
    monkeypatch.setattr(shared_memory_services.os, "geteuid", lambda: other)
    assert path != shared_memory_services.root()
    look = shared_memory_services._make_folder if kind == "folder" else shared_memory_services.check_files
    with pytest.raises(SharedMemoryError, match=rf"{names[kind == 'file']}.* owner|{names[0]} belongs to user"):
        look()


def test_a_pipe_or_link_among_the_files_is_refused(folder):
    for make in (os.mkfifo, lambda path: os.symlink("/etc/passwd", path)):
        path = f"{folder}/{shared_memory_services.prefix()}x"
        make(path)
        with pytest.raises(SharedMemoryError, match="is not a file of this user"):
            shared_memory_services.check_files()
        os.unlink(path)


def test_files_of_others_and_of_a_longer_user_number_are_none_of_ours(folder, monkeypatch):
    monkeypatch.setattr(shared_memory_services.os, "geteuid", lambda: 100)
    for name in ("vla_1000_x", "iox2_x", "fastdds_x", "sem.x"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    shared_memory_services.check_files()
    assert len(list(folder.iterdir())) == 4


def test_an_empty_file_is_waited_for_a_moment_and_then_removed(folder, monkeypatch):
    path = Path(f"{folder}/{shared_memory_services.prefix()}x")
    path.touch()
    with pytest.raises(shared_memory_services.EmptyFileError):
        shared_memory_services.check_files()
    assert path.exists()
    monkeypatch.setattr(shared_memory_services, "_EMPTY_SEC", 0.0)
    shared_memory_services.check_files()
    assert not path.exists()


# Containers


@needs_iceoryx2
def test_a_container_with_its_own_dev_shm_and_the_hosts_tmp_breaks_nothing(own_shm):
    """It takes what lies in /tmp for its own; on the host the services go on, for old and new readers."""
    code = """
import subprocess
writer, reader = TokenWriter("/tokens", 0), TokenReader("/tokens", 0)
inside = "from vla_perception.tokens.shared_memory import *; r = TokenReader('/tokens', 0); r.cleanup_dead_nodes(); r.close()"
mount = "mount -t tmpfs tmpfs /dev/shm && exec \\"$@\\""
subprocess.run(["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", inside], check=True)
later = TokenReader("/tokens", 0)
print(writer.write(make_tokens(3)))
print([VisualTokens.from_bytes(end.take()[0]).sequence for end in (reader, later)])
"""
    assert own_shm(code) == "2\n[3, 3]\n"


@needs_iceoryx2
def test_many_that_start_at_once_find_each_other(own_shm):
    """Each tries the services in another process first, which makes and removes them under the others' hands."""
    code = """
import threading
ends, errors = [], []
def begin(number):
    try:
        ends.append((TokenWriter if number == 0 else TokenReader)("/tokens", 0))
    except SharedMemoryError as error:
        errors.append(error)
for _ in range(5):
    threads = [threading.Thread(target=begin, args=(number,)) for number in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors, errors
    (writer,) = [end for end in ends if isinstance(end, TokenWriter)]
    print(writer.write(make_tokens(0)))
    for end in ends: end.close()
    ends.clear()
"""
    assert own_shm(code).split() == ["4"] * 5
