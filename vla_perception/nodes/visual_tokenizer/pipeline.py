"""Frames → published tokens, in threads. Imports no ROS; lifecycle, topics and parameters are not here.

frame → frame set (synchronizer.py) → decode, prepare (thread `worker`) → encode (`encoder`) → message (`publisher`).
Stages are connected by single-slot mailboxes; a newer item replaces a waiting one, so nothing queues up, and every frame
is accounted for. On a GPU each thread has its own CUDA stream: the next frame set is decoded and copied there, and the
last one's tokens are copied back, while one is encoded. On a CPU the worker encodes, too: decoding ahead would take the
cores from encoding, for frames that would be old by the time it is done.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_perception.nodes.visual_tokenizer.device_errors import device_is_lost
from vla_perception.nodes.visual_tokenizer.empty_views import EmptyViews
from vla_perception.nodes.visual_tokenizer.encode_request import Request
from vla_perception.synchronizer import Frame, FrameSet, SetSynchronizer
from vla_perception.tokens import View, VisualTokens
from vla_perception.tokens.encode_service import FINAL, published
from vla_perception.tokens.torch_tensors import all_finite, queue_to_host

if TYPE_CHECKING:
    import torch

    from vla_perception.nodes.visual_tokenizer.diagnostics import FailureLog
    from vla_perception.nodes.visual_tokenizer.parameters import TokenizerParameters
    from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher
    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokenizer.preprocess_gpu import UploadedImages

#: What is timed per frame set. preprocess: on a GPU the upload alone, the rest is part of encode. overhead: from the callback
#: of its last frame until it is published, less what the tokenizer takes, preprocess and encode.
STAGES = ("decode", "preprocess", "encode", "publish", "overhead")
#: What may become of a frame set instead of a message.
FAILURES = ("encode_errors", "non_finite", "publish_errors")
#: Seconds after which a frame set is no longer encoded on request: its cameras have stopped, and it would pass for new.
STALE_SEC = 5.0
#: Seconds that `stop` waits for a message that is being published, at most.
_GRACE_SEC = 2.0


@dataclass(eq=False)
class _Job:
    """A frame set on its way through the threads. Times are seconds of the performance counter."""

    frames: FrameSet
    request: Request | None
    generation: int
    arrived: float  # when its last frame did, or when it was asked for
    views: list[View] = field(default_factory=list)
    prepared: UploadedImages | list[torch.Tensor] | None = None
    tokens: torch.Tensor | None = None
    features: torch.Tensor | None = None
    condition: str | None = None
    tokenizing: float = 0.0  # what preprocess and encode took


class Pipeline:
    """What a configured node does with frames. Stopped until `start`; `close` ends its threads.

    Args:
        parameters: the node's; `apply_parameters` replaces them.
        publisher: sends the tokens, and knows whether there are subscribers.
        log: where failures go.
        decode: an image message, and the most pixels that it may have → uint8 RGB [height, width, 3]; ValueError where
            it is not a readable image. Called by several threads.
        empty_views: of missing cameras; None: none are missing.
        sequence: the number of the first message that is published.

    Attributes:
        parameters: those in force.
        sequence: the number of the next message.
    """

    #: Devices that compute while the processor's cores do something else.
    OVERLAPPING = ("cuda",)

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        synchronizer: SetSynchronizer,
        parameters: TokenizerParameters,
        publisher: TokenPublisher,
        log: FailureLog,
        *,
        decode: Callable[[Any, int], np.ndarray],
        empty_views: EmptyViews | None = None,
        sequence: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.parameters = parameters
        self._publisher, self._log, self._decode = publisher, log, decode
        self._empty_views = empty_views or EmptyViews(tokenizer, synchronizer.cameras)

        self._changed = threading.Condition()  # guards all that follows
        self._sync = synchronizer
        self._active = False
        self._ended = False
        self._generation = 0  # counts starts: what began before the last start is not published
        self._has_new_set = False  # a frame set has come that was not considered yet
        self._set_arrived = 0.0  # when its last frame did, seconds of the performance counter
        self._arrivals: dict[str, float] = {}  # when each camera's last frame did
        self._last_taken = -math.inf  # when a frame set was taken, seconds of the performance counter
        self._request: Request | None = None
        self._publishing = False
        self.sequence = sequence
        self._failures = dict.fromkeys(FAILURES, 0)
        self._timings: dict[str, deque[float]] = {stage: deque(maxlen=500) for stage in STAGES}

        self._decoders = ThreadPoolExecutor(max(1, len(synchronizer.cameras) - 1), thread_name_prefix="decoder")
        loops = {"worker": self._work, "encoder": self._encode_loop, "publisher": self._publish_loop}
        if tokenizer.device.type not in self.OVERLAPPING:
            del loops["encoder"]
        # Thread's name → the job that waits for it.
        self._mailboxes: dict[str, _Job | None] = {name: None for name in loops if name != "worker"}
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
            self._generation += 1
            self._has_new_set = False
            self._last_taken = -math.inf
            self._arrivals.clear()

    def stop(self) -> None:
        """Frames are not taken any more; what is under way is given up. Nothing is published after it has returned."""
        with self._changed:
            self._active = False
            self._sync.clear()
            self._reject_request("the node has been deactivated")
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._publishing, _GRACE_SEC)

    def close(self, timeout_sec: float | None = None) -> None:
        """Ends the threads, waiting for what cannot be interrupted: so long in all, or for ever."""
        end = None if timeout_sec is None else time.monotonic() + timeout_sec
        with self._changed:
            self._active = False
            self._ended = True
            self._reject_request("the node is ending")
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
                self._has_new_set = True
                self._set_arrived = now
                self._changed.notify_all()
        return True

    def reject(self, camera: str, reason: str, subject: str) -> bool:
        """A frame has arrived that cannot be used, for a `reason` about `subject`; False while stopped."""
        with self._changed:
            if not self._active:
                return False
            self._sync.reject(camera)
        self._report_frame(subject, camera, reason)
        return True

    def request(self) -> Request:
        """Asks for the latest frame set; answered at once where there is none to encode."""
        request = Request()
        with self._changed:
            age = request.created - self._set_arrived
            if not self._active:
                request.answer(False, "the node is not active")
            elif self.parameters.trigger != "on_request":
                request.answer(
                    False, f"{FINAL}the parameter trigger is continuous, every latest frame set is encoded anyway"
                )
            elif not self._publisher.has_subscribers():
                request.answer(False, "the tokens have no subscriber")
            elif self._lacks_condition:
                request.answer(False, "the model has FiLM, and no condition came yet on the topic `condition`")
            elif not self._sync.waiting:
                request.answer(False, f"no new frame set since the last request ({self._last_frames()})")
            elif age > STALE_SEC:
                request.answer(False, f"the last frame set came {age:.1f} s ago ({self._last_frames()})")
            else:
                self._reject_request("a newer request came")
                self._request = request
                self._changed.notify_all()
        return request

    @property
    def _lacks_condition(self) -> bool:
        """Whether what the encoders are modulated with has not come yet."""
        return self.tokenizer.condition_channels > 0 and self.tokenizer.condition is None

    def apply_parameters(self, parameters: TokenizerParameters) -> None:
        """From the next frame set on these are in force."""
        with self._changed:
            self.parameters = parameters
            self._sync.slop_sec = self.parameters.sync_slop_sec
            self._sync.max_age_sec = self.parameters.max_age_sec
            self._sync.policy = self.parameters.sync_policy
            self._changed.notify_all()

    def frame_sets(self) -> tuple[int, dict[str, int | None]]:
        """How many frame sets were found, and the stamp of each camera's last frame in nanoseconds."""
        with self._changed:
            return self._sync.sets_made, {camera: self._sync.last_stamp_ns(camera) for camera in self._sync.cameras}

    def report(self) -> tuple[dict[str, dict[str, int]], dict[str, int], dict[str, np.ndarray]]:
        """Counters of each camera, of what failed, and the last seconds that each stage took."""
        with self._changed:
            counts = {camera: dict(vars(counts)) for camera, counts in self._sync.counts.items()}
            return counts, dict(self._failures), {stage: np.array(values) for stage, values in self._timings.items()}

    # Threads

    def _guard(self, loop: Callable[[], None]) -> None:
        """Runs a thread's loop, on a GPU with its own CUDA stream."""
        try:
            device = self.tokenizer.device
            if device.type == "cuda":
                import torch

                torch.cuda.set_stream(torch.cuda.Stream(device))
            loop()
        except Exception:
            self._log.fatal(f"the thread {threading.current_thread().name} failed:\n{traceback.format_exc()}")

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            if self._run_step(self._prepare, job):
                if "encoder" in self._mailboxes:
                    self._put(job, "encoder")
                elif self._run_step(self._encode, job):
                    self._put(job, "publisher")

    def _encode_loop(self) -> None:
        while (job := self._get("encoder")) is not None:
            if self._run_step(self._encode, job):
                self._put(job, "publisher")

    def _publish_loop(self) -> None:
        while (job := self._get("publisher")) is not None:
            self._publish(job)

    def _next_job(self) -> _Job | None:
        """Waits for a frame set whose turn it is; None when the thread is to end."""
        with self._changed:
            while not self._ended:
                wait = None
                on_request = self.parameters.trigger == "on_request"
                if not on_request:
                    self._reject_request(f"{FINAL}the parameter trigger has been set to continuous")
                if not self._active:
                    pass
                elif on_request and self._request is not None:
                    request, self._request = self._request, None
                    if (frames := self._sync.take()) is not None:
                        return _Job(frames, request, self._generation, request.created)
                    request.answer(False, "the frame set is gone: time was set back, or sync_policy was changed")
                elif not on_request and self._has_new_set:
                    rate, now = self.parameters.max_rate_hz, time.perf_counter()
                    # Of a rate of almost nothing, the longest time that `wait` takes.
                    wait = self._last_taken + min(1 / rate, threading.TIMEOUT_MAX) - now if rate > 0 else 0.0
                    if wait <= 0:
                        wait = None
                        self._has_new_set = False  # also without subscribers: by the time one comes it is old
                        wanted = self._publisher.has_subscribers() and not self._lacks_condition
                        if wanted and (frames := self._sync.take()) is not None:
                            self._last_taken = now
                            return _Job(frames, None, self._generation, self._set_arrived)
                self._changed.wait(wait)
        return None

    def _put(self, job: _Job, thread: str) -> None:
        """Puts a job into the thread's mailbox, and drops one that still waits there."""
        with self._changed:
            if self._ended:
                self._drop(job, "the node is ending")
                return
            waiting, self._mailboxes[thread] = self._mailboxes[thread], job
            if waiting is not None:
                self._drop(waiting, "a newer frame set replaced it")
            self._changed.notify_all()

    def _get(self, thread: str) -> _Job | None:
        """Waits for a job in the thread's mailbox; None when the thread is to end."""
        with self._changed:
            while True:
                job, self._mailboxes[thread] = self._mailboxes[thread], None
                if job is not None:
                    if self._active and not self._ended and job.generation == self._generation:
                        self._publishing = self._publishing or thread == "publisher"
                        return job
                    self._drop(job, "the node has been deactivated")
                elif self._ended:
                    return None
                else:
                    self._changed.wait()

    def _drop(self, job: _Job, reason: str) -> None:
        self._sync.replaced(job.frames)
        if job.request is not None:
            job.request.answer(False, reason)

    def _reject_request(self, reason: str) -> None:
        """Answers the request that no frame set was taken for yet, if there is one."""
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

    def _run_step(self, step: Callable[[_Job], bool], job: _Job) -> bool:
        """Whether the job goes on to the next step; if not, its frames are accounted for."""
        try:
            return step(job)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._count_failure(job, "encode_errors", text)
            if device_is_lost(error):
                self._log.fatal(f"the device failed, and only a new process can use it again: {text}")
            else:
                self._log.report("encode", f"a frame set could not be encoded: {text}")
            return False

    def _count_failure(self, job: _Job, failure: str, text: str) -> None:
        with self._changed:
            self._failures[failure] += 1
            self._sync.encoded(job.frames)
        if job.request is not None:
            job.request.answer(False, text)

    def _prepare(self, job: _Job) -> bool:
        """Images of a frame set → what the encoders take, on their device; False if an image cannot be read."""
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
                self._report_frame("decode", frame.camera, reason)
        if bad:
            with self._changed:
                self._sync.undecodable(job.frames, bad)
                self._last_taken = -math.inf  # the next frame set need not wait for its turn
                self._changed.notify_all()
            if job.request is not None:
                job.request.answer(False, f"no readable image from {', '.join(frame.camera for frame in bad)}")
            return False
        decoding_ended = clock()
        job.prepared = self.tokenizer.prepare(images, [frame.camera for frame in job.frames])
        preprocessed = clock()
        job.tokenizing = preprocessed - decoding_ended
        with self._changed:
            self._timings["decode"].append(decoding_ended - begun)
            self._timings["preprocess"].append(preprocessed - decoding_ended)
        return True

    def _report_frame(self, subject: str, camera: str, reason: str) -> None:
        self._log.report(f"{subject} {camera}", f"camera {camera}: a frame is skipped: {reason}")

    def _decode_all(self, frames: FrameSet) -> list[Callable[[], np.ndarray]]:
        """Per frame a call that returns its image or raises; several JPEG or PNG images are decoded side by side."""
        calls: list[Callable[[], np.ndarray]] = [
            partial(self._decode, frame.image, self.parameters.max_image_pixels) for frame in frames
        ]
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
        assert job.prepared is not None, "encoded before it was prepared"
        output = self.tokenizer.encode(job.prepared, features=self.parameters.publish_features)
        token_dtype = self.parameters.token_dtype
        dtype = getattr(torch, token_dtype)
        parts = [part.to(dtype) for part in self._empty_views.add_tokens(output)]
        # All is queued before the one wait for the device; on a GPU the copies go to pinned memory.
        finite, *on_host = [queue_to_host(part) for part in (all_finite(parts), *parts)]
        if parts[0].is_cuda:
            torch.cuda.current_stream(parts[0].device).synchronize()
        job.tokens, job.features = on_host[0], on_host[1] if len(on_host) > 1 else None
        job.condition = output.condition
        job.prepared = None  # the memory of its images can be given to the next job
        if not finite:
            text = (
                f"tokens that are not finite were not published; compute_dtype {self.tokenizer.compute_dtype} or "
                f"token_dtype {token_dtype} may be too narrow for this model: try bfloat16 or float32"
            )
            self._count_failure(job, "non_finite", text)
            self._log.report("non-finite", text)
            return False
        seconds = time.perf_counter() - begun
        job.tokenizing += seconds
        with self._changed:
            self._timings["encode"].append(seconds)
        return True

    def _publish(self, job: _Job) -> None:
        assert job.tokens is not None, "published before it was encoded"
        begun = time.perf_counter()
        try:
            self._publisher.publish(
                VisualTokens.from_torch(
                    job.tokens,
                    sequence=self.sequence,  # given here: a gap in the numbers is then a lost message
                    views=self._empty_views.add_views(job.views),
                    features=job.features,
                    condition=job.condition,
                    **self.tokenizer.metadata(),
                )
            )
        except Exception as error:
            text = f"tokens could not be published: {type(error).__name__}: {error}"
            self._count_failure(job, "publish_errors", text)
            if not self._ended:
                self._log.report("publish", text)
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
