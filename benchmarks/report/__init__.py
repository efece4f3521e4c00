"""
Make tables and pictures of all results in ``benchmarks/results``: ``make report``.

Tables are written between the marks ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of the pages, pictures to
``docs/pictures``.
"""

from benchmarks.report.pages import PAGES, insert_table, main, make_tables

__all__ = ["PAGES", "insert_table", "main", "make_tables"]
