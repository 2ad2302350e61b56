"""Puts the tables of the committed benchmark results into the pages: {{ results NAME }}, {{ results gpu }}."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402


def on_page_markdown(markdown, **_):
    return re.sub(
        r"\{\{ results (\S+) \}\}", lambda m: report.gpu_table() if m[1] == "gpu" else report.table(m[1]), markdown
    )
