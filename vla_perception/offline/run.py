"""Recordings → token files: reading and decoding, encoding, and writing side by side.

A thread reads frame sets and hands their decoding to others; the caller's thread encodes, one block of `batch` frame sets
after the other; a thread writes. Between them are queues of a few blocks, so that memory does not grow with a recording.
Which frame sets are in a block follows from their number alone: with or without an interruption the encoders get the
same batches, and give the same bits.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_perception.offline import run_index
from vla_perception.offline.recordings import FrameSet, Recording, Selection, SourceError, expected_sets, selected
from vla_perception.offline.token_file_writer import Geometry, Layout, TokenFileWriter
from vla_perception.tokens.torch_tensors import queue_to_host, to_words

if TYPE_CHECKING:
    import torch

    from vla_perception.tokenizer import VisualTokenizer

#: Blocks that wait between two threads, at most.
_QUEUED = 3
_POLL_SEC = 0.2


@dataclass(frozen=True)
class RunSettings:
    """How recordings become token files.

    Attributes:
        out: folder of the run.
        batch: frame sets that go through the encoders together; 1, as in the node, gives the node's bits.
        token_dtype: as the node's parameter.
        output: ``safetensors``, or ``mcap``: bags of token messages in the place of token files.
        copied: topics of a bag that go into its bag of token messages, too; None: all but its cameras'.
        on_error: ``skip`` reports and counts what is damaged and goes on; ``stop`` ends the run there.
    """

    out: Path
    selection: Selection = Selection()
    batch: int = 1
    token_dtype: str = "bfloat16"
    on_error: str = "skip"
    output: str = "safetensors"
    copied: tuple[str, ...] | None = ()

    def as_index(self, tokenizer: VisualTokenizer) -> dict[str, object]:
        """What decides on the tokens, for the index: two parts of one run must agree in it."""
        return {
            "device": tokenizer.device.type,
            "compute_dtype": tokenizer.compute_dtype,
            "runtime": tokenizer.runtime,
            "kernels": tokenizer.kernels,
            "condition": tokenizer.condition,
            "token_dtype": self.token_dtype,
            "batch": self.batch,
            "on_error": self.on_error,
            "format": self.output,
            "copied_topics": None if self.copied is None else list(self.copied),
            **self.selection.settings(),
        }


@dataclass
class Statistics:
    """What a run took: seconds in all, and of them in which the encoders computed; frame sets that were encoded."""

    seconds: float = 0.0
    encoding_sec: float = 0.0
    frame_sets: int = 0


@dataclass
class _Decoded:
    """A frame set on its way. Its images, or the reason why it is skipped."""

    frames: FrameSet
    images: Sequence[np.ndarray] = ()
    geometry: list[Geometry] = field(default_factory=list)
    reason: str = ""


@dataclass
class _Block:
    """Frame sets that are encoded together."""

    writer: TokenFileWriter
    sets: list[Future[_Decoded]]


@dataclass
class _Encoded:
    """A block's tokens on the host, once `ready` has been waited for."""

    writer: TokenFileWriter
    sets: list[_Decoded]
    words: torch.Tensor | None = None
    finite: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None


@dataclass
class _End:
    """A recording is over; `breaks_off`: why before its end."""

    writer: TokenFileWriter
    recording: Recording
    digests: Future[dict]
    breaks_off: str = ""


