"""`--html`: a breakdown as one self-contained page."""

from peftprof.report.page.page import render

__all__ = ["render"]
