"""Backends are interchangeable: the same training, and adapters that stock PEFT loads."""

import dataclasses

import pytest
import torch

from peftprof.run import adapters, model, runner
from tests.kernels.nf4_weights import DEVICE
from tests.tolerances import LOGITS_FP32, LOSS_CURVE, relative_error


@pytest.fixture
def train(small_run, tmp_path, quiet, trained):
    """`train(method, family, kernels, **settings)`: the run's folder, and what it trained."""

    def run(method, family, kernels, **settings):
        defaults = {
            "dropout": 0.0,
            "warmup_ratio": 0.0,
            "learning_rate": 3e-3,
            "max_steps": 6,
            "profiler": "none",
            "device": DEVICE.type,
        }
        config = small_run(method, family, kernels=kernels, **(defaults | settings))
        folder = runner.train(config, tmp_path / f"run-{len(trained)}", [], quiet)
        return folder, trained[-1]

    return run


def losses(folder) -> torch.Tensor:
    return torch.tensor([step.loss for step in folder.read_steps()], dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "family", "precision", "backends"),
    [
        ("lora", "bert", "fp32", ("torch", "triton")),
        ("qlora", "llama", "fp32", ("torch", "triton")),
        ("qlora", "llama", "bf16", ("torch",)),
    ],
)
def test_every_backend_gives_the_same_losses(method, family, precision, backends, train):
    limit = LOSS_CURVE[model.DTYPES[precision]]

    def curve(kernels, **settings):
        folder, _ = train(method, family, kernels, precision=precision, **settings)
        assert folder.read_record().state == "complete"
        return losses(folder)

    stock = curve("bnb")
    assert len(stock) == 6
    for kernels in backends:
        apart = ((curve(kernels) - stock) / stock).abs().max()
        assert apart < limit, (kernels, apart)
    # The control: adapters that count half as much.
    apart = ((curve("torch", alpha=4.0) - stock) / stock).abs().max()
    assert apart > 2 * limit


@pytest.mark.parametrize("kernels", ["bnb", "torch", "triton"])
@pytest.mark.parametrize(("method", "family"), [("lora", "bert"), ("qlora", "llama")])
def test_stock_peft_loads_what_was_saved(method, family, kernels, train):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder, trainee = train(method, family, kernels, max_steps=3, learning_rate=1e-2)
    config = trainee.config
    options = {}
    if method == "qlora":
        options["quantization_config"] = model.quantization(config, model.FAMILIES[family])
    base = AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=2, dtype=torch.float32, device_map={"": config.device}, **options
    )
    for module in adapters.linear_4bit(base):
        module.support_avx512bf16_for_cpu = False  # would re-quantise the weight: kernels.md
    stock = PeftModel.from_pretrained(base, folder.path / "adapter").eval()
    # What stock PEFT can be given: a padded batch, which a model that packs takes too.
    padded = runner.prepare(dataclasses.replace(config, padding="pad")).validation.at(0)
    inputs = padded.to(trainee.device).parts[0].inputs
    with torch.no_grad():
        expected = trainee.model.eval()(**inputs).logits
        assert relative_error(stock(**inputs).logits, expected) < LOGITS_FP32
        # The control: without the adapter they are others.
        for name, parameter in stock.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert relative_error(stock(**inputs).logits, expected) > 10 * LOGITS_FP32
