"""What one call of an operator takes: floating point operations, and bytes in and out.

A product of [M, K] and [K, N] is 2 M N K operations, as in torch.utils.flop_counter; only
products are counted. Bytes are those of each operand read once and each result written
once. Every formula raises OperandsError where the shapes are not of such a call.
docs/work-and-ceilings.md has them in words.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from peftprof.trace.operands import BOOL, FP32, INT32, Call, Dtype, OperandsError, Shape, Tensor


@dataclass(frozen=True)
class Cost:
    """Operations of products, in the dtype named `dtype`, and bytes moved."""

    flops: int
    bytes: int
    dtype: str = ""


Formula = Callable[[Call], Cost]


def _must(held: bool) -> None:
    if not held:
        raise OperandsError("shapes that do not fit")


def _product(call: Call, flops: int, results: int, dtype: Dtype) -> Cost:
    return Cost(flops, call.read + results, dtype.name)


# Products


def matmul(first: int, rank: int = 2) -> Formula:
    """[..., M, K] x [..., K, N] by the operands at `first`; what stands before is added."""

    def formula(call: Call) -> Cost:
        a, b = call.tensor(first, rank), call.tensor(first + 1, rank)
        _must(a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2])
        results = math.prod(a.shape[:-1]) * b.shape[-1]
        return _product(call, 2 * a.numel * b.shape[-1], results * a.dtype.size, a.dtype)

    return formula


def scaled_mm(call: Call) -> Cost:
    """[M, K] x [K, N] in fp8; the result's dtype is an argument."""
    a, b = call.tensor(0, 2), call.tensor(1, 2)
    _must(a.shape[1] == b.shape[0])
    M, K, N = *a.shape, b.shape[1]
    out = call.dtype(6)  # scales and bias stand before it
    return _product(call, 2 * M * N * K, M * N * out.size, a.dtype)


def int_mm(call: Call) -> Cost:
    """[M, K] x [K, N] of int8 in int32."""
    a, b = call.tensor(0, 2), call.tensor(1, 2)
    _must(a.shape[1] == b.shape[0])
    return _product(call, 2 * a.numel * b.shape[1], a.shape[0] * b.shape[1] * INT32.size, a.dtype)


def matvec(first: int) -> Formula:
    """[M, K] x [K] by the operands at `first`."""

    def formula(call: Call) -> Cost:
        a, x = call.tensor(first, 2), call.tensor(first + 1, 1)
        _must(a.shape[1] == x.shape[0])
        return _product(call, 2 * a.numel, a.shape[0] * a.dtype.size, a.dtype)

    return formula


def dot(call: Call) -> Cost:
    """[K] x [K]."""
    a, b = call.tensor(0, 1), call.tensor(1, 1)
    _must(a.shape == b.shape)
    return _product(call, 2 * a.numel, a.dtype.size, a.dtype)


def linear(call: Call) -> Cost:
    """X [..., K] W [N, K]^T."""
    x, weight = call.tensor(0), call.tensor(1, 2)
    return _product(call, *_by_weight(x, weight.shape), x.dtype)


def _by_weight(x: Tensor, weight: Shape) -> tuple[int, int]:
    """Operations of X [..., K] W [N, K]^T, and bytes of the result."""
    _must(len(weight) == 2 and len(x.shape) >= 1 and x.shape[-1] == weight[1])
    N = _positive(weight[0])
    return 2 * x.numel * N, math.prod(x.shape[:-1]) * N * x.dtype.size


def _positive(number: int) -> int:
    _must(number >= 0)
    return number


def conv(call: Call) -> Cost:
    """Each place of the result (transposed: of the input) meets the whole filter."""
    x, weight = call.tensor(0), call.tensor(1)
    spatial = len(x.shape) - 2
    _must(spatial >= 1 and len(weight.shape) == spatial + 2)
    stride, padding, dilation, extra = (_each(call.integers(i), spatial) for i in (3, 4, 5, 7))
    transposed, groups = call.flag(6), call.integer(8)
    _must(min(stride) > 0 and groups > 0)
    places = []
    for i, k in enumerate(weight.shape[2:]):
        reach, size = dilation[i] * (k - 1) + 1, x.shape[2 + i]
        if transposed:
            place = (size - 1) * stride[i] - 2 * padding[i] + reach + extra[i]
        else:
            place = (size + 2 * padding[i] - reach) // stride[i] + 1
        places.append(_positive(place))
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    results = x.shape[0] * channels * math.prod(places) * x.dtype.size
    met = x.shape[2:] if transposed else places
    return _product(call, 2 * x.shape[0] * math.prod(met) * weight.numel, results, x.dtype)


