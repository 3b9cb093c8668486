"""The paper's figures 5 to 11 (LoRA) and 12 to 18 (QLoRA): everything by rank."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from peftprof.report.study.figures.by_method import open_diamond, paper_marks, paper_says
from peftprof.report.study.figures.drawing import (
    METHODS,
    NAMES,
    PAPER,
    SMALL,
    Drawn,
    colour_of,
    draw,
    ends,
    from_zero,
    key,
    method_of,
    rank_of,
    short,
    whiskers,
)
from peftprof.report.study.figures.quantities import (
    ACCURACY,
    EFFICIENCY,
    MEMORY,
    THROUGHPUT,
    TRAINED,
    Quantity,
)
from peftprof.studies import Interval, Judged

FIRST = {"lora": 5, "qlora": 12}  # the number of each method's first figure in the paper
BESIDE_FULL = (ACCURACY, MEMORY, THROUGHPUT)
PANELS = (ACCURACY, TRAINED, MEMORY, THROUGHPUT)
# Each by rank: places after the first figure, the quantity, the file's name.
SINGLES = (
    (2, ACCURACY, "accuracy"),
    (3, EFFICIENCY, "parameter-efficiency"),
    (4, MEMORY, "memory"),
    (5, TRAINED, "trained-parameters"),
    (6, THROUGHPUT, "throughput"),
)
FULL = "The dashed line is full fine-tuning"


def by_rank(judged: Judged, method: str) -> list[Drawn]:
    """The seven figures of an adapter method, those without data left out."""
    first = FIRST[method]
    found = [_overview(judged, method, first), _against_parameters(judged, method, first + 1)]
    found += [
        _single(judged, method, quantity, first + after, name) for after, quantity, name in SINGLES
    ]
    return [drawn for drawn in found if drawn is not None]


def _of(judged: Judged, method: str, quantity: Quantity) -> dict[str, Interval]:
    return {n: one for n, one in quantity.of(judged).items() if method_of(n) == method}


def _overview(judged: Judged, method: str, number: int) -> Drawn | None:
    if not any(_of(judged, method, quantity) for quantity in PANELS):
        return None

    def paint(figure: Figure) -> None:
        for axes, quantity in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            axes.set_title(quantity.words)
            _lines(axes, judged, method, quantity)
        _key(figure, judged, method, PANELS)

    apart = any(q.apart(_of(judged, method, q)) for q in PANELS)
    printed = any(q.paper(_of(judged, method, q)) for q in PANELS)
    says = (
        f"{NAMES[method]} by rank: accuracy, trained parameters, peak memory, samples a second",
        "Whiskers: 95 % intervals, of memory the lowest and the highest run",
        FULL if _beside_full(judged, PANELS) else "",
        f"Open diamonds: what the paper prints{', on an axis to the right' if apart else ''}"
        if printed
        else "",
    )
    title = f"Fig. {number}: {NAMES[method]} by rank"
    file = f"fig{number:02}-{method}-overview.svg"
    return draw(judged, file, title, says, paint, (8.6, 6.2))


def _single(
    judged: Judged, method: str, quantity: Quantity, number: int, name: str
) -> Drawn | None:
    found = _of(judged, method, quantity)
    if not found:
        return None

    def paint(figure: Figure) -> None:
        _lines(figure.add_subplot(), judged, method, quantity)
        _key(figure, judged, method, (quantity,))

    says = (
        f"{NAMES[method]}: {quantity.words} by rank",
        quantity.whiskers,
        FULL if _beside_full(judged, (quantity,)) else "",
        paper_says(quantity, found),
    )
    title = f"Fig. {number}: {NAMES[method]}, {quantity.words} by rank"
    return draw(judged, f"fig{number:02}-{method}-{name}.svg", title, says, paint, SMALL)


def _lines(axes: Axes, judged: Judged, method: str, quantity: Quantity) -> None:
    """One quantity over ranks, from zero; ranks stand at equal distances."""
    found = _of(judged, method, quantity)
    axes.set_ylabel(quantity.label)
    if not found:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    values = [one.value for one in found.values()]
    axes.errorbar(
        range(len(found)), values, yerr=whiskers(found.values()), marker="o", capsize=3,
        color=METHODS[method], elinewidth=1,
    )  # fmt: skip
    shown = [*ends(found.values()), *paper_marks(axes, quantity, found)]
    full = quantity.of(judged).get("full")
    if full is not None and quantity in BESIDE_FULL:
        axes.axhline(full.value, color=METHODS["full"], linestyle="--", linewidth=1.2)
        shown.append(full.value)
    from_zero(axes, shown)
    axes.set_xticks(range(len(found)), [f"{rank_of(name)}" for name in found])
    axes.set_xlim(-0.4, len(found) - 0.6)
    axes.set_xlabel("rank")
    if quantity is TRAINED:
        axes.yaxis.set_major_formatter(FuncFormatter(short))


def _beside_full(judged: Judged, quantities: tuple[Quantity, ...]) -> bool:
    return any(q in BESIDE_FULL and "full" in q.of(judged) for q in quantities)


def _key(figure: Figure, judged: Judged, method: str, quantities: tuple[Quantity, ...]) -> None:
    marks = [Line2D([], [], color=METHODS[method], marker="o", label=NAMES[method])]
    if _beside_full(judged, quantities):
        marks.append(Line2D([], [], color=METHODS["full"], linestyle="--", label="full"))
    if any(quantity.paper(_of(judged, method, quantity)) for quantity in quantities):
        marks.append(Line2D([], [], **open_diamond()))
    key(figure, marks)


def _against_parameters(judged: Judged, method: str, number: int) -> Drawn | None:
    """Accuracy over trained parameters; beside it the paper's, of a model of other size."""
    trained, accuracy = _of(judged, method, TRAINED), _of(judged, method, ACCURACY)
    names = [name for name in accuracy if name in trained]
    if not names:
        return None
    theirs = {n: v for n, v in TRAINED.paper(names).items() if n in ACCURACY.paper(names)}
    apart = bool(theirs) and TRAINED.apart(trained)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 2 if apart else 1, sharey=True, squeeze=False)[0]
        ours, paper = panels[0], panels[-1]
        intervals = [accuracy[name] for name in names]
        counts = [trained[name].value for name in names]
        ours.errorbar(
            counts, [one.value for one in intervals], yerr=whiskers(intervals), marker="o",
            capsize=3, color=colour_of(names[0]), elinewidth=1,
        )  # fmt: skip
        tops = [max(ends([one])) for one in intervals]
        _name_ranks(ours, names, counts, tops, below=False)
        points = [ACCURACY.paper([name])[name] for name in theirs]
        paper.plot(list(theirs.values()), points, **open_diamond())
        _name_ranks(paper, list(theirs), list(theirs.values()), points, below=True)
        from_zero(ours, [*ends(intervals), *points])
        from_zero(ours, counts if apart else [*counts, *theirs.values()], "x")
        ours.set_ylabel(ACCURACY.label)
        if apart:
            from_zero(paper, theirs.values(), "x")
            ours.set_title("here")
            paper.set_title(PAPER)
        for axes in panels:
            axes.set_xlabel(TRAINED.label)
            axes.xaxis.set_major_formatter(FuncFormatter(short))
        _key(figure, judged, method, (TRAINED,))

    says = (
        f"{NAMES[method]}: accuracy over trained parameters, a point a rank",
        ACCURACY.whiskers,
        paper_says(TRAINED, trained, where=""),
    )
    title = f"Fig. {number}: {NAMES[method]}, accuracy over trained parameters"
    file = f"fig{number:02}-{method}-accuracy-over-parameters.svg"
    size = (7.2, 3.5) if apart else SMALL
    return draw(judged, file, title, says, paint, size)


def _name_ranks(
    axes: Axes, names: list[str], across: list[float], up: list[float], below: bool
) -> None:
    for name, x, y in zip(names, across, up, strict=True):
        axes.annotate(
            f"r{rank_of(name)}", (x, y), (0, -14 if below else 4), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
