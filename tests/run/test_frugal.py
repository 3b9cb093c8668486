"""Less work, the same numbers: frozen weights rounded once, dropout in bytes, compiled NF4."""

import pytest
import torch

from peftprof.run import adapters, frugal, packing, runner
from peftprof_kernels import block_scales, dequantize, native_dequantize
from tests.tolerances import FP32_REORDERED, relative_error


def logits(trainee):
    """Of a batch in evaluation, in the run's precision."""
    trainee.model.eval()
    with torch.no_grad(), trainee.autocast():
        return torch.cat([packing.logits(trainee.model, p) for p in trainee.train.at(0).parts])


@pytest.fixture
def build(small_run):
    def make(method, family="bert", **settings):
        return runner.prepare(small_run(method, family, **settings)).build()[0]

    return make


# --- frozen weights


@pytest.mark.parametrize("kernels", ["torch", "bnb"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rounding_frozen_weights_changes_no_number(family, kernels, build, monkeypatch):
    settings = {"precision": "bf16", "kernels": kernels, "dropout": 0.0}
    rounded = build("lora", family, **settings)
    with monkeypatch.context() as patched:
        patched.setattr(frugal, "_round_frozen", lambda *_: None)
        exact = build("lora", family, **settings)
    assert {p.dtype for _, p in exact.model.named_parameters()} == {torch.float32}
    torch.testing.assert_close(logits(rounded), logits(exact), rtol=0, atol=0)
    losses = []
    for trainee in (rounded, exact):
        trainee.model.train()
        torch.manual_seed(1)
        losses.append(float(trainee.step(0)[0]))
    assert losses[0] == losses[1]
    for (name, a), (_, b) in zip(
        adapters.trainable(rounded.model), adapters.trainable(exact.model), strict=True
    ):
        assert torch.equal(a.grad, b.grad), name


def test_only_frozen_linear_layers_are_rounded(build):
    model = build("lora", precision="bf16").model
    linear = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        for leaf, _ in module.named_parameters()
        if "original_module" not in name  # PEFT's copy of the head, which computes nothing
    }
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad and name in linear
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    assert any(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize(
    ("method", "precision"), [("lora", "fp32"), ("full", "bf16"), ("qlora", "bf16")]
)
def test_nothing_else_is_rounded(method, precision, build):
    model = build(method, precision=precision).model
    dense = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert dense == {torch.float32}


# --- dropout


def test_dropout_modules_keep_what_they_are(build):
    trainee = build("full")
    found = [m for m in trainee.model.modules() if isinstance(m, torch.nn.Dropout)]
    x = torch.ones(100, 64)
    for module in found:
        torch.manual_seed(0)
        y = module(x)
        assert float((y == 0).float().mean()) == pytest.approx(module.p, abs=0.02)
        module.eval()
        assert module(x) is x
        module.train()
        module.p = 0.0  # read when it runs
        assert module(x) is x
    assert found


# --- NF4 dequantised by bitsandbytes' compiled code


def agrees(trainee):
    """Every NF4 weight of the model is what bitsandbytes' own layers compute with."""
    import bitsandbytes as bnb

    return all(
        torch.allclose(
            dequantize(adapters._unnested(adapters.nf4_weight(m)), torch.float32),
            bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state).float(),
            rtol=1e-5,
            atol=1e-6,
        )
        for m in adapters.linear_4bit(trainee.model)
    )


def test_compiled_code_that_is_right_is_used(build):
    assert native_dequantize() is None
    trainee = build("qlora")
    assert native_dequantize() is adapters._native_dequantise
    assert agrees(trainee)
    config = trainee.config
    assert frugal.describe(trainee.model, trainee.optimizer, config).native_dequantise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_that_is_wrong_is_not_used(dtype, build, monkeypatch):
    right = logits(build("qlora"))
    real = adapters._native_dequantise
    asked = []

    def wrong(weight, scales, wanted):
        dense = real(weight, scales, wanted)
        asked.append(wanted)
        if wanted == dtype:
            dense[-1, -1] *= 1.01  # one element of one dtype
        return dense

    monkeypatch.setattr(adapters, "_native_dequantise", wrong)
    trainee = build("qlora")  # sets, or here takes back, what the run before it set
    assert native_dequantize() is None
    assert dtype in asked
    assert not frugal.describe(trainee.model, trainee.optimizer, trainee.config).native_dequantise
    assert relative_error(logits(trainee), right) < FP32_REORDERED
    asked.clear()
    trainee.step(0)
    assert asked == []


def test_blocks_across_rows_are_never_asked_for(build, monkeypatch):
    """K = 96 is no multiple of 64: bitsandbytes is wrong there on some CPUs."""
    real = adapters._native_dequantise

    def only_whole_rows(weight, scales, dtype):
        assert weight.shape[1] % weight.blocksize == 0
        return real(weight, scales, dtype)

    monkeypatch.setattr(adapters, "_native_dequantise", only_whole_rows)
    trainee = build("qlora", hidden=96)
    trainee.step(0)


def test_unnested_weights_are_the_same(build):
    trainee = build("qlora")
    for module in adapters.linear_4bit(trainee.model):
        nested = adapters.nf4_weight(module)
        flat = adapters._unnested(nested)
        assert nested.nested
        assert not flat.nested
        assert torch.equal(block_scales(flat), block_scales(nested))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(dequantize(flat, dtype), dequantize(nested, dtype))
