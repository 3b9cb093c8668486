import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from peftprof_kernels import lora_linear, set_listener, span
from tests.kernels.nf4_weights import DEVICE, random_weight


@pytest.fixture
def heard() -> Iterator[list[tuple[str, int]]]:
    """(name, thread) of each range that was opened and closed."""
    ranges: list[tuple[str, int]] = []

    @contextmanager
    def listener(name: str) -> Iterator[None]:
        yield
        ranges.append((name, threading.get_ident()))

    before = set_listener(listener)
    yield ranges
    set_listener(before)


def test_silence_costs_no_object() -> None:
    assert span("op:dequant") is span("op:lora_A")


def test_a_listener_hears_until_it_is_removed(heard: list[tuple[str, int]]) -> None:
    with span("one"):
        pass
    listener = set_listener(None)
    with span("two"):
        pass
    set_listener(listener)
    assert [name for name, _ in heard] == ["one"]


BACKWARD = {
    "torch": {"op:lora_dB", "op:lora_dA", "op:dequant", "op:base_gemm", "op:lora_dx"},
    "triton": {"op:lora_dB", "op:lora_dA", "op:dequant", "op:base_gemm"},
}


@pytest.mark.parametrize("backend", BACKWARD)
def test_each_piece_of_work_is_in_its_range(heard: list[tuple[str, int]], backend: str) -> None:
    shapes = ((40, 64), (2, 64), (8, 2))
    x, A, B = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    weight = random_weight(8, 64)
    y = lora_linear(x, weight, None, A, B, 2.0, p=0.1, training=True, backend=backend)
    assert [name for name, _ in heard] == ["op:dequant", "op:base_gemm", "op:lora_A", "op:lora_B"]
    heard.clear()
    # On another thread, as the backward of a GPU graph is.
    worker = threading.Thread(target=lambda: y.sum().backward())
    worker.start()
    worker.join()
    names = [name for name, _ in heard]
    assert set(names) == BACKWARD[backend]
    assert {thread for _, thread in heard} != {threading.get_ident()}


def test_nothing_is_opened_while_a_graph_is_traced(heard: list[tuple[str, int]]) -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        with span("op:lora_A"):
            return x + 1

    compiled = torch.compile(work, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert heard == []
