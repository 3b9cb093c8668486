"""A variant switches something off that exists, and a run of one is measured."""

import sys

import pytest

from bench import ablation

SETTINGS = {
    "method": "qlora",
    "precision": "fp32",
    "batch_size": 2,
    "max_steps": 7,
    "profiler": "none",
    "device": "cpu",
}


@pytest.mark.slow
def test_a_variant_is_measured_step_by_step():
    """Against a worker with all on: all on against itself is two of those."""
    variant = "dequantised by library operations"
    assert variant in ablation.applicable(SETTINGS, None)
    ratios = ablation.measure(variant, SETTINGS)
    assert len(ratios) == 2
    assert all(ratio > 0 for ratio in ratios)


def test_a_run_that_ends_is_told_and_not_waited_for():
    with (
        ablation.Worker(ablation.ALL, SETTINGS | {"method": "none"}) as worker,
        pytest.raises(RuntimeError, match="all on"),
    ):
        worker.step()


def test_only_what_applies_and_was_asked_for():
    full = ablation.applicable(SETTINGS | {"method": "full"}, None)
    assert "each adapter by itself" not in full
    assert "clipping as a pass of its own" in full
    assert "any number of tokens" not in full  # fp32
    assert ablation.applicable(SETTINGS, ["padded batches"]) == ["padded batches"]


def test_what_a_variant_replaces_is_there():
    """A renamed function would leave the saving on, and its worth would read as nothing."""
    from peftprof.run import adapters, batches, frugal, loop, narrow, packing
    from peftprof_kernels import dropout  # noqa: F401

    assert hasattr(batches, "grouped")
    assert hasattr(frugal, "dropout")
    assert hasattr(frugal, "_round_frozen")
    assert hasattr(packing, "BUCKET")
    assert hasattr(adapters, "SHARE_INPUT")
    assert hasattr(adapters, "_use_native_dequantise")
    assert hasattr(loop.Trainee, "_update")
    assert hasattr(sys.modules["peftprof_kernels.dropout"], "random_bytes")
    assert hasattr(packing, "_first_tokens")
    assert hasattr(narrow, "prepare")
