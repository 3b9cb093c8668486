"""What the name of a kernel alone tells, for names of many makers (kernel_names.txt)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from peftprof.breakdowns import CATEGORIES
from peftprof.trace import rules
from peftprof.trace.events import NONE

TABLE = Path(__file__).with_name("kernel_names.txt")


def table() -> Iterator[tuple[str, str, str]]:
    """Maker, category and name of each line."""
    maker = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            maker = line.strip("[]")
        elif line and not line.startswith("#"):
            category, name = line.split(" ", 1)
            yield maker, category, name


def category_of(name: str) -> str:
    ruleset = rules.load()
    found = ruleset.category_of[rules.match(ruleset.kernels, [(name, "")]).rule[0]]
    return "none" if found == NONE else CATEGORIES[found]


@pytest.mark.parametrize(("maker", "category", "name"), table())
def test_a_kernel_by_its_name(maker: str, category: str, name: str) -> None:
    assert category_of(name) == category, maker
