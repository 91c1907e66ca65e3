"""CUDA graphs: their logic with a recorder on the CPU, what only a device can show with the marker gpu."""

import contextlib
import gc
import re
import threading
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import fake_cuda  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer, cuda_graphs, dependent_launches  # noqa: E402
from vla_perception.tokenizer.cuda_graphs import CudaGraphs  # noqa: E402
from vla_perception.tokenizer.fused_blocks import patches_as_products  # noqa: E402

#: What CUDA says when somebody else has broken off a capture.
BROKEN_OFF = "CUDA error: operation failed due to a previous error during capture"


def load(**choices):
    """The preset `tiny-random` on a grid of 4 × 4, which is quick."""
    return VisualTokenizer.load("tiny-random", **{"image_size": [56, 64]} | choices)


def images(views, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (120, 160, 3), dtype=np.uint8) for _ in range(views)]


@pytest.fixture
def cuda(monkeypatch):
    with fake_cuda.one_thread():
        yield fake_cuda.install(monkeypatch)


@pytest.fixture
def graphs(cuda):
    """CUDA graphs, recorded on the CPU, of a network whose eager results are known."""
    tokenizer = load(runtime="eager")
    return CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32), tokenizer


def agree(run, tokenizer, pixel_values):
    """Whether a runtime's tokens are eager's."""
    torch.testing.assert_close(run(pixel_values)[1], tokenizer.network(pixel_values)[1])


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"token_strategy": "cls+patch", "pool": 2},
        {"token_strategy": "cls", "encoders": ["siglip"], "image_size": 64},
    ],
)
@torch.inference_mode()
def test_graphs_give_eager_results_and_never_write_into_them_again(cuda, choices):
    tokenizer = load(runtime="eager", **choices)
    patches_as_products(tokenizer.network)
    run = CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32)
    inputs = [tokenizer.preprocess(images(2, seed)) for seed in range(4)]
    exact = [tokenizer.network(pixel_values) for pixel_values in inputs]
    results = [run(pixel_values) for pixel_values in inputs]
    for found, expected in zip(results, exact):  # after all of them ran
        for values, truth in zip(found, expected):
            torch.testing.assert_close(values, truth)
    assert len(cuda.captures) == 1 and cuda.captures[0].replays == 4
    assert run.name == "graph" and not run.fallback


@torch.inference_mode()
def test_features_are_copied_only_for_those_who_want_them(graphs):
    run, tokenizer = graphs
    pixel_values = tokenizer.preprocess(images(1))
    features, tokens = run(pixel_values, features=False)
    assert features is None
    torch.testing.assert_close(tokens, tokenizer.network(pixel_values)[1])


@torch.inference_mode()
def test_there_is_a_graph_for_each_number_of_views(cuda, graphs):
    run, tokenizer = graphs
    for views in (1, 3, 1, 3, 2):
        agree(run, tokenizer, tokenizer.preprocess(images(views, views)))
    assert [recorder.replays for recorder in cuda.captures] == [2, 2, 1]
    assert len(set(cuda.pools)) == 1  # replays follow one another, so they can share memory


