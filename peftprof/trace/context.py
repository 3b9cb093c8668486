"""What the ranges, operators and links round each CPU event say of it, as columns.

Rules are carried by their number; what a rule's category is, `Rules.category_of` says.
"""

from dataclasses import dataclass

import numpy as np

from peftprof.breakdowns import PHASES
from peftprof.trace import rules
from peftprof.trace.events import NONE, Bools, Events, Ints, Kind
from peftprof.trace.nesting import Tree, nest
from peftprof.trace.rules import Reach, Rules
from peftprof.trace.steps import Steps

BACKWARD = PHASES.index("backward")
OPTIMIZER = PHASES.index("optimizer")
OTHER = PHASES.index("other")


@dataclass(frozen=True)
class Context:
    """Of each event: its phase, layer, and which rule holds for it in which order."""

    tree: Tree
    phase: Ints
    layer: Ints
    operator: Ints  # row of the innermost operator, itself included
    names_category: Bools  # a range that names a category
    ranged: Ints  # rule of the innermost such range
    before: Ints  # by the forward's range, head, optimizer, operators that own what is under them
    after: Ints  # by the rules of the innermost operator
    python: Bools  # in the Python body of an autograd.Function, no operator running

    @property
    def rule(self) -> Ints:
        """The rule that holds for a CPU event."""
        return first(self.ranged, self.before, self.after)


def surroundings(events: Events, found: Steps, ruleset: Rules) -> Context:
    """The context of every CPU event of the trace."""
    tree = nest(events)
    is_range, is_operator = events.kind == Kind.RANGE, events.kind == Kind.OPERATOR
    rows = np.arange(len(events))
    of_name = _range_names(events, ruleset)
    own_phase = np.where(is_range, of_name.phase[events.name], NONE)
    own_phase[_with_closure(events, tree, own_phase)] = NONE
    phase = tree.inherit(own_phase)
    own_range = np.where(is_range, of_name.rule[events.name], NONE)
    in_range = tree.inherit(own_range)
    layer_name = np.where(of_name.layer, np.arange(len(events.names)), NONE)
    layer = tree.inherit(np.where(is_range, layer_name[events.name], NONE))
    head = np.where((layer != NONE) & of_name.head[layer], rules.HEAD, NONE)

    operator = tree.inherit(np.where(is_operator, rows, NONE))
    own = _operator_rules(events, tree, operator, is_operator, ruleset)
    at_once = tree.inherit(own[Reach.FIRST])
    within = tree.inherit(own[Reach.WITHIN], outermost=True)
    named = first(own[Reach.OWN], own[Reach.WITHIN])
    is_idle = ruleset.category_of == rules.IDLE
    python = is_idle[own[Reach.OWN]][operator] & (operator != NONE)
    enclosing = tree.inherit(np.where(is_idle[named], NONE, named))
    last = tree.inherit(own[Reach.LAST])

    forward = tree.inherit(events.forward)

    def linked(values: Ints) -> Ints:
        return np.where(forward != NONE, values[forward], NONE)

    phase = _complete_phase(events, found, tree, phase)
    optimizer = np.where(phase == OPTIMIZER, rules.OPTIMIZER, NONE)
    before = first(at_once, linked(in_range), head, linked(head), optimizer, within, linked(within))
    after = first(
        enclosing, linked(enclosing), own[Reach.INHERIT], linked(own[Reach.INHERIT]), last
    )
    # Hooks run in the engine's wrapper round a node, and no operator tells of them either.
    hooks = (is_operator & _named(events, rules.ENGINE))[operator] & (operator != NONE)
    python |= hooks & (first(in_range, before, after) == NONE)
    return Context(
        tree=tree,
        phase=phase,
        layer=first(layer, linked(layer)),
        operator=operator,
        names_category=own_range != NONE,
        ranged=in_range,
        before=before,
        after=after,
        python=python,
    )


