"""Runs one run in child processes that are killed at random points, each going on where the last one was killed.

python test/support/kill_run.py OUT SEED SOURCE…      prints how many were killed
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "test/support")]

from pixel_tokenizer import PixelTokenizer  # noqa: E402

from vla_perception.offline import run  # noqa: E402
from vla_perception.offline.recordings import Selection, open_recordings  # noqa: E402

#: Blocks that a child encodes at least before it is killed, so that it all comes to an end.
LEAST = 2


def whole_run(out: Path, sources: list[str], on_encode=lambda: None) -> None:
    settings = run.RunSettings(out, Selection(), batch=2)
    tokenizer = PixelTokenizer(on_encode)
    recordings = open_recordings(sources, settings.selection)
    index = run.begin(settings, tokenizer, recordings)
    failed, _ = run.encode_recordings(recordings, tokenizer, settings)
    run.end(settings, index, recordings, failed)


def main() -> None:
    out, seed, *sources = sys.argv[1:]
    chance, killed = random.Random(int(seed)), 0
    open_recordings(sources, Selection())  # what is slow the first time is so once, and not in every child
    while True:
        encoded, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(encoded)
            whole_run(Path(out), sources, lambda tell=tell: (os.write(tell, b"."), time.sleep(0.005)))
            os._exit(0)
        os.close(tell)
        for _ in range(LEAST + chance.randrange(4)):
            os.read(encoded, 1)  # empty where the child has ended
        time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(encoded)
        if os.WIFEXITED(status):
            print(killed, os.WEXITSTATUS(status))
            return
        killed += 1


if __name__ == "__main__":
    main()
