"""benchmarks/soak.py: what it calls growth. The run itself is `make soak`."""

import os
import sys

import pytest
from ros_harness import ROOT

pytest.importorskip("rclpy")
sys.path.insert(0, str(ROOT / "benchmarks"))
import soak


def rows(**columns):
    """30 rows in which nothing grows, but for `columns`: minute → value."""
    steady = {column: lambda _minute: 40.0 for column in soak.LIMITS} | columns
    return [{column: value(minute) for column, value in steady.items()} for minute in range(30)]


def test_a_leak_is_growth_and_what_comes_back_is_none():
    assert soak.growth(rows(), 5)[1] == []
    _, wrong = soak.growth(rows(node_anonymous_mib=lambda minute: 500 + 0.6 * minute), 5)
    assert wrong == ["node_anonymous_mib grows by 0.6 a minute, more than 0.5"]
    _, wrong = soak.growth(rows(node_fds=lambda minute: 40 + minute // 6), 5)  # one with every other reconfiguration
    assert len(wrong) == 1 and wrong[0].startswith("node_fds grows")
    # While the node loads it takes more; a policy that has just come holds files.
    peaks = rows(
        node_anonymous_mib=lambda minute: 500 + 200 * (minute % 3 == 2), shm_in_use=lambda minute: 50 + minute % 4
    )
    assert soak.growth(peaks, 5)[1] == []
    warming_up = rows(node_anonymous_mib=lambda minute: min(500, 400 + 20 * minute))
    assert soak.growth(warming_up, 5)[1] == [] and soak.growth(warming_up[:8], 0)[1]


def test_a_run_too_short_to_tell_is_no_success():
    assert soak.growth(rows()[:7], 5) == (
        {},
        ["too short to tell what grows: it takes 8 minutes (or a shorter --warm-up)"],
    )
    assert soak.growth(rows()[:8], 5)[1] == []


def test_files_in_dev_shm_are_those_that_a_process_has():
    import mmap

    name = f"/dev/shm/vla_perception_test_{os.getpid()}"
    with open(name, "wb") as file:
        file.write(b"x" * mmap.PAGESIZE)
        file.flush()
        assert name in soak.shm_in_use([os.getpid()])
    try:
        assert name not in soak.shm_in_use([os.getpid()]) and name in soak.shm_files()
        with open(name, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        assert name in soak.shm_in_use([os.getpid()])
        mapped.close()
    finally:
        os.unlink(name)
