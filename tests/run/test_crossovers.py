"""The table of crossovers of this GPU: where it lies, and what a damaged one says."""

import json

import pytest
import torch

from peftprof.errors import InputError
from peftprof.run import crossovers
from peftprof_kernels.crossover import (
    DEFAULT_MAX_M,
    Crossover,
    lookup,
    set_crossovers,
    write_crossovers,
)

GPU = torch.device("cuda")
TABLE = [Crossover(768, 768, 32, 8), Crossover(4096, 1024, 64, 0)]


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A GPU by name alone, with an empty cache: where its table would lie."""
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    before = set_crossovers(None)
    yield crossovers.path_for("NVIDIA H100 80GB HBM3")
    set_crossovers(before)


def test_the_file_is_in_the_cache_and_bears_the_devices_name(card, tmp_path):
    assert card == tmp_path / "cache" / "crossovers" / "nvidia-h100-80gb-hbm3.json"
    for name, slug in (
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("Quadro K1/2..\\x (TM) ", "quadro-k1-2-x-tm"),  # nothing that leaves the folder
        ("../../etc/passwd", "etc-passwd"),
    ):
        assert crossovers.path_for(name) == card.with_name(f"{slug}.json")


def test_a_cpu_has_none_and_is_not_asked_for_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked"))
    assert crossovers.stored(torch.device("cpu")) is None


def test_what_was_stored_is_used(card):
    assert crossovers.stored(GPU) is None  # nothing measured yet
    crossovers.use_stored(GPU)
    assert lookup(768, 768).forward_max_m == DEFAULT_MAX_M
    write_crossovers(card, "NVIDIA H100 80GB HBM3", TABLE, {"torch": torch.__version__})
    assert crossovers.stored(GPU) == TABLE
    crossovers.use_stored(GPU)
    assert lookup(768, 768) == TABLE[0]
    # A run on a CPU afterwards does not go by the GPU's table.
    crossovers.use_stored(torch.device("cpu"))
    assert lookup(768, 768).forward_max_m == DEFAULT_MAX_M


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b'{"device": "x"}',
        b'{"crossovers": 3}',
        b'{"crossovers": {"N": 1}}',
        b'{"crossovers": [{"N": 1}]}',
        json.dumps({"crossovers": [{"N": 0, "K": 1, "forward_max_m": 1, "dx_max_m": 1}]}).encode(),
    ],
)
def test_a_damaged_file_is_named(content, card):
    card.parent.mkdir(parents=True)
    card.write_bytes(content)
    with pytest.raises(InputError) as raised:
        crossovers.stored(GPU)
    assert str(card) in str(raised.value)
    assert "python -m bench.crossover" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(card):
    card.mkdir(parents=True)  # a folder in its place
    with pytest.raises(InputError, match="cannot be used") as raised:
        crossovers.use_stored(GPU)
    assert str(card) in str(raised.value)
