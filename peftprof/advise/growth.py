"""What a quantity of a traced step grows with: the batch, the rank, the tokens of an example.

A step is traced with a batch b0, a rank r0 and a length t0 that are primes and divide no other
size of the model. So a number of bytes or of operations says by itself what it is a multiple
of: b^i r^j t^k times a constant, with i and j 0 or 1 and k up to 2 (attention scores are
[.., t, t]), and no second trace is needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from peftprof.errors import ConfigError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PRIMES: Final = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)
TERMS: Final = 12  # products b^i r^j t^k, of which number 6 i + 3 j + k


@dataclass(frozen=True)
class Markers:
    """The primes that a step is traced with; `rank` is 0 where nothing depends on a rank."""

    batch: int
    rank: int
    tokens: int

    def term(self, amount: int) -> tuple[float, int]:
        """`amount` as a coefficient, and the number of the product that it grows with."""
        if amount == 0:
            return 0.0, 0
        divisor, term = 1, 0
        if amount % self.batch == 0:
            divisor, term = self.batch, 6
        if self.rank and amount % self.rank == 0:
            divisor, term = divisor * self.rank, term + 3
        if amount % self.tokens == 0:
            squared = amount % self.tokens**2 == 0
            divisor *= self.tokens ** (1 + squared)
            term += 1 + squared
        return amount / divisor, term

    def spread(self, amounts: Iterable[int]) -> list[float]:
        """The sum of `amounts` as coefficients of all products, [TERMS]."""
        found = [0.0] * TERMS
        for amount in amounts:
            coefficient, term = self.term(amount)
            found[term] += coefficient
        return found


def products(batch: float, rank: float, tokens: float) -> Floats:
    """The products b^i r^j t^k in their order, [TERMS]; `batch` may be a part of an example."""
    of_rank = np.outer([1.0, rank], [1.0, tokens, tokens**2]).ravel()
    return np.outer([1.0, batch], of_rank).ravel()


def markers(sizes: Iterable[int], longest: int | None, ranked: bool) -> Markers:
    """Primes that divide none of `sizes`, that of the length at most `longest`.

    Raises ConfigError where a model is so odd that there are none.
    """
    known = set(sizes)
    free = [prime for prime in PRIMES if all(size % prime for size in known)]
    short = [prime for prime in free if longest is None or prime <= longest]
    if not short or len(free) < 3:
        raise ConfigError(
            "the sizes of this model leave no prime to trace it with; it cannot be predicted"
        )
    tokens = short[-1]
    others = [prime for prime in free if prime != tokens]
    return Markers(others[0], others[1] if ranked else 0, tokens)
