"""The quota is found where control groups of version 1 and 2, containers and systemd have it."""

import pytest

from vla_perception.cpu_quota import cpu_quota

V1 = "9:name=systemd:/\n4:cpu,cpuacct:{}\n3:cpuset:/elsewhere\n"
V2 = "0::{}\n"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        (V2.format("/"), {"cpu.max": "150000 100000\n"}, 1.5),
        (V2.format("/"), {"cpu.max": "max 100000\n"}, None),
        (V2.format("/"), {"cpu.max": ""}, None),
        (V2.format("/system.slice/vla.service"), {"system.slice/vla.service/cpu.max": "200000 100000"}, 2.0),
        (V2.format("/a/b"), {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        (V2.format("/a/b"), {"a/b/cpu.max": "50000 100000", "a/cpu.max": "400000 100000"}, 0.5),
        (V2.format("/a"), {"other/cpu.max": "50000 100000"}, None),
        # Of a container without a namespace of its own for groups: the path is the host's.
        (V2.format("/docker/0123"), {"cpu.max": "100000 100000"}, 1.0),
        (V1.format("/docker/0123"), {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        (V1.format("/a"), {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        (V2.format("/../a"), {"../a/cpu.max": "50000 100000"}, None),
        ("", {"cpu.max": "0 0"}, None),
        (None, {"cpu.max": "100000 100000"}, 1.0),
        (None, {}, None),
        ("odd", {}, None),
    ],
)
def test_the_least_of_what_groups_allow(tmp_path, membership, files, quota):
    mounted = tmp_path / "cgroup"
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    assert cpu_quota(tmp_path / "membership", mounted) == quota
