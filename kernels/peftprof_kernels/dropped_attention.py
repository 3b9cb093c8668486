"""Attention with dropout on a CPU: everything between the projections in fp32, few copies.

Three things make it faster than the library's operations one by one. Rows go between the
packed tokens and the products' layout by one look-up of d numbers a row, for all groups of a
batch at once; where they go (`Layout`) is worked out once a batch, not in every layer. A mask
is drawn for all groups at once and kept as one byte an element. And products write to where
their results belong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftprof_kernels.dropout import draw_mask, draw_seed, keep_scale
from peftprof_kernels.spans import ATTENTION, span

if TYPE_CHECKING:  # packed_attention.py imports this module
    from peftprof_kernels.packed_attention import Group


@dataclass
class Layout:
    """Rows of packed tokens x [T, h, d] as the products of all groups take them, and back.

    In the products' layout stand, for each group and then for each of its sequences and
    heads, `longest` rows of d numbers.

    rows    int64, for each row the one of x as [T * h, d]; any where there is no token
    places  int64 [tokens * h], the way back
    absent  bool [rows, 1], where there is no token; None where there is one everywhere
    bounds  of each group, in rows
    shapes  (count * h, longest) of each group
    """

    heads: int
    tokens: int
    rows: Tensor | None
    places: Tensor | None
    absent: Tensor | None
    bounds: list[tuple[int, int]]
    shapes: list[tuple[int, int]]
    biases: dict[bool, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: "Sequence[Group]", heads: int) -> "Layout":
        """Worked out once, and kept at the first group."""
        first, *others = groups
        then, layout = first.layouts.get(heads, ([], None))
        if layout is None or len(then) != len(others) or any(map(is_not, then, others)):
            layout = cls._made(groups, heads)
            first.layouts[heads] = others, layout
        made: Layout = layout
        return made

    @classmethod
    def _made(cls, groups: "Sequence[Group]", heads: int) -> "Layout":
        head = torch.arange(heads)
        rows, places, absent, bounds, shapes = [], [], [], [], []
        start = 0
        for group in groups:
            shape = (group.count, heads, group.longest)
            token = torch.arange(group.end - group.start) if group.rows is None else group.rows
            token = (group.start + token).view(group.count, 1, group.longest)
            rows.append((token * heads + head[:, None]).reshape(-1))
            place = torch.arange(group.end - group.start) if group.places is None else group.places
            sequence, position = place // group.longest, place % group.longest
            place = (sequence[:, None] * heads + head) * group.longest + position[:, None]
            places.append(start + place.view(-1))
            gone = group.absent
            here = torch.zeros(()) if gone is None else gone[:, None]
            absent.append(here.bool().expand(shape).reshape(-1, 1))
            end = start + shape[0] * shape[1] * shape[2]
            bounds.append((start, end))
            shapes.append((group.count * heads, group.longest))
            start = end
        alone = all(group.longest == 1 for group in groups)  # the two layouts are one
        return cls(
            heads,
            groups[-1].end,
            None if alone else torch.cat(rows),
            None if alone else torch.cat(places),
            torch.cat(absent) if any(group.absent is not None for group in groups) else None,
            bounds,
            shapes,
        )

    def gather(self, x: Tensor) -> Tensor:
        """x [T, h, d] in fp32, in the products' layout [rows, d]."""
        flat = x.reshape(-1, x.shape[-1])
        if self.rows is None:
            return flat[: self.tokens * self.heads].float()
        return flat.index_select(0, self.rows).float()

    def put(self, y: Tensor, out: Tensor) -> None:
        """Write y [rows, d] into out [T, h, d], and zero where no group has a token."""
        flat = out.view(-1, out.shape[-1])
        used = self.tokens * self.heads
        flat[used:] = 0
        if self.places is None:
            flat[:used] = y
        else:
            torch.index_select(y.to(out.dtype), 0, self.places, out=flat[:used])

    def parts(self, y: Tensor) -> list[Tensor]:
        """y [rows, d] by group, [count * h, longest, d] each."""
        found = zip(self.bounds, self.shapes, strict=True)
        return [y[a:b].view(*shape, y.shape[1]) for (a, b), shape in found]

    def bias(self, groups: "Sequence[Group]", causal: bool) -> list[Tensor]:
        """By group: zero, and minus infinity where a query must not look; as keys."""
        if causal not in self.biases:
            self.biases[causal] = [_bias(group, self.heads, causal) for group in groups]
        return self.biases[causal]


def _bias(group: "Group", heads: int, causal: bool) -> Tensor:
    longest = group.longest
    if causal:
        return torch.full((longest, longest), -torch.inf).triu_(1)
    if group.absent is None:
        return torch.zeros(())
    bias = torch.zeros(group.count, 1, longest).masked_fill_(group.absent[:, None], -torch.inf)
    return bias.repeat_interleave(heads, 0)  # [count * heads, 1, longest]


