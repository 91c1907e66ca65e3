"""The binding to cuBLASLt: against a library that computes from the pointers it is given, and against the real one."""

import ctypes
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
import fake_cuda  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception.tokenizer import cublaslt  # noqa: E402
from vla_perception.tokenizer.cublaslt import CublasLt, CublasLtError  # noqa: E402
from vla_perception.tokenizer.tuned_products import TOLERANCES  # noqa: E402

CPU = torch.device("cpu")
DTYPES = {2: torch.float16, 14: torch.bfloat16}


class Library:
    """cuBLASLt as its documentation has it: columns first, a description with attributes, three proposals per question.

    The proposals for a part of the device are those for all of it with one more.
    """

    def __init__(self):
        self.objects, self.calls, self.heuristic_status, self.matmul_status = {}, [], 0, 0
        self.cublasLtGetVersion = lambda: 130401

    def _new(self, reference, **what):
        self.objects[len(self.objects) + 1] = what
        reference._obj.value = len(self.objects)
        return 0

    def cublasLtCreate(self, handle):
        return self._new(handle)

    def cublasLtMatmulDescCreate(self, description, compute, scale):
        assert (compute, scale) == (68, 0)
        return self._new(description)

    def cublasLtMatmulDescSetAttribute(self, description, number, value, size):
        assert size.value == ctypes.sizeof(value._obj)
        self.objects[description.value][number] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, layout, kind, rows, columns, stride):
        return self._new(layout, kind=kind, rows=rows.value, columns=columns.value, stride=stride.value)

    def cublasLtMatmulPreferenceCreate(self, preference):
        return self._new(preference)

    def cublasLtMatmulPreferenceSetAttribute(self, preference, number, value, size):
        assert (number, value._obj.value, size.value) == (1, 32 << 20, 8)
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle, description, a, b, c, d, preference, asked, results, count):
        if self.heuristic_status:
            return self.heuristic_status
        part = self.objects[description.value].get(15, 0)
        tiles = [10, 20, 30] + ([part] if part else [])
        for index, tile in enumerate(tiles):
            results[index].algorithm[0], results[index].workspace = tile, 100 * index
            results[index].status = 7 if tile == 20 else 0
        count._obj.value = len(tiles)
        return 0

    def cublasLtMatmulAlgoConfigGetAttribute(self, algorithm, number, value, size, written):
        assert size.value == (2 if number > 6 else 4)
        value._obj.value = algorithm._obj.algorithm[0] if number == 1 else number
        return 0

    def matrix(self, pointer, layout):
        """[rows, columns] of memory in which a column is in one piece."""
        what = self.objects[layout.value]
        count = what["columns"] * what["stride"]
        memory = (ctypes.c_uint8 * (2 * count)).from_address(pointer.value)
        flat = torch.frombuffer(memory, dtype=DTYPES[what["kind"]])
        return flat.view(what["columns"], what["stride"])[:, : what["rows"]].t()

    def cublasLtMatmul(
        self,
        handle,
        description,
        alpha,
        a,
        a_layout,
        b,
        b_layout,
        beta,
        c,
        c_layout,
        d,
        d_layout,
        algorithm,
        space,
        size,
        stream,
    ):
        if self.matmul_status:
            return self.matmul_status
        assert alpha._obj.value == 1 and beta._obj.value == 0
        assert (size.value, space.value is not None) == (algorithm._obj.workspace, True)
        attributes = self.objects[description.value]
        left, right = self.matrix(a, a_layout).float(), self.matrix(b, b_layout).float()
        result = (left.t() if attributes[3] else left) @ right
        if attributes.get(7, 1) == 4:
            kind = DTYPES[attributes[26]]
            memory = (ctypes.c_uint8 * (2 * len(result))).from_address(attributes[8])
            result = result + torch.frombuffer(memory, dtype=kind).float()[:, None]
        self.matrix(d, d_layout).copy_(result)
        self.calls.append((algorithm._obj.algorithm[0], b.value))
        return 0


def noise(*shape, dtype=torch.bfloat16):
    """At an address that products take as it is."""
    count = torch.Size(shape).numel()
    memory = torch.empty(count + 128, dtype=dtype)
    made = memory[-memory.data_ptr() % 256 // 2 :][:count].view(shape)
    return made.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))))


@pytest.fixture
def library(monkeypatch):
    fake_cuda.install(monkeypatch)
    return Library()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_is_functional_linear(library, dtype, with_bias):
    lt = CublasLt(library, CPU)
    weight, bias = noise(48, 32, dtype=dtype), noise(48, dtype=dtype) if with_bias else None
    products = lt.proposals(10, weight, bias)
    other_bias = None if bias is None else bias * 2
    for values in (noise(10, 32, dtype=dtype), noise(2, 5, 32, dtype=dtype), noise(32, 10, dtype=dtype).t()):
        for own in (bias, other_bias):  # a description is of all layers that multiply alike
            expected = functional.linear(values, weight, own)
            for product in products:
                torch.testing.assert_close(product(values, weight, own), expected, rtol=2e-2, atol=2e-2)
    assert {tile for tile, _ in library.calls} == {10, 30, 66, 96}


def test_what_is_not_aligned_is_copied_first(library, monkeypatch):
    lt = CublasLt(library, CPU)
    weight, bias = noise(48, 32), noise(48)
    product = lt.proposals(1, weight, bias)[0]
    aligned = noise(32)
    odd = noise(33)[1:]
    assert odd.data_ptr() % 256
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: aligned.copy_(self))
    torch.testing.assert_close(product(odd, weight, bias), functional.linear(odd, weight, bias), rtol=2e-2, atol=2e-2)
    assert library.calls == [(10, aligned.data_ptr())]
    product(aligned, weight, bias)
    assert library.calls[1:] == [(10, aligned.data_ptr())]


