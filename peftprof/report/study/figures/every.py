"""Every figure of a study, in the order in which it is read."""

from peftprof.report.study.figures.by_method import by_method
from peftprof.report.study.figures.by_rank import FIRST, by_rank
from peftprof.report.study.figures.drawing import Drawn
from peftprof.report.study.figures.ladder import ladder
from peftprof.report.study.figures.pareto import pareto
from peftprof.report.study.figures.profiles import memory, operators
from peftprof.report.study.figures.roofline import roofline
from peftprof.studies import Judged


def figures(judged: Judged) -> list[Drawn]:
    """The paper's figures by their numbers (the fourth is a photograph), then those it lacks.

    A figure without data is left out.
    """
    found = by_method(judged)
    for method in FIRST:
        found += by_rank(judged, method)
    new = (make(judged) for make in (operators, ladder, memory, roofline, pareto))
    return [*found, *(drawn for drawn in new if drawn is not None)]
