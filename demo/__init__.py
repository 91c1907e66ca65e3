"""`make demo`: a bag's cameras become visual tokens at a policy, every piece in a separate process.

    python -m demo [--model tiny-random] [--bag examples/sample_bag] [--out out/demo]
    python -m demo --view       the bag in a loop, seen in a browser, until Ctrl-C

Run from the checkout; the package that is installed has no part of it.

    __main__.py     the command: starts the processes, follows them, writes report.json and tokens.png
    recording.py    the bag's cameras and images
    processes.py    processes on a separate ROS domain
    policy.py       the policy's process: a node that receives tokens and keeps account of them
    events.py       what that process reports, and when nothing moves any more
    report.py       every frame accounted for, latencies, the table
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class DemoError(Exception):
    """What kept the demo from its end, as the user is to read it."""
