"""A stand-in for the tokenizer's node: token messages of known content, as a process or inside a test.

python test/support/fake_tokenizer.py --rate 50 --fingerprint ab… --cameras front wrist
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time

import numpy as np

from vla_perception.tokens import View, VisualTokens

MODEL = {
    "model": "fake",
    "weights": "checkpoint",
    "fingerprint": "ab" * 32,
    "compute_dtype": "float32",
    "token_strategy": "patch",
    "pool": 1,
    "encoders": ({"name": "dinov2", "channels": [0, 5]}, {"name": "siglip", "channels": [5, 9]}),
    "projector": "linear",
}


def make_tokens(sequence: int, *, cameras=("front",), grid=(3, 4), channels=6, stamp_ns=None, **changes):
    """A set whose values are all its sequence number."""
    stamp_ns = time.time_ns() if stamp_ns is None else stamp_ns
    affine = (grid[1] / 640, 0.0, 0.0, 0.0, grid[0] / 480, 0.0)
    return VisualTokens(
        **{
            "data": np.full((len(cameras), grid[0] * grid[1], channels), sequence, np.float32),
            "dtype": "float32",
            "views": tuple(View(name, f"{name}_optical", stamp_ns, 480, 640, affine) for name in cameras),
            "sequence": sequence,
            "grid": grid,
        }
        | MODEL
        | changes
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=0.0, help="messages per second; 0: only on request")
    parser.add_argument("--count", type=int, default=0, help="stop publishing after so many; 0: never")
    parser.add_argument("--first", type=int, default=0, help="first sequence number")
    parser.add_argument("--skip", type=int, nargs="*", default=[], help="sequence numbers to leave out")
    parser.add_argument("--fingerprint", default=MODEL["fingerprint"])
    parser.add_argument("--cameras", nargs="+", default=["front"])
    parser.add_argument("--grid", type=int, nargs=2, default=(3, 4))
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shared-memory", action="store_true", help="beside the topic")
    options = parser.parse_args()

    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions
    from std_srvs.srv import Trigger

    from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("fake_tokenizer")
    publisher = TokenPublisher(node)
    if options.shared_memory:
        publisher.open_shared_memory()
    lock = threading.Lock()
    state = {"sequence": options.first, "sent": 0}

    def publish() -> int:
        with lock:
            while state["sequence"] in options.skip:
                state["sequence"] += 1
            sequence = state["sequence"]
            tokens = make_tokens(
                sequence,
                cameras=options.cameras,
                grid=tuple(options.grid),
                channels=options.channels,
                fingerprint=options.fingerprint,
            )
            if options.dtype == "bfloat16":
                words = (tokens.data.view(np.uint32) >> 16).astype(np.uint16)
                tokens = VisualTokens(**{**tokens.__dict__, "data": words, "dtype": "bfloat16"})
            state["sequence"] += 1
            publisher.publish(tokens)
            state["sent"] += 1
        return sequence

    def encode(_request, response):
        response.success, response.message = True, f"sequence {publish()}"
        return response

    node.create_service(Trigger, "encode", encode)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=lambda: [executor.spin_once(0.1) for _ in iter(ended.is_set, True)])
    spinner.start()
    print("ready", flush=True)
    while options.rate and not publisher.has_subscribers() and not ended.wait(0.02):
        pass
    begin = time.monotonic()
    while options.rate and not ended.is_set() and not 0 < options.count <= state["sent"]:
        publish()
        ended.wait(max(0.0, begin + state["sent"] / options.rate - time.monotonic()))
    print(f"sent {state['sent']}", flush=True)
    ended.wait()
    spinner.join()
    publisher.close_shared_memory()
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
