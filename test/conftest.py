"""What all tests share: markers that say why they skip, and ROS kept to this machine and this run."""

import importlib.util
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from ros_harness import ROOT, RosContext, RosProcess, domains_given_back, free_domain


def pytest_configure(config: pytest.Config) -> None:
    # Tests choose a domain of their own; one that forgot to must not meet a robot's nodes either.
    os.environ["ROS_DOMAIN_ID"] = str(free_domain())
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ.pop("ROS_STATIC_PEERS", None)
    # Triton reads this when it is imported: without a GPU its kernels are tested in its interpreter.
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/nvmap").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Ctrl-C works in the processes of a test, also where a shell has begun the run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logs = tempfile.TemporaryDirectory(prefix="vla_perception-logs-")
    os.environ["ROS_LOG_DIR"] = logs.name
    config.add_cleanup(logs.cleanup)


@pytest.fixture(scope="module", autouse=True)
def ros_domains():
    with domains_given_back():
        yield


@pytest.fixture(autouse=True)
def own_logging():
    """Commands set up logging for their process; the next test in this one finds it as it was."""
    loggers = [logging.getLogger(), logging.getLogger("vla_perception")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # An rclpy that is there and does not import is a failure, not a reason to skip.
    skips = {}
    if importlib.util.find_spec("rclpy") is None:
        skips["ros"] = "needs rclpy: pip install '.[ros]', or a sourced ROS 2"
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        skips["gpu"] = "needs a CUDA device"
    if "gpu" not in skips and "torch" in sys.modules:
        _keep_to_the_cpu()
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _keep_to_the_cpu() -> None:
    """With a GPU: device `auto` is the CPU as where there is none; tests of the GPU name it."""
    if importlib.util.find_spec("timm") is not None and _has_gpu():
        import torch

        from vla_perception.tokenizer import devices

        devices._first_that_works = lambda: (torch.device("cpu"), "a test", [])


@pytest.fixture
def ros():
    """Nodes of this process on a domain of its own, see `RosContext`; and a stand-in for the tokenizer's process."""
    pytest.importorskip("rclpy")

    class Ros(RosContext):
        def publisher(self, topic="tokens"):
            from sensor_msgs.msg import CompressedImage

            return self.node("publisher").create_publisher(CompressedImage, topic, 20)

        def fake(self, *arguments):
            return RosProcess([str(ROOT / "test" / "support" / "fake_tokenizer.py"), *map(str, arguments)], self.domain)

    with Ros() as ros:
        yield ros