def test_proposals_are_all_different_ones_and_each_is_found_again(library):
    lt = CublasLt(library, CPU)
    weight, bias = noise(48, 32), noise(48)
    products = lt.proposals(7, weight, bias)
    assert lt.version == 130401
    # of the whole device, then what is new for a half and for three quarters; 20 was refused by its status
    assert [(each.choice.multiprocessors, each.choice.index, each.choice.configuration.tile) for each in products] == [
        (0, 0, 10),
        (0, 2, 30),
        (66, 3, 66),
        (96, 3, 96),
    ]
    assert products[1].choice.configuration == cublaslt.Configuration(0, 30, 2, 3, 4, 5, 6, 7, 8, 200)
    made = len(library.objects)
    firsts = lt.first_for_parts(7, weight, bias)  # which the whole device has, too
    assert {part: (each.choice.index, each.choice.configuration.tile) for part, each in firsts.items()} == {
        66: (0, 10),
        96: (0, 10),
    }
    for product in products:
        assert lt.product(7, weight, bias, product.choice).choice == product.choice
    assert len(library.objects) == made  # descriptions are made once
    other = cublaslt.Choice(0, 0, products[1].choice.configuration)
    assert lt.product(7, weight, bias, other) is None
    assert lt.product(7, weight, bias, cublaslt.Choice(0, 50, products[0].choice.configuration)) is None
    for part in (-1, 65, 2**32 - 1):  # of another device, or of a damaged file: nothing is asked, and nothing kept
        assert lt.product(7, weight, bias, replace(products[0].choice, multiprocessors=part)) is None
    assert len(library.objects) == made


def test_a_product_without_proposals_has_none_and_other_failures_are_errors(library):
    lt = CublasLt(library, CPU)
    library.heuristic_status = 15
    assert lt.proposals(7, noise(48, 32), noise(48)) == []
    library.heuristic_status = 7
    with pytest.raises(CublasLtError, match="cublasLtMatmulAlgoGetHeuristic ended with status 7"):
        lt.proposals(8, noise(48, 32), noise(48))
    library.heuristic_status, library.matmul_status = 0, 14
    product = lt.proposals(9, noise(48, 32), noise(48))[0]
    with pytest.raises(CublasLtError, match="cublasLtMatmul ended with status 14"):
        product(noise(9, 32), noise(48, 32), noise(48))
    with pytest.raises(CublasLtError, match="no proposals for torch.float32"):
        lt.proposals(7, noise(48, 32, dtype=torch.float32), None)


def test_a_library_that_lacks_functions_is_refused(library, monkeypatch):
    monkeypatch.delattr(Library, "cublasLtMatmulDescCreate")
    with pytest.raises(CublasLtError, match="this cuBLASLt has no cublasLtMatmulDescCreate"):
        CublasLt(library, CPU)


def test_without_cuda_or_its_library_it_says_so(monkeypatch):
    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(CublasLtError, match="no cuBLASLt, which comes with CUDA"):
        cublaslt.open_library(device)
    monkeypatch.setattr(torch.version, "cuda", "14.2")
    monkeypatch.setattr(cublaslt, "_mapped", list)
    with pytest.raises(CublasLtError, match=r"cannot be loaded: libcublasLt\.so\.14: cannot open"):
        cublaslt.open_library(device)


def test_the_library_that_the_process_has_mapped_is_found(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 fe:01 17     /usr/lib/libcublas.so.13\n"
        "7f02-7f03 r-xp 00000000 fe:01 18     /home/a b/nvidia/lib/libcublasLt.so.13\n"
        "7f04-7f05 r--p 00001000 fe:01 18     /home/a b/nvidia/lib/libcublasLt.so.13\n"
    )
    assert cublaslt._mapped(maps) == ["/home/a b/nvidia/lib/libcublasLt.so.13"]
    assert cublaslt._mapped(tmp_path / "none") == []


def test_the_real_library_has_the_functions():
    files = cublaslt._mapped()
    if not files:
        pytest.skip("this PyTorch has no cuBLASLt")
    library = ctypes.CDLL(files[0])
    assert [name for name in cublaslt._FUNCTIONS if not hasattr(library, name)] == []
    assert ctypes.sizeof(cublaslt._Result) == 96


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, out, width", [(261, 3072, 1024), (256, 1152, 4304), (1024, 4304, 1152)])
@torch.inference_mode()
def test_every_proposal_computes_the_product(dtype, rows, out, width):
    device = torch.device("cuda", torch.cuda.current_device())
    lt = cublaslt.open_library(device)
    values, weight = torch.randn(rows, width, device=device).to(dtype), torch.randn(out, width, device=device).to(dtype)
    bias = torch.randn(out, device=device).to(dtype)
    products = lt.proposals(rows, weight, bias)
    assert len(products) > 1
    for own in (bias, bias * 3):
        exact = functional.linear(values.double(), weight.double(), own.double())
        for product in products:
            found = product(values, weight, own).double()
            assert float((found - exact).norm() / exact.norm()) < TOLERANCES[dtype], product.choice
            assert lt.product(rows, weight, own, product.choice).choice == product.choice


@pytest.mark.gpu
@torch.inference_mode()
def test_a_product_can_be_captured():
    device = torch.device("cuda", torch.cuda.current_device())
    values, weight = (torch.randn(256, 1152, device=device).bfloat16() for _ in range(2))
    bias = torch.randn(256, device=device).bfloat16()
    for product in cublaslt.open_library(device).proposals(256, weight, bias):
        expected = product(values, weight, bias)
        graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(values)
        with torch.cuda.graph(graph):
            result = product(static, weight, bias)
        static.copy_(values)
        graph.replay()
        assert torch.equal(result, expected), product.choice