@torch.inference_mode()
def test_a_bounded_number_of_graphs_is_kept(cuda, graphs, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_MAX_GRAPHS", 2)
    run, tokenizer = graphs
    inputs = {views: tokenizer.preprocess(images(views)) for views in (1, 2, 3)}
    for views in (1, 2, 1, 3, 1, 2):  # 2 goes when 3 comes, 3 when 2 comes again
        agree(run, tokenizer, inputs[views])
    assert [recorder.replays for recorder in cuda.captures] == [3, 1, 1, 1]
    assert len(run._captured) == 2
    assert [entry for entry in cuda.order if entry[0] == "synchronize"]  # none goes that may still be running


@torch.inference_mode()
def test_a_pool_whose_last_graph_has_gone_is_not_used_again(cuda, graphs, monkeypatch):
    """CUDA's allocator ends such a capture with an internal assertion (seen with PyTorch 2.11)."""
    monkeypatch.setattr(cuda_graphs, "_MAX_GRAPHS", 1)
    run, tokenizer = graphs
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    cuda.failures = [RuntimeError("CUDA out of memory")]
    agree(run, tokenizer, tokenizer.preprocess(images(2)))  # no graph, and the one before has gone
    assert list(run._captured.values()) == [None]
    agree(run, tokenizer, tokenizer.preprocess(images(3)))
    first, failed, last = cuda.pools
    assert failed is first and last is not first


@pytest.mark.parametrize("missing", [["MemPool", "use_mem_pool"], ["use_mem_pool"]])
@torch.inference_mode()
def test_pytorch_without_memory_pools_has_graphs_too(cuda, graphs, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(torch.cuda, name)
    run, tokenizer = graphs
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    assert run.name == "graph" and not run.fallback


@torch.inference_mode()
def test_encoders_run_on_streams_that_fork_and_join(cuda, graphs):
    run, tokenizer = graphs
    run(tokenizer.preprocess(images(1)))
    side, main = id(run._streams.sides[0]), id(run._streams.main)
    waits = [(waiting, other) for kind, waiting, *other in cuda.order if kind == "wait" and side in (waiting, *other)]
    assert waits == [(side, [main]), (main, [side])]


@torch.inference_mode()
def test_nothing_but_captures_runs_on_their_streams(cuda, graphs, monkeypatch):
    """But what makes cuBLAS allocate a workspace for each, once, in a pool that stays."""
    run, tokenizer = graphs
    ran = {"captured": set(), "held": set(), "eager": set()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.addmm.default:
                way = "captured" if cuda.in_pool else "held" if cuda.holding else "eager"
                ran[way].add(torch.cuda.current_stream().name)
            return function(*args, **(kwargs or {}))

    run._streams.main.name, run._streams.sides[0].name = "main", "side"
    with Watch():
        for views in (1, 2, 1):
            run(tokenizer.preprocess(images(views)))
    assert ran == {"captured": {"main", "side"}, "held": {"main", "side"}, "eager": {"default"}}
    assert len(cuda.lasting) == 1


@torch.inference_mode()
def test_every_thread_that_captures_holds_the_workspaces_of_its_cublas_handle(cuda, graphs):
    """Else they would be allocated during the capture, 32 MiB a stream from the graphs' pool."""
    run, tokenizer = graphs

    @torch.inference_mode()
    def capture(views):
        agree(run, tokenizer, tokenizer.preprocess(images(views)))

    for views in (1, 2):
        capture(views)
    for _ in range(2):
        thread = threading.Thread(target=capture, args=(3 + len(cuda.captures),))
        thread.start()
        thread.join()
    assert len(cuda.captures) == 4
    assert len(cuda.lasting) == 3 and len(set(map(id, cuda.lasting))) == 1


@torch.inference_mode()
def test_workspaces_that_there_was_no_memory_for_are_held_by_the_next_capture(cuda, graphs, monkeypatch):
    run, tokenizer = graphs
    multiply, out_of_memory = torch.mm, [torch.cuda.OutOfMemoryError("CUDA out of memory")]

    def mm(*given):
        if cuda.holding and out_of_memory:
            raise out_of_memory.pop()
        return multiply(*given)

    monkeypatch.setattr(torch, "mm", mm)
    for views in (1, 2):
        agree(run, tokenizer, tokenizer.preprocess(images(views)))
    assert len(cuda.captures) == 1 and len(cuda.lasting) == 2


@torch.inference_mode()
def test_nothing_is_given_back_that_the_device_still_reads(cuda, graphs):
    _, tokenizer = graphs
    run = CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32)
    run(tokenizer.preprocess(images(1)))
    for recorder in cuda.captures:
        recorder.operations.clear()  # which hold on to all, unlike CUDA
    free, found = run._streams.free, []
    static = weakref.ref(next(iter(run._captured.values())).inputs[0])
    free.synchronize = lambda: found.append(static() is not None)
    del run
    gc.collect()
    assert found == [True] and static() is None


@torch.inference_mode()
def test_streams_and_their_workspaces_are_used_again(cuda, graphs):
    """A node that is configured again and again: as few as live at the same time."""
    _, tokenizer = graphs
    pixel_values = tokenizer.preprocess(images(1))

    def make():
        run = CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32)
        agree(run, tokenizer, pixel_values)
        return run

    run = make()
    other = make()
    streams = run._streams
    assert other._streams.main is not streams.main and other._streams.sides[0] is not streams.sides[0]
    del run
    gc.collect()
    again = make()
    assert again._streams is streams and len(cuda.lasting) == 2
    # What the first one queued last is waited for.
    assert ("record", id(cuda.current[-1]), id(streams.free)) in cuda.order
    assert cuda.order.count(("wait event", id(cuda.current[-1]), id(streams.free))) == 4


@torch.inference_mode()
def test_captures_are_made_outside_inference_mode(cuda, graphs):
    run, tokenizer = graphs
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    assert cuda.modes == [False]
    assert not any(tensor.is_inference() for tensor in next(iter(run._captured.values())).inputs)
    assert torch.is_inference_mode_enabled()


@torch.inference_mode()
def test_a_replay_waits_until_the_last_result_was_copied(cuda, graphs):
    run, tokenizer = graphs
    pixel_values = tokenizer.preprocess(images(1))
    run(tokenizer.preprocess(images(2)))  # graphs of other numbers of views wait, too: they share memory
    run(pixel_values)
    run(tokenizer.preprocess(images(2)))
    del cuda.order[:]
    run(pixel_values)
    (first, _, waited), (last, _, recorded) = cuda.order
    assert (first, last) == ("wait event", "record") and waited == recorded


@pytest.mark.parametrize("part", ["fill", "replay", "result"])
@torch.inference_mode()
def test_the_next_replay_waits_for_one_whose_result_could_not_be_copied(cuda, graphs, monkeypatch, part):
    """What is queued already still writes where the next one would read."""
    run, tokenizer = graphs
    pixel_values = tokenizer.preprocess(images(1))
    run(pixel_values)

    def fails(*_given, **_options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    del cuda.order[:]
    with monkeypatch.context() as patch:
        if part == "replay":
            patch.setattr(cuda.captures[0], "replay", fails)
        else:
            patch.setattr(torch.Tensor, {"fill": "copy_", "result": "clone"}[part], fails)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run(pixel_values)
    assert [kind for kind, _, event in cuda.order if event == id(run._streams.free)] == ["wait event", "record"]
    agree(run, tokenizer, pixel_values)


@torch.inference_mode()
def test_in_a_capture_of_the_callers_the_network_runs_as_it_is(cuda, graphs):
    run, tokenizer = graphs
    pixel_values = tokenizer.preprocess(images(1))
    cuda.capturing_elsewhere = True
    agree(run, tokenizer, pixel_values)
    assert not cuda.captures and not cuda.order  # no event of ours either: it would break the capture
    cuda.capturing_elsewhere = False
    agree(run, tokenizer, pixel_values)
    assert len(cuda.captures) == 1 and run.name == "graph"


def failing_at(run, index, calls):
    """Makes branch `index` fail at its call number `calls`; returns what it raises."""
    branch, counted = run._branches[index], []
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    def fails(pixels):
        counted.append(1)
        if len(counted) == calls:
            raise error
        return branch(pixels)

    run._branches[index] = fails
    return error


@pytest.mark.parametrize("index", [0, 1])
@torch.inference_mode()
def test_what_was_forked_is_joined_when_a_capture_fails(cuda, graphs, index, caplog):
    run, tokenizer = graphs
    failing_at(run, index, cuda_graphs._RUNS_BEFORE_CAPTURE + 1)
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    assert not cuda.forked and not cuda.in_pool and not cuda.released  # so the capture could be ended as it should be
    assert run.fallback == (
        "no CUDA graph for [1, 3, 56, 56] and [1, 3, 64, 64]: OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 2.00 MiB"
    )
    assert run.name == "eager"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and run.fallback in caplog.text
    agree(run, tokenizer, tokenizer.preprocess(images(2)))  # another number of views is not touched
    assert run.name == "graph" and len(cuda.captures) == 2


@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"])
@torch.inference_mode()
def test_a_capture_that_cannot_be_ended_is_taken_from_the_allocator(cuda, graphs, monkeypatch, name):
    """By the name that PyTorch 2.8 has, and the one before."""
    end_allocate = torch._C._cuda_endAllocateToPool
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    monkeypatch.setattr(torch._C, name, end_allocate, raising=False)
    run, tokenizer = graphs
    before = list(cuda.current)
    cuda.failures = [RuntimeError("no kernel image is available")]
    pixel_values = tokenizer.preprocess(images(1))
    for _ in range(2):
        agree(run, tokenizer, pixel_values)
    assert len(cuda.captures) == 1  # it is not tried with every frame
    assert not cuda.in_pool and cuda.released == cuda.pools
    assert cuda.current == before
    fresh = CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32)
    agree(fresh, tokenizer, pixel_values)
    assert fresh.name == "graph"


@pytest.mark.parametrize("failures, name, wanted", [(1, "graph", False), (2, "eager", True)])
@torch.inference_mode()
def test_a_capture_that_fails_is_tried_without_dependent_launches(
    cuda, graphs, monkeypatch, caplog, failures, name, wanted
):
    run, tokenizer = graphs
    monkeypatch.setattr(dependent_launches, "in_use", lambda: dependent_launches.WANTED)
    monkeypatch.setattr(dependent_launches, "WANTED", True)
    cuda.failures = [RuntimeError("CUDA error: operation not supported") for _ in range(failures)]
    for views in (1, 2):
        agree(run, tokenizer, tokenizer.preprocess(images(views)))
        assert run.name == (name if views == 1 else "graph") and dependent_launches.WANTED == wanted
    assert len(cuda.captures) == 3 and len(caplog.records) == 1
    assert ("without dependent launches" in caplog.text) == (failures == 1) == (not run.fallback)


@torch.inference_mode()
def test_one_number_of_views_without_a_graph_leaves_the_others_theirs(cuda, graphs, caplog):
    run, tokenizer = graphs
    one, two, nine = (tokenizer.preprocess(images(views)) for views in (1, 2, 9))
    agree(run, tokenizer, one)
    cuda.failures = [RuntimeError("CUDA out of memory\nTried to allocate 9 GiB")]
    for pixel_values in (nine, one, two, nine, one):
        agree(run, tokenizer, pixel_values)
    assert [recorder.replays for recorder in cuda.captures] == [3, 0, 1]
    assert run.name == "graph"
    assert run.fallback == "no CUDA graph for [9, 3, 56, 56] and [9, 3, 64, 64]: RuntimeError: CUDA out of memory"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("times, works", [(1, True), (4, True), (5, False)])
@torch.inference_mode()
def test_a_capture_that_another_thread_broke_off_is_tried_again(cuda, graphs, times, works):
    run, tokenizer = graphs
    cuda.failures = [RuntimeError(BROKEN_OFF) for _ in range(times)]
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    assert len(cuda.captures) == min(times + 1, 5)
    assert cuda.slept == list(cuda_graphs._RETRY_AFTER_SEC)[:times]
    assert (run.name, not run.fallback) == (("graph", True) if works else ("eager", False))
    assert not cuda.in_pool


@torch.inference_mode()
def test_a_capture_that_cublas_noticed_first_to_be_broken_off_is_tried_again(cuda, graphs):
    """Its status does not say so; the end of the capture does."""
    run, tokenizer = graphs
    branch, calls = run._branches[0], []

    def fails(pixels):
        calls.append(cuda.broken)
        if len(calls) == cuda_graphs._RUNS_BEFORE_CAPTURE + 1:
            cuda.broken = True
            raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasLtMatmul(...)`")
        return branch(pixels)

    run._branches[0] = fails
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    assert len(cuda.captures) == 2 and cuda.slept == [cuda_graphs._RETRY_AFTER_SEC[0]]
    assert run.name == "graph" and not run.fallback and not cuda.in_pool and not cuda.forked


@torch.inference_mode()
def test_what_cublas_refuses_itself_is_not_tried_again(cuda, graphs):
    run, tokenizer = graphs
    branch, calls = run._branches[0], []

    def fails(pixels):
        calls.append(1)
        if len(calls) == cuda_graphs._RUNS_BEFORE_CAPTURE + 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`")
        return branch(pixels)

    run._branches[0] = fails
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    assert len(cuda.captures) == 1 and not cuda.slept and "CUBLAS_STATUS_NOT_SUPPORTED" in run.fallback


@torch.inference_mode()
def test_the_reason_reported_is_this_calls_and_not_one_that_the_caller_handles(cuda, graphs):
    run, tokenizer = graphs
    pixel_values = tokenizer.preprocess(images(1))
    cuda.failures = [RuntimeError("CUDA out of memory")]
    try:
        {}["camera"]
    except KeyError:
        agree(run, tokenizer, pixel_values)
    assert run.fallback.endswith(": RuntimeError: CUDA out of memory")


def test_encoders_with_different_numbers_of_views_are_refused(cuda, graphs):
    tokenizer = load(runtime="eager")
    tokenizer._runtime = graphs[0]
    two, one = tokenizer.preprocess(images(2)), tokenizer.preprocess(images(1))
    tokenizer.encode(two)
    for mixed in (
        [two[0], one[1]],
        [one[0], two[1]],
        [two[1], two[0]],
        [value[:0] for value in two],
        [two[0][0], two[1]],
    ):
        with pytest.raises(ValueError, match=r"takes pixel values \[views, 3, \d+, \d+\]"):
            tokenizer.encode(mixed)
    assert tokenizer.encode(two).tokens.shape == (2, 16, 256)


@torch.inference_mode()
def test_graphs_belong_to_all_shapes_of_the_inputs(cuda, graphs):
    """One runtime serves whatever its network takes; shapes that merely could be broadcast are not the same."""
    run, tokenizer = graphs
    two = tokenizer.preprocess(images(2))
    run(two)
    with pytest.raises(RuntimeError):
        run([two[0], two[1][:1]])  # as eager: the features do not go together
    agree(run, tokenizer, two)


@torch.inference_mode()
def test_what_cannot_be_compiled_is_captured_as_it_is(cuda, monkeypatch, caplog):
    def fails(*_inputs):
        raise AssertionError  # without a text

    monkeypatch.setattr(torch, "compile", lambda function, **_options: fails)
    tokenizer = load(runtime="eager")
    run = CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32, compiled=True)
    for views in (1, 2, 1):
        agree(run, tokenizer, tokenizer.preprocess(images(views)))
    assert (run.name, run.fallback) == ("graph", "not compiled: AssertionError: ")
    assert len(cuda.captures) == 2 and len(caplog.records) == 1


