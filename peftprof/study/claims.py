"""The paper's claims, each a function from a study's results to a verdict.

A claim holds where the whole 95 % interval is on its side, fails where the whole interval is
on the other, and is not testable here where the interval has both sides in it or nothing was
measured. docs/study.md says each rule in words.
"""

from peftprof.studies import Judged, Study
from peftprof.study import claims_of_memory, claims_of_time, estimates
from peftprof.study.evidence import Claim, Results

CLAIMS: tuple[Claim, ...] = (*claims_of_time.CLAIMS, *claims_of_memory.CLAIMS)


def judge(study: Study) -> Judged:
    """Everything that follows from a study's results."""
    results = Results(study)
    return Judged(
        study=study,
        accuracy=results.accuracy,
        throughput=results.throughput,
        memory=results.memory,
        step_ms=estimates.step_times(study),
        comparisons=estimates.comparisons(study),
        ladder=results.ladder,
        verdicts=tuple(
            claim.judge(results)
            for claim in sorted(CLAIMS, key=lambda claim: int(claim.id.removeprefix("C")))
        ),
    )
