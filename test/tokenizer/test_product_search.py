"""The search for products: on times that are made up, so that what is best is known."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import fake_cuda  # noqa: E402
from fake_cublaslt import FakeLt, Product, choice, halves, refused, unsteady, wrong  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception.tokenizer import VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.product_search import GraphTimer, Search  # noqa: E402
from vla_perception.tokenizer.tuned_products import Group, TunedLinear, groups_of  # noqa: E402

VIEWS, ROWS = 2, 10


def group(name):
    products = {}
    linear = nn.Linear(32, 48).bfloat16().requires_grad_(False)
    return Group(name, ROWS // VIEWS, [TunedLinear(linear, products)], products)


class Timer:
    """Times of `costs`: a function of group's name → index of its proposal, None for PyTorch's.

    A capture is what the groups have, and its number.
    """

    def __init__(self, groups, costs, alone=None, fails=()):
        self.groups, self.costs, self.fails = groups, costs, fails
        self.alone_us = alone or (lambda name, index: 10.0)
        self.captures, self.now = [], 0.0

    def capture(self):
        self.now += 1
        made = {each.name: each.products[ROWS].choice.index if ROWS in each.products else None for each in self.groups}
        self.captures.append(made)
        if tuple(made.values()) in self.fails:
            raise RuntimeError("no CUDA graph")
        return len(self.captures) - 1

    def compare(self, captures, rounds):
        return [self.costs(self.captures[number], number) for number in captures]

    def alone(self, group, rows, product):
        assert rows == ROWS
        return self.alone_us(group.name, product.choice.index)


@pytest.fixture
def search(monkeypatch):
    fake_cuda.install(monkeypatch)

    def run(groups, timer, seconds=1e9, lt=None):
        return Search(lt or FakeLt(*[functional.linear] * 12), groups, VIEWS, timer, lambda text: None).run(
            seconds, clock=lambda: timer.now
        )

    return run


def chosen(found):
    return {name: choice.index for name, choice in found.choices.items()}


def test_what_is_fastest_in_the_graph_is_kept_and_not_what_is_fastest_alone(search):
    groups = [group("a"), group("b")]

    def costs(made, number):
        return 100 - {None: 0, 2: 5, 4: 9}.get(made["a"], -3) - {None: 0, 0: 1}.get(made["b"], -3)

    timer = Timer(groups, costs, alone=lambda name, index: index)
    found = search(groups, timer)
    assert chosen(found) == {"a": 4, "b": 0} and (found.before_us, found.after_us) == (100, 90)
    assert [each.products[ROWS].choice.index for each in groups] == [4, 0]
    assert found.tried > 2


def test_a_second_pass_finds_what_pays_only_beside_a_later_change(search):
    groups = [group("a"), group("b")]

    def costs(made, number):
        return 100 - (4 if made["b"] == 1 else 0) - (6 if made == {"a": 3, "b": 1} else -1 if made["a"] == 3 else 0)

    assert chosen(search(groups, Timer(groups, costs))) == {"a": 3, "b": 1}


class PartsLt(FakeLt):
    """Two proposals for the whole device, two for half of it."""

    def proposals(self, rows, weight, bias):
        choices = [choice(0), choice(1), choice(0, 66, tile=200), choice(1, 66, tile=201)]
        return [Product(functional.linear, each) for each in choices]


class PartsTimer(Timer):
    """A capture has the tiles."""

    def capture(self):
        super().capture()
        self.captures[-1] = {
            each.name: each.products[ROWS].choice.configuration.tile if ROWS in each.products else None
            for each in self.groups
        }
        return len(self.captures) - 1


def test_products_for_a_part_of_the_device_are_tried_together_first(search):
    """One of them alone makes it slower, as the others still want all of the device."""
    groups = [group("a"), group("b"), group("c")]

    def costs(made, number):
        parts = sum((tile or 0) >= 200 for tile in made.values())
        return 80 - (made["c"] == 201) if parts == 3 else 100 + parts

    found = search(groups, PartsTimer(groups, costs), lt=PartsLt())
    assert {name: choice.configuration.tile for name, choice in found.choices.items()} == {"a": 200, "b": 200, "c": 201}
    assert (found.before_us, found.after_us) == (100, 79)


def test_a_product_for_a_part_that_is_refused_is_left_out(search):
    class Refusing(PartsLt):
        def first_for_parts(self, rows, weight, bias):
            return {66: Product(refused, choice(0, 66))}

    groups = [group("a")]
    assert search(groups, PartsTimer(groups, lambda made, number: 100), lt=Refusing()).choices == {}


def test_what_is_no_gain_together_leaves_everything_as_it_was(search):
    groups = [group("a"), group("b")]
    timer = PartsTimer(groups, lambda made, number: 100 + number)
    assert search(groups, timer, lt=PartsLt()).choices == {}
    assert timer.captures[:2] == [{"a": None, "b": None}, {"a": 200, "b": 200}]
    assert groups[0].products == groups[1].products == {}


def test_what_there_is_most_to_gain_from_comes_first(search):
    groups = [group("small"), group("large")]
    timer = Timer(groups, lambda made, number: 100, alone=lambda name, index: {"small": 1, "large": 9}[name])
    search(groups, timer)
    assert timer.captures[1]["large"] == 0 and timer.captures[1]["small"] is None


def test_the_fastest_alone_are_tried_and_some_for_a_part_of_the_device(search):
    groups = [group("a")]
    timer = Timer(groups, lambda made, number: 100, alone=lambda name, index: -index)
    search(groups, timer)
    tried = [made["a"] for made in timer.captures[1:]]
    # of 12, the fastest seven; then those of the others that are for 66 multiprocessors
    assert tried == [11, 10, 9, 8, 7, 6, 5, 3, 1] * 2


def test_a_gain_that_a_second_capture_does_not_show_is_noise(search):
    groups = [group("a")]
    lucky = {}  # the first capture of each

    def costs(made, number):
        return 50 if made["a"] is not None and lucky.setdefault(made["a"], number) == number else 100

    found = search(groups, Timer(groups, costs))
    assert found.choices == {} and groups[0].products == {} and (found.before_us, found.after_us) == (100, 100)


def test_a_gain_below_the_noise_is_not_worth_other_bits(search):
    groups = [group("a")]
    found = search(groups, Timer(groups, lambda made, number: 100 if made["a"] is None else 99.95))
    assert found.choices == {} and groups[0].products == {} and found.before_us == found.after_us == 100


def test_a_second_timing_of_what_was_there_is_no_gain(search):
    """At the end PyTorch's products are timed beside themselves where nothing was faster."""
    groups = [group("a")]
    timer = Timer(groups, lambda made, number: 100)
    timer.compare = lambda captures, rounds: [100.0, 50.0] if captures[0] == captures[1] else [100.0, 100.0]
    found = search(groups, timer)
    assert found.choices == {} and (found.before_us, found.after_us) == (100, 100)


