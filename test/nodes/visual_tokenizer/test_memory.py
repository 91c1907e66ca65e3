"""What a node gives back to the system."""

import os
import subprocess
import sys

import pytest
from ros_harness import RosContext, in_domain

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


#: As in a node: threads that stay have freed much, after something large was freed (glibc keeps twice as much then).
THREADS = """
import re, threading
from vla_perception.nodes.executables import set_up_malloc
set_up_malloc()
from vla_perception.nodes.visual_tokenizer.loading import trim_memory

def resident():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) // 1024

def work():
    blocks = [bytearray(b"x" * (64 << 10)) for _ in range(400)]
    filled.wait()
    del blocks
    freed.wait()
    end.wait()

bytearray(30 << 20)
filled, freed, end = threading.Barrier(8), threading.Barrier(9), threading.Event()
before = resident()
threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
freed.wait()
trim_memory()
print(resident() - before)
end.set()
"""
SETTINGS = {"MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}


#: Page faults for each image of 1920 × 1080 of several that are received, decoded and freed, as a node does.
IMAGES = """
import resource
from vla_perception.nodes.executables import set_up_malloc
set_up_malloc()

def receive():
    message = bytes(6 << 20)
    image = bytearray(message)

receive()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    receive()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""


def printed(program, **settings):
    """The number that a program prints, with these settings of glibc and no others."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_threads_freed_goes_back_to_the_system():
    assert printed(THREADS) < 20
    by_glibc = printed(THREADS, MALLOC_ARENA_MAX="8")
    assert by_glibc > 80, "who sets it gets it; and glibc keeps it without, or this shows nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_of_images_is_used_again():
    """Otherwise the system zeroes new pages for each, at a fault every 4 KiB."""
    assert printed(IMAGES) < 100
    by_glibc = printed(IMAGES, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert by_glibc > 2000, "who sets it gets it; and these are glibc's own to begin with, or this shows nothing"


@pytest.mark.ros
def test_a_node_gives_memory_back_now_and_then(monkeypatch):
    pytest.importorskip("rclpy")
    from vla_perception.nodes.visual_tokenizer import node as node_module

    given_back = []
    monkeypatch.setattr(node_module, "trim_memory", lambda: given_back.append(1))
    with RosContext() as ros:
        with in_domain(ros.domain):
            node = node_module.VisualTokenizerNode(lambda _code: None, context=ros.context)
        ros.nodes.append(node)
        try:
            monkeypatch.setattr(node_module, "TRIM_SEC", 3600.0)
            node._on_timer()
            assert not given_back
            monkeypatch.setattr(node_module, "TRIM_SEC", 0.0)
            node._on_timer()
            assert len(given_back) == 1
        finally:
            node.close()


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
