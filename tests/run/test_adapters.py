import contextlib
import dataclasses

import pytest
import torch
from safetensors import safe_open

from peftprof.errors import ConfigError, DeviceError, TrainingError
from peftprof.run import adapters, packing, runner
from peftprof_kernels import set_listener
from tests import tolerances
from tests.conftest import FAMILIES
from tests.kernels.nf4_weights import DEVICE


def gradients(config, steps: int = 1):
    prepared = runner.prepare(config)
    trainee, _ = prepared.build()
    loss = None
    for number in range(steps):
        trainee.optimizer.zero_grad()
        loss, _ = trainee.step(number)
    named = {n: p.grad.clone() for n, p in adapters.trainable(trainee.model)}
    return float(loss), named, trainee


def assert_like_stock(config):
    """The loss and every gradient of `config`'s backend are those of stock PEFT."""
    # Two steps, since lora_A has no gradient while lora_B is still zero.
    ours = gradients(config, 2)
    stock = gradients(dataclasses.replace(config, kernels="bnb"), 2)
    assert ours[0] == pytest.approx(stock[0], rel=1e-4)
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in stock[1].items():
        scale = float(gradient.norm())
        assert scale > 0, name
        error = float((ours[1][name] - gradient).norm()) / scale
        assert error < tolerances.BACKENDS_FP32, (name, error)


# Interpreted, a step takes about a second: the families whose attention differs in kind.
COMPARED = [("torch", f) for f in FAMILIES] + [
    ("triton", f) for f in ("bert", "distilbert", "modernbert", "llama")
]


@pytest.mark.parametrize(("kernels", "family"), COMPARED)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_backends_give_the_same_loss_and_gradients(method, kernels, family, small_run):
    settings = {"dropout": 0.0, "warmup_ratio": 0.0, "device": DEVICE.type}
    assert_like_stock(small_run(method, family, kernels=kernels, **settings))


def test_few_rows_take_the_fused_product_to_the_same_gradients(small_run):
    config = small_run(
        "qlora",
        kernels="triton",
        dropout=0.0,
        warmup_ratio=0.0,
        device=DEVICE.type,
        batch_size=2,
        max_length=8,  # 16 rows: the default crossover
    )
    assert_like_stock(config)
    trainee, _ = runner.prepare(config).build()
    names = []

    def listener(name):
        names.append(name)
        return contextlib.nullcontext()

    before = set_listener(listener)
    try:
        trainee.step(0)
    finally:
        set_listener(before)
    assert "op:base_gemm" in names
    assert "op:dequant" not in names


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_the_head_is_trained_once_in_every_method(family, small_run):
    for method in ("full", "lora", "qlora"):
        _, named, trainee = gradients(small_run(method, family))
        heads = [n for n in named if any(h in n for h in ("classifier", "score"))]
        # bias and weight of each head module, and no frozen twin among the trainable
        expected = {"bert": 2, "distilbert": 4, "llama": 1}[family]
        assert len(heads) == expected, heads
        counted = adapters.count(trainee.model)
        assert counted.live == counted.nominal


def test_parameters_are_counted_as_used_and_as_stored(small_run):
    config = small_run("qlora")
    prepared = runner.prepare(config)
    trainee, info = prepared.build()
    counted = adapters.count(trainee.model)
    assert counted.live == 0  # no backward yet
    adapter = 2 * 2 * config.rank * (64 + 64)
    head = 64 * 2 + 2
    assert counted.nominal == adapter + head
    assert counted.total == info.parameters + adapter + head  # PEFT keeps the frozen head too
    assert counted.packed_total < counted.total


