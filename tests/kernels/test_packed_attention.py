"""Packed attention against float64 attention of each sequence by itself."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof_kernels import dropout, dropped_attention, grouped, packed_attention
from peftprof_kernels.dropout import keep_scale

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(sorted)


def alone(q, k, v, lengths, scale, causal):
    """Each sequence by the definition."""
    n = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
    outs = []
    for Q, K, V in zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True):
        S = torch.einsum("ihd,jhd->hij", Q, K) * scale
        if causal:
            S = S.masked_fill(torch.ones(S.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        outs.append(torch.einsum("hij,jhd->ihd", S.softmax(-1), V))
    return torch.cat(outs)


def tensors(lengths, heads, shared, d=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, heads // shared, heads // shared)
    return [
        torch.randn(sum(lengths), h, d, generator=generator, dtype=torch.float64) for h in sizes
    ]


@settings(deadline=None, max_examples=60)
@given(
    LENGTHS,
    st.sampled_from([(4, 1), (4, 2), (3, 3)]),
    st.booleans(),
    st.sampled_from([0, 50, 10**6]),
)
def test_grouped_attention_is_each_sequence_alone(lengths, heads, causal, cost):
    q, k, v = (t.requires_grad_() for t in tensors(lengths, *heads))
    expected = alone(q, k, v, lengths, 0.3, causal)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    ours = [t.detach().float().requires_grad_() for t in (q, k, v)]
    groups = grouped(lengths, cost)
    out = packed_attention(*ours, groups, 0.3, 0.0, causal)
    assert torch.allclose(out.double(), expected, atol=2e-5)
    for a, b in zip(torch.autograd.grad((out * weights.float()).sum(), ours), wanted, strict=True):
        assert torch.allclose(a.double(), b, atol=2e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cost", [0, 100, 10**6])
def test_dropped_attention_has_the_gradients_of_its_own_function(causal, cost):
    """The masks are the same for the same seed, so finite differences see one function."""
    lengths = [2, 3, 3, 7, 9]
    inputs = [t.float() for t in tensors(lengths, 2, 1, d=4)]
    groups = grouped(lengths, cost)
    weights = torch.randn(sum(lengths), 2, 4, generator=torch.Generator().manual_seed(3))

    def value(*tensors):
        torch.manual_seed(11)
        return (packed_attention(*tensors, groups, 0.4, 0.3, causal) * weights).sum()

    asking = [t.clone().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(value(*asking), asking)
    for which in range(3):
        direction = torch.randn(inputs[which].shape, generator=torch.Generator().manual_seed(5))
        step = 1e-2
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[which] = inputs[which] + sign * step * direction
            ends.append(float(value(*moved)))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((grads[which] * direction).sum()), rel=2e-2, abs=2e-2)


def test_dropout_keeps_the_expectation_of_attention():
    lengths = [3, 5]
    q, k, v = (t.float() for t in tensors(lengths, 2, 1))
    groups = grouped(lengths)
    torch.manual_seed(0)
    mean = torch.stack([packed_attention(q, k, v, groups, 0.3, 0.25) for _ in range(4000)]).mean(0)
    assert torch.allclose(mean, packed_attention(q, k, v, groups, 0.3), atol=0.06)


def test_what_is_worked_out_of_groups_is_of_those_groups():
    """It is kept at the first of them, which another batch may begin with too."""
    q, k, v = (t.float() for t in tensors([2, 3, 9, 9], 2, 1))
    a, b = grouped([2, 3], 10**6)[0], grouped([9, 9], 0)[0]
    b = dataclasses.replace(b, start=5, end=23)
    for groups, end in (((a,), 5), ((a, b), 23), ((a,), 5)):
        for heads in (2, 1):
            x, y, z = (t[:end, :heads].contiguous() for t in (q, k, v))
            expected = packed_attention(x, y, z, groups, 0.3)
            with patch.object(dropped_attention, "draw_mask", lambda shape, *_: keeps(shape)):
                found = packed_attention(x, y, z, groups, 0.3, 1e-5)
            assert torch.allclose(found, expected, atol=1e-4)
    assert sorted(a.layouts) == [1, 2]


def keeps(shape):
    return torch.ones(shape, dtype=torch.int8)


def test_groups_weigh_padding_against_calls():
    lengths = [3, 3, 3, 50, 50]
    assert [(g.count, g.longest) for g in grouped(lengths, 0)] == [(3, 3), (2, 50)]
    assert grouped(lengths, 0)[0].rows is None  # nothing to pad
    assert [(g.count, g.longest) for g in grouped(lengths, 10**9)] == [(5, 50)]
    assert [g.longest for g in grouped(lengths, 0, multiple=8)] == [8, 56]
    with pytest.raises(ValueError, match="ascending"):
        grouped([3, 2])
    with pytest.raises(ValueError, match="positive"):
        grouped([0, 2])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_tokens_of_no_sequence_are_zero_and_learn_nothing(p):
    inputs = [t.float().requires_grad_() for t in tensors([3, 5, 4], 2, 1)]
    out = packed_attention(*inputs, grouped([3, 5]), 0.3, p)
    assert not out[8:].any()
    out.sum().backward()
    for tensor in inputs:
        assert not tensor.grad[8:].any()
        assert tensor.grad[:8].any()


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.sampled_from([(4, 1), (4, 2)]), st.sampled_from([0, 50, 10**6]))
@pytest.mark.parametrize("p", [0.0, 1e-5])
def test_one_query_each_is_that_query_among_all(p, lengths, heads, cost):
    """With p in the code that has masks, which here keep everything: 1 - p is next to 1."""
    q, k, v = (t.requires_grad_() for t in tensors(lengths, *heads))
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    expected = alone(q, k, v, lengths, 0.3, False)[first] * keep_scale(p)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    ours = [t.detach().float() for t in (q[first], k, v)]
    # A token of no sequence at the end, as packed batches have them.
    ours[1:] = [torch.cat([t, torch.ones(1, *t.shape[1:])]) for t in ours[1:]]
    ours = [t.requires_grad_() for t in ours]
    with patch.object(dropped_attention, "draw_mask", lambda shape, *_: keeps(shape)):
        out = packed_attention(*ours, grouped(lengths, cost), 0.3, p, one_query=True)
    assert torch.allclose(out.double(), expected, atol=2e-5)
    dq, dk, dv = torch.autograd.grad((out * weights.float()).sum(), ours)
    assert torch.allclose(dq.double(), wanted[0][first], atol=2e-4)
    for a, b in zip((dk, dv), wanted[1:], strict=True):
        assert torch.allclose(a[:-1].double(), b, atol=2e-4)
        assert not a[-1].any()


def test_what_does_not_fit_is_refused():
    q, k, v = (t.float() for t in tensors([3, 5], 2, 1))
    with pytest.raises(ValueError, match="cover tokens"):
        packed_attention(q, k, v, grouped([3, 6]), 1.0)
    with pytest.raises(ValueError, match="q must be"):
        packed_attention(q, k[:, :0], v[:, :0], grouped([3, 5]), 1.0)
    with pytest.raises(ValueError, match="of 8 tokens, got 2"):
        packed_attention(q[:2], k, v, grouped([3, 5]), 1.0)
    with pytest.raises(ValueError, match="of 2 tokens, got 8"):
        packed_attention(q, k, v, grouped([3, 5]), 1.0, one_query=True)
    with pytest.raises(ValueError, match="causal"):
        packed_attention(q[:2], k, v, grouped([3, 5]), 1.0, causal=True, one_query=True)


@settings(deadline=None)
@given(st.floats(0.0, 0.99), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_dropout_drops_the_share_it_says_and_backward_the_same(p, dtype):
    x = torch.ones(200, 300, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x, p)
    y.backward(torch.ones_like(y))
    kept = float((y != 0).double().mean())
    assert kept == pytest.approx(1 - p, abs=0.01)
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    if kept:
        assert float(y.detach().max()) == pytest.approx(1 / (1 - p), rel=1e-2)
    assert dropout(x, p, training=False) is x


@pytest.mark.parametrize("p", [0.001, 0.1, 0.9])
def test_neighbours_are_dropped_independently(p):
    """Where a byte alone decides, and where points that are thrown do."""
    torch.manual_seed(2)
    n = 4_000_000
    dropped = dropout(torch.ones(n), p) == 0
    rate = float(dropped.double().mean())
    assert rate == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5 + 2**-16)
    for distance in (1, 2, 7, 8, 9, 64):
        both = float((dropped[:-distance] & dropped[distance:]).double().mean())
        assert both == pytest.approx(p * p, abs=6 * (p * p / n) ** 0.5 + 2**-15)


def test_dropout_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="probability"):
        dropout(torch.ones(2), 1.5)
