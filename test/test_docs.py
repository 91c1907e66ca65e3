"""The pages as a whole: their links lead somewhere, and the programs of the tutorial and the how-to pages run."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_tokenizer import make_tokens
from ros_harness import ROOT, RosProcess, free_domain

from vla_perception import cli

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[ROOT / "docs" / page], re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", TEXTS[path]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", TEXTS[path])):
        if target.startswith("https:"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_files_of_tests_that_a_page_names_exist(path):
    """By their path from the root: a bare file name says nothing in a tree that mirrors the package."""
    for name in re.findall(r"[\w/]*\btest_\w+\.py", TEXTS[path]):
        assert "/" in name and (ROOT / name).is_file(), f"{path.name} names {name}"


@pytest.fixture(scope="module")
def options_of_commands() -> dict[str, set[str]]:
    """Subcommand of `vla-perception` → its options, by its own help."""

    def help_of(*arguments: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit):
            cli.main([*arguments, "--help"])
        return told.getvalue()

    names = re.search(r"\{([\w,]+)\}", help_of()).group(1).split(",")
    return {name: set(re.findall(r"--[\w-]+", help_of(name))) for name in names}


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_commands_of_vla_perception_exist(path, options_of_commands):
    for command, rest in re.findall(r"vla-perception ([a-z]+)\b((?:[^`\n#]|\\\n)*)", TEXTS[path]):
        assert command in options_of_commands, f"{path.name}: vla-perception {command}"
        unknown = set(re.findall(r"(?<= )--[\w-]+", rest)) - options_of_commands[command]
        assert not unknown, f"{path.name}: vla-perception {command} {unknown}"


def test_extras_that_pages_and_errors_name_exist():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = set(re.findall(r'^        "(\w+)": [A-Z]', setup, re.MULTILINE))
    assert {"tokenizer", "ros", "all"} <= extras
    for path in [*PAGES, *(ROOT / "vla_perception").rglob("*.py"), *(ROOT / "requirements").glob("*.txt")]:
        for named in re.findall(r"install [^\n]*?\.\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras, f"{path.relative_to(ROOT)}: .[{named}]"


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\((\w+\.md)", TEXTS[ROOT / "docs" / "README.md"]))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_tree_of_the_design_names_every_module():
    block = re.search(r"^```\n(vla_perception/\n.*?)^```", TEXTS[ROOT / "docs" / "design.md"], re.DOTALL | re.MULTILINE)
    named, folders = set(), []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            if name.split()[0].endswith("/"):
                folders[depth:] = [name.split()[0].rstrip("/")]
            elif name.split()[0].endswith(".py"):
                named.add("/".join([*folders[:depth], name.split()[0]]))
    present = {str(path.relative_to(ROOT)) for path in (ROOT / "vla_perception").rglob("*.py")}
    assert named == {name for name in present if not name.endswith(("__init__.py", "__main__.py"))}


def test_making_tokens_without_ros(tmp_path, monkeypatch):
    """Two cameras of ten frames each, 10 ms apart: a message for each frame set, read again from its file."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    begin = 1_700_000_000_000_000_000
    frames = [
        (camera, begin + number * 100_000_000 + lag, image)
        for number in range(10)
        for camera, lag in (("front", 0), ("wrist", 10_000_000))
    ]
    names = {"frames": frames}
    for program in blocks("without_ros.md", "python"):
        exec(program, names)
    assert names["same"].to_bytes() == names["message"].to_bytes() == Path("message.safetensors").read_bytes()
    assert names["same"].shape == (2, 196, 256) and names["same"].dtype == "bfloat16"
    assert [message.sequence for message in names["stored"]] == list(range(10))
    assert [message.stamp_ns for message in names["stored"]] == [begin + number * 100_000_000 for number in range(10)]
    assert names["synchronizer"].counts["wrist"].encoded == 10


def test_reading_a_bag_in_python(monkeypatch, capsys):
    """The sample bag's topics as examples/README.md lists them, its images, its cameras."""
    pytest.importorskip("mcap")
    monkeypatch.chdir(ROOT)
    (program,) = blocks("nodes_bags.md", "python")
    exec(program, {})
    lines = capsys.readouterr().out.splitlines()
    listed = re.findall(r"^\| `(/\S+)` \| `(\S+)` \| (\d+) \|", TEXTS[ROOT / "examples" / "README.md"], re.MULTILINE)
    assert len(listed) == 4 and sorted(lines[:4]) == sorted(" ".join(topic) for topic in listed)
    assert len(lines) == 4 + 80 + 2 and all(re.fullmatch(r"\S+/compressed( \d+){3}", line) for line in lines[4:-2])
    assert [line.split()[0] for line in lines[-2:]] == ["front", "wrist"]


def test_training_on_token_files(tmp_path, monkeypatch):
    """The page's two programs on a LeRobot dataset of three episodes."""
    for package in ("torch", "pyarrow", "av", "rosbags"):
        pytest.importorskip(package)
    from offline_runs import DATASET, tokenize

    monkeypatch.chdir(tmp_path)
    index, _ = tokenize(tmp_path / "tokens", [DATASET])
    reading, training = blocks("offline.md", "python")
    file = index["recordings"][0]["file"]
    exec(reading.replace("drive.safetensors", file).replace("[1200]", "[20]").replace("(1200)", "(20)"), names := {})
    training = training.replace("8c1f0a2b", index["model"]["fingerprint"]).replace("num_workers=2", "num_workers=0")
    exec(training.replace("shuffle=True", "shuffle=False"), names)
    batch = names["batch"]  # the last one, of 74 frames
    assert batch["tokens"].shape[:3] == (10, 4, 2) and batch["tokens"].dtype.itemsize == 2
    assert batch["is_pad"].shape == (10, 4) and not batch["is_pad"].any()
    assert batch["action"].shape[:2] == batch["action_is_pad"].shape == (10, 8)
    assert batch["action_is_pad"][-1].tolist() == [False] + [True] * 7  # the episode's last frame has none after it


