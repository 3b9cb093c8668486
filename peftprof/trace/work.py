"""Operations and bytes of each category in a step, and how near that is to the ceilings.

Only operators that were executed count, each once. So a frozen weight costs what it costs:
no product makes its gradient, and none is counted. docs/work-and-ceilings.md tells it in
words.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftprof.breakdowns import CATEGORIES, Ceilings, Work
from peftprof.trace import costs
from peftprof.trace.attribute import Attribution
from peftprof.trace.costs import Rank
from peftprof.trace.events import NONE, Bools, Events, Ints, Kind, distinct
from peftprof.trace.formulas import Cost
from peftprof.trace.nesting import Tree

Floats = NDArray[np.float64]

# A category at less of both ceilings than this is bound by neither: they account for under
# a third of its time, and the rest is launches, dispatch, small sizes or waiting. More
# cannot be asked for, because the bytes are a lower bound and the products of a real layer
# reach less than the large square one that the ceiling was measured with.
NEAR = 0.3
# What holds up the smaller part of a category's time says nothing of the whole.
MOSTLY = 0.5


def work(found: Attribution, ceilings: Ceilings | None) -> tuple[Work, ...]:
    """What each category with time in the steps did, means over the steps.

    Without ceilings the shares and the bound are None. Nothing at all for a trace without
    shapes and bytes of copies.
    """
    if (found.events.operands == NONE).all() and (found.events.bytes == NONE).all():
        return ()
    prices = _prices(found.events)
    counted = _counted(prices, found.tree)
    owner = found.tree.inherit(np.where(counted, np.arange(len(counted)), NONE))
    if found.events.on_device.any():
        done, known = _on_device(found, prices, owner)
    else:
        done, known = _on_cpu(found, prices, counted, owner)

    row, ns, steps = found.pieces.row, found.pieces.ns, len(found.windows)
    category = found.meaning.category[row]
    all_ns = _sums(category, ns) / steps
    known_ns = _sums(category[known[row]], ns[known[row]]) / steps
    moved = _sums(done.category, done.bytes) / steps
    flops = [
        _sums(done.category, np.where(done.dtype == n, done.flops, 0.0)) / steps
        for n in range(len(prices.dtypes))
    ]
    results = []
    for i in np.flatnonzero(all_ns).tolist():
        by_dtype = {dtype: float(sums[i]) for dtype, sums in zip(prices.dtypes, flops, strict=True)}
        plain = Work(
            category=CATEGORIES[i],
            ns=float(all_ns[i]),
            known=float(known_ns[i] / all_ns[i]),
            flops=sum(by_dtype.values()),
            bytes=float(moved[i]),
            dtype=max((d for d in by_dtype if by_dtype[d]), key=by_dtype.__getitem__, default=""),
        )
        results.append(_against(ceilings, plain, by_dtype) if ceilings else plain)
    return tuple(results)


def _sums(category: Ints, values: Ints | Floats) -> Floats:
    """The sum of `values` in each category; what has none is left out."""
    placed = category != NONE
    sums = np.bincount(category[placed], values[placed], len(CATEGORIES))
    return sums.astype(np.float64)  # bincount of nothing counts in integers


def _against(ceilings: Ceilings, plain: Work, by_dtype: dict[str, float]) -> Work:
    """`plain` with its shares, over the time that is known, and its bound."""
    seconds = plain.ns * plain.known / 1e9
    if not seconds:
        return plain
    bytes_share = plain.bytes / ceilings.bytes_per_s / seconds
    flops_share: float | None = 0.0
    if plain.flops:
        # What ran in a dtype without a ceiling counts against that of the category's own.
        own = ceilings.flops_per_s.get(plain.dtype)
        flops_share = own and sum(
            flops / ceilings.flops_per_s.get(dtype, own) / seconds
            for dtype, flops in by_dtype.items()
        )
    bound = _bound(flops_share, bytes_share) if plain.known >= MOSTLY else None
    return dataclasses.replace(plain, flops_share=flops_share, bytes_share=bytes_share, bound=bound)


def _bound(flops_share: float | None, bytes_share: float) -> str | None:
    """The ceiling that is near; None where that of the products is not known and may be it."""
    if bytes_share >= max(NEAR, flops_share or 0.0):
        return "memory"
    if flops_share is None:
        return None
    return "compute" if flops_share >= NEAR else "overhead"


@dataclass(frozen=True)
class _Prices:
    """What calls take: a price for each distinct pair of name and operands.

    `number[row]` is an event's price; number 0 is that of events without one. `dtype`
    numbers `dtypes`.
    """

    number: Ints
    rank: Ints
    flops: Floats
    bytes: Floats
    dtype: Ints
    dtypes: tuple[str, ...]


def _prices(events: Events) -> _Prices:
    operators = np.flatnonzero(events.kind == Kind.OPERATOR)
    used = np.zeros(len(events.names), np.bool_)
    used[events.name[operators]] = True
    rules = {n: costs.rule(events.names[n]) for n in np.flatnonzero(used).tolist()}
    used[[n for n, rule in rules.items() if rule is None]] = False
    rows = operators[used[events.name[operators]]]

    # NONE, no operands, becomes one more signature after all others.
    signatures = len(events.signatures) + 1
    pairs, which = distinct(events.name[rows] * signatures + events.operands[rows] % signatures)
    ranks, taken = [NONE], [Cost(0, 0)]
    for pair in pairs.tolist():
        rule, signature = rules[pair // signatures], pair % signatures
        cost = None
        if rule and rule.rank is Rank.FREE:
            cost = Cost(0, 0)
        elif rule and signature < len(events.signatures):
            cost = costs.cost(rule, events.signatures[signature])
        ranks.append(NONE if rule is None or cost is None else int(rule.rank))
        taken.append(cost or Cost(0, 0))
    number = np.zeros(len(events), np.int64)
    number[rows] = 1 + which
    dtypes = tuple(sorted({cost.dtype for cost in taken}))
    return _Prices(
        number=number,
        rank=np.array(ranks, np.int64),
        flops=np.array([cost.flops for cost in taken], np.float64),
        bytes=np.array([cost.bytes for cost in taken], np.float64),
        dtype=np.array([dtypes.index(cost.dtype) for cost in taken], np.int64),
        dtypes=dtypes,
    )


def _counted(prices: _Prices, tree: Tree) -> Bools:
    """Which events count: nothing of their rank is below them, and no WHOLE is above."""
    rank = prices.rank[prices.number]
    below = np.full(len(rank), NONE, np.int64)
    for rows in reversed(tree.levels[1:]):
        np.maximum.at(below, tree.parent[rows], np.maximum(rank[rows], below[rows]))
    counting = (rank > Rank.FREE) & (below < rank)
    whole = np.where(counting & (rank == Rank.WHOLE), np.arange(len(rank)), NONE)
    hidden = tree.above(tree.inherit(whole)) != NONE
    counted: Bools = counting & ~hidden
    return counted


@dataclass(frozen=True)
class _Done:
    """Pieces of work: the category of each, and what it took."""

    category: Ints
    flops: Floats
    bytes: Floats
    dtype: Ints

    @classmethod
    def of(cls, prices: _Prices, category: Ints, operators: Ints) -> "_Done":
        """The work of `operators` (rows)."""
        n = prices.number[operators]
        return cls(category, prices.flops[n], prices.bytes[n], prices.dtype[n])


def _on_cpu(
    found: Attribution, prices: _Prices, counted: Bools, owner: Ints
) -> tuple[_Done, Bools]:
    """The work of operators that begin in a step; the rows whose time is accounted for.

    Time is known inside what counts; in an operator without work; and in one of PyTorch's
    or ours that calls what counts, where it is dispatch. Others may work themselves.
    """
    events, operator = found.events, found.meaning.shown
    rows = np.flatnonzero(counted)
    rows = rows[found.windows.holding(events.start[rows]) != NONE]
    done = _Done.of(prices, found.meaning.category[rows], rows)

    free = prices.rank[prices.number] == Rank.FREE
    ours = np.array([name.startswith(("aten::", "peftprof::")) for name in events.names], np.bool_)
    calls = _above(found.tree, counted) & ours[events.name]
    return done, (owner != NONE) | ((operator != NONE) & (free | calls)[operator])


def _above(tree: Tree, marked: Bools) -> Bools:
    """The events with a marked one somewhere below them."""
    result = np.zeros(len(marked), np.bool_)
    for rows in reversed(tree.levels[1:]):
        result[tree.parent[rows[marked[rows] | result[rows]]]] = True
    return result


def _on_device(found: Attribution, prices: _Prices, owner: Ints) -> tuple[_Done, Bools]:
    """The work of operators that launched something which ran in a step.

    An operator's work belongs to the category of its longest kernel. Copies and fills tell
    their own bytes, so they are not asked for their operator. Time is known of these, and
    of kernels whose operator counts.
    """
    events, category = found.events, found.meaning.category
    launched = events.on_device & (events.launch != NONE)
    operator = np.where(launched, owner[events.launch], NONE)
    copies = (events.kind > Kind.KERNEL) & (events.bytes != NONE)

    ran = found.calls.row
    copied = ran[copies[ran]]
    kernels = ran[~copies[ran] & (operator[ran] != NONE)]
    length = events.end[kernels] - events.start[kernels]
    kernels = kernels[np.lexsort((length, operator[kernels]))]
    longest = kernels[np.append(np.diff(operator[kernels]) != 0, True)[: len(kernels)]]
    by_operators = _Done.of(prices, category[longest], operator[longest])

    flops, no_dtype = np.zeros(len(copied)), np.zeros(len(copied), np.int64)
    # On the device itself a byte is read and written; else one of the two is elsewhere.
    within = np.array(["DtoD" in name for name in events.names], np.bool_)
    moved = events.bytes[copied] * np.where(within[events.name[copied]], 2, 1)
    by_copies = _Done(category[copied], flops, moved.astype(np.float64), no_dtype)
    return _joined(by_operators, by_copies), copies | (operator != NONE)


def _joined(first: _Done, second: _Done) -> _Done:
    pairs = zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)
    return _Done(*(np.concatenate(pair) for pair in pairs))
