"""The model hub over HTTP: what its answers say of themselves, and what they hold."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import re
import shutil
import time
import traceback
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from engine import Target, scratch
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import get_session
from mutations import change_json
from safetensors.torch import save

from vla_perception.tokenizer import CheckpointError
from vla_perception.tokenizer.checkpoints import http_range, hub
from vla_perception.tokenizer.checkpoints.files import SafetensorsFile
from vla_perception.tokenizer.checkpoints.paths import cache_directory

ENDPOINT, COMMIT = "http://hub.test", "0123456789abcdef0123456789abcdef01234567"
#: Answers of one input that may differ from the right ones; and how often 64 KiB are sent too much, of a tensor file.
_ANSWERS, _MORE = 24, 4096
_PIECE = bytes(1 << 16)


@functools.cache
def _files() -> dict[str, bytes]:
    vision = {"vision_backbone.featurizer.a": torch.ones(300), "projector.fc1.weight": torch.ones(5, 4)}
    shards = {"1.safetensors": save(vision | {"language_model.a": torch.zeros(1 << 15)})}
    shards["2.safetensors"] = save({"vision_backbone.fused_featurizer.b": torch.ones(40).to(torch.bfloat16)})
    names = {"vision_backbone.featurizer.a": "1.safetensors", "projector.fc1.weight": "1.safetensors"}
    index = {"weight_map": names | {"vision_backbone.fused_featurizer.b": "2.safetensors"}}
    return shards | {
        "config.json": json.dumps({"timm_model_ids": ["x"]}).encode(),
        "preprocessor_config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def _right(request) -> dict:
    """As the hub answers; `body` is bytes."""
    parts, files = urlsplit(str(request.url)), _files()
    path = unquote(parts.path)
    if path.startswith("/api/models/a/b"):
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        body = {"id": "a/b", "modelId": "a/b", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return {"status": 200, "headers": {"Content-Type": "application/json"}, "body": json.dumps(body).encode()}
    file = path.rpartition("/")[2]
    if file not in files:
        return {"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}, "body": b"{}"}
    if path.startswith("/a/b/") and file.endswith(".safetensors"):
        return {"status": 302, "headers": {"Location": f"{ENDPOINT}/storage/{file}"}, "body": b""}
    content = files[file]
    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
    if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")):
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return {"status": 206, "headers": headers, "body": content[start:stop]}
    return {"status": 200, "headers": headers | {"Content-Length": str(len(content))}, "body": content}


class _Hub:
    """Gives the input's answers, one after the other, and right ones when there are no more."""

    def __init__(self) -> None:
        self.answers: list[dict] = []
        self.given: list[dict] = []  # by whom and how each request was answered: what seeds are made of

    def __call__(self, request):
        right = _right(request)
        self.given.append({"status": right["status"], "headers": right["headers"], "body": None, "more": 0})
        answer = {
            name: value for name, value in (self.answers.pop(0) if self.answers else {}).items() if value is not None
        }
        kind = importlib.import_module(type(get_session()).__module__.partition(".")[0])
        body = answer.get("body", right["body"])
        if not isinstance(body, (str, bytes)):
            body = json.dumps(body)
        body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        status = int(answer.get("status", right["status"]))
        # The client reads redirections and errors whole, whatever they hold: the hub's, and no repository's.
        tensors = status in (200, 206) and b"safetensors" in request.url.raw_path
        more = min(int(answer.get("more", 0)), _MORE if tensors else 16)

        def pieces():
            yield body[: len(body) + min(more, 0)]  # below 0: so many bytes are lacking, and the connection breaks
            if more < 0:
                raise kind.ReadError("the connection broke")
            for _ in range(more):
                yield _PIECE

        headers = {str(name): str(value) for name, value in dict(answer.get("headers", right["headers"])).items()}
        content = {} if request.method == "HEAD" else {"content": pieces()}
        return kind.Response(status, headers=headers, **content)


_HUB = _Hub()