@torch.inference_mode()
def test_each_failure_is_reported_where_neither_compiling_nor_capturing_works(cuda, monkeypatch):
    def fails(*_inputs):
        raise AssertionError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **_options: fails)
    cuda.failures = [RuntimeError("no kernel image is available")]
    tokenizer = load(runtime="eager")
    run = CudaGraphs(tokenizer.network, torch.device("cpu"), torch.float32, compiled=True)
    agree(run, tokenizer, tokenizer.preprocess(images(1)))
    assert (run.name, run.fallback) == (
        "eager",
        "not compiled: AssertionError: no compiler; no CUDA graph for [1, 3, 56, 56] and [1, 3, 64, 64]: RuntimeError: "
        "no kernel image is available",
    )


# --- preprocessing in the graph


@pytest.fixture
def in_graph(cuda, monkeypatch):
    fake_cuda.let_plans_be_captured(monkeypatch)
    return fake_cuda.in_graph(load(runtime="eager"))


def agrees(tokenizer, exact, images):
    found, expected = (kind(images, features=True) for kind in (tokenizer, exact))
    torch.testing.assert_close(found.tokens, expected.tokens)
    torch.testing.assert_close(found.features, expected.features)


def test_images_become_tokens_in_one_graph(cuda, in_graph):
    exact = load(runtime="eager")
    for seed in range(4):
        agrees(in_graph, exact, images(2, seed))
    assert [recorder.replays for recorder in cuda.captures] == [4]
    assert in_graph(images(2)).features is None
    assert in_graph.runtime == "graph" and not in_graph.runtime_fallback


