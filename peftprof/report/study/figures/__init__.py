"""A study's figures, as SVG: the paper's drawn again, and those that it lacks."""

from peftprof.report.study.figures.drawing import Drawn
from peftprof.report.study.figures.every import figures

__all__ = ["Drawn", "figures"]
