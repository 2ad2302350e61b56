"""Puts the tables of committed benchmark results into the pages: {{ results NAME }}, NAME a family, gpu or exchange."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402

TABLES = {"gpu": report.gpu_table, "exchange": report.exchange_table}


def on_page_markdown(markdown, **_):
    def table(match):
        name = match[1]
        return TABLES[name]() if name in TABLES else report.table(name)

    return re.sub(r"\{\{ results (\S+) \}\}", table, markdown)
