"""Frames → published tokens, in threads. Imports no ROS; lifecycle, topics and parameters are not here.

frame → frame set (synchronizer.py) → decode, prepare → encode → message. The thread `encoder` takes a frame set through all
of these if no other one waits: each thread on the way adds the time that it takes to wake up. While it is busy, `preparer`
decodes and uploads the next frame set, in its own CUDA stream, and `publisher` sends the last one's tokens. In single-slot
mailboxes between them a newer item replaces a waiting one: nothing queues up, and every frame is accounted for. On a CPU
there is no `preparer`: it would take cores from encoding, for frames that would be old by then.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_perception.nodes.visual_tokenizer.device_errors import device_is_lost
from vla_perception.nodes.visual_tokenizer.empty_views import EmptyViews
from vla_perception.nodes.visual_tokenizer.encode import encode
from vla_perception.nodes.visual_tokenizer.encode_request import Request, last_frames
from vla_perception.nodes.visual_tokenizer.frame_decoder import FrameDecoder
from vla_perception.nodes.visual_tokenizer.job import Job
from vla_perception.synchronizer import SetSynchronizer
from vla_perception.tokens.encode_service import FINAL, published

if TYPE_CHECKING:
    from vla_perception.nodes.visual_tokenizer.diagnostics import FailureLog
    from vla_perception.nodes.visual_tokenizer.parameters import TokenizerParameters
    from vla_perception.nodes.visual_tokenizer.token_publisher import TokenPublisher
    from vla_perception.tokenizer import VisualTokenizer

#: What is timed per frame set. preprocess: on a GPU the upload alone, the rest is part of encode. overhead: from the callback
#: of its last frame until it is published, less what the tokenizer takes, preprocess and encode.
STAGES = ("decode", "preprocess", "encode", "publish", "overhead")
#: What may become of a frame set instead of a message.
FAILURES = ("encode_errors", "non_finite", "publish_errors")
#: Seconds after which a frame set is no longer encoded on request: its cameras have stopped, and it would pass for new.
STALE_SEC = 5.0
#: Seconds that `add` waits until the device has its work, at most. Otherwise the executor would prepare to wait for the next
#: frame, half a millisecond of Python, at the expense of the thread that encodes this one.
_HAND_OVER_SEC = 0.003
#: Seconds that `stop` waits for a message that is being published, at most.
_GRACE_SEC = 2.0


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
        self._publisher, self._log = publisher, log
        self._decoder = FrameDecoder(decode, tokenizer, len(synchronizer.cameras))
        self._empty_views = empty_views or EmptyViews(tokenizer, synchronizer.cameras)

        lock = threading.RLock()  # guards all that follows
        # For `stop`, which waits until nothing is being published, and `add`, which waits until the device has its work.
        self._changed = threading.Condition(lock)
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

        loops = {"encoder": self._encode_loop, "preparer": self._prepare_loop, "publisher": self._publish_loop}
        if tokenizer.device.type not in self.OVERLAPPING:
            del loops["preparer"]
        # Thread's name → the job that waits for it.
        self._mailboxes: dict[str, Job | None] = {"encoder": None, "publisher": None}
        # A condition for each, so that nothing wakes a thread that it does not concern: it would be in the others' way.
        self._wakes = {name: threading.Condition(lock) for name in loops}
        self._preparing = False  # a thread is; the frame sets stay in their order, because it is one at a time
        self._encoder_waits = False
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
            self._changed.wait_for(lambda: not self._publishing, _GRACE_SEC)

    def close(self, timeout_sec: float | None = None) -> None:
        """Ends the threads, waiting for what cannot be interrupted: so long in all, or for ever."""
        end = None if timeout_sec is None else time.monotonic() + timeout_sec
        with self._changed:
            self._active = False
            self._ended = True
            self._reject_request("the node is ending")
            for wake in self._wakes.values():
                wake.notify_all()
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        self._decoder.close()

    def add(self, camera: str, stamp_ns: int, image: object) -> bool:
        """A frame has arrived; False while stopped. Where a frame set is encoded at once, waits until the device has its work."""
        now = time.perf_counter()
        with self._changed:
            if not self._active:
                return False
            self._arrivals[camera] = now
            if self._sync.add(camera, stamp_ns, image):
                self._has_new_set = True
                self._set_arrived = now
                self._wake_for_frame_set()
                if self._is_awaited and self._encoder_waits:
                    self._changed.wait(_HAND_OVER_SEC)
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
                request.answer(
                    False,
                    f"no new frame set since the last request ({last_frames(self._arrivals, self._sync.cameras)})",
                )
            elif age > STALE_SEC:
                request.answer(
                    False,
                    f"the last frame set came {age:.1f} s ago ({last_frames(self._arrivals, self._sync.cameras)})",
                )
            else:
                self._reject_request("a newer request came")
                self._request = request
                self._wake_for_frame_set()
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
            for wake in self._wakes.values():
                wake.notify_all()

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

    def _encode_loop(self) -> None:
        while (job := self._next_job("encoder")) is not None:
            if job.prepared is None and not self._prepare_alone(job):
                continue
            if self._run_step(self._encode, job):
                if self._may_publish_here(job):
                    self._publish(job)
                else:
                    self._put(job, "publisher")

    def _prepare_loop(self) -> None:
        while (job := self._next_job("preparer")) is not None:
            self._prepare_alone(job, for_encoder=True)

    def _publish_loop(self) -> None:
        while (job := self._next_encoded()) is not None:
            self._publish(job)

    def _next_job(self, thread: str) -> Job | None:
        """Waits for a job in the thread's mailbox, or a frame set whose turn it is; None when the thread is to end."""
        with self._changed:
            while not self._ended:
                if (job := self._from_mailbox(thread)) is not None:
                    self._wake_for_frame_set()  # what came before this thread was awake is the preparer's now
                    return job
                job, wait = (None, None) if self._preparing else self._take_frame_set()
                if job is not None:
                    self._preparing = True
                    return job
                if thread == "encoder":
                    self._encoder_waits = True
                self._changed.notify_all()  # `add` need not wait: its frame set is not taken now
                self._wakes[thread].wait(wait)
                if thread == "encoder":
                    self._encoder_waits = False
            self._from_mailbox(thread)
            return None

    def _take_frame_set(self) -> tuple[Job | None, float | None]:
        """A frame set whose turn it is, or after how many seconds that may be without anything new (None: never)."""
        on_request = self.parameters.trigger == "on_request"
        if not on_request:
            self._reject_request(f"{FINAL}the parameter trigger has been set to continuous")
        if not self._active:
            return None, None
        if on_request and self._request is not None:
            request, self._request = self._request, None
            if (frames := self._sync.take()) is not None:
                return Job(frames, request, self._generation, request.created), None
            request.answer(False, "the frame set is gone: time was set back, or sync_policy was changed")
        elif not on_request and self._has_new_set:
            rate, now = self.parameters.max_rate_hz, time.perf_counter()
            # Of a rate of almost nothing, the longest time that can be waited.
            wait = self._last_taken + min(1 / rate, threading.TIMEOUT_MAX) - now if rate > 0 else 0.0
            if wait > 0:
                return None, wait
            self._has_new_set = False  # also without subscribers: by the time one comes it is old
            wanted = self._publisher.has_subscribers() and not self._lacks_condition
            if wanted and (frames := self._sync.take()) is not None:
                self._last_taken = now
                return Job(frames, None, self._generation, self._set_arrived), None
        return None, None

    @property
    def _is_awaited(self) -> bool:
        """Whether a frame set is to be taken, now or when its turn comes."""
        return self._request is not None or self._has_new_set and self.parameters.trigger == "continuous"

    def _wake_for_frame_set(self) -> None:
        """If a frame set is to be taken, wakes the thread that does so."""
        if self._is_awaited:
            encoder_is_busy = not self._encoder_waits and "preparer" in self._wakes
            self._wakes["preparer" if encoder_is_busy else "encoder"].notify()

    def _prepare_alone(self, job: Job, for_encoder: bool = False) -> bool:
        """Prepares a job, which no other thread does meanwhile, for this thread or the encoder's; False if that was its end."""
        done = self._run_step(self._prepare, job)
        with self._changed:
            if done and for_encoder:
                self._put(job, "encoder")
            elif done and not self._is_wanted(job):
                self._drop(job, "the node has been deactivated")
                done = False
            self._preparing = False
            self._wake_for_frame_set()
        return done

    def _may_publish_here(self, job: Job) -> bool:
        """Whether nothing else waits for the encoder's thread meanwhile, and no subscriber can hold it up."""
        with self._changed:
            others_wait = self._preparing or self._is_awaited or any(self._mailboxes.values())
            if others_wait or self._publishing or not self._is_wanted(job) or self._publisher.may_wait():
                return False
            self._publishing = True
            return True

    def _put(self, job: Job, thread: str) -> None:
        """Puts a job into the thread's mailbox, and drops one that still waits there."""
        with self._changed:
            if self._ended:
                self._drop(job, "the node is ending")
                return
            waiting, self._mailboxes[thread] = self._mailboxes[thread], job
            if waiting is not None:
                self._drop(waiting, "a newer frame set replaced it")
            self._wakes[thread].notify()

    def _next_encoded(self) -> Job | None:
        """Waits for a job of the publisher's; None when it is to end."""
        with self._changed:
            while not self._ended:
                if (job := self._from_mailbox("publisher")) is not None:
                    self._publishing = True
                    return job
                self._wakes["publisher"].wait()
            self._from_mailbox("publisher")
            return None

    def _from_mailbox(self, thread: str) -> Job | None:
        """What waits in the thread's mailbox and is still wanted."""
        job = self._mailboxes.get(thread)
        if job is None:
            return None
        self._mailboxes[thread] = None
        if self._is_wanted(job):
            return job
        self._drop(job, "the node has been deactivated")
        return None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _is_wanted(self, job: Job) -> bool:
        return self._active and not self._ended and job.generation == self._generation

    def _drop(self, job: Job, reason: str) -> None:
        self._sync.replaced(job.frames)
        if job.request is not None:
            job.request.answer(False, reason)

    def _reject_request(self, reason: str) -> None:
        """Answers the request that no frame set was taken for yet, if there is one."""
        request, self._request = self._request, None
        if request is not None:
            request.answer(False, reason)

    # Steps

    def _run_step(self, step: Callable[[Job], bool], job: Job) -> bool:
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

    def _count_failure(self, job: Job, failure: str, text: str) -> None:
        with self._changed:
            self._failures[failure] += 1
            self._sync.encoded(job.frames)
        if job.request is not None:
            job.request.answer(False, text)

    def _prepare(self, job: Job) -> bool:
        """Images of a frame set → what the encoders take, on their device; False if an image cannot be read."""
        begun = time.perf_counter()
        images, job.views, bad = self._decoder.decode(job.frames, self.parameters.max_image_pixels)
        for frame, reason in bad.items():
            self._report_frame("decode", frame.camera, reason)
        if bad:
            with self._changed:
                self._sync.undecodable(job.frames, list(bad))
                self._last_taken = -math.inf  # the next frame set need not wait for its turn
            if job.request is not None:
                job.request.answer(False, f"no readable image from {', '.join(frame.camera for frame in bad)}")
            return False
        decoding_ended = time.perf_counter()
        job.prepared = self.tokenizer.prepare(images, [frame.camera for frame in job.frames])
        preprocessed = time.perf_counter()
        job.tokenizing = preprocessed - decoding_ended
        with self._changed:
            self._timings["decode"].append(decoding_ended - begun)
            self._timings["preprocess"].append(preprocessed - decoding_ended)
        return True

    def _report_frame(self, subject: str, camera: str, reason: str) -> None:
        self._log.report(f"{subject} {camera}", f"camera {camera}: a frame is skipped: {reason}")

    def _encode(self, job: Job) -> bool:
        """→ tokens on the host; False if they are not finite."""
        begun = time.perf_counter()
        if "preparer" not in self._wakes:
            self._notify()  # the CPU has its work
        assert job.prepared is not None, "encoded before it was prepared"
        token_dtype = self.parameters.token_dtype
        job.message = encode(
            job.prepared,
            job.views,
            self.tokenizer,
            self._empty_views,
            dtype=token_dtype,
            features=self.parameters.publish_features,
            sequence=self.sequence,
            when_queued=self._notify,
        )
        job.prepared = None  # the memory of its images can be given to the next job
        if job.message is None:
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

    def _publish(self, job: Job) -> None:
        assert job.message is not None, "published before it was encoded"
        begun = time.perf_counter()
        try:
            message = job.message
            if message.sequence != self.sequence:  # a gap in the numbers is to be a lost message
                message = replace(message, sequence=self.sequence)
            self._publisher.publish(message)
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
