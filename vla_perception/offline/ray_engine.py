"""The same run on a Ray cluster: actors with a model each, and the recordings shared out among them.

Scheduling, restarts and retries are Ray's (https://docs.ray.io). An actor whose process dies is started again, and its
recording goes on where it was, as after any interruption (token_file_writer.py); a recording is locked while it is
written, so none is written twice. All machines see the sources and the run's folder under the same paths.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_perception.offline import run, run_index
from vla_perception.offline.recordings import Recording, open_recordings

if TYPE_CHECKING:
    from ray.util import ActorPool

    from vla_perception.tokenizer import VisualTokenizer

#: How often an actor that died is started again, and how often its recording is tried again.
RESTARTS, RETRIES = 10, 3
#: Bytes of shared memory that a local Ray is given: nothing but names and counts goes through it.
_OBJECT_STORE = 80 << 20


class _Worker:
    """Lives in a separate process, with one model."""

    def __init__(
        self, load: Callable[[], VisualTokenizer], sources: Sequence[str | Path], settings: run.RunSettings
    ) -> None:
        self._recordings = {each.name: each for each in open_recordings(sources, settings.selection, [])}
        self._tokenizer, self._settings = load(), settings
        self._digests = run_index.Digests()  # a dataset's episodes share their files

    def expected_bytes(self) -> int:
        """About how many bytes the tokens of all recordings take: that depends on the model, which workers alone have."""
        return run.expected_bytes(list(self._recordings.values()), self._tokenizer, self._settings)

    def begin(self) -> dict:
        """The index of the run; written by the first worker that is asked."""
        return run.begin(self._settings, self._tokenizer, list(self._recordings.values()))

    def built(self) -> dict:
        """What a run by this worker alone would say of itself."""
        return run.new_index(self._settings, self._tokenizer)

    def encode(self, name: str) -> tuple[list[dict[str, str]], int, int, int, list[str]]:
        """One recording: what was left out; frame sets that were encoded, done, and found done; what was reported."""
        reported: list[str] = []
        done, found = [0], [0]
        failed, statistics = run.encode_recordings(
            [self._recordings[name]],
            self._tokenizer,
            self._settings,
            report=reported.append,
            advance=done.append,
            found=found.append,
            digests=self._digests,
        )
        return failed, statistics.frame_sets, sum(done), sum(found), reported[:100]


def tokenize(
    load: Callable[[], VisualTokenizer],
    sources: Sequence[str | Path],
    recordings: Sequence[Recording],
    settings: run.RunSettings,
    *,
    workers: int = 0,
    cpus: int = 1,
    damaged: Sequence[dict[str, str]] = (),
    announce: Callable[[int], None] = lambda _: None,
    report: Callable[[str], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
    found: Callable[[int], None] = lambda _: None,
) -> tuple[dict, run.Statistics]:
    """Runs it all, and writes the index.

    Args:
        load: makes a worker's tokenizer, in the worker.
        sources: as `recordings` were opened from them: each worker opens them for itself.
        workers: how many at most; 0: one per GPU of the cluster, or as many as its CPUs allow.
        damaged: sources that were left out, for the index.
        cpus: cores of each, which is also its number of threads.
        announce: called once, before anything is written, with about how many bytes the tokens take.

    Returns:
        The index, and what it took: `encoding_sec` is without the start of the workers.

    Raises:
        run_index.RunIndexError: workers that would not compute the same bits, or a folder of other settings.
        RuntimeError: a recording whose worker died again and again.
    """
    ray = _started(workers, cpus)
    from ray.util import ActorPool

    began = time.perf_counter()
    actors = _actors(ray, load, sources, settings, min(workers or len(recordings), len(recordings)), cpus)
    statistics, failed = run.Statistics(), list(damaged)
    try:
        announce(ray.get(actors[0].expected_bytes.remote()))
        index = _begun(ray, actors)
        begun = time.perf_counter()
        for left_out, frame_sets, done, earlier, reported in _encoded(ActorPool(actors), recordings):
            failed += left_out
            statistics.frame_sets += frame_sets
            for text in reported:
                report(text)
            found(earlier)
            advance(done)
        statistics.encoding_sec = time.perf_counter() - begun
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error if isinstance(error.cause, Exception) else error
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(f"a worker died again and again: {error}; the same command goes on from here") from error
    finally:
        for actor in actors:
            ray.kill(actor)
    statistics.seconds = time.perf_counter() - began
    failed.sort(key=lambda entry: entry["name"])
    return run.end(settings, index, recordings, failed), statistics


def _encoded(pool: ActorPool, recordings: Sequence[Recording]) -> Iterator[tuple]:
    """What `_Worker.encode` returns of each recording, as they are done."""
    return pool.map_unordered(
        lambda actor, name: actor.encode.remote(name), [recording.name for recording in recordings]
    )


def _actors(ray: Any, load: Callable, sources: Sequence, settings: run.RunSettings, most: int, cpus: int) -> list:
    """At most so many workers: one per GPU of the cluster, or where it has none, as many as its CPUs allow."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = min(most, gpus or max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus))
    worker = ray.remote(_Worker).options(
        num_cpus=cpus, num_gpus=1 if gpus else 0, max_restarts=RESTARTS, max_task_retries=RETRIES
    )
    # Absolute: a worker has another working directory.
    paths = [str(Path(source).expanduser().resolve()) for source in sources]
    settings = dataclasses.replace(settings, out=settings.out.expanduser().resolve())
    return [worker.remote(load, paths, settings) for _ in range(count)]


def _begun(ray: Any, actors: Sequence[Any]) -> dict:
    """The run's index, in its folder; RunIndexError where the workers do not agree with it."""
    index = ray.get(actors[0].begin.remote())
    for built in ray.get([actor.built.remote() for actor in actors]):
        changed = run_index.differences(index, built)
        if changed:
            raise run_index.RunIndexError(f"the workers would not compute the same bits: {'; '.join(changed[:5])}")
    return index


def _started(workers: int, cpus: int) -> Any:
    """Ray, connected to the cluster that RAY_ADDRESS names, or to one on this machine alone."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"{error}: --engine ray needs Ray: pip install '.[ray]'") from error
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(
                num_cpus=workers * cpus or None,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                **quiet,
            )
    return ray