def test_each_layout_of_images_has_a_graph(cuda, in_graph):
    """Reversed channels and rows, other sizes, padded rows: what the graph reads lies elsewhere."""
    exact = load(runtime="eager")
    wide = np.random.default_rng(7).integers(0, 256, (96, 160, 4), dtype=np.uint8)
    kinds = [
        [wide[:, :, :3]],
        [wide[:, :, 2::-1]],
        [wide[::-1, ::-1, :3]],
        [wide[:48, :, :3]],
        [wide[:, :, :3], wide[:48, :, :3]],
    ]
    in_graph._runtime._earned = cuda_graphs._CALLS_PER_CAPTURE * len(kinds)
    for images in kinds * 2:
        agrees(in_graph, exact, images)
    assert len(in_graph._runtime._captured) == len(kinds)
    agrees(in_graph, exact, [(255 - wide)[:, :, :3]])
    assert len(cuda.captures) == len(kinds)


def test_a_graph_holds_on_to_its_plan_and_pixel_values(cuda, in_graph):
    """They lie outside the graphs' memory pool, and the preprocessor may forget a plan."""
    held = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default):
                held.append(weakref.ref(result))
            return result

    plan = weakref.ref(in_graph._preprocessor.plan(images(1)))
    with Watch():
        in_graph(images(1))
    in_graph._preprocessor._plan.cache_clear()
    (entry,) = [entry for key, entry in in_graph._runtime._captured.items() if not isinstance(key[0], torch.Size)]
    for recorder in cuda.captures:
        recorder.operations.clear()  # which hold on to all, unlike CUDA
    gc.collect()
    assert plan() is not None and len([one for one in held if one() is not None]) >= 1 + len(entry.prepare())


