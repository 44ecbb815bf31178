"""Reading logs of many segments: in the order of time, from the end, and by what is looked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from audit_samples import KEY, NEGATIVE, PROMPT, REQUEST, as_objects, resealed, signed_log, write_gated, write_run

from safegen.audit import AuditLog
from safegen.audit.read import Follower, last_lines, lines_in, matching, merged, of_prompt
from safegen.errors import AuditChainError, UsageError


def at(folder: Path, name: str, times: list[int]) -> Path:
    """A segment whose records have these times, in seconds."""
    with AuditLog.open(folder / "made", key=KEY, durable=False) as log:
        for _ in times[2:]:
            write_gated(log)
    objects = as_objects(log.path.read_bytes())
    for item, second in zip(objects, times, strict=True):
        item["ts"] = f"2027-01-05T10:{second // 60:02}:{second % 60:02}.000Z"
        item["event_id"] = f"{name}-{second:04}"
    path = folder / "log" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(resealed(objects))
    return path


def ids(lines: object) -> list[str]:
    return [line.values["event_id"] for line in lines]  # type: ignore[attr-defined]


def test_segments_are_merged_in_the_order_of_time(tmp_path: Path) -> None:
    draw = random.Random(7)
    paths = [at(tmp_path, f"s{k}", sorted(draw.sample(range(900), 3 + k))) for k in range(8)]
    lines = list(merged([tmp_path / "log"]))
    assert len(lines) == sum(3 + k for k in range(8))
    assert ids(lines) == [item for _, item in sorted((line.values["ts"], line.values["event_id"]) for line in lines)]
    assert sorted(line.data for line in lines) == sorted(d for p in paths for d in p.read_bytes().splitlines())
    assert ids(merged([paths[0], *paths[:2]])) == ids(merged(paths[:2]))  # a segment that is named twice comes once
    for count in (1, 5, 1000):
        assert ids(last_lines(tmp_path / "log", count)) == ids(lines)[-count:]


def test_a_clock_that_went_back_keeps_the_order_of_its_segment(tmp_path: Path) -> None:
    at(tmp_path, "a", [10, 40, 20, 50])
    at(tmp_path, "b", [15, 30, 45])
    assert ids(merged([tmp_path / "log"])) == ["a-0010", "b-0015", "b-0030", "a-0040", "a-0020", "b-0045", "a-0050"]


def test_the_end_of_a_long_segment_is_read_without_the_rest(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY, durable=False) as log:
        for _ in range(300):
            write_gated(log)
    data = log.path.read_bytes()
    assert len(data) > 3 * (1 << 16)
    for count in (1, 2, 99, 301, 5000):
        assert [line.data for line in last_lines(tmp_path, count)] == data.splitlines()[-count:]
    log.path.write_bytes(data[:-1])
    assert last_lines(tmp_path, 1)[0].data == data.splitlines()[-2]


def test_what_is_added_is_followed_without_torn_lines(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path, key=KEY)
    write_gated(log)
    follower = Follower(tmp_path)
    assert follower.added() == []
    first = write_gated(log)
    assert ids(follower.added()) == [first.event_id]
    second = write_gated(log)
    data = log.path.read_bytes()
    log.path.write_bytes(data[:-3])
    assert follower.added() == []
    log.path.write_bytes(data)
    assert ids(follower.added()) == [second.event_id]
    with AuditLog.open(tmp_path, key=KEY) as other:
        third = write_gated(other)
    assert third.event_id in ids(follower.added())


def test_records_are_found_by_event_request_hash_and_image(tmp_path: Path) -> None:
    signed_log(tmp_path, runs=1)
    lines = [line for line in merged([tmp_path]) if line.values["kind"] == "generated"]
    (line,) = lines
    for identifier in (line.values["event_id"], line.values["hash"][:12], "ab" * 32):
        assert ids(matching(tmp_path, identifier)) == [line.values["event_id"]]
    assert [found.values["kind"] for found in matching(tmp_path, REQUEST.id)] == [
        "gated",
        "generated",
        "refused",
        "run.failed",
    ]
    assert ids(matching(tmp_path, "77" * 32)) == []  # the digest of a membrane is not what is looked for
    assert ids(matching(tmp_path, '"')) == []


def test_records_are_found_by_prompt(tmp_path: Path) -> None:
    with AuditLog.open(tmp_path, key=KEY, durable=False) as log:
        write_run(log)
        other = write_gated(log, "something else")
    assert [line.values["kind"] for line in of_prompt(tmp_path, [KEY.hmac(PROMPT)])] == ["gated"]
    assert len(list(of_prompt(tmp_path, [KEY.hmac(NEGATIVE)]))) == 2
    both = of_prompt(tmp_path, [KEY.hmac("something else"), KEY.hmac(NEGATIVE)])
    assert ids(both)[-1] == other.event_id
    assert list(of_prompt(tmp_path, [KEY.hmac("never asked")])) == []


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found nothing there"):
        list(merged([tmp_path / "absent"]))
    with AuditLog.open(tmp_path, key=KEY, durable=False) as log:
        write_gated(log)
    log.path.write_bytes(log.path.read_bytes() + b'{"v":1}\n')
    with pytest.raises(AuditChainError, match=r"jsonl:4: not a record: ts: expected text") as caught:
        list(lines_in(log.path))
    assert caught.value.seq == 3
