"""Puts tables into the pages: {{ results NAME }} of committed results, {{ plan NAME }} of what is computed."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import plan, report  # noqa: E402

TABLES = {"gpu": report.gpu_table, "exchange": report.exchange_table, "serving": report.serving_table}


def on_page_markdown(markdown, **_):
    def table(match):
        name = match[1]
        return TABLES[name]() if name in TABLES else report.table(name)

    markdown = re.sub(r"\{\{ plan (\S+) \}\}", lambda m: plan.TABLES[m[1]](), markdown)
    return re.sub(r"\{\{ results (\S+) \}\}", table, markdown)
