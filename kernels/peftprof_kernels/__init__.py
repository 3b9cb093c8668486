"""Tensors in, tensors out: NF4 and LoRA linear algebra that knows no run, trace or PEFT module."""
