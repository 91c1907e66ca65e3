"""Token files: what is written is what is read, by another reader too, and nothing else is believed."""

import json
import pickle

import numpy as np
import pytest

pytest.importorskip("torch")
from fake_tokenizer import MODEL, make_tokens
from safetensors import safe_open

from vla_perception.offline.recordings import FrameSet, SourceError
from vla_perception.offline.token_file import TokenFile
from vla_perception.offline.token_file_writer import BusyError, Geometry, Layout, TokenFileWriter
from vla_perception.tokens import VisualTokens
from vla_perception.tokens.codec import TokenFormatError

SHAPE = (2, 12, 7)  # of which bytes leave what follows unaligned
GEOMETRY = [
    Geometry(480, 640, (4 / 640, 0.0, 0.0, 0.0, 3 / 480, 0.0), None),
    Geometry(10, 20, (0.25, 0.0, -1.0, 0.0, 0.5, 0.0), (2.0, 1.0, 18.0, 9.0)),
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"something recorded")
    return path


def layout(**changes):
    model = {key: value for key, value in MODEL.items() if key not in ("projector", "encoders")}
    model |= {"grid": [3, 4], "projector": "none", "encoders": [{"name": "dinov2", "channels": [0, 7]}]}
    return Layout(
        **{
            "model": model,
            "cameras": ("front", "wrist"),
            "shape": SHAPE,
            "dtype": "bfloat16",
            "recording": {"name": "one", "source": "somewhere"},
        }
        | changes
    )


def frames(index, **values):
    stamps = (10**9 * index + 5, 10**9 * index + 7)
    return FrameSet(index, stamps[0] + 1, index / 3, stamps, ("front_optical", f"wrist{index % 2}"), list, values)


def words(index):
    return np.random.default_rng(index).integers(0, 0x7F00, SHAPE, np.uint16)


def written(path, source, count=5, finish=True, skip=(), **changes):
    writer = TokenFileWriter(path, layout(**changes), [source])
    for index in range(writer.done, count):
        if index in skip:
            writer.skip(f"frame set {index}: damaged")
        else:
            action = np.array([index, -0.1 * index], np.float32)
            writer.add(frames(index, action=action, done=np.array(index == 4)), GEOMETRY, words(index))
    if finish:
        writer.finish({"source_sha256": "00"})
    else:
        writer.close()
    return path


def test_what_is_written_is_read(tmp_path, source):
    with TokenFile(written(tmp_path / "one.safetensors", source, skip=(2,))) as file:
        kept = [0, 1, 3, 4]
        assert len(file) == 4 and file.shape == (4, *SHAPE) and file.cameras == ("front", "wrist")
        np.testing.assert_array_equal(file.words, np.stack([words(index) for index in kept]))
        np.testing.assert_array_equal(file.stamps_ns, [frames(index).stamps_ns for index in kept])
        np.testing.assert_array_equal(file.times_ns, [frames(index).time_ns for index in kept])
        np.testing.assert_array_equal(file.timestamps, [index / 3 for index in kept])
        np.testing.assert_array_equal(file.sequence, range(4))
        np.testing.assert_array_equal(file.values["action"], np.float32([[index, -0.1 * index] for index in kept]))
        np.testing.assert_array_equal(file.values["done"], [False, False, False, True])
        assert all(file.is_sound(index) for index in range(4))
        recording = file.metadata["recording"]
        assert (recording["frames"], recording["frames_skipped"]) == (4, 1)
        assert recording["skipped_because"] == ["frame set 2: damaged"]
        frame = file.frame(2)
        assert [view.frame_id for view in frame.views] == ["front_optical", "wrist1"]
        assert frame.views[0].roi is None and frame.views[1].roi == (2.0, 1.0, 18.0, 9.0)
        assert frame.views[1].affine == GEOMETRY[1].affine and (frame.views[1].height, frame.views[1].width) == (10, 20)


