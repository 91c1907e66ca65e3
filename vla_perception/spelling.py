"""Which of the right names a wrong one may be meant for. The standard library only: launch files import it, too."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection


def nearest(name: str, names: Collection[str], cutoff: float) -> str | None:
    """The name most alike, None if none is as alike as `cutoff` (0 to 1). Case, and what separates words, do not count."""
    plain = {_plain(known): known for known in names}
    alike = difflib.get_close_matches(_plain(name), plain, 1, cutoff)
    return plain[alike[0]] if alike else None


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name[:200].casefold())
