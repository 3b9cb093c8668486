"""Ranges are heard by both listeners, balance whatever happens, and cost nothing when off."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from peftprof import annotate
from tests.nvtx import Event, build_recorder, check_nesting, read_record, recording


@pytest.fixture(autouse=True)
def off():
    yield
    annotate.disable()
    assert annotate._open.ranges == []


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Path:
    return build_recorder(tmp_path_factory.mktemp("recorder"))


def hear(recorder: Path, folder: Path, script: str) -> list[Event]:
    """The NVTX calls of a Python script, which must succeed."""
    record = folder / "record"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        env=recording(recorder, record),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return read_record(record)


def seen(body) -> list[tuple[str, ...]]:
    """Ranges that record_function heard while `body` ran, each with those enclosing it."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        body()
    paths = []
    for event in profiler.events():
        path, at = [], event
        while at is not None:
            if at.name.partition(":")[0] in annotate.CATEGORIES and "::" not in at.name:
                path.append(at.name)
            at = at.cpu_parent
        if path and path[0] == event.name:
            paths.append(tuple(reversed(path)))
    return paths


SCRIPT = """
    import torch
    from peftprof import annotate

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with annotate.op("lora_A"):
                return 2 * x

        @staticmethod
        def backward(ctx, dy):
            with annotate.op("lora_dA"):
                return 2 * dy

    class Layer(torch.nn.Module):
        def forward(self, x):
            return Twice.apply(x)

    model = torch.nn.Sequential(Layer(), Layer())
    with annotate.step(99):
        pass
    ranges = {layer: f"layer:model.{i}" for i, layer in enumerate(model)}
    with annotate.enabled(), annotate.hooks(ranges):
        for n in range(2):
            with annotate.step(n):
                with annotate.phase("data"):
                    x = torch.ones(3, requires_grad=True)
                with annotate.phase("forward"):
                    loss = model(x).sum()
                with annotate.phase("backward"):
                    loss.backward()
    with annotate.step(98):
        model(x)
"""


def test_a_step_is_heard_through_nvtx(recorder, tmp_path):
    events = hear(recorder, tmp_path, SCRIPT)
    assert [e.domain for e in events if e.kind == "domain"] == ["peftprof"]
    assert {e.category for e in events if e.kind == "category"} == set(annotate.CATEGORIES)
    expected = []
    for n in range(2):
        step = f"step:{n}"
        expected += [(step,), (step, "phase:data"), (step, "phase:forward")]
        for layer in ("layer:model.0", "layer:model.1"):
            expected += [
                (step, "phase:forward", layer),
                (step, "phase:forward", layer, "op:lora_A"),
            ]
        expected += [(step, "phase:backward")]
        expected += 2 * [(step, "phase:backward", "op:lora_dA")]
    assert check_nesting(events) == expected
    # A message is registered once, however often it is pushed.
    strings = [e.message for e in events if e.kind == "string"]
    assert len(strings) == len(set(strings)) == len({path[-1] for path in expected})


def test_ranges_of_another_thread_are_its_own(recorder, tmp_path):
    awkward = 'op:a "b"\\c\td é'
    events = hear(
        recorder,
        tmp_path,
        f"""
        import threading
        from peftprof import annotate

        def work():
            with annotate.op("lora_dB"):
                with annotate.range({awkward!r}):
                    pass

        with annotate.enabled(), annotate.step(0), annotate.phase("backward"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        """,
    )
    assert ("op:lora_dB", awkward) in check_nesting(events)
    threads = {e.message: e.tid for e in events if e.kind == "push"}
    assert threads["step:0"] == threads["phase:backward"] != threads[awkward]


def test_nvtx_balances_after_exceptions(recorder, tmp_path):
    events = hear(
        recorder,
        tmp_path,
        """
        import torch
        from peftprof import annotate

        class Failing(torch.nn.Module):
            def forward(self, error):
                annotate.op("leaked").__enter__()
                raise error

        model = torch.nn.Sequential(Failing())
        with annotate.enabled(), annotate.hooks({model[0]: "layer:model.0"}):
            for n, error in enumerate((ValueError(), KeyboardInterrupt())):
                try:
                    with annotate.step(n), annotate.phase("forward"):
                        model(error)
                except (ValueError, KeyboardInterrupt):
                    pass
        """,
    )
    paths = check_nesting(events)
    for n in range(2):
        whole = (f"step:{n}", "phase:forward", "layer:model.0", "op:leaked")
        assert [p for p in paths if p[0] == f"step:{n}"] == [whole[: i + 1] for i in range(4)]


def test_the_checker_refuses_what_is_wrong():
    def event(kind: str, name: str | None = None, tid: int = 1) -> Event:
        category = name.partition(":")[0] if name else None
        return Event(kind, 1, tid, 0, "peftprof", category, name)

    step, phase, pop = event("push", "step:0"), event("push", "phase:forward"), event("pop")
    assert check_nesting([step, phase, pop, pop]) == [("step:0",), ("step:0", "phase:forward")]
    with pytest.raises(AssertionError, match="never popped"):
        check_nesting([step])
    with pytest.raises(AssertionError, match="has not pushed"):
        check_nesting([step, event("pop", tid=2)])
    with pytest.raises(AssertionError, match="step:0 inside phase:forward"):
        check_nesting([phase, step, pop, pop])


def test_record_function_hears_the_same_names():
    model = torch.nn.Linear(2, 2)

    def body():
        on = annotate.enabled(), annotate.hooks({model: "layer:head"})
        with on[0], on[1], annotate.step(7), annotate.phase("forward"):
            model(torch.ones(1, 2))
            with annotate.range("op:loss"):
                pass
        with annotate.step(8):
            pass

    step, phase = "step:7", "phase:forward"
    assert sorted(seen(body)) == [
        (step,),
        (step, phase),
        (step, phase, "layer:head"),
        (step, phase, "op:loss"),
    ]


