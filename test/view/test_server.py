"""The page's server over real sockets: who is let in, what is sent, that nothing piles up."""

import contextlib
import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from fake_feed import FakeFeed, random_tokens
from ros_harness import wait_until

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("websockets")

from websockets.exceptions import InvalidStatus
from websockets.sync import client

from vla_perception.tokens import VisualTokens
from vla_perception.view.server import PageServer
from vla_perception.view.wire import unpack


@contextlib.contextmanager
def serving(feed, **options):
    server = PageServer(feed, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server._server.started, 10, "the server listens")
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def served():
    feed = FakeFeed()
    with serving(feed) as server:
        yield feed, server


def get(server, path="/", host=None, **headers):
    """(status, headers, body) of one request."""
    address = urlsplit(server.address)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host or address.netloc, **headers})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


class Socket:
    """A page's web socket: JSON and unpacked frames, as they come."""

    def __init__(self, server, origin=None, query="", cookie=None):
        address = urlsplit(server.address)
        self._opening = client.connect(
            f"ws://{address.netloc}/socket{query}",
            origin=origin or f"http://{address.netloc}",
            additional_headers={"Cookie": cookie} if cookie else None,
            max_size=None,
        )

    def __enter__(self):
        self._connection = self._opening.__enter__()
        return self

    def __exit__(self, *_):
        self._opening.__exit__(None, None, None)

    def receive(self, timeout=10.0):
        message = self._connection.recv(timeout)
        if isinstance(message, bytes):
            header, blobs = unpack(message)
            return header | {"bytes": blobs}
        return json.loads(message)

    def wait_for(self, kind, timeout=10.0):
        end = time.monotonic() + timeout
        while (message := self.receive(end - time.monotonic()))["type"] != kind:
            pass
        return message

    def say(self, **message):
        self._connection.send(json.dumps(message))


def test_files_come_with_headers_that_keep_foreign_pages_out(served):
    _, server = served
    for path, kind in (("/", "text/html"), ("/main.js", "javascript"), ("/vendor/uPlot.min.css", "text/css")):
        status, headers, body = get(server, path)
        assert status == 200 and kind in headers["content-type"] and body
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert get(server, "/../server.py")[0] == 404
    assert get(server, "/%2e%2e/server.py")[0] == 404
    assert get(server, "/vendor/uPlot.LICENSE")[0] == 200


def test_a_name_that_resolves_here_is_no_localhost(served):
    _, server = served
    port = urlsplit(server.address).port
    assert server.key == "" and server.address.startswith("http://127.0.0.1:")
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "localhost:9999"):
        assert get(server, host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "192.168.0.1", "[::2]"):
        status, headers, body = get(server, host=host)
        assert status == 403 and b"localhost only" in body, host
        assert "content-security-policy" in headers


def test_a_socket_comes_from_this_page_alone(served):
    _, server = served
    with Socket(server) as page:
        assert page.receive()["type"] == "hello"
    port = urlsplit(server.address).port
    for origin in ("http://evil.example", f"http://localhost:{port}", "null", f"http://127.0.0.1:{port + 1}"):
        with pytest.raises(InvalidStatus) as refused, Socket(server, origin=origin):
            pass
        assert refused.value.response.status_code == 403


def test_on_other_addresses_everything_needs_the_key():
    with serving(FakeFeed(), host="0.0.0.0") as server:
        address = urlsplit(server.address)
        assert len(server.key) >= 20 and address.query == f"key={server.key}"
        server.address = f"http://127.0.0.1:{address.port}/"
        assert get(server)[0] == get(server, "/main.js")[0] == get(server, "/?key=wrong")[0] == 403
        assert get(server, "/?key=%C3%A4")[0] == 403
        with pytest.raises(InvalidStatus), Socket(server):
            pass
        status, headers, _ = get(server, f"/?key={server.key}", host="robot.local:1234")
        assert status == 200
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert get(server, "/main.js", Cookie=cookie.partition(";")[0])[0] == 200
        with Socket(server, cookie=cookie.partition(";")[0]) as page:
            assert page.receive()["type"] == "hello"
        with Socket(server, query=f"?key={server.key}") as page:
            assert page.receive()["type"] == "hello"
        with pytest.raises(InvalidStatus), Socket(server, query=f"?key={server.key}", origin="http://evil.example"):
            pass


