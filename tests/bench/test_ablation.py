"""A variant switches something off that exists, and a run of one is measured."""

import json
import subprocess
import sys

import pytest

from bench import ablation


@pytest.mark.slow
@pytest.mark.parametrize("variant", [ablation.ALL, "dequantised by library operations"])
def test_a_variant_runs(variant):
    settings = {
        "method": "full" if variant.startswith("clipping") else "qlora",
        "precision": "fp32",
        "batch_size": 2,
        "max_steps": 6,
        "profiler": "none",
        "device": "cpu",
    }
    command = [sys.executable, "-W", "ignore", "-m", "bench.ablation", "--child"]
    done = subprocess.run(
        [*command, json.dumps([variant, settings])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["p50_ms"] > 0


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
