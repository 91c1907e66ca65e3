"""The policy's side of `make demo`: a node that receives tokens as a policy would, and keeps account of them.

Started by `python -m demo` as a separate process. It reports on stdout, a JSON object per line (`ready`, `tokens`,
`diagnostics`, `problem`), ends when its stdin is closed, and then writes to the folder `record`: `messages.json` (a dict
per token message) and some of the messages as safetensors files.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vla_perception.nodes import executables

    executables.begin()  # before what takes long to import

import json
import sys
import threading
import time
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import GetState
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.utilities import get_rmw_implementation_identifier
from sensor_msgs.msg import CompressedImage

from vla_perception.nodes.node_runner import Stop, run_node
from vla_perception.tokens import TokenFormatError, from_message


class DemoPolicy(Node):
    """Subscribes to `tokens` and `/diagnostics`.

    Parameters: `tokenizer` (name of the tokenizer's node), `record` (folder, exists), `keep_spacing_sec` (keep a
    message whole when its stamp is that far behind the one kept before).
    """

    def __init__(self, stop: Stop):
        super().__init__("demo_policy")
        self._record = Path(self.declare_parameter("record", "").value)
        self._spacing_ns = round(self.declare_parameter("keep_spacing_sec", 2.0).value * 1e9)
        tokenizer = self.declare_parameter("tokenizer", "visual_tokenizer").value
        self._messages: list[dict] = []
        self._kept: list[tuple[int, bytes]] = []

        qos = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
        self.create_subscription(CompressedImage, "tokens", self._on_tokens, qos)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._state = self.create_client(GetState, f"{tokenizer}/get_state")
        self._asked = None
        self._readiness = self.create_timer(0.1, self._check_ready)
        threading.Thread(target=self._stop_when_stdin_closes, args=(stop,), daemon=True).start()

    def close(self) -> None:
        """Writes the record."""
        for sequence, data in self._kept:
            (self._record / f"{sequence:06d}.safetensors").write_bytes(data)
        (self._record / "messages.json").write_text(json.dumps(self._messages))

    def _on_tokens(self, message: CompressedImage) -> None:
        arrival_ns = time.monotonic_ns()
        try:
            tokens = from_message(message)
        except TokenFormatError as error:
            report("problem", text=f"A message on `tokens` is not a token message: {error}")
            return
        stamp_ns = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        self._messages.append(
            {
                "sequence": tokens.sequence,
                "stamp_ns": stamp_ns,
                "arrival_ns": arrival_ns,
                "views": [{"camera": view.camera, "stamp_ns": view.stamp_ns} for view in tokens.views],
                "shape": tokens.shape,
                "dtype": tokens.dtype,
                "model": tokens.model,
                "weights": tokens.weights,
                "fingerprint": tokens.fingerprint,
            }
        )
        if not self._kept or stamp_ns >= self._kept_ns + self._spacing_ns:
            self._kept_ns = stamp_ns
            self._kept.append((tokens.sequence, bytes(message.data)))
        report("tokens", count=len(self._messages))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        status = {status.name: {pair.key: pair.value for pair in status.values} for status in message.status}
        report("diagnostics", status=status)

    def _check_ready(self) -> None:
        """Ready: the tokenizer is active, and its token publisher is seen here."""
        if self._asked is None:
            if self._state.service_is_ready() and self.count_publishers("tokens"):
                self._asked, self._asked_at = self._state.call_async(GetState.Request()), time.monotonic()
        elif self._asked.done():
            if self._asked.result().current_state.id == State.PRIMARY_STATE_ACTIVE:
                self._readiness.cancel()
                report("ready", rmw=get_rmw_implementation_identifier())
            self._asked = None
        elif time.monotonic() > self._asked_at + 2.0:  # an answer can be lost while the two discover each other
            self._state.remove_pending_request(self._asked)
            self._asked = None

    @staticmethod
    def _stop_when_stdin_closes(stop: Stop) -> None:
        sys.stdin.buffer.read()
        stop(0)


def report(event: str, **facts: object) -> None:
    """A line on stdout for the demo. Nothing happens where the demo is gone."""
    try:
        print(json.dumps({"event": event, **facts}), flush=True)
    except BrokenPipeError:
        pass


if __name__ == "__main__":
    executables.leave(run_node(DemoPolicy))
