"""Puts the tables of the committed benchmark results into the pages: {{ results NAME }}."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402


def on_page_markdown(markdown, **_):
    return re.sub(r"\{\{ results (\S+) \}\}", lambda match: report.table(match[1]), markdown)
