"""What becomes of frame sets and of requests in the threads between subscription and publisher. No ROS in here."""

import random
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ros_harness import wait_until

torch = pytest.importorskip("torch")
from fake_model import Gate, Model  # noqa: E402

from vla_perception.nodes.visual_tokenizer import pipeline as pipeline_module  # noqa: E402
from vla_perception.nodes.visual_tokenizer.parameters import TokenizerParameters  # noqa: E402
from vla_perception.nodes.visual_tokenizer.pipeline import Pipeline  # noqa: E402
from vla_perception.synchronizer import SetSynchronizer  # noqa: E402

AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)  # the second before PyTorch 2.8
IMAGE = SimpleNamespace(header=SimpleNamespace(frame_id="camera"), pixels=np.zeros((2, 2, 3), np.uint8))
UNREADABLE = SimpleNamespace(header=IMAGE.header, pixels=None)
PARAMETERS = TokenizerParameters(token_dtype="float32")


def decode(image, _max_pixels):
    if image.pixels is None:
        raise ValueError("no image")
    return image.pixels


class Bench:
    """A pipeline with one camera. It is the pipeline's publisher and its log as well, and keeps what they get."""

    def __init__(self, model=None, kind=Pipeline, **parameters):
        self.model, self.parameters, self.stamp_ns = model or Model(), replace(PARAMETERS, **parameters), 0
        self.published, self.reports, self.failures = [], [], []
        self.publishing, self.has_subscribers, self.may_wait = Gate(), lambda: True, lambda: True
        synchronizer = SetSynchronizer(["front"])
        self.pipeline = kind(self.model, synchronizer, self.parameters, self, self, decode=decode)
        self.pipeline.start()

    def publish(self, tokens):
        self.publishing.pass_through()
        self.published.append(tokens)

    def report(self, _subject, text):
        self.reports.append(text)

    def fatal(self, text):
        self.failures.append(text)

    def add(self, image=IMAGE):
        self.stamp_ns += 10**8
        assert self.pipeline.add("front", self.stamp_ns, image)
        return self.stamp_ns

    def set(self, **parameters):
        self.parameters = replace(self.parameters, **parameters)
        self.pipeline.apply_parameters(self.parameters)

    def wait_for(self, count):
        wait_until(lambda: len(self.published) >= count, 10, f"{count} published sets, not {len(self.published)}")

    def wait_for_stamp(self, stamp_ns):
        wait_until(lambda: self.published and self.published[-1].stamp_ns == stamp_ns, 10, "that set is published")

    def counts(self):
        counts = self.pipeline.report()[0]["front"]
        assert counts["received"] == sum(value for key, value in counts.items() if key != "received")
        return counts


@pytest.fixture
def bench():
    benches = []

    def make(*arguments, **settings):
        benches.append(Bench(*arguments, **settings))
        return benches[-1]

    yield make
    for bench in benches:
        if isinstance(bench.model, Model):
            bench.model.gate.opened.set()
        bench.publishing.opened.set()
        bench.pipeline.close(10.0)
        counts = bench.pipeline.report()[0]["front"]
        assert counts["pending"] == 0 or bench.failures


def busy(bench):
    """A worker that is held up in an encoding; another set waits behind it."""
    bench.model.gate.close()
    bench.add()
    request = bench.pipeline.request()
    assert bench.model.gate.entered.wait(10)
    bench.add()
    return request


def test_numbers_and_stamps_of_what_is_published(bench):
    bench = bench()
    stamps = []
    for count in range(1, 4):
        stamps.append(bench.add())
        bench.wait_for(count)
    assert [tokens.sequence for tokens in bench.published] == [0, 1, 2]
    assert [tokens.stamp_ns for tokens in bench.published] == stamps
    wait_until(lambda: bench.counts()["encoded"] == 3, 10, "all are accounted for")


