import json

import pytest

from peftprof.records import Accuracy, Memory, RunRecord, decode, encode

RECORD = RunRecord(
    version=1,
    name="a",
    state="complete",
    created="2026-01-01T00:00:00+00:00",
    command=("train",),
    config={"rank": 8},
    environment={},
    accuracy=Accuracy(3, 4, 0.75, 0.3, 0.95, 0.5),
    memory=Memory(None, None, None, 7, {"nvml": "no GPU"}),
)


def test_a_record_survives_json():
    assert decode(RunRecord, json.loads(json.dumps(encode(RECORD)))) == RECORD


def test_fields_of_a_newer_version_are_passed_over():
    newer = json.loads(json.dumps(encode(RECORD))) | {"weather": "fine"}
    assert decode(RunRecord, newer) == RECORD


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        3,
        {},
        {"version": "1"},
        encode(RECORD) | {"accuracy": {"correct": 1}},
        encode(RECORD) | {"config": []},
        encode(RECORD) | {"environment": "abc"},
        encode(RECORD) | {"command": "abc"},
    ],
)
def test_what_is_no_record_is_refused(value):
    with pytest.raises((ValueError, TypeError, KeyError)):
        decode(RunRecord, value)
