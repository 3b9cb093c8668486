import io

from rich.console import Console

from peftprof.report.progress import LINE_EVERY_S, LineWatcher, LiveWatcher, watcher


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def text(shown: Console) -> str:
    return shown.file.getvalue()


def test_lines_come_now_and_then_and_at_the_end():
    now = 0.0
    shown = console(False)
    lines = LineWatcher(shown, clock=lambda: now)
    lines.begin("training", 100, 0)
    for done in range(10, 101, 10):
        now += LINE_EVERY_S / 2
        lines.steps(done, 0.5, 64.0, 2**30)
    printed = text(shown).splitlines()
    assert printed[0] == "training: 100 steps"
    assert printed[1] == "training: 20/100  loss 0.5000  64.0 samples/s  1024 MiB  40 s left"
    assert printed[-1] == "training: 100/100  loss 0.5000  64.0 samples/s  1024 MiB"
    assert len(printed) == 6
    assert "\x1b" not in text(shown)


def test_a_resumed_pass_estimates_from_its_own_steps():
    now = 0.0
    shown = console(False)
    lines = LineWatcher(shown, clock=lambda: now)
    lines.begin("training", 100, 80)
    now = 20.0
    lines.steps(90, 0.5, 0.0, None)
    assert text(shown).splitlines() == [
        "training: 100 steps, 80 done",
        "training: 90/100  loss 0.5000  20 s left",
    ]


def test_a_terminal_gets_a_bar_and_markup_is_text():
    shown = console(True)
    with watcher(shown) as live:
        assert isinstance(live, LiveWatcher)
        live.begin("training", 4, 0)
        live.steps(4, 0.25, 10.0, None)
        live.say("[bold]not markup[/bold]")
    assert "loss 0.2500" in text(shown)
    assert "4/4" in text(shown)
    assert "[bold]not markup[/bold]" in text(shown)


def test_no_terminal_gets_lines():
    with watcher(console(False)) as plain:
        assert isinstance(plain, LineWatcher)
