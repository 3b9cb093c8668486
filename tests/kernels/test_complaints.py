"""What users report of today's fast LoRA and NF4 paths, each complaint as a test of ours.

Weights are quantised by bitsandbytes. Layers are judged in float64; whole models are PEFT's,
prepared as a run prepares them.
"""

from collections.abc import Callable

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from peftprof.run import adapters, packing, runner
from peftprof.run.loop import Trainee
from peftprof_kernels import NF4Weight, block_scales, dequantize, dropout, lora_linear
from peftprof_kernels.reference import (
    dequantize_reference,
    lora_linear_backward_reference,
    lora_linear_reference,
)
from tests.kernels.cases import BACKENDS, coarsest, heard, keep_mask
from tests.kernels.nf4_weights import DEVICE, from_quant_state
from tests.tolerances import ADAPTER_GRAD, FP32_REORDERED, GEMM, NF4_HALF_GAP, relative_error

on_both = pytest.mark.parametrize("backend", BACKENDS)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
N, K, R = 48, 128, 4
FEW, MANY = 16, 18  # rows: triton's fused NF4 product takes the first, the other road the second
SCALING = 2.0


def original(K: int = K, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, K, generator=generator).to(DEVICE, dtype)


def quantised(weight: Tensor, nested: bool = True) -> NF4Weight:
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    assert state.nested == nested
    return from_quant_state(packed, state)


