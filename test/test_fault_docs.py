"""docs/security.md and docs/reliability.md: every test that they name exists, and what they say of SROS 2 is so."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from ros_harness import ROOT, free_domain, ros_environment

PAGES = ("security.md", "reliability.md")
TESTS = list((ROOT / "test").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    found = {name for path in TESTS for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))}
    found |= {path.stem for path in TESTS}
    assert len(named) > 20
    # A page may shorten a name as `pytest -k` would take it.
    assert not [name for name in named if not any(other.startswith(name) for other in found)]


def test_the_policy_of_sros2_names_the_nodes_topics():
    policy = ElementTree.parse(ROOT / "config" / "sros2_policy.xml").getroot()
    enclaves = {enclave.get("path"): enclave for enclave in policy.iter("enclave")}
    assert set(enclaves) == {"/tokenizer", "/policy"}

    def names(enclave, kind, right):
        return {item.text for item in enclaves[enclave].findall(f".//{kind}[@{right}='ALLOW']/*")}

    assert {"tokens", "/diagnostics"} <= names("/tokenizer", "topics", "publish")
    assert "tokens" not in names("/policy", "topics", "publish")
    assert "condition" in names("/tokenizer", "topics", "subscribe") & names("/policy", "topics", "publish")
    assert "encode" in names("/tokenizer", "services", "reply") & names("/policy", "services", "request")


@pytest.mark.ros
def test_the_wheels_refuse_sros2(tmp_path):
    """They are built without Fast DDS's security plugins: no node starts, rather than an unprotected one."""
    for name in (
        "enclaves/x/key.pem",
        "cert.pem",
        "identity_ca.cert.pem",
        "permissions_ca.cert.pem",
        "governance.p7s",
        "permissions.p7s",
    ):
        file = tmp_path / "enclaves" / "x" / os.path.basename(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    environment = ros_environment(free_domain()) | {
        "ROS_SECURITY_KEYSTORE": str(tmp_path),
        "ROS_SECURITY_ENABLE": "true",
        "ROS_SECURITY_STRATEGY": "Enforce",
    }
    code = "import rclpy; rclpy.init(args=['--ros-args', '--enclave', '/x']); rclpy.create_node('x')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    if "security libraries" not in done.stderr:
        pytest.skip("this Fast DDS has the security plugins: a distribution's")
