"""Which operators of a trace count as work, and by which formula. Names, and nothing else."""

import re
from dataclasses import dataclass
from enum import IntEnum

from peftprof.trace import formulas
from peftprof.trace.events import Operands
from peftprof.trace.formulas import Cost, Formula
from peftprof.trace.operands import OperandsError, parse

# No call takes more; a trace that says so lies. Sums of it stay far inside a double.
MOST = 2**100


class Rank(IntEnum):
    """Who counts where operators call operators.

    An operator counts unless one of its rank or a higher one is below it. WHOLE hides all
    that it calls: its formula is of the task, however many passes the library makes of it.
    """

    FREE = 0  # views, allocation, the graph's own nodes: no work
    MOVE = 1  # copies, casts, filling
    PART = 2  # elementwise operators, reductions, normalisation, look-ups
    WHOLE = 3  # products, attention, dequantisation


@dataclass(frozen=True)
class Rule:
    """How an operator counts, and its formula, which raises OperandsError."""

    rank: Rank
    formula: Formula


def rule(name: str) -> Rule | None:
    """The rule of the operator called `name`; None where there is none."""
    found = _RULES.get(name)
    if found is None and name.startswith("aten::"):
        # add_ works as add does, and writes its result over its first operand.
        found = _RULES.get(name.removesuffix("_"))
    return found or next((rule for names, rule in _PATTERNS if names.fullmatch(name)), None)


def cost(found: Rule, operands: Operands) -> Cost | None:
    """What a call with these operands takes; None where they cannot be what it was called with."""
    if found.rank is Rank.FREE:
        return Cost(0, 0)
    try:
        taken = found.formula(parse(operands))
    except OperandsError:
        return None
    return taken if max(taken.flops, taken.bytes) <= MOST else None


_ATEN: tuple[tuple[Rank, Formula, str], ...] = (
    (Rank.WHOLE, formulas.matmul(0), "mm"),
    (Rank.WHOLE, formulas.matmul(1), "addmm _addmm_activation"),
    (Rank.WHOLE, formulas.matmul(0, 3), "bmm"),
    (Rank.WHOLE, formulas.matmul(1, 3), "baddbmm"),
    (Rank.WHOLE, formulas.scaled_mm, "_scaled_mm"),
    (Rank.WHOLE, formulas.int_mm, "_int_mm"),
    (Rank.WHOLE, formulas.matvec(0), "mv"),
    (Rank.WHOLE, formulas.matvec(1), "addmv"),
    (Rank.WHOLE, formulas.dot, "dot vdot"),
    (Rank.WHOLE, formulas.linear, "linear mkldnn_linear"),
    (Rank.WHOLE, formulas.conv, "convolution convolution_overrideable"),
    (Rank.WHOLE, formulas.conv_backward, "convolution_backward"),
    (Rank.WHOLE, formulas.attention, "scaled_dot_product_attention"),
    (
        Rank.PART,
        formulas.elementwise,
        """
        add sub rsub mul div neg abs sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt
        reciprocal pow square sin cos tan tanh atan erf floor ceil round remainder fmod
        clamp clamp_min clamp_max maximum minimum where masked_fill addcmul addcdiv lerp
        sigmoid relu gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid
        softplus threshold tril triu cumsum bitwise_and bitwise_or bitwise_xor bitwise_not
        sigmoid_backward tanh_backward threshold_backward gelu_backward silu_backward
        mish_backward elu_backward leaky_relu_backward hardtanh_backward hardswish_backward
        softplus_backward native_dropout_backward _softmax _log_softmax
        _softmax_backward_data _log_softmax_backward_data
        """,
    ),
    (
        Rank.PART,
        formulas.comparison,
        """
        eq ne lt le gt ge logical_and logical_or logical_xor logical_not isnan isinf isfinite
        isneginf isposinf
        """,
    ),
    (
        Rank.PART,
        formulas.like_first,
        """
        native_layer_norm native_layer_norm_backward native_batch_norm native_group_norm
        native_batch_norm_backward native_group_norm_backward cudnn_batch_norm
        cudnn_batch_norm_backward miopen_batch_norm miopen_batch_norm_backward
        _fused_rms_norm _fused_rms_norm_backward
        """,
    ),
    (Rank.PART, formulas.with_mask, "native_dropout"),
    (
        Rank.PART,
        formulas.reads,
        """
        sum mean prod amax amin max min argmax argmin norm linalg_vector_norm var var_mean
        std std_mean logsumexp all any
        """,
    ),
    (Rank.PART, formulas.embedding, "embedding"),
    (Rank.PART, formulas.embedding_backward, "embedding_dense_backward"),
    (Rank.PART, formulas.gather, "gather"),
    (Rank.PART, formulas.index_select, "index_select"),
    (Rank.PART, formulas.nll_loss, "nll_loss_forward"),
    (Rank.PART, formulas.nll_loss_backward, "nll_loss_backward"),
    (Rank.MOVE, formulas.copy, "copy"),
    (Rank.MOVE, formulas.fill, "fill zero normal uniform random bernoulli exponential"),
    (
        Rank.FREE,
        formulas.nothing,
        """
        view _unsafe_view view_as reshape _reshape_alias t transpose permute expand expand_as
        as_strided slice select narrow split split_with_sizes chunk unbind squeeze unsqueeze
        flatten unflatten diagonal movedim swapaxes alias detach empty empty_like
        empty_strided new_empty new_empty_strided resize resolve_conj resolve_neg item
        _local_scalar_dense is_nonzero result_type lift_fresh contiguous to set
        """,
    ),
)
_RULES = {
    f"aten::{name}": Rule(rank, formula) for rank, formula, names in _ATEN for name in names.split()
} | {
    name: Rule(Rank.WHOLE, formula)
    for name, formula in {
        "mkldnn::_linear_pointwise": formulas.linear,
        "bitsandbytes::dequantize_4bit": formulas.dequantize(5, 4),
        "bitsandbytes::dequantize_blockwise": formulas.dequantize(4, None),
        "bitsandbytes::gemv_4bit": formulas.four_bit_product,
        "bitsandbytes::gemm_4bit": formulas.four_bit_product,
        "peftprof::nf4_dequantize": formulas.nf4_dequantize,
        "peftprof::nf4_linear": formulas.nf4_linear,
        "peftprof::nf4_linear_dx": formulas.nf4_linear_dx,
        "peftprof::lora_down": formulas.linear,
        "peftprof::lora_up_backward": formulas.lora_up_backward,
        "peftprof::lora_down_backward": formulas.lora_down_backward,
    }.items()
}
_FUSED_ATTENTION = r"aten::_scaled_dot_product_(flash|efficient|cudnn|fused)_attention\w*"
_PATTERNS = (
    (
        re.compile(rf"{_FUSED_ATTENTION}(?<=_backward)"),
        Rule(Rank.WHOLE, formulas.attention_backward),
    ),
    (re.compile(_FUSED_ATTENTION), Rule(Rank.WHOLE, formulas.attention)),
    # What torch.compile makes of elementwise operators and reductions.
    (re.compile(r"triton_(poi|red|per)_\w+"), Rule(Rank.PART, formulas.reads)),
    # Nodes of the autograd graph that PyTorch has in C++: they only call operators.
    (
        re.compile(r"autograd::engine::\S+: \S+|torch::autograd::\w+|\w+Backward\d+|detach_?"),
        Rule(Rank.FREE, formulas.nothing),
    ),
)