def test_a_frame_is_the_message_of_the_node(tmp_path, source):
    with TokenFile(written(tmp_path / "one.safetensors", source)) as file:
        frame = file.frame(3)
    again = VisualTokens.from_bytes(frame.to_bytes())
    assert again.stamps_ns == frames(3).stamps_ns and again.sequence == 3
    np.testing.assert_array_equal(again.data, words(3))


def test_safetensors_reads_it(tmp_path, source):
    path = written(tmp_path / "one.safetensors", source)
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["vla_tokens"]
        assert json.loads(file.metadata()["vla_tokens"])["schema"] == "vla_tokens/1"
        tokens = file.get_slice("tokens")
        assert tokens.get_shape() == [5, *SHAPE] and tokens.get_dtype() == "BF16"
        import torch

        np.testing.assert_array_equal(tokens[3:4].view(torch.int16).numpy().view(np.uint16)[0], words(3))
        np.testing.assert_array_equal(file.get_tensor("values.action").numpy()[:, 0], range(5))


def test_a_saved_message_is_a_file_of_one_frame(tmp_path):
    message = make_tokens(7, cameras=("front", "wrist"))
    path = tmp_path / "message.safetensors"
    message.save(path)
    assert VisualTokens.load(path).to_bytes() == message.to_bytes()
    with TokenFile(path) as file:
        assert file.shape == (1, *message.shape) and file.cameras == ("front", "wrist")
        assert file.frame(0).to_bytes() == message.to_bytes()


def test_a_recordings_file_is_not_one_message(tmp_path, source):
    path = written(tmp_path / "recording.safetensors", source)
    with pytest.raises(TokenFormatError, match="open it with .*TokenFile"):
        VisualTokens.load(path)
    with TokenFile(path) as file:
        in_file, in_message = file.metadata, TokenFile(saved(tmp_path)).metadata
    about_the_model = set(in_message) - {"views", "sequence"}
    assert about_the_model <= set(in_file), "the same keys say what the model is"


def saved(folder):
    path = folder / "message.safetensors"
    make_tokens(7, cameras=("front", "wrist")).save(path)
    return path


def test_a_reader_pickles_as_its_path(tmp_path, source):
    with TokenFile(written(tmp_path / "one.safetensors", source)) as file:
        assert len(pickle.dumps(file)) < 500
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(file)).words, file.words)


def test_an_interrupted_file_goes_on_with_the_same_bytes(tmp_path, source):
    whole = written(tmp_path / "whole.safetensors", source, 7, skip=(3,)).read_bytes()
    parts = tmp_path / "part" / "whole.safetensors"
    for count in (0, 2, 4, 5, 7):
        written(parts, source, count, finish=False, skip=(3,))
        assert not parts.exists()
    assert written(parts, source, 7, skip=(3,)).read_bytes() == whole
    assert [entry.name for entry in parts.parent.iterdir()] == ["whole.safetensors"]


def test_only_whole_blocks_count(tmp_path, source):
    written(tmp_path / "one.safetensors", source, 5, finish=False, batch=4)
    writer = TokenFileWriter(tmp_path / "one.safetensors", layout(batch=4), [source])
    assert (writer.done, writer.frames) == (4, 4)
    writer.close()


@pytest.mark.parametrize("damage", ["torn line", "no tokens", "wrong tokens", "garbage line"])
def test_what_did_not_reach_the_disk_is_done_again(tmp_path, source, damage):
    whole = written(tmp_path / "whole.safetensors", source).read_bytes()
    path = tmp_path / "part" / "whole.safetensors"
    written(path, source, 4, finish=False)
    part, journal = path.with_name("whole.safetensors.part"), path.with_name("whole.journal")
    if damage == "torn line":
        journal.write_bytes(journal.read_bytes()[:-10])
    elif damage == "garbage line":
        journal.write_bytes(journal.read_bytes() + b"\0" * 100 + b"\n")
    elif damage == "no tokens":
        part.write_bytes(part.read_bytes()[:-50])
    else:
        content = bytearray(part.read_bytes())
        content[-5] ^= 1  # as after a power cut: the length is there, the content is not
        part.write_bytes(content)
    writer = TokenFileWriter(path, layout(), [source])
    assert writer.done == (4 if damage == "garbage line" else 3)
    writer.close()
    assert written(path, source).read_bytes() == whole


