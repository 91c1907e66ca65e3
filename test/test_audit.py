"""`make audit`: what OSV says of the installed packages, and what happens when it says nothing."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[1] / ".ci" / "audit"
NUMPY = metadata.version("numpy")
ADVISORY = {
    "id": "GHSA-aaaa",
    "aliases": ["CVE-2030-1", "PYSEC-2030-1"],
    "summary": "reads too far",
    "affected": [{"ranges": [{"events": [{"introduced": "0"}, {"fixed": "99.1"}]}]}],
}


class Osv(ThreadingHTTPServer):
    """Says of NumPy what it is given, and remembers what it was asked."""

    def __init__(self, advisories, hangs=False, nothing=None):
        self.asked, self.ended = [], threading.Event()
        by_id = {entry["id"]: entry for entry in advisories}

        class Handler(BaseHTTPRequestHandler):
            def answer(self, value):
                body = json.dumps(value).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):  # noqa: N802
                self.answer(by_id[self.path.rpartition("/")[2]])

            def do_POST(self):  # noqa: N802
                queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
                self.server.asked += queries
                if hangs:
                    self.server.ended.wait(60)
                found = {"vulns": [{"id": each} for each in by_id]}
                none = {} if nothing is None else nothing
                self.answer({"results": [found if each["package"]["name"] == "numpy" else none for each in queries]})

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error):
        self.ended.set()
        self.shutdown()
        super().__exit__(*error)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


def audit(url, tmp_path, *arguments, allowed=""):
    (tmp_path / "allowed.txt").write_text(allowed)
    command = [sys.executable, str(AUDIT), "--url", url, "--allowed", str(tmp_path / "allowed.txt"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_installed_package_is_asked_about_in_one_request(tmp_path):
    with Osv([]) as osv:
        result = audit(osv.url, tmp_path)
        assert result.returncode == 0, result.stderr
        asked = {each["package"]["name"]: each["version"] for each in osv.asked}
    assert asked["numpy"] == NUMPY and len(asked) == len(osv.asked)
    assert not any("+" in version for version in asked.values())  # 2.8.0+cu130 is in no database


def test_a_vulnerability_under_two_names_is_one_and_says_the_cure(tmp_path):
    other = ADVISORY | {"id": "PYSEC-2030-1", "aliases": ["CVE-2030-1", "GHSA-aaaa"]}
    with Osv([ADVISORY, other, ADVISORY | {"id": "GHSA-bbbb", "aliases": [], "withdrawn": "2030-01-01"}]) as osv:
        result = audit(osv.url, tmp_path)
        assert result.returncode == 1
        assert result.stdout.count("reads too far (mended in 99.1)") == 1 and "1 with a known" in result.stdout
        assert f"numpy {NUMPY}: CVE-2030-1, GHSA-aaaa, PYSEC-2030-1" in result.stdout
        warned = audit(osv.url, tmp_path, "--warn")
        assert warned.returncode == 0 and "reads too far" in warned.stdout


def test_what_is_allowed_passes_by_any_of_its_names_and_what_is_gone_is_named(tmp_path):
    with Osv([ADVISORY]) as osv:
        result = audit(osv.url, tmp_path, allowed="# why\nCVE-2030-1 not called here\nCVE-2029-5 no longer\n")
        assert result.returncode == 0 and "0 with a known" in result.stdout
        assert "CVE-2029-5 concerns nothing here any more" in result.stdout and "CVE-2030-1" not in result.stdout
        assert "without a reason" in audit(osv.url, tmp_path, allowed="CVE-2030-1\n").stderr


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "refuses"])
def test_without_an_answer_nothing_is_called_sound(tmp_path, hangs):
    with Osv([], hangs=hangs) as osv:
        url = osv.url if hangs else "http://127.0.0.1:9"
        warned = audit(url, tmp_path, "--warn")
        assert warned.returncode == 0 and "nothing is known" in warned.stderr and "0 with" not in warned.stdout
        if not hangs:
            assert audit(url, tmp_path).returncode == 2


def test_an_answer_of_another_shape_is_none(tmp_path):
    with Osv([], nothing=["no object"]) as osv:
        result = audit(osv.url, tmp_path)
        assert result.returncode == 2 and "nothing is known" in result.stderr and "Traceback" not in result.stderr


def test_the_projects_own_list_has_reasons():
    for line in (AUDIT.parents[1] / "requirements" / "audit-allowed.txt").read_text().splitlines():
        assert line.startswith("#") or len(line.split(None, 1)) == 2, line
