"""What a node that was cleaned up gives back."""

import subprocess
import sys

import pytest

from vla_perception.nodes.visual_tokenizer import loading

PROGRAM = """
import re, threading
from vla_perception.nodes.visual_tokenizer.loading import release_memory

def resident():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) // 1024

kept = []

def load():
    blocks = [bytearray(64 << 10) for _ in range(1600)]
    kept.append(blocks[-1])  # so that what lies before it is not given back by itself

before = resident()
for _ in range(3):  # in threads, as transitions are
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
freed = resident()
release_memory()
print(before, freed, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_model_goes_back_to_the_system():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, freed, released = map(int, run.stdout.split())
    assert freed > before + 80, "glibc kept it; otherwise this shows nothing"
    assert released < before + 10


class Unmappable:
    """As without memory for PyTorch's libraries."""

    def find_spec(self, name, path=None, target=None):
        if name == "vla_perception.tokenizer.runtime":
            raise OSError("libcudart.so.13: failed to map segment from shared object")


def test_an_import_of_pytorch_that_breaks_off_is_final(monkeypatch):
    """A second one in the same process fails whatever there is then."""
    monkeypatch.delitem(sys.modules, "vla_perception.tokenizer.runtime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Unmappable(), *sys.meta_path])
    with pytest.raises(loading.BrokenImportError, match="new process .* OSError: libcudart"):
        loading._import_tokenizer()
