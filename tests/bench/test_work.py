"""Bytes and FLOPs against cases counted by hand."""

import pytest
import torch

from bench import work
from bench.layers import MODELS, layers
from bench.work import Ceilings, Work


def test_bytes_of_an_nf4_weight():
    # 4096 x 4096: half a byte each, 262,144 blocks of 64, 1,024 groups of 256 blocks with
    # a float each, a table of 256 floats, an offset and 16 codes.
    assert work.nf4_bytes(4096, 4096) == 8_388_608 + 262_144 + 4_096 + 1_024 + 4 + 64
    # 3 x 5: 15 codes in 8 bytes, one partial block, one group.
    assert work.nf4_bytes(3, 5) == 8 + 1 + 4 + 1_024 + 4 + 64


def test_dequantising_moves_two_and_a_half_bytes_an_element():
    found = work.dequantize(4096, 4096, 2)
    assert found.flops == 0
    assert found.bytes / 4096**2 == pytest.approx(0.5 + 1 / 64 + 4 / 16384 + 2, rel=1e-4)


def test_a_product_reads_its_operands_and_writes_its_result():
    # M 2, N 3, K 4 in fp32: W 12, X 8, Y 6 numbers; 2 x 24 multiplications and additions.
    assert work.linear(2, 3, 4, "float32", 4) == Work((12 + 8 + 6) * 4, 48)
    assert work.linear(2, 64, 64, "nf4", 2) == Work(work.nf4_bytes(64, 64) + 2 * 128 * 2, 16_384)


def test_a_lora_layer_by_hand():
    # M 2, N 3, K 4, r 1, everything fp32. Forward: the product above, A 4 and B 3 numbers,
    # S = X A^T 2 x 2 x 4 and S B^T 2 x 2 x 3 operations.
    forward = work.lora_forward(2, 3, 4, 1, "float32", 4, 4)
    assert forward == Work((26 + 7) * 4, 48 + 16 + 12)
    # Backward: dY 6, W 12, dX 8; X 8 and S 2; A and B 7 read, dA and dB 7 written. dS and
    # dB 2 x 12 operations, dA and dS A 2 x 16.
    backward = work.lora_backward(2, 3, 4, 1, "float32", 4, 4)
    assert backward == Work((26 + 10 + 14) * 4, 48 + 24 + 32)
    assert forward + backward == Work(332, 180)


def test_the_speed_of_light_is_the_longer_of_both():
    ceilings = Ceilings(copy_bytes_per_s=1e9, gemm_flops_per_s=1e12, dtype="bfloat16")
    assert ceilings.least_ms(Work(2_000_000, 1_000_000_000)) == pytest.approx(2)
    assert ceilings.least_ms(Work(2_000_000, 9_000_000_000)) == pytest.approx(9)


def test_ceilings_are_the_fastest_calls():
    def sampler(run, warmup_ms, rep_ms):
        run()
        return [4.0, 2.0, 3.0]

    found = work.measure_ceilings(torch.device("cpu"), torch.float32, sampler, quick=True)
    assert found.copy_bytes_per_s == pytest.approx(2 * 2**25 / 2e-3)
    assert found.gemm_flops_per_s == pytest.approx(2 * 512**3 / 2e-3)


def test_layers_by_model_and_by_size():
    assert layers("minilm") == MODELS["minilm"]
    assert [(layer.N, layer.K) for layer in layers("768x3072, 5x7")] == [(768, 3072), (5, 7)]
    assert len(layers("all")) == sum(map(len, MODELS.values()))


@pytest.mark.parametrize("name", ["bert-giant", "0x5", "5x", "5x5x5"])
def test_an_unknown_shape_is_refused(name):
    with pytest.raises(ValueError, match="unknown shapes"):
        layers(name)
