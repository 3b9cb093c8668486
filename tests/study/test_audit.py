"""Trainable parameters of the paper's DistilBERT against its own arithmetic and its tables."""

import pytest

from peftprof.study.audit import PRINTED, audit

RANKS = (4, 8, 16, 32)
HEAD = 768 * 768 + 768 + 768 * 2 + 2  # pre_classifier and classifier: 592,130
PRE_CLASSIFIER = 768 * 768 + 768  # 590,592
ADAPTERS = 6 * 2 * 2 * 768  # six layers, two projections, A and B of 768 each: 18,432 a rank
ALL = 66_955_010
LINEAR = 6 * (4 * 768 * 768 + 2 * 768 * 3072)  # weights that QLoRA stores in four bits


@pytest.fixture(scope="module")
def counted():
    return {(one.method, one.rank): one for one in audit(RANKS)}


@pytest.mark.parametrize("rank", RANKS)
def test_lora_is_its_adapters_and_the_head(counted, rank):
    assert (ADAPTERS, HEAD) == (18_432, 592_130)
    found = counted["lora", rank]
    assert found.live == found.nominal == found.as_the_paper == 18_432 * rank + 592_130
    assert [(row.what, row.live, row.nominal) for row in found.rows] == [
        ("adapters", 18_432 * rank, 18_432 * rank),
        ("pre_classifier", PRE_CLASSIFIER, PRE_CLASSIFIER),
        ("classifier", 1_538, 1_538),
    ]
    assert found.duplicated == found.without_gradient == 0


@pytest.mark.parametrize("rank", RANKS)
def test_the_papers_qlora_counts_a_layer_of_the_head_twice(counted, rank):
    lora, found = counted["lora", rank], counted["qlora", rank]
    assert found.live == found.nominal == lora.live
    assert found.as_the_paper - found.live == 590_592
    assert found.duplicated == found.without_gradient == 590_592
    assert found.as_the_paper == 18_432 * rank + 1_182_722


@pytest.mark.parametrize(("method", "rank"), list(PRINTED))
def test_rounded_it_is_what_the_paper_prints(counted, method, rank):
    found = counted[method, rank]
    assert found.printed == PRINTED[method, rank]
    # Two decimals of a million; the paper cuts some and rounds others.
    assert abs(found.as_the_paper - found.printed) <= 10_000
    assert f"{found.as_the_paper / 1e6:.2f}" == f"{found.printed / 1e6:.2f}"


def test_totals_are_of_the_whole_model_with_what_was_added(counted):
    for (method, rank), found in counted.items():
        # PEFT's copy of the head is beside the original.
        assert found.total == ALL + 18_432 * rank + HEAD
        packed = found.total - (LINEAR - LINEAR // 2 if method == "qlora" else 0)
        assert found.packed_total == packed
        assert found.live == sum(row.live for row in found.rows)


def test_ranks_that_do_not_fit_are_left_out_and_others_have_no_printed_figure():
    assert audit([]) == ()
    assert audit([0, 769]) == ()
    found = audit([1])
    assert [(one.method, one.rank, one.printed) for one in found] == [
        ("lora", 1, 0),
        ("qlora", 1, 0),
    ]
    assert found[0].live == 18_432 + 592_130
