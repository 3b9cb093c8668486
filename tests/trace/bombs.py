"""Small files that become large, and depths without end."""

import gzip

from tests.trace.hostile import MIB, ONE, OPEN, Makers, event, trace

hostile = Makers()


def bomb(*parts: tuple[bytes, int]) -> bytes:
    """Each part so many times, packed."""
    return gzip.compress(b"".join(part * times for part, times in parts), compresslevel=6)


@hostile
def spaces() -> bytes:
    return bomb((OPEN, 1), (b" ", 100 * MIB))


@hostile
def spaces_first() -> bytes:
    return bomb((b" ", 100 * MIB), (OPEN + ONE + b"]}", 1))


@hostile
def one_event_a_million_times() -> bytes:
    return bomb((OPEN, 1), (ONE + b",", MIB), (ONE + b"]}", 1))


@hostile
def deep_brackets_packed() -> bytes:
    return bomb((b"[", 100 * MIB))


@hostile
def closing_braces() -> bytes:
    return bomb((OPEN, 1), (b"}", 60 * MIB))


@hostile
def commas_and_braces_in_a_text() -> bytes:
    return bomb((OPEN + b'{"name": "', 1), (b"},{", 20 * MIB))


@hostile
def empty_objects_without_end() -> bytes:
    return bomb((OPEN + b'{"args": [', 1), (b"{},", 20 * MIB))


@hostile
def the_same_in_json_that_is_not_strict() -> bytes:
    return bomb((OPEN + b'{"a": NaN, "args": [', 1), (b"{},", 20 * MIB))


@hostile
def empty_objects_as_events() -> bytes:
    return bomb((OPEN, 1), (b"{},", 8 * MIB), (ONE + b"]}", 1))


@hostile
def lists_in_the_head() -> bytes:
    return bomb(
        (b'{"deviceProperties": [', 1), (b"[],", 9 * MIB), (b"0], " + OPEN[1:] + ONE + b"]}", 1)
    )


@hostile
def lists_in_the_tail() -> bytes:
    return bomb((OPEN + ONE + b'], "x": [', 1), (b"[],", 9 * MIB), (b"0]}", 1))


@hostile
def numbers_in_the_tail() -> bytes:
    return bomb((OPEN + ONE + b'], "deviceProperties": [', 1), (b"1,", 14 * MIB), (b"0]}", 1))


@hostile
def packed_many_times() -> bytes:
    data = OPEN + ONE + b"]}"
    for _ in range(40):
        data = gzip.compress(data)
    return data


@hostile
def empty_members() -> bytes:
    return gzip.compress(b"") * 60_000 + gzip.compress(OPEN + ONE + b"]}")


@hostile
def a_member_for_every_byte() -> bytes:
    return b"".join(
        gzip.compress(bytes([byte])) for byte in (OPEN + (ONE + b",") * 200 + ONE + b"]}")
    )


@hostile
def a_header_of_megabytes() -> bytes:
    packed = gzip.compress(OPEN + ONE + b"]}")
    return packed[:3] + b"\x08" + packed[4:10] + b"n" * (4 * MIB) + b"\0" + packed[10:]


# Depth.


@hostile
def a_million_brackets() -> bytes:
    return OPEN + b"[" * MIB


@hostile
def a_million_brackets_that_close() -> bytes:
    return OPEN + b'{"a":' * 500_000 + b"1" + b"}" * 500_000 + b"]}"


@hostile
def brackets_that_a_lenient_parser_takes() -> bytes:
    deep = b"[" * 960 + b"]" * 960
    fields = (b'"%s": %s' % (key, deep) for key in (b"name", b"cat", b"pid", b"tid", b"ts", b"id"))
    return OPEN + b"{" + b", ".join(fields) + b"}," + ONE.replace(b"{", b'{"x": NaN, ') + b"]}"


@hostile
def ranges_in_ranges() -> bytes:
    return trace(event("aten::mm", i, 400_000 - 2 * i) for i in range(100_000))


@hostile
def ranges_as_deep_as_may_be() -> bytes:
    return trace(event("aten::mm", i, 40_000 - 2 * i) for i in range(9_999))
