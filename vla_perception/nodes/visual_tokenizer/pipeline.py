"""Frames → published tokens, in threads. What it knows of ROS is handed in; lifecycle, topics and parameters are not here.

frame → set of frames (synchronizer.py) → decode, preprocess (worker) → encode (encoder) → message (publisher). Between
two steps there is one place, and what is newer takes it; nothing queues up, and every frame is accounted for. On a GPU
each thread has a CUDA stream, so that the next set is decoded and copied there, and the last one's tokens are copied
back, while one is encoded. On a CPU the worker encodes, too: what it decoded meanwhile would take the cores from
encoding, and would be old by the time it is done.
"""

from __future__ import annotations

import math
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vla_perception.synchronizer import Frame, FrameSet, SetSynchronizer
from vla_perception.tokens import View, VisualTokens
from vla_perception.tokens.encode_service import FINAL, published
from vla_perception.tokens.torch_tensors import all_finite, queue_to_host

if TYPE_CHECKING:
    import torch

    from vla_perception.tokenizer import VisualTokenizer

#: What is timed per set. overhead: from the callback of its last frame until it is published, less what the tokenizer
#: takes, preprocess and encode.
STAGES = ("decode", "preprocess", "encode", "publish", "overhead")
#: What may become of a set instead of a message.
FAILURES = ("encode_errors", "non_finite", "publish_errors")
#: Seconds after which a set is not encoded on request any more: its cameras have stopped, and it would pass for new.
STALE_SEC = 5.0
#: What an error of CUDA says that does not end the device's use (`_device_is_lost`).
_PASSES = re.compile("out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|captur")
#: Seconds that `stop` waits for a message that is being published, at most.
_GRACE_SEC = 2.0


class Request:
    """One set that somebody asked for, and waits for."""

    def __init__(self) -> None:
        self.made = time.perf_counter()
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


@dataclass(eq=False)
class _Job:
    """A set on its way through the threads. Times are seconds of the performance counter."""

    frames: FrameSet
    request: Request | None
    run: int
    arrived: float  # when the set's last frame did, or when it was asked for
    views: list[View] = field(default_factory=list)
    pixel_values: list[torch.Tensor] = field(default_factory=list)
    tokens: torch.Tensor | None = None
    features: torch.Tensor | None = None
    tokenizing: float = 0.0  # what preprocess and encode took


