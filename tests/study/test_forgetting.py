"""The loss on general text: the right model below the right head, and nothing trained by it."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from peftprof.run import runner
from peftprof.run.folder import RunFolder
from peftprof.run.source import load_tokenizer, locate
from peftprof.study import forgetting


@pytest.fixture
def finished(small_run, tmp_path, quiet):
    """`finished(method, family, **settings)`: the folder of a finished short run."""

    def make(method, family="bert", **settings) -> RunFolder:
        config = small_run(method, family, max_steps=3, profiler="none", **settings)
        return runner.train(config, tmp_path / f"{method}-{family}", [], quiet)

    return make


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    for name, value in (("SEQUENCES", 4), ("FIT_SEQUENCES", 8), ("FIT_STEPS", 5)):
        monkeypatch.setattr(forgetting, name, value)


def test_the_text_is_prose_and_its_halves_share_nothing():
    paragraphs = forgetting.paragraphs()
    assert len(paragraphs) > 200
    assert all(len(p) >= forgetting.SHORTEST and "\n" not in p for p in paragraphs)
    tokenizer = load_tokenizer(locate("minilm"))
    held, fitted = (
        forgetting._text(tokenizer, True, half, 200) for half in ("held out", "fitted on")
    )
    assert held.tokens.shape[1] == fitted.tokens.shape[1] == forgetting.LENGTH
    rows = {tuple(row) for row in held.tokens.tolist()}
    assert not rows & {tuple(row) for row in fitted.tokens.tolist()}
    assert 0.1 < float(held.asked.float().mean()) < 0.2
    special = torch.isin(held.tokens, torch.tensor(tokenizer.all_special_ids))
    assert not (held.asked & special).any()
    masked = held.inputs(slice(None))
    assert (masked[held.asked] == tokenizer.mask_token_id).all()
    assert torch.equal(masked[~held.asked], held.tokens[~held.asked])


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_that_learnt_much_has_another_loss_and_one_that_learnt_nothing_has_not(
    method, finished, tmp_path
):
    idle = forgetting.measure(finished(method, learning_rate=1e-12), tmp_path / "general")
    assert idle.after == pytest.approx(idle.before, abs=1e-5)
    assert idle.measure == "masked language model"
    assert "fitted" in idle.head
    for path in (tmp_path / f"{method}-bert").iterdir():
        path.rename(tmp_path / f"old-{path.name}")
    (tmp_path / f"{method}-bert").rmdir()
    moved = forgetting.measure(finished(method, learning_rate=0.1), tmp_path / "general")
    assert moved.before == idle.before
    assert abs(moved.after - moved.before) > 5e-5


def test_a_decoder_without_a_head_says_so(finished, tmp_path):
    folder = finished("lora", "llama")
    with pytest.raises(forgetting.NotMeasurableError, match="no language-model head"):
        forgetting.measure(folder, tmp_path / "general")
    forgetting.record(folder, tmp_path / "general")
    assert (
        "no language-model head"
        in json.loads((folder.path / "forgetting.json").read_text())["absent"]
    )


def test_a_decoder_is_asked_for_the_next_token(tiny, finished, tmp_path):
    source = tiny("llama")
    model = tmp_path / "model"
    shutil.copytree(source, model)
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    decoder.save_pretrained(model)
    found = forgetting.measure(
        finished("lora", "llama", model=str(model), learning_rate=1e-12), tmp_path / "general"
    )
    assert (found.measure, found.head) == ("language model", "the checkpoint's own")
    text = forgetting._text(load_tokenizer(locate(str(model))), False, "held out", 4)
    with torch.inference_mode():
        theirs = decoder.eval()(input_ids=text.tokens, labels=text.tokens).loss
    assert found.before == pytest.approx(float(theirs), rel=1e-4)
    assert found.after == pytest.approx(found.before, rel=1e-6)


def test_the_loss_is_the_models_own_where_nothing_is_swapped():
    """The judge over its own encoder gives what transformers computes for the same tokens."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    judge = BertForMaskedLM(BertConfig(vocab_size=30528, num_hidden_layers=2, **sizes)).eval()
    text = forgetting._text(load_tokenizer(locate("minilm")), True, "held out", 3)
    wanted = text.tokens.masked_fill(~text.asked, -100)
    with torch.inference_mode():
        theirs = judge(input_ids=text.inputs(slice(None)), labels=wanted).loss
    encoder = judge.bert
    head = forgetting.OwnHead(judge)
    assert forgetting.loss(head, encoder, text) == pytest.approx(float(theirs), rel=1e-5)
    assert judge.bert is encoder


def test_what_is_recorded_is_recorded_once_and_why_not_too(finished, tmp_path):
    folder = finished("lora")
    forgetting.record(folder, tmp_path / "general")
    path = folder.path / "forgetting.json"
    first = path.read_bytes()
    assert json.loads(first)["tokens"] > 0
    forgetting.record(folder, tmp_path / "general")
    assert path.read_bytes() == first


@pytest.mark.slow
def test_the_fitted_head_reads_more_than_frequencies(monkeypatch, tmp_path):
    """Else a loss that stays the same would say nothing of what was forgotten."""
    monkeypatch.undo()
    source = locate("minilm")
    tokenizer = load_tokenizer(source)
    model = AutoModel.from_pretrained(source.folder).eval()
    judge = forgetting._judge(source, tokenizer, True, tmp_path, model)
    held = forgetting._text(tokenizer, True, "held out", forgetting.SEQUENCES)
    fitted = forgetting._text(tokenizer, True, "fitted on", forgetting.FIT_SEQUENCES)
    counts = torch.bincount(fitted.tokens.flatten(), minlength=30522).double() + 0.1
    frequencies = -(counts / counts.sum()).log()[held.tokens[held.asked]].mean()
    assert forgetting.loss(judge, model, held) < float(frequencies) - 0.25
    again = forgetting._judge(source, tokenizer, True, tmp_path, model)
    assert forgetting.loss(again, model, held) == forgetting.loss(judge, model, held)