def test_off_is_shared_and_state_is_restored():
    assert annotate.op("dequant") is annotate.step(1) is annotate.range("op:loss")
    with annotate.enabled():
        with annotate.enabled():
            pass
        assert annotate.op("dequant") is not annotate.op("dequant")
    assert annotate.op("dequant") is annotate.step(1)
    with pytest.raises(ZeroDivisionError), annotate.enabled():
        raise ZeroDivisionError
    assert annotate.op("dequant") is annotate.step(1)


def test_a_range_open_at_disable_still_closes():
    annotate.enable()
    with annotate.op("dequant"):
        annotate.disable()
    assert annotate._open.ranges == []


def test_an_unknown_category_is_refused_before_anything_opens():
    annotate.enable()
    for name in ("dequant", "kernel:dequant", "step"):
        with pytest.raises(ValueError, match="must begin with step: or phase: or layer: or op:"):
            annotate.range(name)
    with pytest.raises(ValueError, match="must begin with"):  # noqa: SIM117
        with annotate.hooks({torch.nn.ReLU(): "layer:fine", torch.nn.ReLU(): "relu"}):
            pass


def hook_count(module: torch.nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def test_hooks_are_removed_and_absent_when_off():
    model = torch.nn.Linear(2, 2)
    with annotate.hooks({model: "layer:head"}):
        assert hook_count(model) == 0
    annotate.enable()
    with contextlib.suppress(ZeroDivisionError), annotate.hooks({model: "layer:head"}):
        assert hook_count(model) == 2
        raise ZeroDivisionError
    assert hook_count(model) == 0
    assert not model._forward_hooks_always_called


@pytest.mark.parametrize("place", ["pre-hook", "forward", "hook"])
def test_hooks_balance_wherever_the_module_raises(place):
    class Raising(torch.nn.Module):
        def forward(self, x):
            if place == "forward":
                raise ZeroDivisionError
            return x

    def fail(*_):
        raise ZeroDivisionError

    model = Raising()
    if place == "pre-hook":
        model.register_forward_pre_hook(fail)
    if place == "hook":
        model.register_forward_hook(fail)
    annotate.enable()
    with annotate.hooks({model: "layer:0"}), annotate.phase("forward"):
        with contextlib.suppress(ZeroDivisionError):
            model(torch.ones(1))
        assert [r._name for r in annotate._open.ranges] == ["phase:forward"]


def test_hooks_leave_results_alone_and_follow_recursion():
    class Down(torch.nn.Module):
        def forward(self, x, depth=2):
            return self(x + 1, depth=depth - 1) if depth else x

    model = Down()

    def body():
        with annotate.enabled(), annotate.hooks({model: "op:down"}):
            assert model(torch.zeros(1)).item() == 2

    name = "op:down"
    assert sorted(seen(body)) == [(name,), (name, name), (name, name, name)]


def test_a_modules_other_hooks_are_inside_its_range():
    model = torch.nn.Linear(2, 2)

    def work(*_):
        with annotate.op("dequant"):
            pass

    model.register_forward_pre_hook(work)
    model.register_forward_hook(work)

    def body():
        with annotate.enabled(), annotate.hooks({model: "layer:0"}):
            model(torch.ones(1, 2))

    assert sorted(seen(body)) == [("layer:0",), *2 * [("layer:0", "op:dequant")]]


def test_checkpointed_layers_are_annotated_again_in_backward():
    from torch.utils.checkpoint import checkpoint

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())

    def body():
        with annotate.enabled(), annotate.hooks({model: "layer:0"}):
            x = torch.ones(1, 2, requires_grad=True)
            with annotate.phase("forward"):
                y = checkpoint(model, x, use_reentrant=False)
            with annotate.phase("backward"):
                y.sum().backward()

    assert ("phase:forward", "layer:0") in (paths := seen(body))
    assert ("phase:backward", "layer:0") in paths


def test_nothing_is_annotated_while_torch_compile_traces():
    model = torch.nn.Linear(2, 2)

    def forward(x):
        with annotate.op("loss"), annotate.range("op:attention"):
            return model(x).sum()

    expected = forward(torch.ones(1, 2))
    with annotate.enabled(), annotate.hooks({model: "layer:0"}):
        # fullgraph: a graph break would raise.
        compiled = torch.compile(forward, fullgraph=True, backend="eager")
        compiled(torch.ones(1, 2))
        assert seen(lambda: compiled(torch.ones(1, 2))) == []
        assert torch.equal(compiled(torch.ones(1, 2)), expected)
    torch._dynamo.reset()


def test_threads_do_not_see_each_others_ranges():
    annotate.enable()
    inside: list[int] = []
    with annotate.step(0):
        thread = threading.Thread(target=lambda: inside.append(len(annotate._open.ranges)))
        thread.start()
        thread.join()
    assert inside == [0]


def test_importing_it_imports_no_torch_and_no_nvtx():
    code = (
        "import sys, json; from peftprof import annotate; "
        "annotate.op('dequant').__enter__(); "
        "print(json.dumps([m for m in ('torch', 'nvtx') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(out.stdout) == []


def test_without_the_package_nvtx_record_function_remains(tmp_path):
    # As on macOS, where there is none; a module of None in sys.modules cannot be imported.
    code = """
import sys
sys.modules["nvtx"] = None
import torch
from peftprof import annotate
with torch.profiler.profile(acc_events=True) as profiler, annotate.enabled():
    with annotate.op("dequant"):
        pass
assert "op:dequant" in {e.name for e in profiler.events()}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