def test_results_stay_when_other_images_follow(in_graph):
    exact = load(runtime="eager")
    first = [in_graph(images(1, seed)).tokens for seed in range(4)]
    for seed, tokens in enumerate(first):
        torch.testing.assert_close(tokens, exact(images(1, seed)).tokens)


def test_images_are_written_when_the_last_replay_is_done(cuda, in_graph):
    in_graph.warm_up(1, (120, 160))
    in_graph(images(1))
    in_graph(images(1))
    del cuda.order[:]
    in_graph(images(1))
    (first, _, waited), (last, _, recorded) = cuda.order
    assert (first, last) == ("wait event", "record") and waited == recorded


def test_where_images_cannot_be_captured_the_two_steps_do_it(cuda, in_graph, caplog):
    exact = load(runtime="eager")
    cuda.failures = [RuntimeError("CUDA out of memory")]
    for seed in range(4):
        agrees(in_graph, exact, images(1, seed))
    assert [recorder.replays for recorder in cuda.captures] == [0, 4]
    assert in_graph.runtime == "graph" and in_graph.runtime_fallback == (
        "no CUDA graph for an image of 160 × 120: RuntimeError: CUDA out of memory"
    )
    assert len(caplog.records) == 1


def test_a_graph_of_images_does_not_hide_that_pixel_values_run_eagerly(cuda, in_graph):
    """`runtime` is graph as soon as there is one; what runs without stays in `runtime_fallback`."""
    cuda.failures = [RuntimeError("CUDA out of memory")]
    in_graph.encode(in_graph.preprocess(images(1)))
    reason = "no CUDA graph for [1, 3, 56, 56] and [1, 3, 64, 64]: RuntimeError: CUDA out of memory"
    assert (in_graph.runtime, in_graph.runtime_fallback) == ("eager", reason)
    exact = load(runtime="eager")
    for seed in range(2):
        agrees(in_graph, exact, images(1, seed))
    assert (in_graph.runtime, in_graph.runtime_fallback) == ("graph", reason)


