"""A real profile: a small BERT with adapters from PEFT, on the CPU, with ranges of our names."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from peftprof.breakdowns import Breakdown
from peftprof.trace import load

STEPS = 3
HIDDEN = 256


def small_bert(quantised: bool) -> Any:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        num_labels=2,
    )
    model: Any = BertForSequenceClassification(config)
    if quantised:
        for module in list(model.bert.encoder.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear:
                    packed = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                    )
                    packed.weight = bnb.nn.Params4bit(
                        child.weight.data, requires_grad=False, quant_type="nf4"
                    )
                    packed.bias = child.bias
                    setattr(module, name, packed.to("cpu"))
    lora = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    return get_peft_model(model, lora).train()


def annotate(model: Any) -> None:
    def hook(module: torch.nn.Module, name: str) -> None:
        open_: list[Any] = []

        def enter(*_: Any) -> None:
            open_.append(record_function(name))
            open_[-1].__enter__()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda *_: open_.pop().__exit__(None, None, None))

    for path, module in model.named_modules():
        parts = path.split(".")
        if parts[-1] == "default" and parts[-2] in ("lora_A", "lora_B"):
            hook(module, f"op:{parts[-2]}")
        elif parts[-2:-1] == ["layer"]:
            hook(module, f"layer:{path}")
        elif parts[-2:] == ["modules_to_save", "default"]:
            hook(module, "layer:head.classifier")


def train_step(number: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    with record_function(f"step:{number}"):
        with record_function("phase:data"):
            tokens, labels = torch.randint(0, 200, (8, 32)), torch.randint(0, 2, (8,))
        with record_function("phase:forward"):
            logits = model(input_ids=tokens).logits
            with record_function("op:loss"):
                loss = torch.nn.functional.cross_entropy(logits, labels)
        with record_function("phase:backward"):
            loss.backward()
        with record_function("phase:optimizer"):
            with record_function("op:grad_clip"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="module", params=["lora", "qlora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Path]:
    model = small_bert(request.param == "qlora")
    annotate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train_step(0, model, optimizer)
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profiler:
        for number in range(1, STEPS + 1):
            train_step(number, model, optimizer)
    path = tmp_path_factory.mktemp(request.param) / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    return request.param, path


@pytest.fixture(scope="module")
def breakdown(run: tuple[str, Path]) -> Breakdown:
    return load([run[1]]).breakdowns[0]


def time_of(breakdown: Breakdown, phase: str, category: str) -> float:
    return sum(r.ns for r in breakdown.rows if (r.phase, r.category) == (phase, category))


def test_it_adds_up(breakdown: Breakdown) -> None:
    total = breakdown.step_ns.median
    parts = sum(r.ns for r in breakdown.rows) + breakdown.idle_ns + breakdown.unattributed_ns
    assert parts == pytest.approx(total, rel=1e-3)
    assert sum(breakdown.idle_by_phase_ns.values()) == pytest.approx(breakdown.idle_ns)
    assert breakdown.steps == STEPS
    assert breakdown.device == "cpu"


def test_next_to_nothing_is_unattributed(breakdown: Breakdown) -> None:
    assert breakdown.unattributed_ns < 0.05 * breakdown.step_ns.median


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("category", ["dequant", "base_gemm", "adapter_gemm"])
def test_both_directions_of_every_product_are_found(
    run: tuple[str, Path], breakdown: Breakdown, phase: str, category: str
) -> None:
    if run[0] == "lora" and category == "dequant":
        assert time_of(breakdown, phase, category) == 0
    else:
        assert time_of(breakdown, phase, category) > 0


@pytest.mark.parametrize(
    ("phase", "category"),
    [
        ("data", "elementwise"),
        ("forward", "embedding"),
        ("forward", "attention"),
        ("backward", "attention"),
        ("forward", "head_loss"),
        ("backward", "head_loss"),
        ("backward", "elementwise"),
        ("optimizer", "optimizer"),
    ],
)
def test_the_rest_is_where_it_belongs(breakdown: Breakdown, phase: str, category: str) -> None:
    assert time_of(breakdown, phase, category) > 0
    assert "other" not in {r.phase for r in breakdown.rows}


def test_products_are_counted_exactly(run: tuple[str, Path], breakdown: Breakdown) -> None:
    """Two layers of two adapted linears each; nothing before the first asks for a gradient."""
    rows = {(r.phase, r.category): r.count for r in breakdown.rows}
    assert rows["forward", "adapter_gemm"] == 2 * 2 * 2
    products = {o.name: o.count for o in breakdown.operators if o.category == "adapter_gemm"}
    # Forward 8; backward dA, dB and dx of 4 adapters, less dx of lora_A in the first layer.
    assert products["aten::mm"] == 8 + 4 * 4 - 2
    if run[0] == "qlora":
        dequantised = [o.count for o in breakdown.operators if o.name.endswith("dequantize_4bit")]
        # 12 packed linears; the backward needs those that a gradient passes through: the
        # first layer's query, key and value have nothing to train before them.
        assert dequantised == [12 + 9]


def test_self_time_agrees_with_torch(
    run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the nanosecond the time in which any operator runs, read from the JSON."""
    import gzip
    import json
    from decimal import Decimal

    def nanoseconds(event: Any) -> tuple[int, int]:
        return int(event["ts"] * 1000), int((event["ts"] + event["dur"]) * 1000)

    with gzip.open(run[1]) as file:
        events = json.load(file, parse_float=Decimal)["traceEvents"]
    steps = [nanoseconds(e) for e in events if str(e.get("name")).startswith("step:")]
    total = 0
    reached = 0
    for event in sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: e["ts"]):
        name = event["name"].removeprefix("autograd::engine::evaluate_function: ")
        python = name.isidentifier() and name != "detach" and not name[-1].isdigit()
        start, end = nanoseconds(event)
        inside = any(begin <= start < until for begin, until in steps)
        if inside and not python and end > reached:
            total += end - max(start, reached)
            reached = end
    # A breakdown keeps only its longest operators, and this trace may have more.
    monkeypatch.setattr("peftprof.trace.breakdown.OPERATORS", sys.maxsize)
    everything = load([run[1]]).breakdowns[0]
    busy = sum(o.ns for o in everything.operators) * STEPS
    assert round(busy) == total
