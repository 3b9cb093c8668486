"""Every tolerance of the tests, by name, with its reason.

Kernel tolerances are relative Frobenius errors against a float64 reference: one number a
tensor, the same for small and large elements, and independent of the tensor's size.
"""

import torch

# A product of matrices, or a sum of a few, in the named dtype, accumulated in fp32. The
# rounding of one element is half of the last place (fp32 6e-8, bf16 4e-3, fp16 5e-4); errors
# of different elements are independent, so their norm is about 0.6 of that, and a LoRA
# result passes through at most three roundings, of which two are of the small adapter part.
GEMM = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
}

# A gradient of A or B in half precision: dA = dS^T X, where dS is itself a rounded
# product and the sum over the tokens cancels, which leaves the roundings' part larger than
# in a plain product.
ADAPTER_GRAD = {**GEMM, torch.bfloat16: 8e-3, torch.float16: 2e-3}

# Two fp32 evaluations of the same expression in another order of summation.
FP32_REORDERED = 1e-5

# Two bf16 evaluations that round in different places: each is within GEMM of the truth.
BF16_REORDERED = 2 * GEMM[torch.bfloat16]

# The farthest a weight lies from its NF4 value, in units of the block's absmax: half of
# the widest gap between codes, -1 to -0.6962, and a little for the rounding of the
# division that quantised it.
NF4_HALF_GAP = (1 - 0.6961928) / 2 + 1e-4


def relative_error(
    actual: torch.Tensor, expected: torch.Tensor, squares: torch.Tensor | None = None
) -> float:
    """|actual - expected| / |expected|, Frobenius, in float64; a NaN counts as infinite.

    A tensor of a few elements can cancel to almost nothing and then has no accurate digit
    in any implementation. With ``squares``, the expression evaluated on the squares of its
    inputs, the error is taken relative to |expected|'s mean over all signs of the terms.
    """
    difference = (actual.double() - expected.double()).norm().item()
    if difference != difference:
        return float("inf")
    reference = expected.double().norm() if squares is None else squares.sum().sqrt()
    size = reference.item()
    return difference / size if size else difference


# A gradient after a whole model's forward and backward by two backends in fp32: each
# operation is within FP32_REORDERED, and a gradient has passed a few dozen of them. The
# dequantised weights of bitsandbytes may differ from ours in the last place as well.
BACKENDS_FP32 = 2e-3

# The loss of each of a few training steps by two backends. They start from the same weights
# and see the same batches, so only roundings differ; the optimiser carries them on, and a mean
# over the batch takes most of them out. Measured over eight steps on a CPU: 2e-7 in fp32, 7e-4
# in bf16. Halving the scaling of the adapters moves it by 4e-4 at least, or 1e-2 in bf16.
LOSS_CURVE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}

# Logits of a whole model in fp32 by two backends: two layers of FP32_REORDERED, and
# bitsandbytes' dequantised weights, which may differ from ours in the last place.
LOGITS_FP32 = 1e-4

# Logits of a whole model in fp32, packed against padded: the same weights and the same
# functions. Only shapes differ, so only the order of sums.
PACKED_FP32 = 2 * FP32_REORDERED

# The loss of each of a dozen training steps against stock transformers, PEFT and
# bitsandbytes, relative. Padded, split and packed batches differ in the order of sums only,
# which the optimiser carries on. Measured with small models: 4e-7 in fp32, 1e-2 in bf16, where
# stock itself is 1e-2 from its own fp32 losses.
LOSS_STOCK = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

# A tensor's gradient of one step against stock's, largest difference over largest element:
# a hundred sums in another order, of fp32's 6e-8 each, with some cancelling. Measured with small
# models: 2e-6; in bf16 3e-2, where stock itself is up to 5e-2 from its fp32 gradient.
GRADIENT_STOCK = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

# The same of pretrained models in fp32: more layers, and activations that are far from 1.
# Measured: 6e-6.
GRADIENT_PRETRAINED = 1e-4

# A double that went through a logarithm and back: 16 digits, of which a logarithm of up to
# 28 (1e12) loses the last two.
LOGARITHMS = 1e-12

# How much less than the largest the logit of a token may be that was chosen from kept keys and
# values, relative: a whole forward rounds in another order, and of two logits that close either
# may be the largest. In bf16 two layers of BF16_REORDERED.
TOKEN_TIE = {torch.float32: LOGITS_FP32, torch.bfloat16: 2 * BF16_REORDERED}

# A layer that stands for others is like them to the byte; what is left is rounding to whole bytes.
REPEATED_LAYERS = 1e-6