def test_without_kernels_preprocessing_is_in_no_graph(cuda, in_graph, monkeypatch):
    plan = in_graph._preprocessor.plan(images(1))
    plan.capturable = False
    for _ in range(3):
        assert in_graph._runtime.from_images(plan, never) is None
    assert not cuda.captures
    plan.capturable, cuda.capturing_elsewhere = True, True
    for _ in range(3):
        assert in_graph._runtime.from_images(plan, never) is None


def never(memory):
    raise AssertionError("there is no graph to fill")


def test_uploaded_images_are_encoded_in_the_same_graph(cuda, in_graph):
    """The first ones, too, for which it is captured; in one step and in two it is one graph."""
    exact = load(runtime="eager")
    uploaded = [in_graph.prepare(images(2, seed)) for seed in range(4)]  # before any is encoded
    found = [in_graph.encode(each, features=True) for each in uploaded]
    found.append(in_graph(images(2, 4), features=True))
    assert [recorder.replays for recorder in cuda.captures] == [5]
    for seed, output in enumerate(found):
        expected = exact(images(2, seed), features=True)
        torch.testing.assert_close(output.tokens, expected.tokens)
        torch.testing.assert_close(output.features, expected.features)


def sized(width, height=48):
    return [np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)]


def test_the_first_images_of_another_size_or_layout_get_their_graph_and_the_log_says_so_once(cuda, in_graph, caplog):
    caplog.set_level("INFO")
    exact, cameras = load(runtime="eager"), ["front", "wrist"]
    wide = np.random.default_rng(7).integers(0, 256, (96, 160, 4), dtype=np.uint8)
    kinds = [
        ([wide[:, :, 2::-1], wide[:48, :, :3]], "front: 160x96 bgr8, wrist: 160x48 rgba8"),
        ([wide[::-1, ::-1, :3], np.broadcast_to(wide[:, :, :1].copy(), (96, 160, 3))], None),
    ]
    kinds[0][0][0] = np.ascontiguousarray(wide[:, :, :3])[:, :, ::-1]
    kinds[1] = (kinds[1][0], "front: 160x96 rgba8, wrist: 160x96 mono8")
    for images, text in kinds:
        for _ in range(3):
            tokens = in_graph.encode(in_graph.prepare(images, cameras)).tokens
            torch.testing.assert_close(tokens, exact(images).tokens)
        messages = [record.getMessage() for record in caplog.records if "warmed up" in record.getMessage()]
        assert len(messages) == 1 and re.fullmatch(rf"warmed up for {text} in \d+\.\d\d s", messages[0])
        caplog.clear()
    assert [recorder.replays for recorder in cuda.captures] == [3, 3]
    in_graph(sized(90))
    assert "warmed up for 90x48 rgb8 in " in caplog.text


