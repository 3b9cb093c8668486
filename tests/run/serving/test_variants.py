"""What is served is the model that was trained."""

from pathlib import Path

import pytest
import torch

from peftprof.config import make_config
from peftprof.errors import (
    ConfigError,
    InferenceError,
    InputError,
)
from peftprof.inferences import VARIANTS
from peftprof.run import adapters, model
from peftprof.run.folder import RunFolder
from peftprof.run.serving import calls, checks, timing
from peftprof.run.serving.served import Served
from peftprof.run.serving.settle import Asked, settle, tokens_of, with_adapter
from tests.run.serving.small import measure, ready
from tests.tolerances import LOGITS_FP32, TOKEN_TIE, relative_error

# --- What is computed


def stock_of(run: Path, nf4: bool):
    """The run's model as anybody loads it: transformers, bitsandbytes, PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = RunFolder(run).read_record().config
    options = {}
    if nf4:
        family = model.FAMILIES["bert"]
        made = make_config("qlora", model=config["model"], precision="fp32")
        options = {"quantization_config": model.quantization(made, family)}
    base = AutoModelForSequenceClassification.from_pretrained(
        config["model"], num_labels=2, dtype=torch.float32, device_map={"": "cpu"}, **options
    )
    for module in adapters.linear_4bit(base):
        module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, run / "adapter").eval()


@pytest.mark.parametrize("kernels", ["torch", "bnb"])
def test_the_variants_are_those_of_stock_peft_and_bitsandbytes(run, kernels):
    folder = run("lora")
    settled, compared, tokens = ready(
        Asked(run=folder, kernels=kernels, device="cpu", precision="fp32")
    )
    ids = tokens.at(4, 16)
    ours = {v: checks.logits(settled.served, m, ids) for v, m in compared.models.items()}
    assert list(ours) == list(VARIANTS)
    with torch.inference_mode():
        stock = stock_of(folder, nf4=False)
        unmerged = stock(input_ids=ids).logits
        for variant in ("unmerged", "merged"):
            assert relative_error(ours[variant], unmerged) < LOGITS_FP32
        bare = stock.unload()(input_ids=ids).logits  # with the head that was trained
        assert relative_error(ours["base"], bare) < LOGITS_FP32
        assert relative_error(ours["base"], unmerged) > 10 * LOGITS_FP32  # the control
        quantised = stock_of(folder, nf4=True)(input_ids=ids).logits
        assert relative_error(ours["nf4"], quantised) < LOGITS_FP32
        assert relative_error(ours["nf4"], unmerged) > 10 * LOGITS_FP32


def test_a_qlora_run_is_merged_into_what_it_was_trained_against(run):
    settled, compared, _ = ready(Asked(run=run("qlora"), device="cpu", precision="fp32"))
    assert settled.served.plan.dequantised
    judged = {(one.variant, one.of): one.error for one in compared.checks.equal}
    logits = {(variant, "logits") for variant in ("merged", "unmerged", "nf4")}
    assert judged.keys() == logits | {("merged", "weights")}
    assert max(judged.values()) < LOGITS_FP32
    assert compared.checks.effect > 10 * LOGITS_FP32


def one_row_more(merged):
    merged.bert.encoder.layer[1].attention.self.query.weight.data[3] += 0.05


def another_head(merged):
    merged.classifier.weight.data *= 1.01


def another_bias(merged):
    merged.bert.encoder.layer[0].output.dense.bias.data[5] = 1.0


@pytest.mark.parametrize("meddle", [one_row_more, another_head, another_bias])
def test_a_merge_that_is_wrong_stops_before_anything_is_timed(
    meddle, run, monkeypatch, tmp_path, no_children
):
    real = Served.stock

    def meddled(self, variant):
        made = real(self, variant)
        if variant == "merged":
            meddle(made)
        return made

    monkeypatch.setattr(Served, "stock", meddled)
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(InferenceError, match="merged is not the same model") as raised:
        measure(tmp_path / "out", run=run("lora"))
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1.001), ("bf16", 1.1)])
def test_a_variant_that_is_served_wrongly_is_caught(
    precision, factor, run, monkeypatch, tmp_path, no_children
):
    """What goes wrong on the way from stock PEFT to what is served."""
    settings = {"run": run("lora"), "precision": precision, "batch_sizes": (1,)}
    record, _ = measure(tmp_path / "right", **settings)
    (limit,) = {one.allowed for one in record.checks.equal if one.variant == "unmerged"}
    assert limit == LOGITS_FP32 if precision == "fp32" else LOGITS_FP32 < limit < 0.05
    real = Served.ready

    def meddled(self, made, variant):
        made = real(self, made, variant)
        if variant == "unmerged":
            made.classifier.modules_to_save["default"].weight.data *= factor
        return made

    monkeypatch.setattr(Served, "ready", meddled)
    with pytest.raises(InferenceError, match="unmerged is not the same model: its logits in"):
        measure(tmp_path / "out", **settings)


def test_an_adapter_that_merges_to_nothing_is_caught(run, monkeypatch, tmp_path, no_children):
    real = Served.stock
    monkeypatch.setattr(Served, "stock", lambda s, v: real(s, "base" if v == "merged" else v))
    with pytest.raises(InferenceError, match=r"query\.weight is .* away from W \+ s B A"):
        measure(tmp_path / "out", run=run("lora"))


def test_a_new_adapter_moves_what_the_model_says(tiny):
    settled, compared, _ = ready(Asked(model=str(tiny("bert")), device="cpu", precision="fp32"))
    assert compared.checks.effect > 5 * LOGITS_FP32
    assert any("lora_B" in n and t.any() for n, t in settled.served.adapter.tensors.items())
    again, _, _ = ready(Asked(model=str(tiny("bert")), device="cpu", precision="fp32"))
    for name, tensor in settled.served.adapter.tensors.items():
        assert torch.equal(tensor, again.served.adapter.tensors[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_decoding_with_kept_keys_makes_the_tokens_of_a_whole_forward(language_model, precision):
    asked = Asked(model=str(language_model), device="cpu", precision=precision, decode=6)
    settled, compared, tokens = ready(asked)
    assert settled.phases == ("prefill", "decode")
    ids = tokens.at(3, 8)
    for variant, made in compared.models.items():
        chosen = calls.greedy(made, ids, 6)
        grown = ids
        for n in range(6):
            scores = checks.logits(settled.served, made, grown)[:, -1]
            best = scores.max(-1).values
            # Rounding may choose the other of two that are as good; then it is as good.
            of_chosen = scores.gather(-1, chosen[:, n : n + 1])[:, 0]
            limit = TOKEN_TIE[model.DTYPES[precision]] * best.abs()
            assert (best - of_chosen <= limit).all(), variant
            grown = torch.cat([grown, chosen[:, n : n + 1]], dim=1)
    other = calls.greedy(compared.models["base"], tokens.at(3, 8) + 1, 6)
    assert not torch.equal(other, calls.greedy(compared.models["base"], ids, 6))


@pytest.mark.slow
def test_decode_asks_for_the_kernel_of_few_rows(language_model, monkeypatch):
    """With Triton each product of a token has as many rows as there are sequences."""
    from peftprof_kernels import ops

    rows: list[int] = []
    real = ops._most_rows
    monkeypatch.setattr(ops, "_most_rows", lambda x, most: rows.append(len(x)) or real(x, most))
    asked = Asked(model=str(language_model), kernels="triton", precision="fp32", decode=2)
    settled = with_adapter(settle(asked))
    made = settled.served.build("nf4")
    ids = tokens_of(settled).at(3, 4).to(settled.config.device)
    with torch.inference_mode():
        choice, kept = calls.prefill(made, ids)
        assert set(rows) == {12}
        rows.clear()
        calls.decode(made, choice.to(ids.device).unsqueeze(1), kept)
    assert set(rows) == {3}
    assert len(rows) == 14  # seven linears in two layers
    assert ops.lookup(64, 64).forward_max_m >= 3


def test_a_causal_run_is_its_classifier_unless_tokens_are_asked_for(run, monkeypatch):
    folder = run("lora", "llama")
    settled = settle(Asked(run=folder, device="cpu"))
    assert (settled.phases, settled.decode) == (("forward",), 0)
    settled = settle(Asked(run=folder, device="cpu", decode=4))
    assert settled.phases == ("prefill", "decode")
    assert not [n for n in settled.served.adapter.tensors if ".lora_" not in n]
    # The folder of this small model is a classifier's and has no language model's head.
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        settled.served.stock("base")
    assert settle(Asked(run=folder, device="cpu", decode=0)).phases == ("prefill",)


def test_full_fine_tuning_has_no_adapter(run, tmp_path, no_children):
    folder = run("full")
    record, _ = measure(tmp_path / "out", run=folder)
    assert {cell.variant for cell in record.cells} == {"base", "nf4"}
    assert record.adapter is None
    assert record.checks.drift[0].against == "base"
    with pytest.raises(ConfigError, match="--variants base,nf4"):
        measure(tmp_path / "other", run=folder, variants=("base", "merged"))


# --- What is given


def test_tokens_are_the_same_for_all_and_never_padding(run):
    settled = settle(Asked(run=run("lora"), device="cpu"))
    tokens = tokens_of(settled)
    assert "sentences" in tokens.source
    ids = tokens.at(5, 12)
    assert ids.shape == (5, 12)
    assert torch.equal(ids, tokens.at(5, 12))
    assert (ids != settled.served.tokenizer.pad_token_id).all()
    assert (ids[:, 0] == settled.served.tokenizer.cls_token_id).all()
    assert (ids[:, -1] == settled.served.tokenizer.sep_token_id).all()
    for length in (1, 2, 3, 500):
        assert tokens.at(2, length).shape == (2, length)
    assert tokens.at(2, 4, more=3).shape == (2, 7)
    assert torch.equal(tokens.at(2, 4, more=3)[:, 0], tokens.at(2, 4)[:, 0])