def conv_backward(call: Call) -> Cost:
    """As many operations as forward for each of dX and dW that is asked for."""
    grad, x, weight = (call.tensor(i) for i in range(3))
    transposed, wanted = call.flag(7), call.flags(10)
    _must(len(grad.shape) == len(x.shape) == len(weight.shape) >= 3 and len(wanted) == 3)
    met = x.shape[2:] if transposed else grad.shape[2:]
    once = 2 * grad.shape[0] * math.prod(met) * weight.numel
    results = wanted[0] * x.bytes + wanted[1] * weight.bytes
    return _product(call, once * (wanted[0] + wanted[1]), results, grad.dtype)


def _each(values: Shape, count: int) -> Shape:
    """One value for each dimension, where one may stand for all."""
    _must(len(values) in (1, count))
    return values * count if len(values) == 1 else values


def attention(call: Call) -> Cost:
    """Q K^T and P V. What a causal mask saves is not taken off."""
    q, k, v = (call.tensor(i, 4) for i in range(3))
    scores, _ = _scores(q, k, v)
    results = math.prod(q.shape[:3]) * v.shape[3] * q.dtype.size
    return _product(call, 2 * scores * (q.shape[3] + v.shape[3]), results, q.dtype)


def attention_backward(call: Call) -> Cost:
    """Q K^T again, dP = dO V^T, dV = P^T dO, dQ = dS K, dK = dS^T Q."""
    q, k, v = (call.tensor(i, 4) for i in range(1, 4))
    scores, results = _scores(q, k, v)
    return _product(call, 2 * scores * (3 * q.shape[3] + 2 * v.shape[3]), results, q.dtype)


