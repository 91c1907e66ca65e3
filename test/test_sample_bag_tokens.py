"""The sample bag's token messages, byte by byte, against digests that were recorded once.

A change that means to leave tokens alone leaves these alone: metadata, fingerprint, order of views, image decoding,
preprocessing, weights and arithmetic. The arithmetic runs in a process of its own in which torch and MKL keep to
instructions that every x86-64 processor has, and in one thread; the digests belong to the torch version beside them.

    python test/test_sample_bag_tokens.py      # prints what the test compares
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORDED = json.loads((ROOT / "test/data/sample_bag_tokens.json").read_text(encoding="utf-8"))
SAME_EVERYWHERE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}


def messages(count: int) -> list[bytes]:
    """The first `count` token messages that the node makes of the sample bag, one frame set after the other."""
    from rosbags.typesys import Stores, get_typestore

    from vla_perception.images.decode import decode_image
    from vla_perception.sources.bags import Bag
    from vla_perception.synchronizer import SetSynchronizer
    from vla_perception.tokenizer import VisualTokenizer
    from vla_perception.tokens import View, VisualTokens

    tokenizer = VisualTokenizer.load("tiny-random", device="cpu", compute_dtype="float32", runtime="eager")
    synchronizer = SetSynchronizer(["front", "wrist"])
    types, found = get_typestore(Stores.ROS2_JAZZY), []
    with Bag(ROOT / "examples/sample_bag") as bag:
        for recorded in bag.messages(bag.image_topics()):
            image = types.deserialize_cdr(recorded.cdr, recorded.type)
            stamp_ns = image.header.stamp.sec * 10**9 + image.header.stamp.nanosec
            if not synchronizer.add(recorded.topic.split("/")[1], stamp_ns, image):
                continue
            frames = synchronizer.take()
            images = [decode_image(frame.image) for frame in frames]
            views = [
                View(
                    frame.camera,
                    frame.image.header.frame_id,
                    frame.stamp_ns,
                    *image.shape[:2],
                    tokenizer.affine(*image.shape[:2], frame.camera),
                    roi=tokenizer.roi(*image.shape[:2], frame.camera),
                )
                for frame, image in zip(frames, images)
            ]
            tokens = tokenizer(images, [frame.camera for frame in frames]).tokens.bfloat16()
            metadata = tokenizer.metadata() | {"model": RECORDED["model"]}  # the preset's name then
            visual = VisualTokens.from_torch(tokens, sequence=len(found), views=views, **metadata)
            found.append(visual.to_bytes())
            if len(found) == count:
                return found
    return found


def digests(count: int) -> dict[str, list[str]]:
    """Of each message's header (everything but the tensors) and of all of it."""
    found = messages(count)
    headers = [message[: 8 + int.from_bytes(message[:8], "little")] for message in found]
    return {
        "header_sha256": [hashlib.sha256(header).hexdigest() for header in headers],
        "message_sha256": [hashlib.sha256(message).hexdigest() for message in found],
    }


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, __file__, str(len(RECORDED["message_sha256"]))]
    environment = os.environ | SAME_EVERYWHERE | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_names_places_and_fingerprint_of_the_sample_bags_tokens_stay(found):
    assert found["header_sha256"] == RECORDED["header_sha256"]


def test_tokens_of_the_sample_bag_stay(found):
    if found["torch"] != RECORDED["torch"]:
        pytest.skip(f"recorded with torch {RECORDED['torch']}; {found['torch']} may sum in another order")
    assert found["message_sha256"] == RECORDED["message_sha256"]


if __name__ == "__main__":
    import torch

    version = torch.__version__.split("+")[0]
    print(json.dumps({"torch": version, **digests(int(sys.argv[1]) if sys.argv[1:] else 4)}))