def leaves(M: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [2, M / 2, K] in ``dtype``, and fp32 A, B and bias."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, M // 2, K), (R, K), (N, R), (N,))
    x, A, B, bias = (torch.randn(s, generator=generator).to(DEVICE) for s in shapes)
    return x.to(dtype).requires_grad_(), A.requires_grad_(), B.requires_grad_(), bias


def errors(
    weight: NF4Weight,
    backend: str,
    *,
    M: int = MANY,
    dtype: torch.dtype = FP32,
    compute: torch.dtype | None = None,
    p: float = 0.0,
    mask_seed: int = 3,
) -> dict[str, float]:
    """Each result's error in units of its tolerance: below 1 is right.

    ``mask_seed``: the seed of the reference's mask; the layer's own is 3.
    """
    compute = compute or dtype
    x, A, B, bias = leaves(M, weight.shape[1], dtype)
    torch.manual_seed(3)
    y = lora_linear(x, weight, bias, A, B, SCALING, p, True, compute, backend)
    assert y.dtype == dtype  # as bitsandbytes casts back
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    grads = dict(zip("xAB", torch.autograd.grad(y, (x, A, B), dy), strict=True))

    torch.manual_seed(mask_seed)
    mask = keep_mask(backend, (M, x.shape[-1]), p).view(x.shape) if p else None
    W = dequantize_reference(weight, compute)
    dy64, x64, W64, A64, B64, bias64 = (
        t.detach().to(compute).double() for t in (dy, x, W, A, B, bias)
    )
    truth = lora_linear_reference(x64, W64, bias64, A64, B64, SCALING, mask, p)
    expected = lora_linear_backward_reference(dy64, x64, W64, A64, B64, SCALING, mask, p)
    found = {"Y": relative_error(y.detach(), truth) / GEMM[coarsest(compute, dtype)]}
    for name, grad in grads.items():
        limits = GEMM if name == "x" else ADAPTER_GRAD
        limit = limits[coarsest(compute, grad.dtype)]
        found[name] = relative_error(grad, getattr(expected, name)) / limit
    return found


@pytest.fixture
def trainee(small_run) -> Callable[..., Trainee]:
    """`trainee(kernels, family="bert")`: a QLoRA model and all that trains it, at step 0."""

    def build(
        kernels: str, family: str = "bert", dropout: float = 0.1, padding: str = "auto"
    ) -> Trainee:
        config = small_run(
            "qlora",
            family,
            padding=padding,
            kernels=kernels,
            dropout=dropout,
            warmup_ratio=0.0,
            batch_size=4,
            device=DEVICE.type,
        )
        built, _ = runner.prepare(config).build()
        for name, parameter in adapters.trainable(built.model):
            if "lora_B" in name:  # else A would have no gradient yet
                torch.nn.init.normal_(parameter)
        torch.manual_seed(5)  # of the masks
        return built

    return build


def gradients(trainee: Trainee) -> dict[str, Tensor]:
    return {n: p.grad for n, p in adapters.trainable(trainee.model) if p.grad is not None}


# --- "The fast path is off as soon as there is dropout."


@on_both
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_dropout_is_right_forward_and_backward(dtype: torch.dtype, backend: str) -> None:
    weight = quantised(original())
    found = errors(weight, backend, dtype=dtype, p=0.25)
    assert max(found.values()) < 1, found
    # The control: the mask of another seed is another result, everywhere.
    found = errors(weight, backend, dtype=dtype, p=0.25, mask_seed=30)
    assert min(found.values()) > 1, found


@on_both
def test_dropout_leaves_a_peft_model_on_the_fast_path(backend: str, trainee) -> None:
    built, stock = trainee(backend), trainee("bnb")
    with heard() as names:
        built.step(0)
    adapted = sum("lora_A" in name for name, _ in adapters.trainable(built.model))
    # Query and value of a layer go together, one range for both; the last layer's have two.
    assert names.count("op:lora_A") == names.count("op:lora_B") == adapted / 2 + 1 > 1
    with heard() as names:  # the control: stock layers open none
        stock.step(0)
    assert not any("lora" in name for name in names)


# --- "It only takes nested (double) quantisation", or only the other.


@on_both
@pytest.mark.parametrize("M", [FEW, MANY])
@pytest.mark.parametrize("nested", [False, True])
def test_statistics_may_be_nested_or_not(nested: bool, M: int, backend: str) -> None:
    weight = quantised(original(), nested)
    assert weight.nested == nested
    for dtype in (FP32, BF16, FP16):
        found = errors(weight, backend, M=M, dtype=dtype)
        assert max(found.values()) < 1, (dtype, found)
        assert torch.equal(dequantize(weight, dtype, backend), dequantize_reference(weight, dtype))


# --- "x's dtype must be the one the weight was quantised from", or the compute dtype.


@on_both
@pytest.mark.parametrize("M", [FEW, MANY])
@pytest.mark.parametrize("compute", [FP32, BF16, FP16])
@pytest.mark.parametrize("source", [FP32, BF16, FP16])
def test_activations_may_have_any_dtype(
    source: torch.dtype, compute: torch.dtype, M: int, backend: str
) -> None:
    weight = quantised(original(dtype=source))
    for dtype in (FP32, BF16, FP16):
        found = errors(weight, backend, M=M, dtype=dtype, compute=compute)
        assert max(found.values()) < 1, (dtype, found)


# --- "torch.compile breaks the graph at every layer."


@on_both
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_peft_model_with_dropout_compiles_into_one_graph(
    family: str, backend: str, trainee
) -> None:
    torch._dynamo.reset()
    built = trainee(backend, family, padding="pad")
    # A run's CPU dropout has other masks than the one that is compiled, which is torch's. The
    # complaint is about the linear layers, so both sides have torch's here.
    for module in built.model.modules():
        if isinstance(module, torch.nn.Dropout):
            vars(module).pop("forward", None)
    (part,) = built.train.at(0).to(built.device).parts

    def step(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(6)
        logits = model(**part.inputs).logits
        logits.square().sum().backward()
        found = gradients(built)
        built.model.zero_grad(set_to_none=True)
        return logits.detach(), found

    expected, expected_grads = step(built.model)
    # With fullgraph a graph break is an error.
    logits, grads = step(torch.compile(built.model, fullgraph=True, backend="aot_eager"))
    assert relative_error(logits, expected) < FP32_REORDERED
    assert grads.keys() == dict(adapters.trainable(built.model)).keys()
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < FP32_REORDERED, name
    torch._dynamo.reset()


def test_dropout_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dropout(x, 0.3) + 1, fullgraph=True, backend="aot_eager")
    x = torch.ones(100, 100, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach() - 1)
    assert 0.6 < float((x.grad != 0).float().mean()) < 0.8
    torch._dynamo.reset()


def test_a_graph_break_would_be_noticed() -> None:
    # The control: what the test above relies on.
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, fullgraph=True, backend="aot_eager")(torch.zeros(1))
    torch._dynamo.reset()