def test_similarity_as_the_page_of_view_copies_it(tmp_path, monkeypatch):
    """The program on the page, which is also what the browser copies, against a cosine written out."""
    (program,) = blocks("view.md", "python")
    page = (ROOT / "vla_perception" / "view" / "page" / "python.js").read_text(encoding="utf-8")
    copied = page.partition("return `")[2].partition("`;")[0]
    for line, given in zip(program.splitlines(), copied.splitlines(), strict=True):
        fixed = re.split(r"\$\{(?:[^{}]|\{[^}]*\})*\}", given)
        assert re.fullmatch(".*".join(map(re.escape, fixed)), line), line
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(2, 196, 8)).astype(np.float32)
    tokens = make_tokens(41, cameras=("front", "wrist"), grid=(14, 14), data=vectors)
    tokens.save("tokens-41.safetensors")
    exec(program, names := {})
    touched = vectors[0, 119].astype(float)
    for view, token in ((0, 119), (0, 7), (1, 50)):
        other = vectors[view, token].astype(float)
        cosine = sum(touched * other) / (sum(touched**2) * sum(other**2)) ** 0.5
        assert names["similarity"][view, token] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.ros
def test_the_tutorial(tmp_path):
    """Its three programs, started as it says: the tokenizer gets ready, and the policy moves."""
    pytest.importorskip("timm")
    domain = free_domain()
    commands = [line for block in blocks("tutorial.md", "bash") for line in block.splitlines()]
    (tokenizer,) = (command for command in commands if command.startswith("visual_tokenizer "))
    (player,) = (command for command in commands if command.startswith("bag_player "))
    (program,) = blocks("tutorial.md", "python")
    assert "python my_policy.py" in commands and "vla-perception doctor" in commands
    (tmp_path / "my_policy.py").write_text(program, encoding="utf-8")
    folder = Path(sys.executable).parent

    def start(command: str) -> RosProcess:
        name, *arguments = shlex.split(command.replace("examples/sample_bag", str(ROOT / "examples" / "sample_bag")))
        return RosProcess([str(folder / name), *arguments], domain)

    with start(tokenizer) as tokenizer, start(player), RosProcess([str(tmp_path / "my_policy.py")], domain) as policy:
        tokenizer.wait_for("ready", 120.0)
        policy.wait_for("pan", 60.0)
        moves = re.search(r"message \d+: pan ([+-]\d\.\d+), tilt ([+-]\d\.\d+)\n", policy.output)
        assert moves and all(abs(float(value)) <= 1.0 for value in moves.groups()), policy.output
        assert policy.stop() == 0, policy.output
        assert "Traceback" not in policy.output


@pytest.mark.ros
@pytest.mark.jazzy_alone  # its programs run under both in test_the_tutorial and in test_verify.py
def test_the_tutorial_of_training(tmp_path):
    """Record, tokenize, train, deploy with the page's commands, over fewer and shorter episodes and a few steps."""
    for package in ("timm", "mujoco", "av", "rosbags"):
        pytest.importorskip(package)
    commands = [line for block in blocks("tutorial_training.md", "bash") for line in block.splitlines()]
    find = {part: next(line for line in commands if part in line) for part in (
        "record_episodes.py", " tokenize ", "verify tokens", "policy.py train", "visual_tokenizer ", "policy.py run", "bag_player ",
        "--topic tokens"
    )}  # fmt: skip
    find["record_episodes.py"] = find["record_episodes.py"].replace("--episodes 30", "--episodes 5 --frames 6")
    find["policy.py train"] += " --steps 2 --batch 4"
    domain, folder = free_domain(), Path(sys.executable).parent

    def start(part: str, extra: str = "") -> RosProcess:
        name, *arguments = shlex.split(f"{find[part]} {extra}".replace("examples/", f"{ROOT}/examples/"))
        if "episodes/*" in arguments:
            place = arguments.index("episodes/*")
            arguments[place : place + 1] = map(str, sorted((tmp_path / "episodes").iterdir()))
        return RosProcess([str(folder / name), *arguments] if name != "python" else arguments, domain, cwd=tmp_path)

    for part in ("record_episodes.py", " tokenize ", "verify tokens", "policy.py train"):
        with start(part) as process:
            assert process.wait(300) == 0, process.output
            said = process.output
            assert part != "verify tokens" or "30 of 30 frames are sound" in said
    assert re.search(r"held-out episodes.*\n +this head +\d+\.\d+\n +last action +\d+\.\d+\n +mean action", said), said
    with start("visual_tokenizer ") as tokenizer:
        with start("policy.py run", "--count 2") as policy:
            tokenizer.wait_for("ready", 120.0)
            with start("bag_player ", "-p loop:=true"):
                assert policy.wait(120) == 0, policy.output
        with start("--topic tokens") as verifier:
            verifier.wait_for("play the recording now", 60.0)
            with start("bag_player ", "-p rate:=0.5"):
                assert verifier.wait(120) == 0, verifier.output
    compared = re.search(r"(\d+) of (\d+) frames have the same bits", verifier.output)
    assert compared and int(compared[1]) == int(compared[2]) >= 1, verifier.output
    assert len(re.findall(r"message \d+: [+-]\d\.\d+, [+-]\d\.\d+, [+-]\d\.\d+, [+-]\d\.\d+\n", policy.output)) == 2
