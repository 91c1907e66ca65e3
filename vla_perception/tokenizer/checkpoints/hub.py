"""Hugging Face ids → checkpoint directories that hold the vision part alone.

Fetches the headers of a model's safetensors files, and then only the bytes of vision and projector tensors: for
``openvla/openvla-7b`` about a tenth of 15 GB. Writes them to one safetensors file in the cache, ::

    $XDG_CACHE_HOME/vla_perception/hub/ORG/NAME/COMMIT/NAME/{config.json, …, model.safetensors}

which loads without a network from then on. Respects ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_ENDPOINT`` and a login with
``hf auth login``, and reads files that are in Hugging Face's own cache from there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vla_perception.tokenizer.checkpoints import CheckpointError, lerobot, refused, tensor_names
from vla_perception.tokenizer.checkpoints.files import is_statistics, read_json
from vla_perception.tokenizer.checkpoints.http_range import LocalFile, RemoteFile, Span, transport_error
from vla_perception.tokenizer.checkpoints.paths import cache_directory, exists

log = logging.getLogger(__name__)

#: What the hub's client takes: names of at most 96 characters, in which some things must not be.
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_ID = re.compile(
    rf"(?![^@]*(?:--|\.\.))(?P<repository>{_NAME}/{_NAME}(?<!\.git))(?:@(?P<revision>[\w.][\w./-]{{0,199}}))?", re.ASCII
)
#: Names of a repository's files → their bytes, as far as the hub says them.
Files = Mapping[str, "int | None"]
#: Bytes of a file that is fetched whole.
_MAX_SMALL = 1 << 25
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX = "model.safetensors.index.json"
_SMALL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "dataset_statistics.json",
    "adapter_config.json",
)
_ADAPTER = "adapter_model.safetensors"
#: After so many bytes the file is flushed to the disk, so that they survive a power failure, and they count as fetched.
_STEP = 64 << 20
#: Seconds between log lines about the progress, if there is no terminal.
_PROGRESS_SEC = 10.0
#: Free bytes that are kept for small files and other programs.
_SPARE = 64 << 20


def is_id(text: str) -> bool:
    """Whether `text` has the form of a Hugging Face id, ``org/name`` or ``org/name@revision``, and is not a path here."""
    return _ID.fullmatch(text) is not None and not exists(Path(text))


def fetch(name: str) -> Path:
    """The directory with the vision part of a model on the Hugging Face hub; fetches what the cache lacks.

    Without a revision it is the latest commit; if the hub cannot be reached, the latest commit that was fetched.

    Args:
        name: ``org/name`` or ``org/name@revision``: a branch, a tag or a full commit hash.

    Raises:
        CheckpointError: there is no such model, it cannot be fetched, or it has no vision part; says what to do.
    """
    repository, revision, root = _parse(name)
    if _COMMIT.fullmatch(revision) and (held := _held(root, revision)):
        return held
    with _explained(repository, revision):
        commit, files = _resolve(root, repository, revision)
        folder = _held(root, commit) or _fetch(root, repository, commit, files)
        if revision != commit:
            _write(_reference(root, revision), commit.encode())
    return folder


def fetch_configuration(name: str) -> Path:
    """As `fetch`, but without fetching weights: the directory may hold only the configuration files.

    Raises:
        CheckpointError: as `fetch`.
    """
    repository, revision, root = _parse(name)
    with _explained(repository, revision):
        commit, files = _resolve(root, repository, revision)
        return _held(root, commit) or _configuration(root, repository, commit, files)


def _parse(name: str) -> tuple[str, str, Path]:
    """Repository, revision, and its folder in the cache."""
    match = _ID.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name!r:.200} is not a Hugging Face id; write org/name or org/name@revision")
    return match["repository"], match["revision"] or "main", cache_directory() / "hub" / match["repository"]


def _reference(root: Path, revision: str) -> Path:
    return root / "refs" / revision.replace("/", "%2F")


def _held(root: Path, commit: str) -> Path | None:
    folder = root / commit / root.name
    return folder if folder.is_dir() else None


def _resolve(root: Path, repository: str, revision: str) -> tuple[str, Files]:
    """Commit hash of a revision, and the repository's files there."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import HfHubHTTPError

    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = HfApi().model_info(repository, revision=revision, timeout=10, files_metadata=True)
    except (OfflineModeIsEnabled, transport_error(), HfHubHTTPError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        known = _reference(root, revision)
        commit = known.read_text().strip() if known.is_file() else ""
        if _COMMIT.fullmatch(commit) and _held(root, commit):
            log.info("%s: the hub was not asked (%s); taking %s, which was fetched before", repository, error, commit)
            return commit, {}
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(config, str):
            snapshot = Path(config).parent
            names = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
            return snapshot.name, dict.fromkeys(names)
        raise
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise CheckpointError(f"the hub names no commit for {repository}, but {info.sha!r:.200}")
    files: dict[str, int | None] = {}
    for sibling in info.siblings or ():
        if isinstance(sibling.rfilename, str):
            files[sibling.rfilename] = sibling.size if isinstance(sibling.size, int) else None
    return info.sha, files


def _fetch(root: Path, repository: str, commit: str, files: Files) -> Path:
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{commit}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s is being fetched by another process; waiting for it", repository)
        lock.acquire()
    try:
        held = _held(root, commit)
        if held:
            return held
        target = _configuration(root, repository, commit, files)
        source = {"repository": repository, "commit": commit, "holds": "vision and projector tensors only"}
        names = _names(target)
        shards = _shards(repository, commit, files, names)
        if shards:
            _assemble(target / "model.safetensors", _sources(repository, commit, shards), source, names)
        if _ADAPTER in files:
            _assemble(target / _ADAPTER, _sources(repository, commit, [_ADAPTER]), source, names, needed=False)
        beside = f"lora_adapter/{_ADAPTER}"
        if not shards and beside in files:
            _copy(repository, commit, "lora_adapter/adapter_config.json", files, target)
            _assemble(target / beside, _sources(repository, commit, [beside]), source, names, needed=False)
        target.parent.rename(root / commit)
    finally:
        lock.release()
    return root / commit / root.name


def _configuration(root: Path, repository: str, commit: str, files: Files) -> Path:
    """Fetches and checks the small files, in a partial folder: it gets its final name once it has the weights, too."""
    _refuse(repository, commit, files)
    target = root / f"{commit}.partial" / root.name
    for file in _SMALL_FILES:
        _copy(repository, commit, file, files, target)
    _check_config(repository, target)
    return target


def _refuse(repository: str, commit: str, files: Files) -> None:
    """Refuses a model that cannot be fetched in parts, or has no weights to read, before these are fetched."""
    film = sorted(file for file in files if re.fullmatch(r"vision_backbone--.*_checkpoint\.pt", file))
    if film:
        raise CheckpointError(
            f"{repository} is an OpenVLA-OFT checkpoint with FiLM, whose encoders are in {film[0]}, which cannot be fetched in "
            f"parts. Fetch it whole, as in `hf download {repository} --local-dir FOLDER`, and give FOLDER as the model"
        )
    if any(file.endswith(".safetensors") for file in files):
        return
    runs = sorted(file for file in files if file.endswith(".pt"))
    if runs:
        folder = runs[0].split("/checkpoints/")[0] + "/*" if "/checkpoints/" in runs[0] else "*"
        raise CheckpointError(
            f"{repository} holds Prismatic's .pt files, which cannot be fetched in parts. Fetch one run whole, as in "
            f"`hf download {repository} --include '{folder}' --local-dir FOLDER`, and give the run's folder as the model"
        )
    if "config.json" in files:  # Octo's, say
        refused.refuse(read_json(_small(repository, commit, "config.json", files)), f"{repository}: config.json")
    raise CheckpointError(f"{repository} has no .safetensors file; weights are read from safetensors, never a pickle")


def _check_config(repository: str, folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    config = read_json(folder / "config.json")
    if "architecture" in config:
        raise CheckpointError(f"{repository} is a timm encoder; write hf-hub:{repository}")
    refused.refuse(config, f"{repository}: config.json")
    if lerobot.is_policy(config):
        lerobot.check_config(config, f"{repository}: config.json")
        return
    if "timm_model_ids" not in config:
        raise CheckpointError(
            f"{repository} is not an OpenVLA or Prismatic model, and no π0, π0.5 or SmolVLA policy of LeRobot's: its config.json has no timm_model_ids. Its architecture "
            f"is {str(config.get('architectures') or config.get('model_type'))[:200]}"
        )


def _names(folder: Path) -> ModuleType:
    """The module that decides by a tensor's name whether it is fetched."""
    config = folder / "config.json"
    return lerobot if config.is_file() and lerobot.is_policy(read_json(config)) else tensor_names


def _shards(repository: str, commit: str, files: Files, names: ModuleType) -> list[str]:
    """The safetensors files that hold tensors of the vision part."""
    if _INDEX in files:
        index = read_json(_small(repository, commit, _INDEX, files))
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{repository}: {_INDEX} has no weight_map")
        shards = {str(file) for name, file in weight_map.items() if names.is_vision(name)}
        lacking = sorted(file for file in shards if file not in files or Path(file).name != file)
        if lacking:
            raise CheckpointError(f"{repository} lacks files that its index names: {', '.join(lacking[:8])}")
        return sorted(shards)
    single = sorted(
        file
        for file in files
        if re.fullmatch(r"[^/]+\.safetensors", file) and file != _ADAPTER and not is_statistics(file)
    )
    if len(single) > 1:
        raise CheckpointError(f"{repository} has {len(single)} safetensors files and no {_INDEX}")
    return single


def _small(repository: str, commit: str, file: str, files: Files) -> Path:
    """Fetches a file whole, unless the hub says that it is large."""
    from huggingface_hub import hf_hub_download

    size = files.get(file) or 0
    if size <= _MAX_SMALL:
        path = Path(hf_hub_download(repository, file, revision=commit))
        size = path.stat().st_size
        if size <= _MAX_SMALL:
            return path
    raise CheckpointError(f"{repository}: {file} has {size} bytes, which no checkpoint needs")


def _copy(repository: str, commit: str, file: str, files: Files, target: Path) -> None:
    if file in files:
        _write(target / file, _small(repository, commit, file, files).read_bytes())


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(file)


def _sources(repository: str, commit: str, files: Sequence[str]) -> list[LocalFile | RemoteFile]:
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    sources: list[LocalFile | RemoteFile] = []
    for file in files:
        cached = try_to_load_from_cache(repository, file, revision=commit)
        if isinstance(cached, str):
            sources.append(LocalFile(Path(cached)))
        else:
            sources.append(RemoteFile(hf_hub_url(repository, file, revision=commit), f"{repository}: {file}"))
    return sources


@dataclass(frozen=True)
class _Piece:
    """Tensors that are read in one call: ascending spans of one file."""

    source: LocalFile | RemoteFile
    spans: list[Span]


def _assemble(
    target: Path,
    sources: Sequence[LocalFile | RemoteFile],
    about: Mapping[str, str],
    names: ModuleType,
    needed: bool = True,
) -> None:
    """Writes the wanted tensors of several safetensors files to one; resumes an earlier, interrupted attempt.

    Every attempt has the same header, and tensors follow in the order in which they are read, so the number of bytes in
    the partial file says which are left. If not `needed`, there may be none: an adapter may leave vision alone.
    """
    if target.is_file():
        return
    header, pieces = _plan(sources, about, names, needed)
    length = len(header) + sum(stop - start for piece in pieces for start, stop in piece.spans)
    partial, counted = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.partial.bytes")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a+b") as stream:
        stream.seek(0)
        text = counted.read_text() if counted.is_file() else ""
        done = int(text) if re.fullmatch(r"\d{1,18}", text) else 0
        if (
            not len(header) <= done <= min(length, os.fstat(stream.fileno()).st_size)
            or stream.read(len(header)) != header
        ):
            done = 0
        stream.truncate(done)
        stream.seek(done)
        free = shutil.disk_usage(target.parent).free
        if free < length - done + _SPARE:
            raise CheckpointError(
                f"{target.parent} has {free / 1e9:.1f} GB of free space and {(length - done) / 1e9:.1f} GB are to be "
                "fetched; make room, or set XDG_CACHE_HOME to a larger disk"
            )
        if not done:
            stream.write(header)
            done = len(header)

        def keep() -> None:
            stream.flush()
            os.fsync(stream.fileno())
            _write(counted, str(done).encode())

        with _progress(about["repository"], length, done) as show:
            try:
                safe = done
                for data in _left(pieces, done - len(header)):
                    stream.write(data)
                    done += len(data)
                    show(len(data))
                    if done - safe >= _STEP:
                        keep()
                        safe = done
            finally:
                keep()
    partial.replace(target)
    counted.unlink()


def _plan(
    sources: Sequence[LocalFile | RemoteFile], about: Mapping[str, str], parts: ModuleType, needed: bool
) -> tuple[bytes, list[_Piece]]:
    """The header of the new file, and the tensors that follow it."""
    found: list[tuple[int, int, int, str, dict, int]] = []
    names: set[str] = set()
    for number, source in enumerate(sources):
        try:
            entries, begin = source.header()
        except CheckpointError as error:
            raise CheckpointError(f"{source.name} cannot be read as safetensors: {error}") from error
        for name, entry in entries.items():
            if not parts.is_vision(name):
                continue
            if name in names:
                raise CheckpointError(f"{source.name}: the tensor {name[:200]!r} is in another file, too")
            names.add(name)
            # Wide dtypes first, as safetensors writes them: everything stays aligned.
            width = -_width(entry["dtype"])
            found.append((width, number, entry["data_offsets"][0], name, entry, begin))
    # Before any tensor is fetched: with other names the language model would be fetched, too.
    parts.refuse_unknown(about["repository"], (name for name in names if not parts.is_known(name)))
    if needed and not found:
        raise CheckpointError(f"{about['repository']} has no tensor of a vision part; is it a vision-language model?")
    found.sort(key=lambda item: item[:4])
    header: dict[str, object] = {"__metadata__": dict(about)}
    pieces: list[_Piece] = []
    at, last = 0, None
    for width, number, _, name, entry, begin in found:
        start, stop = entry["data_offsets"]
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [at, at + stop - start]}
        at += stop - start
        if last != (width, number):
            pieces.append(_Piece(sources[number], []))
            last = (width, number)
        pieces[-1].spans.append((begin + start, begin + stop))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, pieces


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) if bits else 8