@functools.cache
def _connect() -> None:
    """huggingface_hub's own client, behind which there is no network."""
    client = type(get_session())
    kind = importlib.import_module(client.__module__.partition(".")[0])
    set_client_factory(lambda: client(transport=kind.MockTransport(_Tolerant()), follow_redirects=True))
    constants.HF_HUB_OFFLINE = False
    constants.ENDPOINT = ENDPOINT
    constants.HUGGINGFACE_CO_URL_TEMPLATE = ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    http_range.PAUSES = (0.0, 0.0)
    time.sleep = lambda _seconds: None  # of the client's tries
    for name in ("huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(name).disabled = True
    logging.disable()


class _Tolerant:
    """What no HTTP client would let through is the end of the connection."""

    def __call__(self, request):
        try:
            return _HUB(request)
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            kind = importlib.import_module(type(get_session()).__module__.partition(".")[0])
            raise kind.RemoteProtocolError(f"no answer: {error!r:.100}") from None


def _fetch() -> Path:
    for folder in (cache_directory(), Path(constants.HF_HUB_CACHE)):
        shutil.rmtree(folder, ignore_errors=True)
    return hub.fetch("a/b")


def answers(data: bytes) -> None:
    """The input is a list of answers: status, headers, body (null: the right one), and how much too much or too little."""
    _connect()
    try:
        _HUB.answers = [dict(answer) for answer in json.loads(data)[:_ANSWERS]]
    except (ValueError, TypeError, LookupError, RecursionError):  # Python 3.12 looks a slice up in an object
        return
    try:
        folder = _fetch()
    except CheckpointError as error:
        cause = error.__cause__
        frames = traceback.extract_tb(cause.__traceback__) if cause is not None else []
        # What this package's own code raised, and not the client's.
        if frames and "vla_perception/" in frames[-1].filename and type(cause).__module__ == "builtins":
            assert isinstance(cause, OSError), f"{type(cause).__name__} in {frames[-1].name}"
        raise
    finally:
        left = sum(path.stat().st_size for path in cache_directory().rglob("*") if path.is_file())
        assert left < 1 << 20, f"{left} bytes were kept"
    for stored in SafetensorsFile(folder / "model.safetensors").tensors.values():
        assert stored.dtype not in ("F32", "BF16") or tuple(stored.get().shape) == stored.shape


def answers_seeds() -> list[bytes]:
    _connect()
    constants.HF_HUB_CACHE = str(scratch() / "huggingface")
    _HUB.answers, _HUB.given = [], []
    assert set(SafetensorsFile(_fetch() / "model.safetensors").tensors) == {
        "vision_backbone.featurizer.a",
        "vision_backbone.fused_featurizer.b",
        "projector.fc1.weight",
    }
    recorded = list(_HUB.given)
    files, last = _files(), recorded[-1]
    whole = {"status": 200, "headers": {"Content-Length": str(len(files["1.safetensors"]))}, "more": 0}
    api = {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": name, "size": 9} for name in files]}
    lists = [
        recorded,
        [*recorded[:-2], {"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}, last | {"more": -3}],
        [{"status": 200, "headers": {"Content-Type": "application/json"}, "body": api, "more": 0}, *recorded[1:]],
        [{"status": 401, "headers": {"X-Error-Message": "Repository not found"}, "body": {"error": "no"}}],
        [*recorded[:-2], recorded[-2], whole | {"body": "x" * 40}],
        [*recorded[:6], {"status": 307, "headers": {"Location": "/elsewhere"}}],
    ]
    return [json.dumps(answers).encode() for answers in lists]


_HEADERS = ("Content-Range", "Content-Length", "ETag", "X-Repo-Commit", "X-Linked-Size", "X-Linked-Etag", "Location")
_HEADERS += ("Content-Encoding", "Retry-After", "X-Error-Code", "X-Error-Message", "Content-Type", "Transfer-Encoding")
_VALUES = (
    "",
    "0",
    "-1",
    "1e9",
    "²",
    "99999999999999999999",
    "bytes 0-0/1",
    "bytes 0-7/4611686018427387904",
    "bytes */9",
)
_VALUES += (
    "bytes 5-3/9",
    "gzip",
    "br",
    "deflate",
    "chunked",
    "../../x",
    "http://",
    "//[",
    "file:///etc/passwd",
    "/a/b",
)
_VALUES += (
    "http://hub.test/storage/1.safetensors",
    "GatedRepo",
    "RepoNotFound",
    "RevisionNotFound",
    "x" * 3000,
    "é",
    "\x1b",
)


def change_answers(data: bytes, random) -> bytes:
    """A header, a status or the amount of one answer; an answer more or less; or JSON changed anyhow."""
    try:
        given = [dict(answer) for answer in json.loads(data)]
        answer = given[random.randrange(len(given))]
        headers = dict(answer.get("headers") or {})
    except (ValueError, TypeError, RecursionError):
        return change_json(data, random)
    kind = random.random()
    if kind < 0.4:
        headers[random.choice((*headers, *_HEADERS))] = random.choice(_VALUES)
        answer["headers"] = headers
    elif kind < 0.55:
        statuses = (
            100,
            200,
            204,
            206,
            301,
            302,
            304,
            307,
            308,
            400,
            401,
            403,
            404,
            408,
            416,
            429,
            500,
            502,
            503,
            504,
            599,
        )
        answer["status"] = random.choice(statuses)
    elif kind < 0.7:
        answer["more"] = random.choice((-1, -8, -1000, 1, 2, 16, _MORE))
    elif kind < 0.75:
        given.insert(random.randrange(len(given) + 1), answer)
    elif kind < 0.8:
        given.remove(answer)
    else:
        return change_json(data, random)
    return json.dumps(given).encode()


TARGETS = [
    Target("hub_answers", answers, answers_seeds, (CheckpointError,), (change_answers,), max_bytes=16384),
]
