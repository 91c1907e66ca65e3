"""Python without some of its modules."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_without(blocked: str, code: str) -> None:
    """Runs code in a Python where the modules that `blocked` (a regular expression) matches cannot be imported."""
    blocker = f"""
        import re, sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if re.fullmatch({blocked!r}, name.split(".")[0]):
                    raise ModuleNotFoundError(f"No module named {{name!r}} (hidden by this test)", name=name)

        sys.meta_path.insert(0, Blocker())
    """
    program = textwrap.dedent(blocker) + textwrap.dedent(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