class Encoder:
    """Frame sets → tokens, as the node computes them."""

    def __init__(self, tokenizer: VisualTokenizer, token_dtype: str) -> None:
        import torch

        self.tokenizer = tokenizer
        self._dtype = getattr(torch, token_dtype)

    def geometry(self, camera: str, image: np.ndarray) -> Geometry:
        """ValueError where an image of this size cannot be prepared."""
        height, width = image.shape[:2]
        return Geometry(
            height,
            width,
            self.tokenizer.affine(height, width, camera),
            self.tokenizer.roi(height, width, camera),
        )

    def __call__(
        self, sets: Sequence[Sequence[np.ndarray]], cameras: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[sets, views, tokens, channels] on the device, and whether each set's are finite."""
        images = [image for views in sets for image in views]
        pixel_values = self.tokenizer.preprocess(images, [*cameras] * len(sets))
        tokens = self.tokenizer.encode(pixel_values).tokens.to(self._dtype)
        tokens = tokens.unflatten(0, (len(sets), len(cameras)))
        return tokens, tokens.isfinite().flatten(1).all(1)


def layout_of(recording: Recording, tokenizer: VisualTokenizer, settings: RunSettings) -> Layout:
    condition = {} if tokenizer.condition is None else {"condition": tokenizer.condition}
    return Layout(
        tokenizer.metadata() | condition,
        recording.cameras,
        (len(recording.cameras), tokenizer.tokens_per_view, tokenizer.channels),
        settings.token_dtype,
        {"name": recording.name, "kind": recording.kind, "source": recording.source},
        settings.batch,
    )


def expected_bytes(recordings: Sequence[Recording], tokenizer: VisualTokenizer, settings: RunSettings) -> int:
    """About how many bytes the recordings' tokens take, at most at a time."""
    sizes = [
        expected_sets(recording, settings.selection) * layout_of(recording, tokenizer, settings).frame_bytes
        for recording in recordings
    ]
    # A bag is written from its token file, which is deleted after that.
    return sum(sizes) + (max(sizes, default=0) if settings.output == "mcap" else 0)


class _Run:
    """The threads of one run, and what they share."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        settings: RunSettings,
        report: Callable[[str], None],
        advance: Callable[[int], None],
        found: Callable[[int], None],
        digests: run_index.Digests,
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.encoder = Encoder(tokenizer, settings.token_dtype)
        self.failed: list[dict[str, str]] = []
        self.statistics = Statistics()
        self._report, self._advance, self._found = report, advance, found
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._blocks: queue.Queue[_Block | _End | None] = queue.Queue(_QUEUED)
        self._encoded: queue.Queue[_Encoded | _End | None] = queue.Queue(_QUEUED)
        cores = len(os.sched_getaffinity(0))
        self._decoders = ThreadPoolExecutor(max(1, min(8, cores // 2)), thread_name_prefix="decoder")
        self._digests = digests
        self._writers: list[TokenFileWriter] = []

    def __call__(self, recordings: Sequence[Recording]) -> None:
        began = time.perf_counter()
        threads = [
            threading.Thread(target=self._guard, args=(self._read, recordings), name="reader", daemon=True),
            threading.Thread(target=self._guard, args=(self._write,), name="writer", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            self._encode()
            self._put(self._encoded, None)
            threads[1].join()
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()
            self._decoders.shutdown(wait=False, cancel_futures=True)
            for writer in self._writers:
                writer.close()
            self.statistics.seconds = time.perf_counter() - began
        if self._error is not None:
            raise self._error

    # Threads

    def _guard(self, work: Callable, *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._error = self._error or error
            self._stopped.set()

    def _put(self, place: queue.Queue, item: object) -> bool:
        """False if the run has ended meanwhile."""
        while not self._stopped.is_set():
            try:
                place.put(item, timeout=_POLL_SEC)
                return True
            except queue.Full:
                continue
        return False

    def _items(self, place: queue.Queue) -> Iterator:
        while not self._stopped.is_set():
            try:
                item = place.get(timeout=_POLL_SEC)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item

    def _read(self, recordings: Sequence[Recording]) -> None:
        for recording in recordings:
            try:
                self._read_one(recording)
            except (ValueError, OSError) as error:
                self._refuse(recording, error)
            if self._stopped.is_set():
                return
        self._put(self._blocks, None)

    def _read_one(self, recording: Recording) -> None:
        path = self.settings.out / f"{recording.name}.safetensors"
        bag = run_index.bag_entry(self.settings.out, recording.name) if self.settings.output == "mcap" else None
        if bag is not None:
            from vla_perception.offline import bag_output

            bag_output.tidy(path)
            self._report(f"{recording.name}: is there already")
            self._found(int(bag["frames"]))
            return
        writer = TokenFileWriter(path, layout_of(recording, self.tokenizer, self.settings), recording.files)
        if writer.is_finished:
            self._convert(writer, recording)
            self._report(f"{recording.name}: is there already")
            self._found(writer.frames)
            return
        self._writers.append(writer)
        if writer.done:
            self._report(f"{recording.name}: goes on behind the first {writer.done} frame sets")
            self._found(writer.done)
        digests = self._digests.of(recording.files)
        block: list[Future[_Decoded]] = []
        breaks_off = ""
        try:
            for frames in islice(selected(recording, self.settings.selection), writer.done, None):
                block.append(self._decoders.submit(self._decode, frames, recording.cameras))
                if len(block) == self.settings.batch:
                    if not self._put(self._blocks, _Block(writer, block)):
                        return
                    block = []
        except (ValueError, OSError) as error:
            if self.settings.on_error == "stop":
                raise
            breaks_off = str(error)
        if block:
            self._put(self._blocks, _Block(writer, block))
        self._put(self._blocks, _End(writer, recording, digests, breaks_off))

    def _decode(self, frames: FrameSet, cameras: Sequence[str]) -> _Decoded:
        try:
            images = frames.images()
            geometry = [self.encoder.geometry(camera, image) for camera, image in zip(cameras, images)]
        except (ValueError, OSError) as error:
            return _Decoded(frames, reason=f"frame set {frames.ordinal}: {error}")
        return _Decoded(frames, images, geometry)

    def _encode(self) -> None:
        for item in self._items(self._blocks):
            if isinstance(item, _Block):
                sets = [future.result() for future in item.sets]
                began = time.perf_counter()
                item = self._encoded_block(item.writer, sets)
                self.statistics.encoding_sec += time.perf_counter() - began
            self._put(self._encoded, item)

    def _encoded_block(self, writer: TokenFileWriter, sets: list[_Decoded]) -> _Encoded:
        import torch

        whole = [decoded for decoded in sets if not decoded.reason]
        if not whole:
            return _Encoded(writer, sets)
        tokens, finite = self.encoder([decoded.images for decoded in whole], writer.layout.cameras)
        self.statistics.frame_sets += len(whole)
        encoded = _Encoded(writer, sets, queue_to_host(tokens), queue_to_host(finite))
        if tokens.is_cuda:
            encoded.ready = torch.cuda.Event()
            encoded.ready.record()
        for decoded in whole:
            decoded.images = ()
        return encoded

    def _write(self) -> None:
        for item in self._items(self._encoded):
            if isinstance(item, _End):
                self._finish(item)
            else:
                self._write_block(item)

    def _write_block(self, encoded: _Encoded) -> None:
        if encoded.ready is not None:
            encoded.ready.synchronize()
        words = None if encoded.words is None else to_words(encoded.words)
        place = 0
        for decoded in encoded.sets:
            reason = decoded.reason
            if not reason:
                assert words is not None and encoded.finite is not None
                index, place = place, place + 1
                if encoded.finite[index]:
                    try:
                        encoded.writer.add(decoded.frames, decoded.geometry, words[index])
                    except ValueError as error:
                        reason = f"frame set {decoded.frames.ordinal}: {error}"
                else:
                    reason = f"frame set {decoded.frames.ordinal}: tokens that are not finite; try another --dtype"
            if reason:
                if self.settings.on_error == "stop":
                    raise SourceError(f"{encoded.writer.path.stem}: {reason} (--on-error skip goes on without it)")
                encoded.writer.skip(reason)
                self._report(f"{encoded.writer.path.stem}: skipped: {reason}")
        self._advance(len(encoded.sets))

    def _finish(self, end: _End) -> None:
        problems = end.recording.problems
        if self.settings.on_error == "stop" and problems.count:
            raise SourceError(f"{end.recording.source}: {problems.shown[0]} (--on-error skip goes on without it)")
        found: dict[str, object] = {
            **end.recording.details,
            "frames_damaged": problems.count,
            "damaged_because": list(problems.shown),
            **({"breaks_off": end.breaks_off[:500]} if end.breaks_off else {}),
        }
        for text in problems.shown:
            self._report(f"{end.recording.name}: left out: {text}")
        if end.breaks_off:
            self._report(f"{end.recording.name}: breaks off: {end.breaks_off}")
        try:
            end.writer.finish(found | end.digests.result())
            self._convert(end.writer, end.recording)
        except SourceError as error:
            self._refuse(end.recording, error)
        finally:
            end.writer.close()
            self._writers.remove(end.writer)

    def _convert(self, writer: TokenFileWriter, recording: Recording) -> None:
        if self.settings.output == "mcap":
            from vla_perception.offline import bag_output

            source = Path(recording.source) if recording.kind == "bag" else None
            bag_output.convert(writer.path, source, self.settings.copied)

    def _refuse(self, recording: Recording, error: Exception) -> None:
        """A recording that gives no token file."""
        if self.settings.on_error == "stop" or isinstance(error, OSError):  # a full disk does not end with this one
            raise error
        self.failed.append({"name": recording.name, "source": recording.source, "error": str(error)[:500]})
        self._report(f"{recording.name}: left out: {error}")


def encode_recordings(
    recordings: Sequence[Recording],
    tokenizer: VisualTokenizer,
    settings: RunSettings,
    *,
    report: Callable[[str], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
    found: Callable[[int], None] = lambda _: None,
    digests: run_index.Digests | None = None,
) -> tuple[list[dict[str, str]], Statistics]:
    """Writes the token files that are not there yet; goes on with those that were begun.

    Args:
        report: called with what is skipped, a sentence each.
        advance: called with the number of frame sets just done.
        found: called with the number of frame sets of a recording that an earlier run has done.
        digests: of earlier calls, whose recordings are in part of the same files.

    Returns:
        What was left out (name, source, error), and what it took.

    Raises:
        ValueError: with `on_error` ``stop``, what was damaged.
        OSError: a source cannot be read, or the folder not be written.
    """
    with run_index.Digests() if digests is None else contextlib.nullcontext(digests) as shared:
        run = _Run(tokenizer, settings, report, advance, found, shared)
        run(recordings)
    return run.failed, run.statistics


def new_index(settings: RunSettings, tokenizer: VisualTokenizer) -> dict[str, Any]:
    """The index of a run by this process that has not written anything yet."""
    return run_index.build(tokenizer.metadata(), settings.as_index(tokenizer), run_index.environment())


def begin(settings: RunSettings, tokenizer: VisualTokenizer, recordings: Sequence[Recording]) -> dict:
    """The index of the run, in its folder: a new one, or that of the run which is continued.

    Raises:
        run_index.RunIndexError: the folder holds a run of other settings.
    """
    index = new_index(settings, tokenizer)
    settings.out.mkdir(parents=True, exist_ok=True)
    if (settings.out / run_index.NAME).exists():
        before = run_index.read(settings.out)
        if settings.on_error == "skip" and before.get("settings") == {**index["settings"], "on_error": "stop"}:
            before["settings"] = index["settings"]  # as the error advised that ended the run; no bits depend on it
        changed = run_index.differences(before, index)
        if changed:
            more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise run_index.RunIndexError(
                f"{settings.out} holds tokens that were made in another way ({'; '.join(changed[:5])}{more}): choose "
                "another --out, or delete it"
            )
        return before
    if settings.batch > 1:
        index["batch_tolerance"] = batch_tolerance(recordings, tokenizer, settings)
    run_index.write(settings.out, index)
    return index


def batch_tolerance(
    recordings: Sequence[Recording], tokenizer: VisualTokenizer, settings: RunSettings
) -> dict[str, object] | None:
    """How far tokens of a batch are from those of one frame set at a time, measured on the first batch there is."""
    encoder = Encoder(tokenizer, settings.token_dtype)
    for recording in recordings:
        try:
            sets = [frames.images() for frames in islice(selected(recording, settings.selection), settings.batch)]
            together = encoder(sets, recording.cameras)[0].float().cpu().numpy()
            alone = np.stack([encoder([views], recording.cameras)[0][0].float().cpu().numpy() for views in sets])
        except (ValueError, OSError):
            continue
        difference = np.abs(together - alone)
        return {
            "measured_on": recording.name,
            "frame_sets": len(sets),
            "equal_values": float(np.mean(difference == 0)),
            "worst_difference": float(difference.max()),
            "largest_value": float(np.abs(alone).max()),
        }
    return None


def end(
    settings: RunSettings, index: dict, recordings: Sequence[Recording], failed: Sequence[Mapping[str, str]]
) -> dict:
    """Writes the complete index; returns it."""
    index = run_index.collect(settings.out, index, [recording.name for recording in recordings], failed)
    run_index.write(settings.out, index)
    return index
