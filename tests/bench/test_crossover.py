"""Crossovers from made-up timings; what a GPU would say is made up too."""

import io

import pytest
import torch
from rich.console import Console

from bench import crossover, nf4_linear, options, results
from bench.harness import Case, Prepared, Provider, Quantiles, Ratio, Row, on_cpu
from bench.layers import Layer
from bench.options import Setup
from bench.work import Work
from peftprof.run import crossovers
from peftprof_kernels.crossover import read_crossovers


def fused(verdict_ratio: float, status: str = "timed") -> list[Row]:
    ratio = Ratio("ours-two-step", verdict_ratio, verdict_ratio, verdict_ratio, 1.02)
    ms = Quantiles(1, 1, 1, 3)
    return [
        Row({}, "ours-two-step", "timed", ms=ms),
        Row({}, "ours-fused", status, ms=ms, ratio=ratio if status == "timed" else None),
    ]


def test_a_crossover_is_the_last_of_the_wins_from_the_start():
    assert crossover.limit({1: True, 2: True, 4: False, 8: True}) == 2
    assert crossover.limit({1: False, 2: True}) == 0
    assert crossover.limit({4: True, 1: True, 2: True}) == 4
    assert crossover.limit({}) == 0


def test_a_win_is_beyond_the_self_pair_and_right():
    assert crossover.is_win(fused(1.5))
    assert not crossover.is_win(fused(1.01))
    assert not crossover.is_win(fused(0.7))
    assert not crossover.is_win(fused(1.5, status="wrong"))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """`measured(quick, seconds)`: what a run of two shapes found, and the lines it left.

    The fused kernel takes a millisecond a row, half of it for dX, and the other way 20.
    """
    now = [0.0]

    def provider(name: str, ms: float) -> Provider:
        def run() -> None:
            now[0] += ms / 1e3

        return Provider(name, lambda: Prepared(run, lambda: 0.0))

    def build(setup, key):
        ms = key["M"] if key["direction"] == "forward" else key["M"] / 2
        providers = [provider("dense", 1), provider("ours-fused", ms)]
        return Case(key, Work(1, 1), [*providers, provider("ours-two-step", 20)])

    def go(quick: bool, seconds: float | None = None):
        monkeypatch.setattr(nf4_linear, "build", build)
        monkeypatch.setattr(options, "sampler_for", lambda device, l2: on_cpu(lambda: now[0]))
        shapes = (Layer("a", 64, 32), Layer("the same", 64, 32), Layer("b", 32, 64))
        cpu, tokens = torch.device("cpu"), (1, 2, 4, 8, 16, 32, 64, 128)
        setup = Setup(
            cpu, torch.float32, quick, shapes, tokens, "cold", False, False, seconds, tmp_path
        )
        path = tmp_path / "crossover.jsonl"
        with path.open("w") as file:
            found, _ = crossover.run(setup, file, Console(file=io.StringIO()))
        return found, results.lines(path)

    return go


@pytest.mark.parametrize("quick", [False, True])
def test_each_shape_is_measured_once_and_each_direction_apart(measured, quick):
    found, lines = measured(quick)
    assert found == [(64, 32, 16, 32), (32, 64, 16, 32)]
    rows = [line for line in lines if line["kind"] == "row"]
    assert {row["provider"] for row in rows} == {"ours-two-step", "ours-fused"}
    largest = max(row["case"]["M"] for row in rows)
    assert largest == (64 if quick else 128)  # quick stops at the first that is no win
    assert lines[-1]["done"] == lines[-1]["planned"] == 2


def test_a_shape_that_was_not_finished_is_left_out(measured):
    found, lines = measured(True, seconds=0)
    assert found == []
    assert lines[-1]["cut_short"]


def test_the_table_is_stored_where_the_backend_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card 9000")
    crossover.store(torch.device("cuda"), [crossover.Found(64, 32, 16, 0)])
    [entry] = read_crossovers(crossovers.path_for("A Card 9000"))
    assert (entry.N, entry.K, entry.forward_max_m, entry.dx_max_m) == (64, 32, 16, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys):
    assert crossover.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("bench.crossover: needs a GPU, and ")
    assert said.err.count("\n") == 1