def test_a_request_is_answered(bench):
    bench = bench(trigger="on_request")
    assert not bench.pipeline.request().success
    stamp = bench.add()
    request = bench.pipeline.request()
    assert request.wait(10) and request.success
    assert request.text == f"published as sequence 0, stamp {stamp} ns"
    request = bench.pipeline.request()
    assert request.wait(0) and "no new frame set since the last request (front: 0." in request.text


def test_a_request_whose_frame_set_has_gone_meanwhile_is_answered(bench):
    bench = bench(trigger="on_request")
    first = busy(bench)
    second = bench.pipeline.request()
    bench.set(sync_policy="latest")  # drops what waits
    bench.model.gate.opened.set()
    assert first.wait(10) and first.success
    assert second.wait(10) and not second.success and "is gone" in second.text


def test_a_request_that_waits_when_the_trigger_becomes_continuous_is_answered(bench):
    bench = bench(trigger="on_request")
    busy(bench)
    request = bench.pipeline.request()
    bench.set(trigger="continuous")
    bench.model.gate.opened.set()
    assert request.wait(10) and not request.success and "continuous" in request.text


def test_a_request_under_way_when_the_node_is_deactivated_gets_the_reason(bench):
    bench = bench(trigger="on_request")
    request = busy(bench)
    bench.pipeline.stop()
    bench.model.gate.opened.set()
    assert request.wait(10) and not request.success and request.text == "the node has been deactivated"
    assert bench.published == []


def test_old_frames_do_not_pass_for_new_ones(bench, monkeypatch):
    bench = bench(trigger="on_request")
    bench.add()
    monkeypatch.setattr(pipeline_module, "STALE_SEC", 0.0)
    request = bench.pipeline.request()
    assert request.wait(0) and not request.success and "the last frame set came 0.0 s ago" in request.text
    monkeypatch.undo()
    assert bench.pipeline.request().wait(10) and len(bench.published) == 1


def test_nothing_is_published_after_stop_has_returned(bench):
    bench, order = bench(), []
    bench.publishing.close()
    bench.add()
    assert bench.publishing.entered.wait(10)
    stopping = threading.Thread(target=lambda: (bench.pipeline.stop(), order.append(len(bench.published))))
    stopping.start()
    wait_until(lambda: not bench.pipeline.add("front", 1, IMAGE), 10, "frames are not taken any more")
    bench.publishing.opened.set()
    stopping.join(10)
    assert order == [1]


def test_a_higher_rate_holds_at_once(bench):
    bench = bench(max_rate_hz=0.01)
    bench.add()
    bench.wait_for(1)
    stamp = bench.add()
    bench.set(max_rate_hz=0.0)
    bench.wait_for(2)
    assert bench.published[1].stamp_ns == stamp


@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-12])
def test_a_rate_of_almost_nothing_only_waits(bench, rate):
    bench = bench(max_rate_hz=rate)
    bench.add()
    bench.wait_for(1)
    stamp = bench.add()
    bench.set(max_rate_hz=0.0)
    bench.wait_for(2)
    assert bench.published[1].stamp_ns == stamp and not bench.failures


def test_a_frame_that_is_rejected_is_counted_and_logged(bench):
    bench = bench()
    assert bench.pipeline.reject("front", "its stamp is no time", "header")
    assert bench.counts()["undecodable"] == bench.counts()["received"] == 1
    bench.add()
    bench.wait_for(1)
    assert "front: a frame is skipped: its stamp is no time" in bench.reports[0]
    bench.pipeline.stop()
    assert not bench.pipeline.reject("front", "", "header") and bench.counts()["received"] == 2


def test_an_unreadable_image_takes_no_turn(bench):
    bench = bench(max_rate_hz=0.01)
    bench.add(UNREADABLE)
    wait_until(lambda: bench.counts()["undecodable"] == 1, 10, "it was looked at")
    bench.add()
    bench.wait_for(1)
    assert "front: a frame is skipped: no image" in bench.reports[0]


