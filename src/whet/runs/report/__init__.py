"""A run as a page to look at, and several runs side by side. One HTML file each, nothing fetched, no scripts."""

from whet.runs.report.compare import write_comparison
from whet.runs.report.page import write_report
from whet.runs.report.record import Record, read_run

__all__ = ["Record", "read_run", "write_comparison", "write_report"]
