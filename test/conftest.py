"""What all tests share: markers that say why they skip, and ROS kept to this machine and this run."""

import importlib.util
import os
import tempfile

import pytest
from ros_domain import free_domain


def pytest_configure(config: pytest.Config) -> None:
    # Tests choose a domain of their own; one that forgot to must not meet a robot's nodes either.
    os.environ["ROS_DOMAIN_ID"] = str(free_domain())
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ.pop("ROS_STATIC_PEERS", None)
    logs = tempfile.TemporaryDirectory(prefix="vla_perception-logs-")
    os.environ["ROS_LOG_DIR"] = logs.name
    config.add_cleanup(logs.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # An rclpy that is there and does not import is a failure, not a reason to skip.
    skips = {}
    if importlib.util.find_spec("rclpy") is None:
        skips["ros"] = "needs rclpy: pip install '.[ros]', or a sourced ROS 2"
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        skips["gpu"] = "needs a CUDA device"
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
