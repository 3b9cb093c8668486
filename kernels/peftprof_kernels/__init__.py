"""Tensors in, tensors out: NF4 and LoRA linear algebra that knows no run, trace or PEFT module."""

from peftprof_kernels.backends import dequantize
from peftprof_kernels.dropout import draw_seed, dropout, dropout_mask
from peftprof_kernels.lora_linear import lora_linear, lora_linear_group, nf4_linear
from peftprof_kernels.nf4 import NF4Weight, block_scales, native_dequantize, set_native_dequantize
from peftprof_kernels.packed_attention import Group, grouped, packed_attention
from peftprof_kernels.spans import Listener, set_listener, span

__all__ = [
    "Group",
    "Listener",
    "NF4Weight",
    "block_scales",
    "dequantize",
    "draw_seed",
    "dropout",
    "dropout_mask",
    "grouped",
    "lora_linear",
    "lora_linear_group",
    "native_dequantize",
    "nf4_linear",
    "packed_attention",
    "set_listener",
    "set_native_dequantize",
    "span",
]
