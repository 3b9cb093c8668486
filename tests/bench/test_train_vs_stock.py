"""The comparison with the stock Trainer: its arithmetic, and once small from end to end."""

import contextlib
import io
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import results, stock_trainer, train_vs_stock, train_vs_stock_child
from bench.train_vs_stock_child import first_dropout
from bench.train_vs_stock_figures import (
    OURS,
    STOCK,
    Cell,
    LossDifference,
    Ratio,
    Run,
    UnequalError,
    across,
    check_pair,
    order,
    summary,
)
from bench.train_vs_stock_flops import ModelFlops
from peftprof.run import packing, runner
from peftprof.run.loop import WARMUP_STEPS

LORA, QLORA = Cell("lora", "fp32"), Cell("qlora", "fp32")
BF16 = Cell("lora", "bf16")


def fake(seconds: float, losses=(1.0, 0.5), **other) -> dict:
    """What a child answers whose two timed steps of 8 samples take `seconds` each."""
    steps = WARMUP_STEPS + 2
    values = {
        "seconds": [9.0] * WARMUP_STEPS + [seconds] * 2,  # a warm-up that would be seen
        "losses": [2.0] * WARMUP_STEPS + list(losses),
        "samples": [8] * steps,
        "real_tokens": [80] * steps,
        "padded_tokens": [160] * steps,
        "flops": [10**9] * steps,
        "held_bytes": 100,
        "peak_bytes": 300,
        "loading_peak_bytes": 200,
        "initial_sha256": "same",
        "order_sha256": "same",
        "threads": 2,
        "drops_out": None,
    }
    return values | other


def run(round_: int, cell: Cell, side: str, seconds: float, dropout=True, **other) -> Run:
    return Run(round_, cell, side, dropout, fake(seconds, **other))


def test_ratios_are_of_pairs_and_the_warm_up_is_left_out():
    runs = [
        run(0, LORA, STOCK, 1.0),
        run(0, LORA, OURS, 0.5),
        run(1, LORA, OURS, 1.0, peak_bytes=200),
        run(1, LORA, STOCK, 4.0),  # the machine was slower in this round, for both
        run(2, LORA, STOCK, 1.0),
        run(2, LORA, OURS, 1.0),
        run(0, LORA, STOCK, 1.0, dropout=False),
        run(0, LORA, OURS, 0.1, dropout=False, losses=(1.01, 0.5)),
    ]
    found = summary(LORA, runs, peak=4e9)
    assert found["pairs"] == 3
    assert found["ours_over_stock"]["samples_per_s"] == {"median": 2, "low": 1, "high": 4}
    assert found["ours_over_stock"]["peak_bytes"]["low"] == pytest.approx(2 / 3)
    assert found["ours_over_stock"]["above_bytes"]["low"] == pytest.approx(1 / 2)
    assert found["stock"]["samples_per_s"] == 8
    assert found["ours"]["samples_per_s"] == 8
    assert found["stock"]["padded_tokens_per_s"] == 160
    assert found["stock"]["step_p50_ms"] == 1000
    assert found["stock"]["mfu"] == pytest.approx(0.25)  # 1e9 in 1 s, of 4e9
    assert found["ours"]["peak_bytes"] == 300
    assert found["loss_dropout_off"]["step"] == WARMUP_STEPS
    assert found["loss_dropout_off"]["relative"] == pytest.approx(0.01)
    assert found["loss_dropout_on"]["relative"] == 0


def test_ratios_across_cells_are_paired_within_a_round():
    runs = []
    for number, slow in enumerate((1.0, 3.0)):
        runs += [
            run(number, LORA, STOCK, 1.0 * slow),
            run(number, LORA, OURS, 0.8 * slow),
            run(number, BF16, STOCK, 0.9 * slow),
            run(number, BF16, OURS, 0.5 * slow),
            run(number, QLORA, STOCK, 2.0 * slow),
            run(number, QLORA, OURS, 1.0 * slow),
        ]
    found = {(line["of"], line["over"]): line for line in across(runs, [LORA, BF16, QLORA])}
    assert set(found) == {
        ("ours lora bf16", "stock lora fp32"),
        ("ours qlora fp32", "stock qlora fp32"),
        ("ours qlora fp32", "stock lora fp32"),
        ("ours qlora fp32", "ours lora fp32"),
        ("stock qlora fp32", "stock lora fp32"),
    }
    best = found["ours lora bf16", "stock lora fp32"]
    assert best["low"] == pytest.approx(best["high"]) == pytest.approx(2.0)
    assert found["ours qlora fp32", "ours lora fp32"]["median"] == pytest.approx(0.8)