def _left(pieces: Sequence[_Piece], done: int) -> Iterator[bytes]:
    """The bytes of all pieces but the first `done`."""
    for piece in pieces:
        spans = []
        for start, stop in piece.spans:
            skipped = min(done, stop - start)
            done -= skipped
            spans.append((start + skipped, stop))
        yield from piece.source.read(spans)


@contextmanager
def _progress(what: str, total: int, done: int):
    """A bar on a terminal, otherwise log lines; yields a function to call with each number of bytes that arrived."""
    from huggingface_hub.utils import tqdm

    begun = f"{done / 1e6:.0f} MB of them are there" if done > _STEP else "kept for the next time"
    log.info("%s: fetching the vision part, %.0f MB (%s)", what, total / 1e6, begun)
    shown, logged = done, time.monotonic()
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=what, disable=not sys.stderr.isatty()) as bar:

        def show(count: int) -> None:
            nonlocal shown, logged
            shown += count
            bar.update(count)
            if bar.disable and time.monotonic() - logged > _PROGRESS_SEC:
                logged = time.monotonic()
                log.info("%s: %.0f of %.0f MB", what, shown / 1e6, total / 1e6)

        yield show


@contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """Turns every error into a `CheckpointError` that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (CheckpointError, MemoryError, ImportError):
        raise
    except OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"HF_HUB_OFFLINE is set, and {repository} ({revision}) is not in {cache_directory() / 'hub'}; unset it once "
            "to fetch the model, or give a checkpoint's directory"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is given only to those who accepted its terms: do so at {constants.ENDPOINT}/{repository}, "
            "and set HF_TOKEN or run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is neither a folder {repository} here nor a model of that name at {constants.ENDPOINT} that you may "
            "see; check the name, and for a private model set HF_TOKEN or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r}; give a branch, a tag or a commit") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {401: "HF_TOKEN is not valid", 403: "your token does not allow this"}.get(status, "try again later")
        raise CheckpointError(f"{constants.ENDPOINT} refuses {repository} with status {status}; {advice}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine, and not of the connection
            raise CheckpointError(
                f"{repository} cannot be kept in {cache_directory()} ({error}); set XDG_CACHE_HOME to a folder that can be "
                "written"
            ) from error
        # The client raises whatever comes of an answer that it cannot read: KeyError, TypeError, its library's.
        reason = (str(error).splitlines() or [""])[0][:300]
        if not reason or type(error).__module__ == "builtins":
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(
            f"{repository} cannot be fetched from {constants.ENDPOINT} ({reason}). What has arrived is kept: try again, "
            "or give a checkpoint's directory"
        ) from error