def first(*columns: Ints) -> Ints:
    """The first value that is not NONE, row by row."""
    found = columns[0]
    for column in columns[1:]:
        found = np.where(found != NONE, found, column)
    return found


@dataclass(frozen=True)
class _RangeNames:
    """By name: the phase it says, the rule that gives a category, whether a layer, the head."""

    phase: Ints
    rule: Ints
    layer: Bools
    head: Bools


def _range_names(events: Events, ruleset: Rules) -> _RangeNames:
    used = {events.names[i] for i in np.unique(events.name[events.kind == Kind.RANGE])}
    matches = [
        next((r for r in ruleset.ranges if name in used and r.match.fullmatch(name)), None)
        for name in events.names
    ]
    return _RangeNames(
        phase=np.array([r.phase if r else NONE for r in matches], np.int64),
        rule=np.array([r.number if r and r.category != NONE else NONE for r in matches], np.int64),
        layer=np.array([bool(ruleset.layer.fullmatch(n)) for n in events.names], np.bool_),
        head=np.array([bool(ruleset.head.fullmatch(n)) for n in events.names], np.bool_),
    )


def _operator_rules(
    events: Events, tree: Tree, operator: Ints, is_operator: Bools, ruleset: Rules
) -> dict[Reach, Ints]:
    """By reach, the rule that each operator's own name gives it."""
    above = tree.above(operator)
    parent = np.where(above != NONE, events.name[above], NONE)
    width = len(events.names) + 1
    pairs = events.name[is_operator] * width + parent[is_operator] + 1
    unique, which = np.unique(pairs, return_inverse=True)
    matched = rules.match(
        ruleset.operators,
        [
            (events.names[pair // width], events.names[pair % width - 1] if pair % width else "")
            for pair in unique.tolist()
        ],
    )
    result = {}
    for reach in Reach:
        result[reach] = np.full(len(events), NONE, np.int64)
        result[reach][is_operator] = matched.only(reach)[which.reshape(-1)]
    return result


def _named(events: Events, prefix: str) -> Bools:
    """Which events have a name that begins so."""
    matches: Bools = np.array([name.startswith(prefix) for name in events.names], np.bool_)
    return matches[events.name]


def _with_closure(events: Events, tree: Tree, phase: Ints) -> Ints:
    """Optimizer ranges in which operators run whose gradients are computed later.

    They call a closure that does the whole step, so they say nothing of what is inside.
    `phase` is what each range says by itself.
    """
    around = tree.inherit(np.where(phase != NONE, np.arange(len(events)), NONE))
    holds = around[np.unique(events.forward[events.forward != NONE])]
    holds = holds[holds != NONE]
    found: Ints = holds[phase[holds] == OPTIMIZER]
    return found


def _complete_phase(events: Events, found: Steps, tree: Tree, phase: Ints) -> Ints:
    """Without a phase range round it, work of the autograd engine is backward, all else other.

    Where operators were not recorded, as by nsys, the engine's thread is any other thread
    that works while the step's own is in its backward phase, waiting for it.
    """
    engine = _named(events, rules.ENGINE) & (events.kind == Kind.OPERATOR)
    under = tree.inherit(np.where(engine, BACKWARD, NONE))
    if engine.any():
        threads = np.setdiff1d(events.thread[engine], found.thread)
        backward = np.isin(events.thread, threads)
    else:
        backward = (events.thread != found.thread) & _meanwhile(events, found, tree, phase)
    return first(phase, under, np.where(backward, BACKWARD, OTHER))


def _meanwhile(events: Events, found: Steps, tree: Tree, phase: Ints) -> Bools:
    """Which events begin while the thread of the steps is in its backward phase."""
    inside = tree.innermost[events.thread[tree.innermost.row] == found.thread]
    inside = inside[phase[inside.row] == BACKWARD]
    if not len(inside):
        return np.zeros(len(events), np.bool_)
    at = np.searchsorted(inside.start, events.start, side="right") - 1
    within: Bools = (at >= 0) & (events.start < inside.end[at])
    return within