def test_what_fails_is_counted_and_the_next_frame_set_goes_on(bench):
    bench = bench(token_dtype="float16")
    # 70000 is beyond float16's range, infinity after the conversion.
    for index, result in enumerate([RuntimeError("CUDA out of memory"), float("nan"), 70000.0, 1.5]):
        bench.model.results.append(result)
        stamp = bench.add()
        wait_until(lambda n=index: bench.counts()["encoded"] == n + 1, 10, f"set {index} is done with")
    assert bench.pipeline.report()[1] == {"encode_errors": 1, "non_finite": 2, "publish_errors": 0}
    assert [(tokens.sequence, tokens.stamp_ns) for tokens in bench.published] == [(0, stamp)]
    assert (bench.published[0].float32() == 1.5).all()
    assert "CUDA out of memory" in bench.reports[0] and not bench.failures


def test_a_frame_set_that_cannot_be_published_takes_no_number(bench):
    bench = bench()
    bench.publishing.pass_through = lambda: 1 / 0
    bench.add()
    wait_until(lambda: bench.pipeline.report()[1]["publish_errors"] == 1, 10, "it was tried")
    del bench.publishing.pass_through
    bench.add()
    bench.wait_for(1)
    assert bench.published[0].sequence == 0


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"),
        AcceleratorError("CUDA error: unspecified launch failure\nno graph is captured, nor memory out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
def test_an_error_of_the_device_ends_it(bench, error):
    bench = bench()
    bench.model.results.append(error)
    bench.add()
    wait_until(lambda: bench.failures, 10, "it gives up")
    assert str(error).partition("\n")[0] in bench.failures[0] and "new process" in bench.failures[0]


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        AcceleratorError("CUDA error: operation failed due to a previous error during capture"),
        AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
        RuntimeError("CUDA error: dependency created on uncaptured work in another stream"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_errors_that_pass_are_counted_and_the_next_frame_set_is_encoded(bench, error):
    bench = bench()
    bench.model.results.append(error)
    bench.add()
    wait_until(lambda: bench.counts()["encoded"] == 1, 10, "the first set is done with")
    bench.add()
    bench.wait_for(1)
    assert bench.pipeline.report()[1]["encode_errors"] == 1 and not bench.failures


def test_a_thread_that_breaks_off_ends_it(bench):
    bench = bench()
    bench.has_subscribers = lambda: 1 / 0
    bench.add()
    wait_until(lambda: bench.failures, 10, "it gives up")
    assert "the thread encoder failed" in bench.failures[0] and "ZeroDivisionError" in bench.failures[0]


class OverlappingPipeline(Pipeline):
    """As on a GPU, on any device; and every encoding waits until another set has been prepared meanwhile."""

    OVERLAPPING = ("cpu", "cuda")
    prepared = 0

    def _prepare(self, job):
        done = super()._prepare(job)
        self.prepared += 1
        return done

    def _encode(self, job):
        wanted = self.prepared + 1
        wait_until(lambda: self.prepared >= wanted or not self._active, 20, "another set prepared meanwhile")
        return super()._encode(job)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sets_that_are_prepared_while_another_is_encoded_do_not_mix(bench, device):
    pytest.importorskip("timm")
    from vla_perception.tokenizer import VisualTokenizer

    tokenizer, images = VisualTokenizer.load("tiny-random", device=device, compute_dtype="float32"), {}
    bench = bench(tokenizer, OverlappingPipeline)

    def more():
        pixels = np.random.default_rng(len(images)).integers(0, 256, (96, 128, 3), np.uint8)
        images[bench.add(SimpleNamespace(header=IMAGE.header, pixels=pixels))] = pixels
        return bench.reports or len(bench.published) >= 6

    wait_until(more, 60, "6 published sets")
    assert not bench.reports and not bench.failures
    bench.pipeline.stop()
    stamps = [tokens.stamp_ns for tokens in bench.published]
    assert stamps == sorted(set(stamps))  # in the order in which they were taken, each once
    for tokens in bench.published:
        expected = tokenizer([images[tokens.stamp_ns]]).tokens.cpu().numpy()
        np.testing.assert_allclose(tokens.float32(), expected, atol=1e-4 * np.abs(expected).max())
    wait_until(lambda: bench.counts()["pending"] == 0, 10, "what waited for the encoder is accounted for")
    assert bench.counts()["replaced"] > 0


class Unsteady:
    """A model and a publisher that take no time, some, or more than others, by a seed; notes the threads that did what."""

    def __init__(self, seed, done_by):
        self._random, self._done_by = random.Random(seed), done_by

    def __call__(self, what):
        self._done_by.setdefault(what, set()).add(threading.current_thread().name)
        time.sleep(self._random.choice((0.0, 0.0, 0.0005, 0.002)))


class UnsteadyPipeline(Pipeline):
    OVERLAPPING = ("cpu",)

    def _prepare(self, job):
        self._publisher.unsteady("prepare")
        return super()._prepare(job)

    def _encode(self, job):
        self._publisher.unsteady("encode")
        return super()._encode(job)


class UnsteadyBench(Bench):
    def __init__(self, *arguments, seed, may_wait, **settings):
        self.done_by = {}
        self.unsteady = Unsteady(seed, self.done_by)
        super().__init__(*arguments, **settings)
        self.may_wait = lambda: may_wait

    def publish(self, tokens):
        self.unsteady("publish")
        super().publish(tokens)


@pytest.mark.parametrize("kind", [Pipeline, UnsteadyPipeline])
@pytest.mark.parametrize("may_wait", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_steps_take_frame_sets_stay_in_order_and_the_latest_is_published(seed, may_wait, kind):
    bench = UnsteadyBench(kind=kind, seed=seed, may_wait=may_wait)
    schedule = random.Random(-seed)
    try:
        for _ in range(60):
            for _ in range(schedule.randrange(1, 6)):
                bench.add()
                time.sleep(schedule.choice((0.0, 0.0003, 0.003)))
            bench.wait_for_stamp(bench.stamp_ns)
    finally:
        bench.pipeline.close(10.0)
    stamps = [tokens.stamp_ns for tokens in bench.published]
    assert stamps == sorted(set(stamps))
    assert [tokens.sequence for tokens in bench.published] == list(range(len(stamps)))
    assert bench.counts()["encoded"] == len(stamps) and bench.counts()["pending"] == 0
    assert not bench.reports and not bench.failures
    # A subscriber that is waited for holds up the publisher's thread alone.
    assert bench.done_by["publish"] == {"publisher"} if may_wait else "encoder" in bench.done_by["publish"]


class HeldPipeline(Pipeline):
    """As on a GPU, on any device; prepares when its gate is open, and notes the threads that do."""

    OVERLAPPING = ("cpu",)

    def __init__(self, *arguments, **options):
        self.preparing, self.prepared_by = Gate(), []
        super().__init__(*arguments, **options)

    def _prepare(self, job):
        self.prepared_by.append(threading.current_thread().name)
        self.preparing.pass_through()
        return super()._prepare(job)


def test_what_comes_while_a_frame_set_is_prepared_is_prepared_while_that_is_encoded(bench):
    bench = bench(kind=HeldPipeline)
    preparing, prepared = bench.pipeline.preparing, bench.pipeline.prepared_by
    preparing.close()
    bench.model.gate.close()
    bench.add()
    assert preparing.entered.wait(10)
    second = bench.add()
    preparing.opened.set()
    assert bench.model.gate.entered.wait(10)
    wait_until(lambda: prepared == ["encoder", "preparer"], 10, "the second is prepared while the first is encoded")
    bench.model.gate.opened.set()
    bench.wait_for_stamp(second)


def test_what_comes_before_the_encoder_is_awake_is_prepared_while_it_encodes(bench):
    bench = bench(kind=HeldPipeline)
    preparing, prepared = bench.pipeline.preparing, bench.pipeline.prepared_by
    bench.model.gate.close()
    first = bench.add()
    assert bench.model.gate.entered.wait(10)
    preparing.close()
    bench.add()
    assert preparing.entered.wait(10)
    bench.model.gate.opened.set()
    bench.wait_for_stamp(first)
    wait_until(lambda: bench.pipeline._encoder_waits, 10, "the encoder is idle")
    bench.model.gate.close()
    wakes = bench.pipeline._wakes
    wake, wakes["encoder"] = wakes["encoder"], SimpleNamespace(notify=lambda: None)  # it sleeps on
    preparing.opened.set()
    wait_until(lambda: bench.pipeline._mailboxes["encoder"], 10, "the second waits for it")
    third = bench.add()
    wakes["encoder"] = wake
    with wake:
        wake.notify()
    assert bench.model.gate.entered.wait(10)
    wait_until(lambda: prepared == ["encoder", "preparer", "preparer"], 10, "the third is prepared meanwhile")
    bench.model.gate.opened.set()
    bench.wait_for_stamp(third)


def test_a_frame_set_that_is_deactivated_while_it_is_prepared_is_not_encoded(bench):
    bench = bench(kind=HeldPipeline)
    preparing = bench.pipeline.preparing
    preparing.close()
    bench.add()
    assert preparing.entered.wait(10)
    bench.pipeline.stop()
    preparing.opened.set()
    wait_until(lambda: bench.counts()["replaced"] == 1, 10, "it is accounted for")
    assert not bench.model.gate.entered.is_set() and not bench.published


def test_adding_a_frame_set_that_is_taken_at_once_waits_until_the_device_has_it(bench, monkeypatch):
    monkeypatch.setattr(pipeline_module, "_HAND_OVER_SEC", 60.0)
    bench, order = bench(), []
    encode = bench.model.encode

    def queue_and_wait(pixel_values, features):
        order.append("queued")
        bench.pipeline._notify()  # as `encode` does before it waits for a GPU
        return encode(pixel_values, features)

    monkeypatch.setattr(bench.model, "encode", queue_and_wait)
    wait_until(lambda: bench.pipeline._encoder_waits, 10, "the encoder is idle")
    bench.model.gate.close()
    adding = threading.Thread(target=lambda: [bench.add(), order.append("added"), bench.add()])
    adding.start()
    adding.join(30.0)  # the second time it is busy
    assert order == ["queued", "added"] and not adding.is_alive()
    bench.model.gate.opened.set()
    bench.wait_for_stamp(bench.stamp_ns)


@pytest.mark.parametrize("why", ["no request", "no subscriber", "its turn comes later"])
def test_adding_a_frame_set_that_is_not_taken_does_not_wait(bench, monkeypatch, why):
    monkeypatch.setattr(pipeline_module, "_HAND_OVER_SEC", 60.0)
    bench = bench(trigger="on_request" if why == "no request" else "continuous")
    wait_until(lambda: bench.pipeline._encoder_waits, 10, "the encoder is idle")
    if why == "no subscriber":
        bench.has_subscribers = lambda: False
    elif why == "its turn comes later":
        bench.set(max_rate_hz=0.001)
        bench.pipeline._last_taken = time.perf_counter()
    adding = threading.Thread(target=bench.add)
    adding.start()
    adding.join(30.0)
    assert not adding.is_alive()
    bench.pipeline.stop()  # the frame set is accounted for


def test_what_waits_for_the_publisher_is_not_overtaken(bench):
    bench = bench()
    wakes = bench.pipeline._wakes
    wake, wakes["publisher"] = wakes["publisher"], SimpleNamespace(notify=lambda: None)  # it sleeps on
    first = bench.add()
    wait_until(lambda: bench.pipeline._mailboxes["publisher"], 10, "the first waits")
    bench.may_wait = lambda: False
    second = bench.add()
    wait_until(lambda: bench.published or bench.counts()["replaced"], 10, "the second is encoded")
    wakes["publisher"] = wake
    with wake:
        wake.notify()
    bench.wait_for(1)
    assert [tokens.stamp_ns for tokens in bench.published] == [second] and first < second
    assert bench.counts()["replaced"] == 1


def test_the_first_frame_of_a_size_waits_for_its_graph_and_is_published(bench, monkeypatch, caplog):
    pytest.importorskip("timm")
    import fake_cuda

    from vla_perception.tokenizer import VisualTokenizer

    caplog.set_level("INFO")
    fake_cuda.let_plans_be_captured(monkeypatch)
    happened = fake_cuda.install(monkeypatch)
    options = {"device": "cpu", "compute_dtype": "float32", "runtime": "eager", "image_size": [56, 64]}
    tokenizer, exact = (VisualTokenizer.load("tiny-random", **options) for _ in range(2))
    bench, expected = bench(fake_cuda.in_graph(tokenizer)), {}
    for number, height in enumerate((48, 48, 72, 72, 48), start=1):
        bgr = np.random.default_rng(number).integers(0, 256, (height, 128, 3), np.uint8)[:, :, ::-1]
        expected[bench.add(SimpleNamespace(header=IMAGE.header, pixels=bgr))] = exact([bgr]).tokens.numpy()
        bench.wait_for(number)
    assert not bench.reports and not bench.failures
    for tokens in bench.published:
        np.testing.assert_allclose(tokens.float32(), expected[tokens.stamp_ns], rtol=1e-4, atol=1e-5)
    assert [recorder.replays for recorder in happened.captures] == [3, 2]
    logged = [record.getMessage() for record in caplog.records if "warmed up" in record.getMessage()]
    assert [text.partition(" in ")[0] for text in logged] == [
        "warmed up for front: 128x48 bgr8",
        "warmed up for front: 128x72 bgr8",
    ]


def test_compressed_images_of_a_frame_set_are_decoded_side_by_side():
    """Each waits for the others: one after the other they would never come to an end. A bad one is the only one lost."""
    cameras = ("front", "side", "wrist", "rear")
    together, undecoded = threading.Barrier(3), []

    def decode_together(image, max_pixels):
        if hasattr(image, "format"):
            together.wait(30.0)
        return decode(image, max_pixels)

    published, reports, model = [], [], Model()
    model.encode = lambda images, features: SimpleNamespace(
        tokens=torch.ones(len(images), 4, 8), features=None, condition=None
    )
    pipeline = Pipeline(
        model,
        SetSynchronizer(cameras),
        PARAMETERS,
        SimpleNamespace(publish=published.append, has_subscribers=lambda: True, may_wait=lambda: True),
        SimpleNamespace(report=lambda subject, text: reports.append(text), fatal=undecoded.append),
        decode=decode_together,
    )
    compressed = SimpleNamespace(**vars(IMAGE), format="jpeg")
    broken = SimpleNamespace(**vars(UNREADABLE), format="jpeg")
    frames = (compressed, IMAGE, compressed, compressed), (compressed, IMAGE, broken, compressed)
    pipeline.start()
    for stamp, images in enumerate(frames, start=1):
        for camera, image in zip(cameras, images):
            pipeline.add(camera, stamp * 10**8, image)
        wait_until(lambda: len(published) + len(reports) == stamp, 30.0, "the set's end")  # noqa: B023
    counts, _, _ = pipeline.report()
    assert [view.camera for view in published[0].views] == list(cameras) and len(published) == 1
    assert [count["undecodable"] for count in counts.values()] == [0, 0, 1, 0]
    assert "wrist" in reports[0]
    before = [thread for thread in threading.enumerate() if thread.name.startswith("decoder")]
    pipeline.close()
    for thread in before:
        thread.join(30.0)
    assert before and not any(thread.is_alive() for thread in before) and not undecoded
