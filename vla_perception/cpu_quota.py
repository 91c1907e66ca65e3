"""How many cores the control groups of a process allow it: a container's, or a systemd unit's (``CPUQuota=``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_quota(membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores, the least that any group on the way up allows; None without a quota.

    Source: the kernel's Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (version 1).
    """
    quotas = [quota for folder in _folders(membership, mounted) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _folders(membership: Path, mounted: Path) -> Iterator[Path]:
    """This process's groups that have a CPU controller, and those above them.

    A container sees its own group mounted at the top, under whatever path the host has it.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for top, controllers in ((mounted, ""), (mounted / "cpu", "cpu")):
        yield top
        for line in lines:
            names, _, path = line.partition(":")[2].partition(":")
            if names == controllers or (controllers and controllers in names.split(",")):
                group = Path(path.lstrip("/"))
                yield from (top / folder for folder in (group, *group.parents) if ".." not in folder.parts)


def _quota(folder: Path) -> float | None:
    """Cores that a group allows by itself; None without a quota."""
    for read in (
        lambda: (folder / "cpu.max").read_text().split(),
        lambda: [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")],
    ):
        try:
            quota, period = map(int, read())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:  # version 1 has -1 for none
            return quota / period
    return None