def test_it_ends_in_time_and_keeps_what_it_has(search):
    groups = [group("a"), group("b")]
    timer = Timer(
        groups, lambda made, number: 100 - sum(5 + (index or 0) for index in made.values() if index is not None)
    )
    found = search(groups, timer, seconds=5)  # a capture takes a second
    assert len(timer.captures) <= 8 and found.tried < 5
    assert found.choices and found.after_us < found.before_us
    nothing = [group("a")]
    found = search(nothing, timer := Timer(nothing, lambda made, number: 100), seconds=0)
    assert len(timer.captures) == 1 and found.choices == {}


def test_a_proposal_that_cannot_be_captured_is_skipped(search):
    groups = [group("a")]
    costs = {None: 100, 0: 10, 1: 90}
    found = search(groups, Timer(groups, lambda made, number: costs.get(made["a"], 100), fails=[(0,)]))
    assert chosen(found) == {"a": 1}


def test_a_network_that_cannot_be_captured_cannot_be_tuned(search):
    groups = [group("a")]
    with pytest.raises(RuntimeError, match="no CUDA graph"):
        search(groups, Timer(groups, None, fails=[(None,)]))


def test_proposals_that_give_another_product_are_never_timed(search):
    groups = [group("a")]
    timer = Timer(groups, lambda made, number: 100 if made["a"] is None else 10)
    found = search(groups, timer, lt=FakeLt(wrong, refused, unsteady, halves))
    assert chosen(found) == {"a": 3} and {made["a"] for made in timer.captures} == {None, 3}
    assert search(groups, timer, lt=FakeLt(wrong)).tried == 0


@torch.inference_mode()
def test_real_captures_are_of_the_network_as_it_is(monkeypatch):
    happened = fake_cuda.install(monkeypatch)
    tokenizer = VisualTokenizer.load(
        "tiny-random", image_size=[56, 64], device="cpu", compute_dtype="bfloat16", runtime="eager"
    )
    groups = groups_of(tokenizer.network)
    with fake_cuda.one_thread():
        timer = GraphTimer(tokenizer.network, VIEWS)
        before, first = timer.tokens(), timer.capture()
        rows, layer = VIEWS * groups[0].tokens, groups[0].layers[0]
        product = FakeLt(halves).proposals(rows, layer.weight, layer.bias)[0]
        assert timer.alone(groups[0], rows, product) > 0
        groups[0].products[rows] = product
        second = timer.capture()
        times = timer.compare([first, second], 3)
        assert len(times) == 2 and min(times) > 0
        after = timer.tokens()
        assert torch.equal(after, timer.tokens()) and not torch.equal(after, before)
        groups[0].products.clear()
        assert torch.equal(timer.tokens(), before)
        happened.failures = [RuntimeError("no kernel image")]
        with pytest.raises(RuntimeError, match="no kernel image"):
            timer.alone(groups[0], rows, product)
        assert not happened.in_pool and len(happened.released) == 1  # the allocator does not believe in that capture
        happened.failures = [RuntimeError("no kernel image")]
        with pytest.raises(RuntimeError, match="no CUDA graph for .*: no kernel image"):
            timer.capture()