def test_a_page_sees_frames_health_and_the_message_itself(served):
    feed, server = served
    feed.diagnose(fingerprint="ab" * 32)
    feed.log.add(30, "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", 0.0)
    with Socket(server) as page:
        number = page.receive()["page"]
        health = page.wait_for("health")
        assert health["log"][0]["text"] == "<script>alert(1)</script>"
        wait_until(lambda: feed.readers, 5, "the page wants tokens")
        tokens = random_tokens(5)
        feed.publish(tokens)
        frame = page.wait_for("frame")
        assert frame["sequence"] == 5 and frame["topic"] == "/tokens"
        status, headers, body = get(server, f"/message?page={number}")
        assert status == 200 and 'filename="tokens-5.safetensors"' in headers["content-disposition"]
        assert np.array_equal(VisualTokens.from_bytes(body).data, tokens.data)
        assert get(server, "/message?page=wrong")[0] == get(server, f"/message?page={number}&pinned")[0] == 404
        page.say(type="touch", camera="front", box=[45, 25, 45, 25], hold=True)
        page.say(type="painted")
        feed.publish(random_tokens(6))
        while page.wait_for("frame")["sequence"] != 6:
            pass
        _, headers, body = get(server, f"/message?page={number}&pinned")
        assert 'filename="tokens-5.safetensors"' in headers["content-disposition"], "where it was pinned"
        assert np.array_equal(VisualTokens.from_bytes(body).data, tokens.data)
        page.say(type="nonsense")
        assert "unknown message" in page.wait_for("error")["text"]
        page.say(type="hz", hz=10**400)
        assert "finite" in page.wait_for("error")["text"]
        for garbage, said in (
            ("[" * 5000, "not JSON"),
            ("{", "not JSON"),
            ("[]", "not an object"),
            (b"{}", "not text"),
        ):
            page._connection.send(garbage)
            assert said in page.wait_for("error")["text"]
    wait_until(lambda: not feed.readers, 5, "nobody wants tokens any more")


@pytest.mark.parametrize("error", [ValueError("truncated there"), OSError("truncated there")])
def test_a_message_that_cannot_be_read_is_said_and_the_page_goes_on(served, error):
    feed, server = served
    readable = feed.snapshot

    def snapshot(topic, index):
        found = readable(topic, index)
        if found is not None and found.tokens.sequence == 1:
            raise error
        return found

    with Socket(server) as page:
        page.wait_for("health")
        feed.snapshot = snapshot
        feed.publish(random_tokens(1))
        assert page.wait_for("error")["text"] == "truncated there"
        feed.publish(random_tokens(2))
        assert page.wait_for("frame")["sequence"] == 2


def test_a_page_that_does_not_paint_gets_the_latest_later(served):
    feed, server = served
    with Socket(server) as page:
        page.wait_for("health")
        page.say(type="hz", hz=60)
        feed.publish(random_tokens(0))
        assert page.wait_for("frame")["sequence"] == 0
        for sequence in range(1, 50):
            feed.publish(random_tokens(sequence))
        page.say(type="painted")
        assert page.wait_for("frame")["sequence"] == 49, "what came meanwhile is skipped"
        page.say(type="pause", paused=True)
        page.say(type="painted")
        page.say(type="mode", mode="norm")
        assert page.wait_for("layers")["sequence"] == 49
        feed.publish(random_tokens(50))
        page.say(type="mode", mode="colors")
        assert page.wait_for("layers")["sequence"] == 49, "paused"
        page.say(type="pause", paused=False)
        assert page.wait_for("frame")["sequence"] == 50


def test_whoever_is_gone_is_said_at_once(served):
    feed, server = served
    with Socket(server) as page:
        feed.diagnose()
        while page.wait_for("health")["tokenizers"][0]["gone"]:
            pass
        while not page.wait_for("health")["tokenizers"][0]["gone"]:
            pass
        feed.diagnose()
        while page.wait_for("health")["tokenizers"][0]["gone"]:
            pass


def test_control_is_only_for_those_who_asked_for_it(served):
    feed, server = served
    with Socket(server) as page:
        assert page.receive()["allow_control"] is False
        page.say(type="control", action="deactivate")
        assert "--allow-control" in page.wait_for("error")["text"]
    assert feed.actions == []
    with serving(feed, allow_control=True) as server, Socket(server) as page:
        assert page.receive()["allow_control"] is True
        page.wait_for("health")
        page.say(type="control", action="deactivate")
        assert page.wait_for("control")["text"] == "deactivate: done"
    assert feed.actions == [("/tokens", "deactivate")]
