"""Attention of sequences that stand one after the other, without padding outside it.

A batch is T tokens; sequences come by length, so that those of similar length are
neighbours. Neighbours form a group, and only inside a group, and only inside attention, a
sequence is padded to the longest of its group: linear layers, norms and dropout never see
a token that is none.

    group 0                      group 1
    [a a a . | b b b b | c c c c] [d d d d d d d . | e e e e e e e e]

The equations are those of Vaswani et al. 2017, section 3.2.1, with dropout on the
probabilities: O = drop(softmax(scale Q K^T)) V.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peftprof_kernels.dropout import rounded
from peftprof_kernels.dropped_attention import dropped_attention
from peftprof_kernels.spans import ATTENTION, span

# What one more group costs, in rows x columns of scores of a head: the calls that it takes
# against the padding that it saves. Not sharp: for a batch of 32 film reviews attention of
# one layer, forward and backward in fp32, took 7.3 to 8.8 ms with anything from two to eight
# groups and 19 ms with one (2 cores, 2026-11-26).
GROUP_COST: Final = 6_000


@dataclass(frozen=True)
class Group:
    """Sequences that attention pads to one length; rows are tokens, from `start` to `end`.

    count, longest  sequences, and the length they are padded to
    rows    int64 [count * longest], the group's row at each place; any row where there is none
    places  int64 [end - start], the place of each row
    absent  bool [count, longest], where no row is
    All three are None where every sequence is as long as the longest.
    """

    start: int
    end: int
    count: int
    longest: int
    rows: Tensor | None = None
    places: Tensor | None = None
    absent: Tensor | None = None
    # What `dropped_attention` works out of the groups that this is the first of, by heads.
    layouts: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> "Group":
        """The group with its tensors on `device`."""
        if self.rows is None:
            return self
        tensors = (self.rows, self.places, self.absent)
        moved = (None if t is None else t.to(device, non_blocking=True) for t in tensors)
        return Group(self.start, self.end, self.count, self.longest, *moved)


def grouped(lengths: Sequence[int], cost: int = GROUP_COST, multiple: int = 1) -> tuple[Group, ...]:
    """Groups for sequences of these ascending lengths, by the least sum of scores and `cost`.

    A group of n sequences padded to L has n * L^2 scores (a head); `multiple` rounds L up.
    Raises ValueError for lengths that are not ascending, or not positive.
    """
    if any(b < a for a, b in itertools.pairwise(lengths)) or min(lengths, default=0) < 1:
        raise ValueError("lengths must be positive and ascending")
    padded = [-(-length // multiple) * multiple for length in lengths]
    # For the first j sequences: the least cost, and where the last group then starts.
    best: list[tuple[int, int]] = [(0, 0)]
    for j, longest in enumerate(padded, 1):
        best.append(min((best[i][0] + (j - i) * longest**2 + cost, i) for i in range(j)))
    bounds = [len(lengths)]
    while bounds[-1]:
        bounds.append(best[bounds[-1]][1])
    bounds.reverse()
    groups, start = [], 0
    for first, last in itertools.pairwise(bounds):
        group = _group(lengths[first:last], padded[last - 1], start)
        groups.append(group)
        start = group.end
    return tuple(groups)


def _group(lengths: Sequence[int], longest: int, start: int) -> Group:
    count, total = len(lengths), sum(lengths)
    if total == count * longest:
        return Group(start, start + total, count, longest)
    here = torch.arange(longest)
    sizes = torch.tensor(lengths)
    present = here < sizes[:, None]
    begins = sizes.cumsum(0) - sizes
    rows = torch.where(present, begins[:, None] + here, 0).view(-1)
    return Group(
        start, start + total, count, longest, rows, present.view(-1).nonzero().view(-1), ~present
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[Group],
    scale: float,
    p: float = 0.0,
    causal: bool = False,
    one_query: bool = False,
) -> Tensor:
    """Attention inside each sequence, q [T, h, d] and k, v [T, h / n, d] -> [T, h, d].

    Each key head serves n query heads. p is dropout's probability on the attention
    probabilities. Tokens after the last group belong to no sequence: their rows are zero.
    `one_query`: q [sequences, h, d] is one token of each sequence, which sees all of its
    sequence, and so is the result.
    On a CPU with dropout, scores and softmax are fp32 and their masks one byte each; else it
    is torch's scaled_dot_product_attention, group by group. The result has v's dtype.
    Raises ValueError for shapes that do not fit each other or the groups.
    """
    if one_query and causal:
        raise ValueError("one query sees all of its sequence, so causal has no meaning for it")
    queries = _one_each(groups) if one_query else groups
    _check(q, k, v, queries, groups)
    with span(ATTENTION):
        return _attend(q, k, v, queries, groups, scale, p, causal)


def _one_each(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups of the queries where each sequence has one."""
    ends = [0, *itertools.accumulate(group.count for group in groups)]
    return tuple(Group(a, b, b - a, 1) for a, b in itertools.pairwise(ends))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequence[Group],
    groups: Sequence[Group],
    scale: float,
    p: float,
    causal: bool,
) -> Tensor:
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if q.device.type == "cpu" and rounded(p):
        return dropped_attention(q, k, v, queries, groups, scale, p, causal)
    q, k = q.to(v.dtype), k.to(v.dtype)
    pairs = zip(queries, groups, strict=True)
    parts = [_stock(q, k, v, asking, group, scale, p, causal) for asking, group in pairs]
    if rest := q.shape[0] - queries[-1].end:
        parts.append(v.new_zeros(rest, *q.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[Group], groups: Sequence[Group]
) -> None:
    one_query = queries is not groups
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be [T, heads, d], k and v [T, heads / n, d]; got {(*q.shape,)}, "
            f"{(*k.shape,)}, {(*v.shape,)}"
        )
    ends = [0] + [g.end for g in groups]
    if [g.start for g in groups] != ends[:-1] or not 0 < ends[-1] <= k.shape[0]:
        raise ValueError(f"the groups must cover tokens from the first of {k.shape[0]}, each once")
    wanted = queries[-1].end if one_query else k.shape[0]
    if q.shape[0] != wanted:
        raise ValueError(f"q must be of {wanted} tokens, got {q.shape[0]}")


def _spread(x: Tensor, group: Group) -> Tensor:
    """The group's rows of x [T, h, d] as [count, longest, h, d]; what is no row is any row."""
    part = x[group.start : group.end]
    if group.rows is not None:
        part = part.index_select(0, group.rows)
    return part.view(group.count, group.longest, *x.shape[1:])


def _stock(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asking: Group,
    group: Group,
    scale: float,
    p: float,
    causal: bool,
) -> Tensor:
    q = _spread(q, asking).transpose(1, 2)
    k, v = (_spread(t, group).transpose(1, 2) for t in (k, v))
    mask = None
    if group.absent is not None and not causal:  # causal: what is absent comes after
        mask = ~group.absent[:, None, None, :]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal, scale=scale
    )
    flat = out.transpose(1, 2).flatten(0, 1)  # [count * longest, h, d]
    return flat if asking.places is None else flat.index_select(0, asking.places)
