"""NVTX ranges in exports of nsys: ours, and those that PyTorch's emit_nvtx writes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftprof.trace import nsys_names
from peftprof.trace.events import NONE, Kind
from tests.trace.build import ENGINE, MAIN
from tests.trace.nsys_files import Nsys, global_tid, one, rows, small


def test_ranges_that_were_not_closed_or_changed_the_thread_are_left_out(tmp_path: Path) -> None:
    file = small()
    file.range("never closed", 1500, None)
    file.range("moved", 1500, 2500, eventType=60, endGlobalTid=global_tid(ENGINE))
    file.range("stayed", 1600, 2600, eventType=60, endGlobalTid=global_tid(MAIN))
    file.range("stayed too", 1700, 2600, eventType=60)
    file.range("a mark", 1800, None, eventType=34)
    file.range("a domain", 0, None, eventType=75)
    names = [name for name, *_ in rows(one(file.write(tmp_path)), Kind.RANGE)]
    assert names == ["step:0", "stayed", "stayed too"]


def test_a_range_beside_the_registered_ones_may_have_text(tmp_path: Path) -> None:
    file = small(registered=True)
    file.add(
        "NVTX_EVENTS", start=1200, end=1300, eventType=59, globalTid=global_tid(MAIN), text="inline"
    )
    names = [name for name, *_ in rows(one(file.write(tmp_path)), Kind.RANGE)]
    assert names == ["step:0", "inline"]


SAID = [
    ("aten::mm", Kind.OPERATOR, "aten::mm", NONE, False, ""),
    ("aten::mm, op_id = 7", Kind.OPERATOR, "aten::mm", NONE, False, ""),
    (
        "aten::addmm, seq = 12, op_id = 3, sizes = [[8, 16], [16, 4], []], "
        "input_op_ids = [(2,0), (1,0)]",
        Kind.OPERATOR, "aten::addmm", 12, False, "[[8, 16], [16, 4], []]",
    ),
    ("aten::addmm, seq = 12, sizes = [[8, 16], [16", Kind.OPERATOR, "aten::addmm", 12, False, ""),
    ("bnb::gemv_4bit, op_id = 9", Kind.OPERATOR, "bnb::gemv_4bit", NONE, False, ""),
    ("MatMul4Bit, seq = 4", Kind.OPERATOR, "MatMul4Bit", 4, False, ""),
    ("MatMul4BitBackward, seq = 4", Kind.OPERATOR, "MatMul4BitBackward", 4, True, ""),
    ("AddmmBackward0", Kind.OPERATOR, "AddmmBackward0", NONE, True, ""),
    (
        "autograd::engine::evaluate_function: AddmmBackward0, seq = 12, op_id = 40",
        Kind.OPERATOR, "autograd::engine::evaluate_function: AddmmBackward0", 12, True, "",
    ),
    ("step:3", Kind.RANGE, "step:3", NONE, False, ""),
    ("step:3, op_id = 5", Kind.RANGE, "step:3", NONE, False, ""),
    ("layer:model::x", Kind.RANGE, "layer:model::x", NONE, False, ""),
    ("Optimizer.step#SGD, op_id = 5", Kind.RANGE, "Optimizer.step#SGD", NONE, False, ""),
    ("ProfilerStep#2", Kind.RANGE, "ProfilerStep#2", NONE, False, ""),
    ("loss, sizes = small", Kind.RANGE, "loss, sizes = small", NONE, False, ""),
    ("my::region", Kind.RANGE, "my::region", NONE, False, ""),
    ("a, seq = 99999999999999999999", Kind.RANGE, "a, seq = 99999999999999999999", NONE, False, ""),
    ("", Kind.RANGE, "", NONE, False, ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "name", "sequence", "backward", "shapes"), SAID)
def test_what_a_text_means(
    text: str, kind: Kind, name: str, sequence: int, backward: bool, shapes: str
) -> None:
    assert nsys_names.meaning(text) == nsys_names.Meaning(kind, name, sequence, backward, shapes)


@given(st.text() | st.text("[]0, sqizeopdn=:a").map(lambda text: "aten::mm, seq = 1" + text))
def test_any_text_means_something(text: str) -> None:
    found = nsys_names.meaning(text)
    assert text.startswith(found.name)
    assert found.kind in (Kind.RANGE, Kind.OPERATOR)


@pytest.mark.parametrize("registered", [False, True])
def test_operators_of_emit_nvtx_are_linked_and_have_shapes(
    tmp_path: Path, registered: bool
) -> None:
    file = Nsys(registered=registered)
    sizes = "sizes = [[8, 16], [16, 4]]"
    file.range("aten::t, seq = 12, op_id = 1, sizes = [[4, 16]]", 0, 50)
    file.range(f"aten::mm, seq = 12, op_id = 2, {sizes}, input_op_ids = [(1,0)]", 100, 200)
    file.range("autograd::engine::evaluate_function: MmBackward0, seq = 12", 300, 500, ENGINE)
    file.range("MmBackward0, seq = 12, op_id = 5", 310, 480, ENGINE)
    file.range("aten::mm, op_id = 6", 320, 400, ENGINE)
    events = one(file.write(tmp_path))
    found = {
        (events.named(row), int(events.start[row])): (
            events.signatures[events.operands[row]].dims if events.operands[row] != NONE else "",
            int(events.start[events.forward[row]]) if events.forward[row] != NONE else NONE,
        )
        for row in range(len(events))
    }
    assert set(events.kind.tolist()) == {Kind.OPERATOR}
    assert found == {
        ("aten::t", 0): ("[[4, 16]]", NONE),
        ("aten::mm", 100): ("[[8, 16], [16, 4]]", NONE),
        ("autograd::engine::evaluate_function: MmBackward0", 300): ("", 100),
        ("MmBackward0", 310): ("", 100),
        ("aten::mm", 320): ("", NONE),
    }