def test_other_settings_or_sources_begin_anew(tmp_path, source):
    path = written(tmp_path / "one.safetensors", source, 4, finish=False)
    source.write_bytes(b"something else was recorded")
    writer = TokenFileWriter(path, layout(), [source])
    assert writer.done == 0
    writer.close()


def test_a_finished_file_of_another_source_is_not_taken_for_this_ones(tmp_path, source):
    path = written(tmp_path / "one.safetensors", source)
    assert TokenFileWriter(path, layout(), [source]).is_finished
    source.write_bytes(b"longer than what was recorded")
    with pytest.raises(SourceError, match="delete it, or choose another --out"):
        TokenFileWriter(path, layout(), [source])


def test_two_processes_do_not_write_one_file(tmp_path, source):
    writer = TokenFileWriter(tmp_path / "one.safetensors", layout(), [source])
    with pytest.raises(BusyError, match="being written by another process"):
        TokenFileWriter(tmp_path / "one.safetensors", layout(), [source])
    writer.close()


def test_values_of_another_shape_are_an_error(tmp_path, source):
    writer = TokenFileWriter(tmp_path / "one.safetensors", layout(), [source])
    writer.add(frames(0, action=np.zeros(2, np.float32)), GEOMETRY, words(0))
    with pytest.raises(ValueError, match="action is .*, and was"):
        writer.add(frames(1, action=np.zeros(3, np.float32)), GEOMETRY, words(1))
    writer.close()


def test_a_changed_bit_is_found(tmp_path, source):
    path = written(tmp_path / "one.safetensors", source)
    content = bytearray(path.read_bytes())
    with TokenFile(path) as file:
        place = content.find(words(2).tobytes())
    content[place + 3] ^= 0x10
    path.write_bytes(content)
    with TokenFile(path) as file:
        assert [file.is_sound(index) for index in range(5)] == [True, True, False, True, True]


def test_damaged_files_are_refused(tmp_path, source):
    path = written(tmp_path / "one.safetensors", source)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    bad = {
        "empty": b"",
        "cut off": content[:-1],
        "a header that claims too much": (2**40).to_bytes(8, "little") + content[8:],
        "no metadata": _with_header(content, {name: entry for name, entry in header.items() if name != "__metadata__"}),
    }
    for name in header:
        if name != "__metadata__":
            for shape in ([], [2**40], [-1, 5], [5, 5, 5]):
                changed = header | {name: header[name] | {"shape": shape}}
                bad[f"{name} of shape {shape}"] = _with_header(content, changed)
            bad[f"{name} of another dtype"] = _with_header(content, header | {name: header[name] | {"dtype": "I8"}})
    for what, damaged in bad.items():
        other = tmp_path / "damaged.safetensors"
        other.write_bytes(damaged)
        with pytest.raises(TokenFormatError):
            TokenFile(other)
            pytest.fail(f"{what} was accepted")


@pytest.mark.parametrize(
    ("name", "place", "value"), [("affines", 4, np.nan), ("affines", 0, 1e300), ("rois", 0, np.inf), ("rois", 2, -1.0)]
)
def test_a_view_that_no_message_can_have_is_refused(tmp_path, source, name, place, value):
    path = written(tmp_path / "one.safetensors", source)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[begin + 8 * place : begin + 8 * place + 8] = np.float64(value).tobytes()
    path.write_bytes(content)
    with TokenFile(path) as file, pytest.raises(TokenFormatError, match="frame 0: a view's"):
        file.frame(0)


def _with_header(content, header):
    length = int.from_bytes(content[:8], "little")
    return content[:8] + json.dumps(header).encode().ljust(length) + content[8 + length :]
