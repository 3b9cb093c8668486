"""`advise` from the command line: shapes without weights, bad input, and a run compared."""

import json

import pytest
from typer.testing import CliRunner

from peftprof.advise import advisor, shapes
from peftprof.cli import app
from peftprof.cli_advise import memory_of
from peftprof.errors import ConfigError, PeftprofError
from peftprof.run import calibrate, runner
from tests.advise.test_profile import BERT, LLAMA

GB = 10**9
FAST = ["--batch-size", "1", "--rank", "8", "--precision", "bf16"]


def advise(*words: str):
    return CliRunner().invoke(app, ["advise", *words])


def refused(*words: str) -> str:
    """What `advise` refuses these options with: one line, exit code 2."""
    result = advise(*words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, PeftprofError), result.exception
        assert result.exception.exit_code == 2
        return str(result.exception)
    assert result.exit_code == 2
    return result.output


def test_llama_2_7b_beside_the_papers_claim(capsys):
    """C12: QLoRA under 15 GB; full fine-tuning takes far more than the 28 GB that are said."""
    words = ["--model", "llama-2-7b", "--device", "a100-80gb", "--tokens", "128", *FAST]
    result = advise(*words, "--no-checkpointing", "--json")
    found = json.loads(result.output)
    assert found["parameters"] == 6_607_351_808
    least = {}
    for p in found["predictions"]:
        method = p["choice"]["method"]
        least[method] = min(least.get(method, p["peak_bytes"]), p["peak_bytes"])
    assert least["qlora"] < 15 * GB
    # Weights, gradients and two moments, all fp32.
    assert least["full"] > 16 * found["parameters"] > 28 * GB
    assert least["qlora"] < least["lora"] < least["full"]


def test_the_answer_fits_80_columns_and_names_its_basis(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = advise("--model", "bert-base-uncased", "--device", "t4", "--precision", "fp16")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "python -m peftprof train --method" in result.output
    assert "datasheet" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--memory", "0"], "no memory"),
        (["--memory", "-1"], "no amount"),
        (["--memory", "12 parsecs"], "no amount"),
        (["--memory", "1e9GiB"], "no amount"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--model", "./nowhere"], "no folder"),
        (["--device", "no such card"], "no device"),
        (["--rank", "0"], "--rank"),
        (["--rank", "many"], "--rank"),
        (["--batch-size", "0,1"], "--batch-size"),
        (["--method", "lora,magic"], "magic"),
        (["--precision", "int3"], "int3"),
        (["--objective", "fame"], "fame"),
        (["--check", "nowhere"], "no nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says):
    given = ["--device", "t4"] if "--device" not in words else []
    assert says in refused("--model", "bert-base-uncased", *given, *words)


def test_more_tokens_than_positions_or_a_rank_above_the_layer(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BERT))
    on = ["--model", str(tmp_path), "--device", "t4"]
    assert "128 positions" in refused(*on, "--tokens", "129")
    assert "smaller side" in refused(*on, "--rank", "65")
    assert "no module" in refused(*on, "--target-modules", "absent")


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_config_that_lacks_a_size(tmp_path, missing):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in LLAMA.items() if k != missing}))
    assert f"lacks {missing}" in refused("--model", str(path), "--device", "t4")


@pytest.mark.parametrize("size", [0, -1, "six", True])
def test_a_config_with_an_impossible_size(tmp_path, size):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"num_hidden_layers": size}))
    assert "no size" in refused("--model", str(path), "--device", "t4")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "gpt7"}', "{}"])
def test_a_config_that_is_none(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    refused("--model", str(path), "--device", "t4")


def test_a_device_that_nobody_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    assert "calibrate" in refused("--model", "bert-base-uncased", "--device", "cpu")


def test_no_run_to_check_against(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    assert "no run to check against" in refused("--check", str(tmp_path))
    for text in ('{"state": "running"}', "{", "[]"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "run.json").write_text(text)
        assert "mine is damaged or not complete" in refused("--check", str(tmp_path))


def test_a_picture_that_cannot_be_written_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(advisor, "subject", lambda *_: pytest.fail("asked"))
    words = ["--model", "bert-base-uncased", "--device", "t4"]
    assert "--svg" in refused(*words, "--svg", str(tmp_path / "absent" / "front.svg"))


def test_a_shape_that_comes_with_peftprof_is_trained_by_its_name_on_the_hub():
    result = advise("--model", "qwen2.5-0.5b", "--device", "t4", "--precision", "fp16", *FAST[:4])
    assert "--model Qwen/Qwen2.5-0.5B" in result.output
    assert all(values["hub"].count("/") == 1 for values in shapes.known().values())


def stand_in(monkeypatch):
    """This CPU as a board of the table: quick to have, and no time is looked at."""
    from peftprof import devices

    board = devices.find("raspberry pi 5 8gb")
    monkeypatch.setattr(calibrate, "stored", lambda device: board)


def test_a_run_is_predicted_compared_and_learnt_from(small_run, quiet, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path / "cache"))
    config = small_run("lora", kernels="torch", checkpointing=True)
    runner.train(config, tmp_path / "run", ["train"], quiet)
    result = advise("--check", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert "optimizer state" in advise("--check", str(tmp_path), "--all").output
    (row,) = json.loads(result.output)["runs"]
    assert row["choice"]["checkpointing"] is True
    assert row["predicted_bytes"] > row["predicted_process_bytes"] > 0
    predicted, measured = row["parts"]["base_weights"]
    assert predicted == measured
    assert row["parts"]["adapters"][0] == row["parts"]["adapters"][1]
    assert row["parts"]["optimizer_state"][0] == pytest.approx(
        row["parts"]["optimizer_state"][1], rel=0.02
    )
    from peftprof.cli_advise import say_compared

    say_compared(tmp_path / "run")
    made = json.loads((tmp_path / "run" / "prediction.json").read_text())
    assert made["name"] == "run"
    # A cache that cannot be written: the table is shown all the same.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path / "file"))
    result = advise("--check", str(tmp_path))
    assert isinstance(result.exception, PeftprofError)
    assert "memory: 1 run" in result.output


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * 2**30), ("12 gb", 12 * 10**9), ("8g", 8 * 2**30), ("1024", 1024)],
)
def test_amounts_of_memory(text, size):
    assert memory_of(text) == size


def test_an_amount_that_is_none():
    with pytest.raises(ConfigError):
        memory_of("a lot")
