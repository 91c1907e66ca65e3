"""`vla-perception view` and `vla-perception top`: their options, and what they start."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from pathlib import Path

#: Where a page is by default; the next ones where that is taken.
DEFAULT_PORT = 8420
PORTS_TRIED = 10


def add_view(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "view",
        help="cameras, tokens and health of a running tokenizer or of a recording, in a browser",
        description="Opens a page that shows every camera with its tokens over it, what is similar to the patch that you "
        "touch, rates, latencies, drops and the log's warnings. Without a recording: of the tokenizers in this ROS "
        "domain.",
    )
    parser.add_argument(
        "recording",
        nargs="?",
        type=Path,
        metavar="RECORDING",
        help="a bag, a video, a folder of images, or what `vla-perception tokenize` wrote",
    )
    parser.add_argument("--model", help="encodes a recording that holds no tokens: whatever `tokenize` takes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, help=f"default: {DEFAULT_PORT}, or the next that is free")
    parser.add_argument("--hz", type=_hz, default=5.0, help="frames per second of a page at most (default: 5)")
    parser.add_argument(
        "--passive", action="store_true", help="receive tokens only while another node subscribes to them"
    )
    parser.add_argument(
        "--allow-control", action="store_true", help="let pages activate, deactivate and ask for encodings"
    )
    parser.add_argument(
        "--rerun",
        nargs="?",
        const="",
        metavar="FILE.rrd",
        help="send it to a Rerun viewer, or into its file, in the place of a page (pip install rerun-sdk)",
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    _add_domain(parser)
    parser.set_defaults(run=_view)


def add_top(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "top",
        help="health of the tokenizers in this ROS domain, as text",
        description="Rates, latencies, drops and warnings, once a second. Reads /diagnostics and the log and subscribes to "
        "no tokens, so that nothing is encoded for it.",
    )
    parser.add_argument("--once", action="store_true", help="print it once and end; 1 if no tokenizer is found")
    parser.add_argument("--json", action="store_true", help="as JSON; without --once an object a second, one a line")
    parser.add_argument(
        "--wait", type=float, default=5.0, metavar="SEC", help="--once: wait for diagnostics at most (default: 5)"
    )
    _add_domain(parser)
    parser.set_defaults(run=_top)


def _add_domain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--domain", type=int, metavar="N", help="ROS_DOMAIN_ID; default: the environment's, or 0")


def _hz(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.1 to 60")
    return value


def _view(options: argparse.Namespace) -> int:
    if options.rerun is not None:
        return _rerun(options)
    try:
        from vla_perception.view.server import PageServer
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}; `pip install '.[view]'` in this package's sources brings what the page needs"
        ) from error
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(_feed(options))
        server = _server(PageServer, feed, options)
        print(f"{feed.title}: {server.address}  (Ctrl-C ends it)", flush=True)
        if not options.no_browser and _has_screen():
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        server.run()
    return 0


def _rerun(options: argparse.Namespace) -> int:
    from vla_perception.view.rerun_sink import RerunSink

    sink = RerunSink(Path(options.rerun) if options.rerun else None)
    with _feed(options) as feed:
        print(f"{feed.title}: sent to Rerun  (Ctrl-C ends it)", flush=True)
        # A recording is sent once; a running system, until the user ends it.
        longest = max((len(feed.times(str(one["topic"]))) for one in feed.tokenizers()), default=0)
        with contextlib.suppress(KeyboardInterrupt):
            sink.run(feed, options.hz, rounds=range(longest) if feed.is_recording else None)
    return 0


def _feed(options: argparse.Namespace):
    if options.recording is not None:
        from vla_perception.view.recording import open_recording

        return open_recording(options.recording, options.model)
    if options.model is not None:
        raise ValueError("--model goes with a recording; a running tokenizer has its own")
    return _live(options.domain, passive=options.passive)


def _live(domain: int | None, *, passive: bool = False):
    if domain is not None and not 0 <= domain <= 232:
        raise ValueError(f"--domain must be from 0 to 232, got {domain}")
    try:
        from vla_perception.view.live import LiveFeed
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}; a running system is seen through ROS: source a ROS 2 distribution, or `pip install '.[ros]'`"
        ) from error
    return LiveFeed(domain=domain, passive=passive)


def _server(kind, feed, options: argparse.Namespace):
    tried = [options.port] if options.port is not None else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED)
    for port in tried:
        try:
            return kind(feed, host=options.host, port=port, allow_control=options.allow_control, hz=options.hz)
        except OSError as error:
            failure = error
    raise ValueError(f"cannot listen at {options.host} port {tried[0]}: {failure}; choose another --port, 0 for any")


def _has_screen() -> bool:
    """Whether a browser would be seen: not in a shell over ssh without a display."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _top(options: argparse.Namespace) -> int:
    from vla_perception.view.top import run

    with _live(options.domain) as feed:
        return run(feed, once=options.once, as_json=options.json, wait_sec=options.wait)