@pytest.mark.parametrize("kernels", ["torch", "bnb", "triton"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_evaluating_and_training_again(kernels, precision, family, small_run):
    """On CPUs with AVX512-BF16 stock bitsandbytes loses the gradients or fails here."""
    device = DEVICE.type if kernels == "triton" else "cpu"
    config = small_run("qlora", family, kernels=kernels, precision=precision, device=device)
    trainee, _ = runner.prepare(config).build()
    base = adapters.frozen_sha256(trainee.model)
    first = trainee.evaluate()
    for number in range(2 if kernels == "triton" else 4):  # interpreted, a second each
        trainee.step(number)
        adapters.check_gradients(trainee.model)
        trainee.optimizer.zero_grad()
        trainee.evaluate()
    assert adapters.frozen_sha256(trainee.model) == base
    assert trainee.evaluate().loss != first.loss


@pytest.mark.filterwarnings("ignore:bitsandbytes")
def test_without_our_care_stock_bitsandbytes_is_caught(small_run):
    import bitsandbytes as bnb

    if not bnb.functional.has_avx512bf16():
        pytest.skip("the repacking happens on CPUs with AVX512-BF16 only")
    config = small_run("qlora", "llama", kernels="bnb", precision="bf16")
    trainee, _ = runner.prepare(config).build()
    for module in adapters.linear_4bit(trainee.model):
        module.support_avx512bf16_for_cpu = True
    base = adapters.frozen_sha256(trainee.model)
    trainee.evaluate()
    trainee.step(0)
    assert adapters.frozen_sha256(trainee.model) != base
    with pytest.raises(TrainingError, match="got no gradient"):
        adapters.check_gradients(trainee.model)


def test_a_tensor_without_gradient_stops_the_run(small_run):
    trainee, _ = runner.prepare(small_run("lora")).build()
    trainee.model.register_parameter("spare", torch.nn.Parameter(torch.zeros(3)))
    trainee.step(0)
    with pytest.raises(TrainingError, match=r"1 of .* got no gradient, spare first"):
        adapters.check_gradients(trainee.model)


def test_stock_kernels_that_would_be_wrong_are_refused(small_run):
    """K = 96 is no multiple of the quantisation block, 64."""
    import bitsandbytes as bnb

    config = small_run("qlora", hidden=96)
    assert gradients(dataclasses.replace(config, kernels="torch"))[0] > 0
    weight = bnb.nn.Params4bit(torch.randn(96, 96), quant_type="nf4").to("cpu")
    linear = bnb.nn.Linear4bit(96, 96, bias=False, compute_dtype=torch.float32)
    linear.weight = weight
    try:
        adapters._check_dequantise(linear)
    except DeviceError:
        with pytest.raises(DeviceError, match="use --kernels torch"):
            gradients(dataclasses.replace(config, kernels="bnb"))
    else:
        gradients(dataclasses.replace(config, kernels="bnb"))


def test_targets_and_ranks_that_do_not_fit(small_run):
    for settings, says in (
        ({"target_modules": ("nope",)}, "its linear layers are"),
        ({"target_modules": ("classifier",)}, "its linear layers are"),
        ({"target_modules": ("LayerNorm",)}, "is no linear layer"),
        ({"rank": 65}, "--rank 65 is more than 64"),
    ):
        with pytest.raises(ConfigError, match=says):
            runner.prepare(small_run("lora", **settings)).build()


def test_triton_takes_a_rank_beyond_one_launch(small_run):
    config = small_run(
        "lora",
        hidden=264,
        kernels="triton",
        rank=257,
        target_modules=("value",),
        dropout=0.0,
        warmup_ratio=0.0,
        device=DEVICE.type,
        batch_size=2,
        max_length=8,
    )
    assert_like_stock(config)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_is_saved_loads_in_stock_peft(method, small_run, tmp_path, quiet):
    from peft import AutoPeftModelForSequenceClassification

    config = small_run(method, max_steps=6, profiler="none")
    folder = runner.train(config, tmp_path / "run", [], quiet)
    with safe_open(folder.path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any("lora_B" in key for key in file.keys())  # noqa: SIM118
    options = {}
    # Stock models know nothing of packed sequences.
    prepared = runner.prepare(dataclasses.replace(config, padding="pad"))
    if method == "qlora":
        from peftprof.run.model import quantization

        options["quantization_config"] = quantization(config, prepared.family)
    stock = AutoPeftModelForSequenceClassification.from_pretrained(
        folder.path / "adapter", num_labels=2, **options
    )
    for module in adapters.linear_4bit(stock):
        module.support_avx512bf16_for_cpu = False
    trainee, _ = prepared.build()
    trainee.model = stock
    recorded = folder.read_record().accuracy
    again = trainee.evaluate()
    assert again.correct == recorded.correct
    assert again.loss == pytest.approx(recorded.loss, rel=1e-4)


def test_disabled_adapters_give_the_base_model(small_run):
    trainee, _ = runner.prepare(small_run("lora", dropout=0.0)).build()
    for number in range(3):
        trainee.step(number)
        trainee.optimizer.zero_grad()
    trainee.model.eval()
    (part,) = trainee.train.at(0).parts
    with torch.no_grad(), trainee.model.disable_adapter():
        base = packing.logits(trainee.model, part)
    with torch.no_grad():
        adapted = packing.logits(trainee.model, part)
    assert not torch.equal(base, adapted)
