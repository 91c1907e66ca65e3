"""Pools whose threads all start with them."""

import threading

import pytest

from vla_perception import kept_threads


def names(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


def test_a_pool_has_all_its_threads_from_the_beginning_and_there_is_one():
    pool = kept_threads.pool("begun", 3)
    assert len(names("begun")) == 3
    assert list(pool.map(abs, range(-9, 0))) == list(range(9, 0, -1))
    assert kept_threads.pool("begun", 3) is pool and len(names("begun")) == 3
    assert kept_threads.pool("begun", 2) is not pool


def test_where_a_thread_cannot_be_started_none_is_left_waiting(monkeypatch):
    start, started = threading.Thread.start, []

    def fails_at_the_third(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fails_at_the_third)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            kept_threads.pool("failing", 3)
    for thread in started:
        thread.join(30)
    assert not names("failing")
    assert list(kept_threads.pool("failing", 3).map(abs, [-1])) == [1]  # tried again
