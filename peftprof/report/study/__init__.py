"""A study for people: tables, figures, a page, a summary."""

from peftprof.report.study.terminal import render
from peftprof.report.study.written import write

__all__ = ["render", "write"]