def test_the_largest_difference_is_relative():
    assert LossDifference.of([100.0, 1.0], [101.0, 1.5]) == LossDifference(0.5, 1)
    assert str(Ratio.of([(3, 2), (1, 1), (4, 2)])) == "1.50x [1.00, 2.00]"


def test_who_goes_first_changes_for_each_cell_and_round():
    cells = [LORA, BF16, QLORA]
    for cell in cells:
        first = [next(s for c, s in order(n, cells) if c == cell) for n in range(4)]
        assert first in ([STOCK, OURS] * 2, [OURS, STOCK] * 2)
    for number in range(2):
        turns = order(number, cells)
        assert len(set(turns)) == len(turns) == 6
        assert all(turns[i][0] == turns[i + 1][0] for i in range(0, 6, 2))  # pairs side by side


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("initial_sha256", "other", "initial weights"),
        ("order_sha256", "other", "order of examples"),
        ("samples", [7] * 7, "samples by step"),
        ("threads", 1, "number of threads"),
        ("drops_out", "dropout 0.1", "still drops out: dropout 0.1"),
    ],
)
def test_what_is_no_pair_is_refused(key, value, said):
    stock = run(0, LORA, STOCK, 1.0, dropout=False)
    check_pair(stock, run(0, LORA, OURS, 1.0, dropout=False))
    with pytest.raises(UnequalError, match=said):
        check_pair(stock, run(0, LORA, OURS, 1.0, dropout=False, **{key: value}))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_flops_are_those_that_torch_counts(method, small_run):
    config = small_run(method, dropout=0.0)
    prepared = runner.prepare(config)
    net = stock_trainer.load(prepared).train()
    examples, length, hidden = 3, 7, 64
    inputs = {"input_ids": torch.arange(100, 100 + examples * length).view(examples, length)}
    counted = ModelFlops.of(net, prepared.family.layers, inputs)
    assert (counted.hidden, counted.layers) == (hidden, 2)
    if method == "qlora":  # bitsandbytes' product is no operator that torch knows
        lora = stock_trainer.load(runner.prepare(small_run("lora", dropout=0.0))).train()
        assert counted == ModelFlops.of(lora, prepared.family.layers, inputs)
        return
    net.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        net(**inputs, labels=torch.zeros(examples, dtype=torch.long)).loss.backward()
    pooler, head = hidden * hidden, 2 * hidden
    # Both trained: forward, dX, dW. Frozen pooler: forward and dX.
    outside = 2 * examples * (3 * pooler + 3 * head if method == "full" else 2 * pooler + 3 * head)
    # The first layer's key needs no gradient where nothing below it is trained.
    key = 0 if method == "full" else 2 * length * length * hidden * examples
    assert counted.of_step([length] * examples) == counter.get_total_flops() - outside + key


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_our_steps_take_the_model_flops_and_no_more(method, family, small_run):
    """Of sequences of one length, so that attention pads nothing; its dropout makes its
    products ones that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small_run(method, family, padding="packed", dropout=0.0)
    prepared = runner.prepare(config)
    batches, length = prepared.train, 9
    batches.columns = {n: [row[:length] for row in rows] for n, rows in batches.columns.items()}
    chosen = [i for i, row in enumerate(batches.columns["input_ids"]) if len(row) == length][:6]
    batches.lengths = [len(row) for row in batches.columns["input_ids"]]
    (part,) = batches.collate(chosen).parts
    assert (len(chosen), part.inputs["input_ids"].shape[1]) == (6, 6 * length)
    trainee, _ = prepared.build()
    with FlopCounterMode(display=False) as counter:
        packing.logits(trainee.model, part).sum().backward()
    net = stock_trainer.load(prepared).train()
    inputs = {"input_ids": torch.stack([batches.columns["input_ids"][i] for i in chosen])}
    counted = ModelFlops.of(net, prepared.family.layers, inputs, narrow=True)
    hidden = counted.hidden
    outside = 2 * 6 * 3 * (hidden * hidden + 2 * hidden)  # pooler or pre_classifier, classifier
    if method == "lora":
        if family == "bert":
            outside -= 2 * 6 * hidden * hidden  # the pooler is frozen
        outside -= 2 * length * length * hidden * 6  # the first layer's keys need no gradient
    assert counter.get_total_flops() == counted.of_step([length] * 6) + outside


def test_stock_draws_the_examples_of_our_batches(small_run):
    examples = runner.prepare(small_run("lora", batch_size=7)).train
    sampler = stock_trainer.OurOrder(examples)
    steps = range(2 * examples.per_epoch)
    expected = [i for step in steps for i in examples.indices(step)]
    assert [*sampler, *sampler] == expected
    assert len(sampler) == len(examples.labels)


def test_without_dropout_there_is_none(small_run, tmp_path):
    config = small_run("lora")
    assert first_dropout(runner.prepare(config).build()[0].model)
    still = train_vs_stock.without_dropout(config, tmp_path)
    assert first_dropout(runner.prepare(still).build()[0].model) is None
    assert first_dropout(stock_trainer.load(runner.prepare(still))) is None


@pytest.fixture
def go(tmp_path, capsys):
    """`go(*options)`: exit code, the lines of the results, output, errors."""

    def call(*options):
        code = train_vs_stock.main(["--device", "cpu", "--out", str(tmp_path), *options])
        said = capsys.readouterr()
        paths = list(tmp_path.rglob("train_vs_stock.jsonl"))
        if not paths:
            assert not list(tmp_path.rglob("*.*"))
            return code, [], said.out, said.err
        ElementTree.parse(paths[0].with_suffix(".svg"))
        return code, results.lines(paths[0]), said.out, said.err

    return call


def test_runs_become_a_table_a_picture_and_lines(go, monkeypatch):
    asked = []

    def child(request):
        asked.append(request["what"])
        if request["what"] == "ceilings":
            speed = 1e9 * len(asked)
            return {"flops_per_s": dict.fromkeys(request["precisions"], speed)}
        return fake(1.0 if request["what"] == STOCK else 0.5)

    monkeypatch.setattr(train_vs_stock, "child", child)
    code, lines, out, err = go("--methods", "lora,qlora", "--precisions", "fp32", "--pairs", "2")
    assert code == 0
    assert asked[0] == asked[-1] == "ceilings"
    assert len(asked) == 2 + 2 * 2 * 2 + 4
    assert lines[0]["gemm_flops_per_s"] == {"fp32": 1e9 * len(asked)}  # the larger
    kinds = [line["kind"] for line in lines]
    assert [kinds.count(k) for k in ("header", "run", "cell", "end")] == [1, 12, 2, 1]
    assert "2.00x [2.00, 2.00]" in out
    assert "ours qlora fp32 / ours lora fp32: 1.00x" in out
    assert err.count("samples/s") == 12


def test_a_run_that_fails_ends_it_with_one_line_and_no_file(go, monkeypatch):
    def child(request):
        if request["what"] == OURS:
            raise train_vs_stock.ChildError("TrainingError: no")
        return fake(1.0) | {"flops_per_s": {"fp32": 1e9}}

    monkeypatch.setattr(train_vs_stock, "child", child)
    code, lines, _, err = go("--methods", "lora", "--precisions", "fp32")
    assert (code, lines) == (2, [])
    assert err.endswith("bench.train_vs_stock: round 1, lora fp32, ours: TrainingError: no\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--steps", str(WARMUP_STEPS)), f"--steps is {WARMUP_STEPS}"),
        (("--pairs", "0"), "--pairs is 0"),
        (("--dataset", "missing.csv"), "missing.csv"),
        (("--model", "./missing"), "./missing"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(go, monkeypatch, options, says):
    monkeypatch.setattr(train_vs_stock, "child", None)
    code, lines, _, err = go(*options)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    assert says in err


@pytest.fixture
def processes(monkeypatch):
    """Of each kind of request the first has a process of its own; the next are answered here."""
    real, kinds = train_vs_stock.child, set()

    def child(request):
        if request["what"] not in kinds:
            kinds.add(request["what"])
            return real(request)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert train_vs_stock_child.main(json.dumps(request)) == 0
        return json.loads(said.getvalue().splitlines()[-1])

    monkeypatch.setattr(train_vs_stock, "child", child)
    return kinds


@pytest.mark.slow
def test_both_sides_train_the_same_on_the_embedded_model(go, processes):
    options = ("--methods", "lora", "--precisions", "fp32", "--pairs", "1", "--steps", "7")
    code, lines, out, err = go(*options, "--batch-size", "4")
    assert code == 0, err
    assert processes == {"ceilings", STOCK, OURS}
    runs = [line for line in lines if line["kind"] == "run"]
    assert [(r["side"], r["dropout"]) for r in runs] == [
        (STOCK, True),
        (OURS, True),
        (STOCK, False),
        (OURS, False),
    ]
    for key in ("order_sha256", "initial_sha256", "threads"):
        assert len({json.dumps(r[key]) for r in runs}) == 1
    assert all(len(r["losses"]) == len(r["seconds"]) == 7 and r["peak_bytes"] > 0 for r in runs)
    stock = [r["settings"] for r in runs if r["side"] == STOCK]
    assert stock[0]["attention"] == "sdpa"  # nothing of ours in it
    (cell,) = (line for line in lines if line["kind"] == "cell")
    assert cell["loss_dropout_off"]["relative"] < 1e-3
    assert 0 < cell["stock"]["mfu"] < 1
    assert "lora fp32" in out