def _scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Elements of Q K^T over all heads, and bytes of Q, K and V: [B, heads, length, width]."""
    _must(k.shape[:3] == v.shape[:3] and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3])
    return math.prod(q.shape[:3]) * k.shape[2], q.bytes + k.bytes + v.bytes


# NF4, and the fused adapters


def dequantize(dtype_at: int, shape_at: int | None) -> Formula:
    """Codes and their scales read, dense weights written; no product."""

    def formula(call: Call) -> Cost:
        numel = call.tensor(0).numel
        if shape_at is not None:
            numel = _positive(math.prod(call.integers(shape_at)))
        return Cost(0, call.read + numel * call.dtype(dtype_at).size)

    return formula


def four_bit_product(call: Call) -> Cost:
    """X [..., K] with packed codes of a weight [N, K] whose shape is a value."""
    x = call.tensor(0)
    return _product(call, *_by_weight(x, call.integers(2)), x.dtype)


def nf4_dequantize(call: Call) -> Cost:
    """nf4_dequantize(weight, layout, dtype, backend)."""
    N, K, stored = _nf4(call, 0)
    return Cost(0, stored + N * K * call.dtype(2).size)


def nf4_linear(call: Call) -> Cost:
    """nf4_linear(x, weight, layout, bias, backend): X W^T, whatever kernels do it."""
    N, K, stored = _nf4(call, 1)
    x = call.tensor(0, 2)
    flops, results = _by_weight(x, (N, K))
    bias = call.tensor(3, 1).bytes if call.has(3) else 0
    return Cost(flops, x.bytes + stored + bias + results, x.dtype.name)


def nf4_linear_dx(call: Call) -> Cost:
    """nf4_linear_dx(dy, weight, layout, backend): dY W."""
    N, K, stored = _nf4(call, 1)
    dy = call.tensor(0, 2)
    flops, results = _by_weight(dy, (K, N))
    return Cost(flops, dy.bytes + stored + results, dy.dtype.name)


def _nf4(call: Call, position: int) -> tuple[int, int, int]:
    """N, K and the bytes of a weight as `NF4Weight.tensors` and `.layout` give it.

    packed, absmax, code fp32 [16] and a table of 2 KiB; nested three more, and then
    absmax is a byte for each block instead of an fp32.
    """
    tensors, layout = call.shapes(position), call.integers(position + 1)
    _must(len(tensors) in (4, 7) and len(layout) == 4 and min(layout) >= 0)
    packed, absmax = (math.prod(shape) for shape in tensors[:2])
    nested = len(tensors) == 7
    scales = absmax if nested else FP32.size * absmax
    tables = FP32.size * sum(math.prod(shape) for shape in (tensors[2], *tensors[4:]))
    return layout[0], layout[1], packed + scales + tables


def lora_up_backward(call: Call) -> Cost:
    """dS = dY B where it is wanted, dB = dY^T S where S is given."""
    dy, B = call.tensor(0, 2), call.tensor(1, 2)
    _must(dy.shape[1] == B.shape[0])
    wanted, given = call.flag(4), call.has(2)
    results = wanted * dy.shape[0] * B.shape[1] * dy.dtype.size + given * B.bytes
    return _product(call, 2 * dy.numel * B.shape[1] * (wanted + given), results, dy.dtype)


def lora_down_backward(call: Call) -> Cost:
    """dA = dS^T X where X is given; dS A added to dX where that is given."""
    dS, A = call.tensor(1, 2), call.tensor(2, 2)
    _must(dS.shape[1] == A.shape[0])
    results = A.bytes * call.has(0) + (call.tensor(3, 2).bytes if call.has(3) else 0)
    products = call.has(0) + call.has(3)
    return _product(call, 2 * dS.numel * A.shape[1] * products, results, dS.dtype)


# Everything that only moves


def elementwise(call: Call) -> Cost:
    """Operands broadcast against each other, one result of the widest dtype among them."""
    return Cost(0, call.read + _broadcast(call) * _widest(call).size)


def comparison(call: Call) -> Cost:
    """As elementwise, with a result of truth values."""
    return Cost(0, call.read + _broadcast(call) * BOOL.size)


def _broadcast(call: Call) -> int:
    given = call.given
    _must(bool(given))
    shape = [1] * max(len(tensor.shape) for tensor in given)
    for tensor in given:
        for i, n in enumerate(reversed(tensor.shape), 1):
            _must(n == shape[-i] or 1 in (n, shape[-i]))
            shape[-i] = n if shape[-i] == 1 else shape[-i]
    return math.prod(shape)


def _widest(call: Call) -> Dtype:
    """A tensor of one element, such as a number, does not widen the others."""
    given = call.given
    return max(
        (t.dtype for t in given if t.shape or len(given) == 1),
        key=lambda d: d.size,
        default=given[0].dtype,
    )


def like_first(call: Call) -> Cost:
    """Normalisation: operands, and a result as large as the first."""
    return Cost(0, call.read + call.tensor(0).bytes)


def with_mask(call: Call) -> Cost:
    """Dropout: a result as large as its operand, and the mask."""
    x = call.tensor(0)
    return Cost(0, call.read + x.bytes + x.numel * BOOL.size)


def reads(call: Call) -> Cost:
    """Operands alone: a reduction's result is small, and a Triton kernel's is an operand."""
    call.tensor(0)
    return Cost(0, call.read)


def copy(call: Call) -> Cost:
    """copy_(to, from)."""
    return Cost(0, call.tensor(0).bytes + call.tensor(1).bytes)


def fill(call: Call) -> Cost:
    """The first operand written."""
    return Cost(0, call.tensor(0).bytes)


def embedding(call: Call) -> Cost:
    """The rows looked up, read and written; not the table."""
    table, indices = call.tensor(0, 2), call.tensor(1)
    row = table.shape[1] * table.dtype.size
    return Cost(0, indices.bytes + 2 * indices.numel * row)


def embedding_backward(call: Call) -> Cost:
    """Gradients read and added to their rows; filling the table with zeros counts by itself."""
    return Cost(0, call.read + call.tensor(0).bytes)


def gather(call: Call) -> Cost:
    """gather(from, dim, index): what is looked up, read and written."""
    source, index = call.tensor(0), call.tensor(2)
    return Cost(0, index.bytes + 2 * index.numel * source.dtype.size)


def index_select(call: Call) -> Cost:
    """As gather, from one dimension; of several the trace does not tell which is indexed."""
    call.tensor(0, 1)
    return gather(call)


def nll_loss(call: Call) -> Cost:
    """One element a row is read."""
    scores, target = call.tensor(0), call.tensor(1)
    return Cost(0, target.bytes + target.numel * scores.dtype.size)


def nll_loss_backward(call: Call) -> Cost:
    """nll_loss_backward(gradient, scores, target, ...): one gradient for each score."""
    return Cost(0, call.tensor(1).bytes + call.tensor(2).bytes)


def nothing(call: Call) -> Cost:
    """No work: nothing is computed, nothing moves."""
    return Cost(0, 0)
