"""A call of the service `encode`, between the executor's thread and the pipeline's."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence


class Request:
    """A call of the service `encode` that waits for its tokens."""

    def __init__(self) -> None:
        self.created = time.perf_counter()
        self.success = False
        self.text = ""
        self._done = threading.Event()

    def answer(self, success: bool, text: str) -> None:
        """The first answer counts."""
        if not self._done.is_set():
            self.success, self.text = success, text
            self._done.set()

    def wait(self, timeout_sec: float) -> bool:
        """Whether it was answered in time."""
        return self._done.wait(timeout_sec)


def last_frames(arrivals: Mapping[str, float], cameras: Sequence[str]) -> str:
    """When each camera's last frame came, for an answer; arrivals are seconds of the performance counter."""
    now = time.perf_counter()
    return ", ".join(
        f"{camera}: {f'{now - arrivals[camera]:.2f} s ago' if camera in arrivals else 'no frame yet'}"
        for camera in cameras
    )
