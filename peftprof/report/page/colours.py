"""One colour a category, the same in every figure; told apart without seeing red or green.

The two sets were searched for the largest smallest distance (OKLab) between any two of them
as seen with each kind of colour blindness (Machado, Oliveira and Fernandes 2009), one set
on white, one on black. Idle and unattributed are greys: they are no work of a kind.
"""

from peftprof.breakdowns import CATEGORIES
from peftprof.report.page.markup import Html, tag
from peftprof.report.words import label

# category: (on a light page, on a dark one)
COLOURS = {
    "dequant": ("#f5850b", "#f2a849"),
    "base_gemm": ("#6971f9", "#729efe"),
    "adapter_gemm": ("#1f6a98", "#80d1fe"),
    "attention": ("#660c80", "#7d3d89"),
    "elementwise": ("#f6c321", "#f6e959"),
    "embedding": ("#b47eb2", "#90728e"),
    "head_loss": ("#a295ff", "#696bd9"),
    "optimizer": ("#718462", "#446724"),
    "memcpy": ("#775d02", "#c37f20"),
    "communication": ("#57c189", "#b8f4d6"),
    "idle": ("#dcdcd8", "#3d3e42"),
    "unattributed": ("#4c4c4c", "#a4a4a4"),
}
ORDER = (*CATEGORIES, "idle", "unattributed")


def colour_class(category: str) -> str:
    """The CSS class that paints in the colour of `category`."""
    return f"c-{category if category in COLOURS else 'unattributed'}"


def swatch(category: str) -> Html:
    """A small square in the colour of `category`."""
    return tag("i", class_=f"swatch {colour_class(category)}", aria_hidden="true")


def legend(categories: set[str]) -> Html:
    """What each colour means, for the categories named, in their usual order."""
    items = [tag("li", swatch(c), label(c)) for c in ORDER if c in categories]
    return tag("ul", *items, class_="legend")


def css() -> str:
    """The colours as variables for both kinds of page, and the classes that use them."""
    light, dark = (
        "".join(
            f"--{name}:{pair[side]};--on-{name}:{ink(pair[side])};"
            for name, pair in COLOURS.items()
        )
        for side in (0, 1)
    )
    classes = "".join(
        f".c-{name}{{fill:var(--{name});background-color:var(--{name})}}"
        f".on-{name} text{{fill:var(--on-{name})}}"
        for name in COLOURS
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}"


def ink(colour: str) -> str:
    """Black or white, whichever reads better on `colour` (WCAG 2 contrast)."""
    light = luminance(colour)
    return "#000000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#ffffff"


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour `#rrggbb`, 0 to 1."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