class Pipeline:
    """What a configured node does with frames. Stopped until `start`; `close` ends its threads.

    Args:
        settings: read at every set, so that they may change: ``trigger``, ``max_rate_hz``, ``token_dtype``,
            ``publish_features``, and the synchroniser's; tell it by `settings_changed`.
        decode: an image message → uint8 RGB [height, width, 3]; ValueError if it is no readable image.
        publish: sends a set of tokens.
        wanted: whether anybody would receive it.
        complain: logs trouble that may come with every set: what it is about, and a sentence.
        fail: told when this pipeline cannot go on, with the reason.
        sequence: the number of the first set that is published.
    """

    #: Devices that compute while the processor's cores do something else.
    OVERLAPPING = ("cuda",)

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        synchronizer: SetSynchronizer,
        settings: Mapping[str, object],
        *,
        decode: Callable[[object], np.ndarray],
        publish: Callable[[VisualTokens], None],
        wanted: Callable[[], bool],
        complain: Callable[[str, str], None],
        fail: Callable[[str], None],
        sequence: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self._decode, self._publish, self._wanted = decode, publish, wanted
        self._complain, self._fail = complain, fail

        self._changed = threading.Condition()  # guards all that follows
        self._sync = synchronizer
        self._active = False
        self._ended = False
        self._run = 0  # counts starts: what was begun in an earlier run is not published
        self._fresh = False  # a set has come that was not looked at yet
        self._set_arrived = 0.0  # when its last frame did, seconds of the performance counter
        self._arrivals: dict[str, float] = {}  # when each camera's last frame did
        self._taken = -math.inf  # when a set was taken last, seconds of the performance counter
        self._request: Request | None = None
        self._publishing = False
        self.sequence = sequence
        self._failures = dict.fromkeys(FAILURES, 0)
        self._timings: dict[str, deque[float]] = {stage: deque(maxlen=500) for stage in STAGES}

        self._decoders = ThreadPoolExecutor(max(1, len(synchronizer.cameras) - 1), thread_name_prefix="decoder")
        loops = {"worker": self._work, "encoder": self._encode_loop, "publisher": self._publish_loop}
        if tokenizer.device.type not in self.OVERLAPPING:
            del loops["encoder"]
        # What waits for the thread of that name.
        self._places: dict[str, _Job | None] = {name: None for name in loops if name != "worker"}
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True) for name, loop in loops.items()
        ]
        for thread in self._threads:
            thread.start()

    # For the node

    def start(self) -> None:
        """From here on frames are taken."""
        with self._changed:
            self._active = True
            self._run += 1
            self._fresh = False
            self._taken = -math.inf
            self._arrivals.clear()

    def stop(self) -> None:
        """Frames are not taken any more; what is under way is given up. Nothing is published after it has returned."""
        with self._changed:
            self._active = False
            self._sync.clear()
            self._answer_waiting("the node has been deactivated")
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._publishing, _GRACE_SEC)

    def close(self, timeout_sec: float | None = None) -> None:
        """Ends the threads, waiting for what cannot be interrupted: so long in all, or for ever."""
        end = None if timeout_sec is None else time.monotonic() + timeout_sec
        with self._changed:
            self._active = False
            self._ended = True
            self._answer_waiting("the node is ending")
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        self._decoders.shutdown(wait=False)

    def add(self, camera: str, stamp_ns: int, image: object) -> bool:
        """A frame has arrived; False while stopped."""
        now = time.perf_counter()
        with self._changed:
            if not self._active:
                return False
            self._arrivals[camera] = now
            if self._sync.add(camera, stamp_ns, image):
                self._fresh = True
                self._set_arrived = now
                self._changed.notify_all()
        return True

    def refuse(self, camera: str, reason: str, subject: str) -> bool:
        """A frame has arrived that nothing can be made of, for a `reason` about `subject`; False while stopped."""
        with self._changed:
            if not self._active:
                return False
            self._sync.refuse(camera)
        self._complain_of_frame(subject, camera, reason)
        return True

    def request(self) -> Request:
        """Asks for the latest set; answered at once where that cannot be."""
        request = Request()
        with self._changed:
            age = request.made - self._set_arrived
            if not self._active:
                request.answer(False, "the node is not active")
            elif self._settings["trigger"] != "on_request":
                request.answer(False, f"{FINAL}the parameter trigger is continuous, every latest set is encoded anyway")
            elif not self._wanted():
                request.answer(False, "nobody subscribes to the tokens")
            elif not self._sync.waiting:
                request.answer(False, f"no new set of frames since the last request ({self._last_frames()})")
            elif age > STALE_SEC:
                request.answer(False, f"the last set of frames came {age:.1f} s ago ({self._last_frames()})")
            else:
                self._answer_waiting("another request came")
                self._request = request
                self._changed.notify_all()
        return request

    def settings_changed(self) -> None:
        """Takes what is in `settings` now."""
        with self._changed:
            self._sync.slop_sec = self._settings["sync_slop_sec"]
            self._sync.max_age_sec = self._settings["max_age_sec"]
            self._sync.policy = self._settings["sync_policy"]
            self._changed.notify_all()

    def sets(self) -> tuple[int, dict[str, int | None]]:
        """How many sets were found, and the stamp of each camera's last frame in nanoseconds."""
        with self._changed:
            return self._sync.sets_made, {camera: self._sync.last_stamp_ns(camera) for camera in self._sync.cameras}

    def report(self) -> tuple[dict[str, dict[str, int]], dict[str, int], dict[str, np.ndarray]]:
        """Counters of each camera, of what failed, and the last seconds that each stage took."""
        with self._changed:
            counts = {camera: dict(vars(counts)) for camera, counts in self._sync.counts.items()}
            return counts, dict(self._failures), {stage: np.array(values) for stage, values in self._timings.items()}

    # Threads

    def _guard(self, loop: Callable[[], None]) -> None:
        """Runs a thread's loop; what it does on a GPU goes to a stream of its own."""
        try:
            device = self.tokenizer.device
            if device.type == "cuda":
                import torch

                torch.cuda.set_stream(torch.cuda.Stream(device))
            loop()
        except Exception:
            self._fail(f"the thread {threading.current_thread().name} has broken off:\n{traceback.format_exc()}")

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            if self._succeeds(self._prepare, job):
                if "encoder" in self._places:
                    self._hand_on(job, "encoder")
                elif self._succeeds(self._encode, job):
                    self._hand_on(job, "publisher")

    def _encode_loop(self) -> None:
        while (job := self._receive("encoder")) is not None:
            if self._succeeds(self._encode, job):
                self._hand_on(job, "publisher")

    def _publish_loop(self) -> None:
        while (job := self._receive("publisher")) is not None:
            self._send(job)

    def _next_job(self) -> _Job | None:
        """Waits for a set whose turn it is; None when the thread is to end."""
        with self._changed:
            while not self._ended:
                wait = None
                on_request = self._settings["trigger"] == "on_request"
                if not on_request:
                    self._answer_waiting(f"{FINAL}the parameter trigger has been set to continuous")
                if not self._active:
                    pass
                elif on_request and self._request is not None:
                    request, self._request = self._request, None
                    if (frames := self._sync.take()) is not None:
                        return _Job(frames, request, self._run, request.made)
                    request.answer(False, "the set of frames has gone: time was set back, or sync_policy was changed")
                elif not on_request and self._fresh:
                    rate, now = self._settings["max_rate_hz"], time.perf_counter()
                    # Of a rate of almost nothing, the longest time that `wait` takes.
                    wait = self._taken + min(1 / rate, threading.TIMEOUT_MAX) - now if rate > 0 else 0.0
                    if wait <= 0:
                        wait = None
                        self._fresh = False  # also where nobody wants it: by the time somebody subscribes it is old
                        if self._wanted() and (frames := self._sync.take()) is not None:
                            self._taken = now
                            return _Job(frames, None, self._run, self._set_arrived)
                self._changed.wait(wait)
        return None

    def _hand_on(self, job: _Job, thread: str) -> None:
        """Puts a job into the thread's place; one that still waits there is given up."""
        with self._changed:
            if self._ended:
                self._give_up(job, "the node is ending")
                return
            waiting, self._places[thread] = self._places[thread], job
            if waiting is not None:
                self._give_up(waiting, "a newer set was there first")
            self._changed.notify_all()

    def _receive(self, thread: str) -> _Job | None:
        """Waits for what is put into the thread's place; None when the thread is to end."""
        with self._changed:
            while True:
                job, self._places[thread] = self._places[thread], None
                if job is not None:
                    if self._active and not self._ended and job.run == self._run:
                        self._publishing = self._publishing or thread == "publisher"
                        return job
                    self._give_up(job, "the node has been deactivated")
                elif self._ended:
                    return None
                else:
                    self._changed.wait()

    def _give_up(self, job: _Job, reason: str) -> None:
        self._sync.replaced(job.frames)
        if job.request is not None:
            job.request.answer(False, reason)

    def _answer_waiting(self, reason: str) -> None:
        """Refuses the request that no set was taken for yet, if there is one."""
        request, self._request = self._request, None
        if request is not None:
            request.answer(False, reason)

    def _last_frames(self) -> str:
        now = time.perf_counter()
        return ", ".join(
            f"{camera}: {f'{now - self._arrivals[camera]:.2f} s ago' if camera in self._arrivals else 'no frame yet'}"
            for camera in self._sync.cameras
        )

    # Steps

    def _succeeds(self, step: Callable[[_Job], bool], job: _Job) -> bool:
        """Whether `step` did what it is to do with a job; if not, its frames are accounted for."""
        try:
            return step(job)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._drop(job, "encode_errors", text)
            if _device_is_lost(error):
                self._fail(f"the device failed, and only a new process can use it again: {text}")
            else:
                self._complain("encode", f"a set could not be encoded: {text}")
            return False

    def _drop(self, job: _Job, failure: str, text: str) -> None:
        with self._changed:
            self._failures[failure] += 1
            self._sync.encoded(job.frames)
        if job.request is not None:
            job.request.answer(False, text)

    def _prepare(self, job: _Job) -> bool:
        """Images of a set → what the encoders take, on their device; False if an image cannot be read."""
        clock = time.perf_counter
        begun = clock()
        images, bad = [], []
        for frame, decoded in zip(job.frames, self._decode_all(job.frames)):
            try:
                image = decoded()
                job.views.append(self._view(frame, image))
                images.append(image)
            except Exception as error:
                bad.append(frame)
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                self._complain_of_frame("decode", frame.camera, reason)
        if bad:
            with self._changed:
                self._sync.undecodable(job.frames, bad)
                self._taken = -math.inf  # the next set need not wait for its turn
                self._changed.notify_all()
            if job.request is not None:
                job.request.answer(False, f"no readable image from {', '.join(frame.camera for frame in bad)}")
            return False
        decoding_ended = clock()
        device = self.tokenizer.device
        job.pixel_values = self.tokenizer.preprocess(images, [frame.camera for frame in job.frames])
        if device.type == "cuda":
            import torch

            torch.cuda.current_stream(device).synchronize()  # the encoder's stream does not wait for this one
        preprocessed = clock()
        job.tokenizing = preprocessed - decoding_ended
        with self._changed:
            self._timings["decode"].append(decoding_ended - begun)
            self._timings["preprocess"].append(preprocessed - decoding_ended)
        return True

    def _complain_of_frame(self, subject: str, camera: str, reason: str) -> None:
        self._complain(f"{subject} {camera}", f"camera {camera}: a frame is skipped: {reason}")

    def _decode_all(self, frames: FrameSet) -> list[Callable[[], np.ndarray]]:
        """Per frame what gives its image, or raises; several JPEG or PNG images are decoded side by side."""
        calls = [partial(self._decode, frame.image) for frame in frames]
        # Those of CompressedImage have a format. Other images are views of the message, which take no time.
        compressed = [index for index, frame in enumerate(frames) if hasattr(frame.image, "format")]
        # This thread decodes one of them: it would only wait meanwhile.
        for index in compressed[1:]:
            calls[index] = self._decoders.submit(calls[index]).result
        return calls

    def _view(self, frame: Frame, image: np.ndarray) -> View:
        """ValueError where an image of this size cannot be transformed."""
        height, width = image.shape[:2]
        return View(
            camera=frame.camera,
            frame_id=frame.image.header.frame_id,
            stamp_ns=frame.stamp_ns,
            height=height,
            width=width,
            affine=self.tokenizer.affine(height, width, frame.camera),
            roi=self.tokenizer.roi(height, width, frame.camera),
        )

    def _encode(self, job: _Job) -> bool:
        """→ tokens on the host; False if they are not finite."""
        import torch

        begun = time.perf_counter()
        output = self.tokenizer.encode(job.pixel_values, features=bool(self._settings["publish_features"]))
        token_dtype = self._settings["token_dtype"]
        dtype = getattr(torch, token_dtype)
        parts = [part.to(dtype) for part in (output.tokens, output.features) if part is not None]
        # All is queued before the one wait for the device; on a GPU the copies go to pinned memory.
        finite, *on_host = [queue_to_host(part) for part in (all_finite(parts), *parts)]
        if parts[0].is_cuda:
            torch.cuda.current_stream(parts[0].device).synchronize()
        job.tokens, job.features = on_host[0], on_host[1] if len(on_host) > 1 else None
        job.pixel_values = []  # not before the wait: what they hold may be given to the next set
        if not finite:
            text = (
                f"tokens that are not finite were not published; compute_dtype {self.tokenizer.compute_dtype} or "
                f"token_dtype {token_dtype} may be too narrow for this model: try bfloat16 or float32"
            )
            self._drop(job, "non_finite", text)
            self._complain("non-finite", text)
            return False
        seconds = time.perf_counter() - begun
        job.tokenizing += seconds
        with self._changed:
            self._timings["encode"].append(seconds)
        return True

    def _send(self, job: _Job) -> None:
        begun = time.perf_counter()
        try:
            self._publish(
                VisualTokens.from_torch(
                    job.tokens,
                    sequence=self.sequence,  # given here: a gap in the numbers is then a lost message
                    views=job.views,
                    features=job.features,
                    **self.tokenizer.metadata(),
                )
            )
        except Exception as error:
            text = f"tokens could not be published: {type(error).__name__}: {error}"
            self._drop(job, "publish_errors", text)
            if not self._ended:
                self._complain("publish", text)
        else:
            ended = time.perf_counter()
            with self._changed:
                text = published(self.sequence, job.views[0].stamp_ns)
                self.sequence += 1
                self._timings["publish"].append(ended - begun)
                self._timings["overhead"].append(ended - job.arrived - job.tokenizing)
                self._sync.encoded(job.frames)
            if job.request is not None:
                job.request.answer(True, text)
        with self._changed:
            self._publishing = False
            self._changed.notify_all()


def _device_is_lost(error: Exception) -> bool:
    """Whether an error stays with the process: most errors of CUDA do.

    Not those of memory that is not there just now, under whatever name, and of a graph's capture that something broke
    off: the next frame may do better, and is counted if not.
    """
    text = str(error).partition("\n")[0]  # advice follows
    # Before torch 2.8 an error of CUDA had no class of its own.
    of_cuda = type(error).__name__ == "AcceleratorError" or "CUDA error" in text
    return of_cuda and not _PASSES.search(text)
