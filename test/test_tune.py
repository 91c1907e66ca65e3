"""`vla-perception tune`: what it writes, prints and refuses. The search itself: test_product_search.py."""

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
import fake_cublaslt  # noqa: E402
import fake_cuda  # noqa: E402
from fake_cublaslt import FakeLt, load  # noqa: E402

from vla_perception import cli, tune  # noqa: E402
from vla_perception.tokenizer import VisualTokenizer, cublaslt, tuned_products  # noqa: E402
from vla_perception.tokenizer.devices import Placement  # noqa: E402


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU that passes for a GPU, on which every proposal is faster than the one before."""
    lt = fake_cublaslt.install(monkeypatch, tmp_path)
    monkeypatch.setattr(tune, "place", lambda *_: Placement(torch.device("cpu"), "bfloat16", "a test"))
    monkeypatch.setattr(tune, "_library", lambda placement: lt)

    class Loaded:
        given = []

        @classmethod
        def load(cls, model, **options):
            cls.given.append((model, options))
            return load(encoders=options["encoders"], image_size=options["image_size"] or [56, 64])

    monkeypatch.setattr(tune, "VisualTokenizer", Loaded)
    times = iter(range(10_000, 0, -1))
    monkeypatch.setattr(
        tune.GraphTimer, "compare", lambda self, captures, rounds: [float(next(times)) for _ in captures]
    )
    monkeypatch.setattr("vla_perception.tokenizer.product_search._LEAST_GAIN", 0)
    monkeypatch.setattr(tune.GraphTimer, "alone", lambda self, group, rows, product: 1.0 + product.choice.index)
    with fake_cuda.one_thread():
        yield Loaded


def test_what_is_found_is_written_and_used_at_the_next_start(machine, tmp_path, capsys):
    assert cli.main(["tune", "--model", "tiny-random", "--views", "1,2", "--seconds", "60"]) == 0
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "vla_perception" / "tuned_products").iterdir()
    assert machine.given == [
        (
            "tiny-random",
            {
                "device": "cpu",
                "compute_dtype": "bfloat16",
                "runtime": "graph",
                "encoders": None,
                "image_size": None,
            },
        )
    ]
    for views in (1, 2):
        assert re.search(
            rf"^{views} view\(s\): one replay \d+\.\d → \d+\.\d µs, 8 of 8 products changed after \d+ tries; tokens' "
            r"relative L2 to before \d\.\de-\d+$",
            printed,
            re.MULTILINE,
        )
    (number,) = re.findall(r"tuned products ([0-9a-f]{12}), used by runtime graph from the next start on", printed)
    assert str(file) in printed and "tiny-random, a fake, bfloat16, torch" in printed
    assert tuned_products.use(load().network) == f"tuned products {number} for 1, 2 view(s)"


def test_a_folder_that_cannot_be_written_is_told_before_the_search(machine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("it searched"))
    (tmp_path / "vla_perception").mkdir()
    (tmp_path / "vla_perception" / "tuned_products").write_text("in the way")
    assert cli.main(["tune", "--model", "tiny-random"]) == 1
    assert "tuned_products" in capsys.readouterr().err


def test_where_nothing_is_faster_nothing_changes(machine, monkeypatch, capsys):
    monkeypatch.setattr(tune.GraphTimer, "compare", lambda self, captures, rounds: [10.0] * len(captures))
    assert cli.main(["tune", "--model", "tiny-random"]) == 0
    printed = capsys.readouterr().out
    assert "0 of 8 products changed" in printed and "nothing faster was found, so nothing changes" in printed
    assert tuned_products.use(load().network) == ""


def test_other_numbers_of_views_keep_what_was_found_for_them(machine):
    key = tuned_products.key_of(FakeLt(), tuned_products.groups_of(load().network))
    file = tuned_products.file_of(key)
    found = []
    for views in ("2", "1", "2"):
        assert cli.main(["tune", "--model", "tiny-random", "--views", views]) == 0
        found.append(tuned_products.read(file, key))
    assert [sorted(each) for each in found] == [[2], [1, 2], [1, 2]]
    assert found[1][2] == found[0][2] and found[2][1] == found[1][1]
    file.write_text("{")
    assert cli.main(["tune", "--model", "tiny-random", "--views", "3"]) == 0  # in the place of what is damaged
    assert sorted(tuned_products.read(file, key)) == [3]
    assert cli.main(["tune", "--model", "tiny-random", "--encoders", "siglip", "--image-size", "64"]) == 0
    assert len(list(file.parent.iterdir())) == 2


def test_what_another_process_finds_meanwhile_stays(machine, monkeypatch):
    key = tuned_products.key_of(FakeLt(), tuned_products.groups_of(load().network))
    file, search = tuned_products.file_of(key), tune.tune
    theirs = {"siglip mlp.fc2": FakeLt().proposals(4, torch.empty(1, 1), None)[1].choice}

    def beside(*arguments):
        tuned_products.write(file, key, {5: theirs})
        return search(*arguments)

    monkeypatch.setattr(tune, "tune", beside)
    assert cli.main(["tune", "--model", "tiny-random", "--views", "2"]) == 0
    found = tuned_products.read(file, key)
    assert sorted(found) == [2, 5] and found[5] == theirs and found[2]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda patch: patch.setitem(tune.TOLERANCES, "bfloat16", 1e-9), r"would come .* from those before, where"),
        (lambda patch: patch.setattr(torch, "equal", lambda *_: False), "not have the same bits twice"),
        (
            lambda patch: patch.setattr(tune.GraphTimer, "capture", lambda self: _raise()),
            "tuning failed: no CUDA graph",
        ),
    ],
)
def test_tokens_that_are_too_far_are_not_kept(machine, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.setattr(tuned_products, "gives_the_product", lambda product, layer, rows: product.choice.index == 1)
    change(monkeypatch)
    assert cli.main(["tune", "--model", "tiny-random"]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert list((tmp_path / "vla_perception" / "tuned_products").iterdir()) == []


def _raise():
    raise RuntimeError("no CUDA graph")


def test_forgetting_removes_all_of_it(machine, tmp_path, capsys):
    folder = tmp_path / "vla_perception" / "tuned_products"
    for left in (1, 0):
        if left:
            assert cli.main(["tune", "--model", "tiny-random"]) == 0
            capsys.readouterr()
        assert cli.main(["tune", "--forget"]) == 0
        assert capsys.readouterr().out == f"{left} file(s) of tuned products removed from {folder}\n"
        assert not folder.exists() or not list(folder.iterdir())
    assert tuned_products.use(load().network) == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "tune takes --model, or --forget"),
        (["--model", "tiny-random", "--encoders", "clip"], "clip"),
        (["--model", "tiny-random", "--device", "cpu"], "tune needs an NVIDIA GPU, and this would be cpu in float32"),
        (["--model", "tiny-random", "--views", "65"], "at most 64 views can be tuned, not 65"),
    ],
)
def test_where_nothing_can_be_tuned_it_says_why(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(tune.VisualTokenizer, "load", None)  # which would take long
    assert cli.main(["tune", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_what_a_gpu_must_have(monkeypatch):
    cuda = torch.device("cuda", 0)
    for compute_dtype in ("float32", "float8"):
        with pytest.raises(ValueError, match=f"bfloat16 and float16, not {compute_dtype}"):
            tune._library(Placement(cuda, compute_dtype, "a test"))

    def fails(device):
        raise cublaslt.CublasLtError("this PyTorch has no cuBLASLt, which comes with CUDA")

    monkeypatch.setattr(cublaslt, "open_library", fails)
    with pytest.raises(ValueError, match="products cannot be tuned here: this PyTorch has no cuBLASLt"):
        tune._library(Placement(cuda, "bfloat16", "a test"))


@pytest.mark.gpu
def test_a_search_on_a_device_is_used_at_the_next_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["tune", "--model", "tiny-random", "--device", "cuda", "--views", "1,2", "--seconds", "5"]) == 0
    printed = capsys.readouterr().out
    assert "1 view(s): one replay " in printed and "2 view(s): one replay " in printed
    tokenizer = VisualTokenizer.load("tiny-random", device="cuda", runtime="graph")
    changed = [int(number) for number in re.findall(r"(\d+) of 8 products changed", printed)]
    assert len(changed) == 2 and ("tuned products" in tokenizer.kernels) == any(changed)
    tokenizer.warm_up(2)
    assert tokenizer.runtime == "graph" and not tokenizer.runtime_fallback