# --- "Wrong numbers, or a crash, where K is no multiple of the blocksize."


@on_both
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("K", [32, 96, 100, 111])  # blocks over several rows, an odd K
def test_blocks_may_cross_rows(K: int, nested: bool, backend: str) -> None:
    weight = quantised(original(K), nested)
    for M in (FEW, MANY):
        found = errors(weight, backend, M=M)
        assert max(found.values()) < 1, (M, found)


@on_both
@pytest.mark.parametrize("K", [32, 96, 100, 111])
def test_where_blocks_cross_rows_it_is_what_was_quantised(K: int, backend: str) -> None:
    # Judged without our own reference: no weight is farther from its value than half of the
    # widest gap between codes.
    weight = quantised(original(K), nested=False)
    scales = block_scales(weight).repeat_interleave(64)[: N * K].view(N, K)
    units = dequantize(weight, FP32, backend) / scales
    assert ((units * scales - original(K)).abs() / scales).max() <= NF4_HALF_GAP
    # The control: a block that starts with each row, as bitsandbytes 0.50.2 has it on AVX-512.
    wrong = block_scales(weight)[torch.arange(K, device=DEVICE) // 64].expand(N, K)
    assert ((units * wrong - original(K)).abs() / scales).max() > NF4_HALF_GAP


# --- "Evaluating before training: no gradients, or an error in backward."


@on_both
@pytest.mark.parametrize("family", ["bert", "llama"])  # with biases and without
def test_evaluating_first_changes_no_gradient(family: str, backend: str, trainee) -> None:
    fresh = trainee(backend, family)
    loss, _ = fresh.step(0)
    adapters.check_gradients(fresh.model)
    evaluated = trainee(backend, family)
    evaluated.evaluate()
    with torch.no_grad():
        (part,) = evaluated.train.at(0).to(evaluated.device).parts
        packing.logits(evaluated.model.eval(), part)
    evaluated.model.train()
    torch.manual_seed(5)
    again, _ = evaluated.step(0)
    adapters.check_gradients(evaluated.model)
    assert torch.equal(again, loss)
    expected = gradients(fresh)
    for name, grad in gradients(evaluated).items():
        assert torch.equal(grad, expected[name]), name


# --- "Going from train to eval and back changes the base weight."


@on_both
def test_train_and_eval_leave_the_base_weight_alone(backend: str, trainee) -> None:
    built = trainee(backend)
    before = adapters.frozen_sha256(built.model)
    for number in range(2):
        built.evaluate()
        built.step(number)
        built.optimizer.zero_grad()
    built.evaluate()
    assert adapters.frozen_sha256(built.model) == before
    # The control: one bit would be seen.
    next(adapters.linear_4bit(built.model)).weight.data.view(-1)[0] ^= 1
    assert adapters.frozen_sha256(built.model) != before


# --- "The same step gives other gradients the next time."


@on_both
def test_gradients_are_deterministic(backend: str, trainee) -> None:
    runs = []
    for seed in (5, 5, 6):
        built = trainee(backend)
        torch.manual_seed(seed)
        built.step(0)
        runs.append(gradients(built))
    first, second, other = runs
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name
        assert not torch.equal(grad, other[name]), name  # the control: other masks
