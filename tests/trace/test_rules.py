"""A user's own rules, before those that come with peftprof."""

from pathlib import Path

import pytest

from peftprof.errors import ConfigError
from peftprof.trace import load, rules
from tests.trace.build import Trace


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def trace_of(folder: Path) -> Path:
    trace = Trace()
    trace.range("epoch 3 of mine", 0, 1000)
    trace.op("mylib::magic", 0, 600)
    trace.op("aten::mm", 600, 900)
    return trace.write(folder)


def test_rules_of_a_user_come_first_and_are_named(tmp_path: Path) -> None:
    mine = rules.load(
        write(
            tmp_path,
            """
            steps = ['epoch \\d+ of mine']
            [[operator]]
            name = "magic"
            match = "mylib::.*"
            category = "dequant"
            [[operator]]
            match = "aten::mm"
            category = "adapter_gemm"
            """,
        )
    )
    (found,) = load([trace_of(tmp_path)], ruleset=mine).breakdowns
    assert found.steps_by == "epoch 3 of mine"
    placed = {row.category: [(p.rule, p.share) for p in row.rules] for row in found.rows}
    assert placed == {
        "dequant": [("your operator: magic", 1.0)],
        "adapter_gemm": [("your operator: 2", 1.0)],
    }
    assert {o.name: o.rule for o in found.operators} == {
        "mylib::magic": "your operator: magic",
        "aten::mm": "your operator: 2",
    }


def test_without_them_what_no_rule_places_says_so(tmp_path: Path) -> None:
    (found,) = load([trace_of(tmp_path)]).breakdowns
    assert [(p.rule, round(p.share, 6)) for p in found.rules] == [
        ("no rule", round(2 / 3, 6)),
        ("operator: products with a weight", round(1 / 3, 6)),
    ]
    assert found.unattributed_ns == 600


def test_every_rule_has_a_name_of_its_own() -> None:
    labels = rules.load().labels
    assert len(set(labels)) == len(labels)
    assert not [label for label in labels if label.split(": ")[-1].isdecimal()]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[kernel]]\nmatch = 'x'", "category"),
        ("[[kernel]]\ncategory = 'dequant'", "match"),
        ("[[kernel]]\nmatch = '('\ncategory = 'dequant'", "unterminated"),
        ("[[kernel]]\nmatch = 7\ncategory = 'dequant'", "mine.toml"),
        ("[[kernel]]\nmatch = 'x'\ncategory = 'magic'", "'magic' is none of dequant"),
        ("[[operator]]\nmatch = 'x'\ncategory = 'dequant'\nreach = 'far'", "far"),
        ("[[range]]\nmatch = 'x'\nphase = 'night'", "'night' is none of data"),
        ("kernel = 3", "mine.toml"),
        ("[[kernels]]\nmatch = 'x'", "'kernels' is no table of rules"),
        ("[[", "mine.toml"),
    ],
)
def test_bad_rules_are_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        rules.load(write(tmp_path, text))
    assert "mine.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_rules_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the rules"):
        rules.load(tmp_path / "none.toml")
