"""The node as it runs on a GPU, on the CPU: every encoding waits until another set has been prepared meanwhile."""

import sys

from vla_perception.nodes.process import run_node
from vla_perception.nodes.visual_tokenizer import VisualTokenizerNode


class OverlappingNode(VisualTokenizerNode):
    OVERLAPPING = ("cpu", "cuda")
    prepared = 0

    def _prepare(self, job):
        done = super()._prepare(job)
        with self._changed:
            self.prepared += 1
            self._changed.notify_all()
        return done

    def _encode(self, job):
        with self._changed:
            wanted = self.prepared + 1
            if not self._changed.wait_for(lambda: self.prepared >= wanted or not self._active, 30.0):
                raise TimeoutError("no other set was prepared while this one was being encoded")
        return super()._encode(job)


if __name__ == "__main__":
    sys.exit(run_node(OverlappingNode, None, threads=4))
