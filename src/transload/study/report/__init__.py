"""Results as pages and tables for people: one self-contained HTML file, and CSV."""

from transload.study.report.page import render_page, result_labels, write_page

__all__ = ["render_page", "result_labels", "write_page"]
