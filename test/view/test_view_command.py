"""What `vla-perception view` says where it cannot do what it was asked for: one sentence, at once."""

import socket
import sys

import pytest

from vla_perception.cli import main


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["view", "--model", "tiny-random"], "--model goes with a recording"),
        (["view", "no/such/bag"], "there is no no/such/bag"),
        (["view", "--domain", "300"], "--domain must be from 0 to 232"),
        (["top", "--once", "--domain", "-1"], "--domain must be from 0 to 232"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(arguments, said, capsys):
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    pytest.importorskip("mcap")
    assert main([*arguments, *["--no-browser"] * (arguments[0] == "view")]) == 1
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1


def test_hz_is_bounded(capsys):
    for value in ("0", "1000", "nan"):
        with pytest.raises(SystemExit):
            main(["view", "--hz", value])
        assert "is not from 0.1 to 60" in capsys.readouterr().err


def test_without_the_extra_it_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "vla_perception.view.server", raising=False)
    assert main(["view", "--no-browser"]) == 1
    assert "pip install '.[view]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(capsys):
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from fake_feed import FakeFeed

    from vla_perception.view import command
    from vla_perception.view.server import PageServer

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = command.argparse.Namespace(host="127.0.0.1", port=port, allow_control=False, hz=5.0)
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1 port {port}.*choose another --port"):
            command._server(PageServer, FakeFeed(), options)
