"""Every benchmark from its options to its results file, small and on a CPU."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from bench import command, dequantize, lora_linear, nf4_linear, results
from bench.harness import WrongError
from bench.options import Setup, slug
from bench.problems import quantised
from peftprof.run import environment

BENCHMARKS = [dequantize.BENCHMARK, nf4_linear.BENCHMARK, lora_linear.BENCHMARK]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(benchmark, *options)`: exit code, header, rows, closing line, output, errors."""
    monkeypatch.setattr(command, "quiet", lambda: None)

    def go(benchmark, *options):
        code = command.main(
            benchmark, ["--device", "cpu", "--quick", "--out", str(tmp_path), *options]
        )
        paths = list(tmp_path.glob(f"*/{benchmark.name}.jsonl"))
        said = capsys.readouterr()
        if not paths:
            return code, None, [], None, said.out, said.err
        header, *lines = results.lines(paths[0])
        ElementTree.parse(paths[0].with_suffix(".svg"))
        return code, header, lines[:-1], lines[-1], said.out, said.err

    return go


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
def test_a_benchmark_runs_small_on_a_cpu(benchmark, run):
    code, header, rows, end, out, err = run(benchmark, "--shapes", "64x128", "--tokens", "3")
    assert (code, err) == (0, "")
    assert header["environment"]["torch"]["version"] == torch.__version__
    assert header["date"].startswith("20")
    assert header["device"] in out
    assert header["ceilings"]["gemm_flops_per_s"] > 0
    assert not end["cut_short"]
    assert {row["status"] for row in rows} <= {"timed", "absent"}
    ours = [row for row in rows if row["provider"] == "ours-torch"]
    assert len(ours) == end["planned"] == end["done"]
    for row in ours:
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["error"] < 0.01
        assert row["light"] > 0
        assert row["ratio"]["self_spread"] >= 1
    absent = {row["provider"]: row["why"] for row in rows if row["status"] == "absent"}
    assert "Unsloth" in absent
    assert "needs a GPU" in absent["ours-triton"]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
def test_the_triton_providers_are_right_under_the_interpreter(benchmark, run):
    options = ("--verify-only", "--shapes", "48x66", "--tokens", "3", "--dtype", "fp32")
    code, header, rows, _, _, _ = run(benchmark, *options)
    assert code == 0
    assert header["ceilings"] is None
    status = {row["status"] for row in rows if row["provider"].startswith("ours")}
    assert status == {"right"}
    assert all(row["ms"] is None for row in rows)


def test_weights_that_bitsandbytes_gets_wrong_here_are_not_timed(run):
    _, _, rows, _, out, _ = run(dequantize.BENCHMARK, "--shapes", "64x96")
    found = next(row for row in rows if row["provider"] == "bitsandbytes")
    if "wrong on cpu" in (environment.describe()["kernels"]["bnb"]["note"] or ""):
        assert (found["status"], found["ms"]) == ("wrong", None)
        assert "bitsandbytes is wrong" in out
    else:
        assert found["status"] == "timed"


def test_time_that_runs_out_is_said(run):
    code, _, rows, end, out, _ = run(dequantize.BENCHMARK, "--shapes", "8x64", "--seconds", "1e-9")
    assert (code, rows) == (0, [])
    assert (end["done"], end["planned"], end["cut_short"]) == (0, 1, True)
    assert "cut short: 0 of 1 cases" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shapes", "llama-9b"], "unknown shapes 'llama-9b'"),
        (["--tokens", "4,x"], "--tokens wants numbers from 1 to 1000000, not 'x'"),
        (["--tokens", ","], "--tokens wants numbers from 1 to 1000000, not none"),
        (["--tokens", "9" * 20], "--tokens wants numbers from 1 to 1000000"),
        (["--shapes", ","], "--shapes names no shape"),
        (["--shapes", "64x9999999"], "--shapes wants sizes up to 1000000"),
        (["--seconds", "0"], "--seconds wants a number above 0, not 0.0"),
        (["--seconds", "nan"], "--seconds wants a number above 0, not nan"),
        (["--dtype", "fp16"], "--dtype fp16 needs a GPU; on cpu use --dtype"),
    ],
)
def test_options_that_cannot_be_are_one_line(run, options, said):
    code, header, _, _, _, err = run(nf4_linear.BENCHMARK, *options)
    assert (code, header) == (2, None)
    assert err.startswith("bench.nf4_linear: ")
    assert said in err
    assert err.count("\n") == 1


def small_setup(tmp_path, p_dtype=torch.float32) -> Setup:
    cpu = torch.device("cpu")
    return Setup(cpu, p_dtype, True, (), (), "cold", False, False, None, tmp_path)


def test_a_forward_and_a_backward_with_different_masks_are_caught(tmp_path):
    """What a lost seed looks like: dX of another mask than y's."""
    setup = small_setup(tmp_path)
    problem = lora_linear.make_problem(setup, 64, 24, 32, "float32", zero=True)
    stock = lora_linear._peft(setup, problem, 0.1)
    lora_linear._check(stock, setup, problem, 0.1)

    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.nn.functional.dropout(x, 0.1)

        @staticmethod
        def backward(ctx, dy):
            return torch.nn.functional.dropout(dy, 0.1)

    A, B = problem.adapter()
    forget = lora_linear.Layer(lambda x: Forgetful.apply(x) @ A.T @ B.T * lora_linear.SCALING, A, B)
    with pytest.raises(WrongError, match="is off by"):
        lora_linear._check(forget, setup, problem, 0.1)
    often = lora_linear._peft(setup, problem, 0.3)
    with pytest.raises(WrongError, match=r"dropout of 0\.1 keeps 0\.[67]"):
        lora_linear._check(often, setup, problem, 0.1)


def test_saved_memory_is_counted_once_and_without_parameters():
    w = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4, requires_grad=True)

    def forward() -> torch.Tensor:
        hidden = (x @ w.T).exp()  # keeps x, w and its own result
        return hidden[:4] * hidden[4:]  # keeps two views of that result

    assert lora_linear.saved_bytes(forward, [w]) == (8 * 4 + 8 * 4) * 4


def test_a_weight_of_zeros_is_exactly_zero():
    cpu = torch.device("cpu")
    assert quantised(48, 66, cpu, torch.float32, zero=True).exact.abs().max() == 0


def test_without_bitsandbytes_the_weight_is_as_large(monkeypatch):
    monkeypatch.setattr("bench.problems.installed", lambda package: False)
    cpu = torch.device("cpu")
    made = quantised.__wrapped__(256, 128, cpu, torch.float32)
    assert made.layer is None
    assert made.exact.std() * 128**0.5 == pytest.approx(0.7, abs=0.4)


def test_a_line_that_broke_off_is_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"kind": "header"}) + '\n{"kind": "ro')
    assert results.lines(path) == [{"kind": "header"}]


def test_a_slug_is_a_folder_name():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("../ü") == "unknown"