def dropped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: "Sequence[Group]",
    groups: "Sequence[Group]",
    scale: float,
    p: float,
    causal: bool,
) -> Tensor:
    """`packed_attention` of as many key heads as query heads, on a CPU, p above 0.

    `queries` are the groups of q where each sequence has one query, else `groups`.
    """
    out: Tensor = _DroppedAttention.apply(q, k, v, queries, groups, scale, p, causal)  # type: ignore[no-untyped-call]
    return out


class _DroppedAttention(torch.autograd.Function):
    """With P = softmax(scale Q K^T), D its dropout and O = D V:

    dV = D^T dO, dD = dO V^T, dP = dropout's backward of dD, dS = P (dP - rowsum(dP P)),
    dQ = scale dS K, dK = scale dS^T Q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: "Sequence[Group]",
        groups: "Sequence[Group]",
        scale: float,
        p: float,
        causal: bool,
    ) -> Tensor:
        asking, asked = Layout.of(queries, q.shape[1]), Layout.of(groups, q.shape[1])
        with torch.autocast(q.device.type, enabled=False):
            Q, K, V = asking.gather(q), asked.gather(k), asked.gather(v)
            masks = _masks(asking, asked, p)
            made = torch.empty_like(Q)
            Ps = []
            for q_, k_, v_, o_, mask, bias in zip(
                asking.parts(Q),
                asked.parts(K),
                asked.parts(V),
                asking.parts(made),
                masks,
                asked.bias(groups, causal),
                strict=True,
            ):
                P = torch.baddbmm(bias, q_, k_.transpose(1, 2), alpha=scale).softmax(-1)
                torch.bmm(mask.to(P.dtype).mul_(P), v_, out=o_)
                Ps.append(P)
            out = v.new_empty(q.shape)
            asking.put(made.mul_(keep_scale(p)), out)
        ctx.save_for_backward(Q, K, V, *masks, *Ps)
        ctx.asking, ctx.asked, ctx.scale, ctx.keep = asking, asked, scale, keep_scale(p)
        ctx.like = tuple((t.shape, t.dtype) for t in (q, k, v))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        asking, asked = ctx.asking, ctx.asked
        Q, K, V, *rest = ctx.saved_tensors
        masks, Ps = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        need = ctx.needs_input_grad[:3]
        grads: list[Tensor | None] = [None] * 3
        with span(ATTENTION), torch.autocast(dout.device.type, enabled=False):
            dO = asking.gather(dout)
            if asking.absent is not None:
                dO.masked_fill_(asking.absent, 0.0)
            found = [
                torch.empty_like(t) if n else None for t, n in zip((Q, K, V), need, strict=True)
            ]
            parts = [
                layout.parts(t) if t is not None else [None] * len(Ps)
                for layout, t in zip((asking, asked, asked), found, strict=True)
            ]
            for q_, k_, v_, do_, mask, P, dq_, dk_, dv_ in zip(
                asking.parts(Q),
                asked.parts(K),
                asked.parts(V),
                asking.parts(dO),
                masks,
                Ps,
                *parts,
                strict=True,
            ):
                kept = mask.to(P.dtype)
                if dq_ is not None or dk_ is not None:
                    dP = torch.bmm(do_, v_.transpose(1, 2)).mul_(kept)
                    dS = torch._softmax_backward_data(dP, P, -1, P.dtype).mul_(ctx.scale * ctx.keep)
                if dv_ is not None:
                    torch.bmm(kept.mul_(P).transpose(1, 2), do_, out=dv_)
                if dq_ is not None:
                    torch.bmm(dS, k_, out=dq_)
                if dk_ is not None:
                    torch.bmm(dS.transpose(1, 2), q_, out=dk_)
            if found[2] is not None:
                found[2].mul_(ctx.keep)
            for i, layout in enumerate((asking, asked, asked)):
                if found[i] is not None:
                    shape, dtype = ctx.like[i]
                    grads[i] = torch.empty(shape, dtype=dtype)
                    layout.put(found[i], grads[i])
        return (*grads, *[None] * 5)


def _masks(asking: Layout, asked: Layout, p: float) -> list[Tensor]:
    """The keep masks of all groups' probabilities, of one draw."""
    pairs = zip(asking.shapes, asked.shapes, strict=True)
    shapes = [(batch, rows, columns) for (batch, rows), (_, columns) in pairs]
    sizes = [a * b * c for a, b, c in shapes]
    drawn = draw_mask((sum(sizes),), p, torch.int8, draw_seed()).split(sizes)
    return [part.view(shape) for part, shape in zip(drawn, shapes, strict=True)]
