"""Small measurements, for the tests beside this."""

from pathlib import Path

from peftprof.run import inference
from peftprof.run.serving import checks
from peftprof.run.serving.settle import Asked, settle, tokens_of, with_adapter

SMALL = {
    "device": "cpu",
    "precision": "fp32",
    "batch_sizes": (1, 2),
    "lengths": (8,),
    "requests": 4,
}


class Silent:
    def begin(self, what, total): ...

    def done(self, figures): ...


def measure(out: Path, **settings):
    settings = {"profiler": "none", **SMALL, "out": out, **settings}
    return inference.infer(Asked(**settings), ["infer"], Silent())


def ready(asked: Asked):
    """The variants of `asked`, built, and ids to give them."""
    settled = with_adapter(settle(asked))
    tokens = tokens_of(settled)
    compared = checks.build_and_compare(settled.served, settled.variants, tokens, 16)
    return settled, compared, tokens