def test_sizes_that_change_with_every_image_are_not_captured_for_ever(cuda, in_graph):
    exact = load(runtime="eager")
    for width in range(60, 80):
        agrees(in_graph, exact, sized(width))
    # and one graph from pixel values, for the others
    assert len(cuda.captures) == cuda_graphs._CAPTURES_AHEAD + 1 and cuda.captures[-1].replays == 16


def test_more_sizes_in_turn_than_graphs_are_kept_are_not_captured_for_ever(cuda, in_graph):
    random = np.random.default_rng(0)
    for width in random.integers(60, 72, 60):
        in_graph(sized(width))
    assert len(cuda.captures) == cuda_graphs._CAPTURES_AHEAD + 1


def test_a_size_that_stays_gets_its_graph_after_all(cuda, in_graph, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_CALLS_PER_CAPTURE", 10)
    in_graph._runtime._earned = 0
    for _ in range(10):
        in_graph(sized(60))
    assert [recorder.replays for recorder in cuda.captures] == [10]  # from pixel values
    in_graph(sized(60))
    assert [recorder.replays for recorder in cuda.captures] == [10, 1]
    for _ in range(5):  # in turn with one that has a graph
        in_graph(sized(61))
        in_graph(sized(60))
    assert [recorder.replays for recorder in cuda.captures] == [15, 6]
    in_graph(sized(61))
    assert [recorder.replays for recorder in cuda.captures] == [15, 6, 1]


def test_what_was_earned_is_limited(cuda, in_graph, monkeypatch):
    """A day with one size does not pay for thousands of captures."""
    monkeypatch.setattr(cuda_graphs, "_CALLS_PER_CAPTURE", 5)
    in_graph._runtime._earned = 0
    for _ in range(50):
        in_graph(sized(60))
    assert in_graph._runtime._earned == 5 * cuda_graphs._CAPTURES_AHEAD


def test_warming_up_for_sizes_that_are_announced_takes_nothing_from_others(cuda, in_graph):
    in_graph.device = torch.device("cuda")
    for width in range(60, 66):
        in_graph.warm_up(1, (48, width))
    assert len(cuda.captures) == 6 + 1  # and one from pixel values
    for width in range(60, 66):
        in_graph(sized(width))
    assert len(cuda.captures) == 7
    for width in range(66, 72):
        in_graph(sized(width))
    assert len(cuda.captures) == 7 + cuda_graphs._CAPTURES_AHEAD + 1  # the one from pixel values had to go for these


def test_encoding_waits_for_the_upload_of_another_stream(cuda, in_graph):
    in_graph.warm_up(1, (120, 160))
    in_graph(images(1))
    del cuda.order[:]
    uploading, encoding = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(uploading):
        uploaded = in_graph.prepare(images(1))
    with torch.cuda.stream(encoding):
        in_graph.encode(uploaded)
    (kind, on, event), first, *_ = cuda.order
    assert (kind, on) == ("record", id(uploading)) and first == ("wait event", id(encoding), event)


def test_a_callers_autocast_is_in_no_graph(cuda, in_graph):
    """Whoever called first would decide in which precision all others are computed."""
    exact = load(runtime="eager")
    expected = exact(images(1)).tokens
    with torch.autocast("cpu", torch.bfloat16):
        in_graph.warm_up(1, (120, 160))
        found = [in_graph(images(1)).tokens, in_graph.encode(in_graph.prepare(images(1))).tokens]
        assert torch.is_autocast_enabled("cpu")
    for tokens in (*found, in_graph(images(1)).tokens, in_graph.encode(in_graph.preprocess(images(1))).tokens):
        torch.testing.assert_close(tokens, expected)


def test_on_a_cpu_prepared_images_are_pixel_values():
    tokenizer = load(runtime="eager")
    for prepared, expected in zip(tokenizer.prepare(images(2)), tokenizer.preprocess(images(2)), strict=True):
        assert torch.equal(prepared, expected)


# --- on a device


@pytest.mark.gpu
def test_every_way_gives_the_same_bits():
    tokenizer = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    tokenizer.warm_up(2, (120, 160))
    for seed in range(3):
        batch = images(2, seed)
        tokens = tokenizer(batch).tokens
        assert torch.equal(tokens, tokenizer.encode(tokenizer.prepare(batch)).tokens)
        assert torch.equal(tokens, tokenizer.encode(tokenizer.preprocess(batch)).tokens)


@pytest.mark.gpu
def test_uploads_on_another_stream_are_encoded_whole():
    """Many in a row, none of which is waited for: memory that one reads is not given to the next too early."""
    tokenizer = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    tokenizer.warm_up(1, (1200, 1600))
    large = [[np.kron(image, np.ones((10, 10, 1), np.uint8)) for image in images(1, seed)] for seed in range(4)]
    expected = [tokenizer(batch).tokens for batch in large]
    uploading, encoding = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    found = []
    for number in range(40):
        with torch.cuda.stream(uploading):
            uploaded = tokenizer.prepare(large[number % 4])
        with torch.cuda.stream(encoding):
            found.append(tokenizer.encode(uploaded).tokens)
        del uploaded
    torch.cuda.synchronize()
    assert all(torch.equal(tokens, expected[number % 4]) for number, tokens in enumerate(found))


@pytest.mark.gpu
def test_one_graph_gives_the_bits_of_two_steps():
    tokenizer = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    for views, step in ((1, 1), (3, 1), (2, -1)):
        for seed in range(3):
            given = [image[:, :, ::step] for image in images(views, seed)]
            two_steps = tokenizer.encode(tokenizer.preprocess(given), features=True)
            whole = tokenizer(given, features=True)
            assert torch.equal(whole.tokens, two_steps.tokens) and torch.equal(whole.features, two_steps.features)
    assert sum(not isinstance(key[0], torch.Size) for key in tokenizer._runtime._captured) == 3
    assert not tokenizer.runtime_fallback


def synchronizing(stop):
    """Waits for the whole device now and then, as a policy in the same process may."""
    while not stop.wait(0.02):
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_capture_survives_a_thread_that_synchronizes_the_device():
    stop = threading.Event()
    thread = threading.Thread(target=synchronizing, args=(stop,))
    thread.start()
    try:
        tokenizer = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
        for views in (1, 2, 3):
            tokenizer.warm_up(views)
    finally:
        stop.set()
        thread.join()
    assert tokenizer.runtime == "graph", tokenizer.runtime_fallback


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_process_as_it_was():
    broken = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    failing_at(broken._runtime, 0, cuda_graphs._RUNS_BEFORE_CAPTURE + 1)
    broken.encode(broken.preprocess(images(1)))
    assert broken.runtime == "eager" and "OutOfMemoryError" in broken.runtime_fallback
    torch.cuda.empty_cache()
    other = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    for tokenizer in (broken, other):
        tokenizer.warm_up(2)
        assert tokenizer.runtime == "graph", tokenizer.runtime_fallback
    assert "OutOfMemoryError" in broken.runtime_fallback and not other.runtime_fallback
    assert torch.equal(broken(images(2)).tokens, other(images(2)).tokens)


@pytest.mark.gpu
def test_graphs_live_through_clearing_of_cublas_workspaces():
    """Inductor's CUDA graphs do that in a policy that is compiled."""
    tokenizer = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    before = tokenizer(images(1)).tokens
    torch._C._cuda_clearCublasWorkspaces()
    others = [torch.full((1 << 20,), 3.0, device="cuda") for _ in range(64)]
    assert all(torch.equal(tokenizer(images(1)).tokens, before) for _ in range(5))
    assert all(bool((part == 3).all()) for part in others)


@pytest.mark.gpu
def test_a_policy_can_capture_the_tokenizer_and_graphs_of_its_own():
    tokenizer = load(device="cuda", runtime="graph", compute_dtype="bfloat16")
    pixel_values = tokenizer.preprocess(images(1))
    expected = tokenizer.encode(pixel_values).tokens  # the process's first capture, under inference_mode
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        random = torch.rand(4, device="cuda")
        tokens = tokenizer.encode(pixel_values).tokens
    graph.replay()
    torch.cuda.synchronize()
    assert float((tokens.float() - expected.float()).norm() / expected.float().norm()) < 2e-2
    assert bool((random >= 0).all())
