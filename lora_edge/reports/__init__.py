"""Reports of validations for people and machines, all made from one JSON.

Reads what ``validate --json`` writes (``report.schema.json``); knows nothing of how it came about.
"""

from lora_edge.reports.baseline import Regression, compare
from lora_edge.reports.html import html
from lora_edge.reports.junit import junit
from lora_edge.reports.load import load_report
from lora_edge.reports.markdown import markdown

__all__ = ["Regression", "compare", "html", "junit", "load_report", "markdown"]
