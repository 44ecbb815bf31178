from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safegen.errors import PromptsFileError
from safegen.prompts import MAX_LINE_BYTES, PromptRow, read_prompts


def rows(tmp_path: Path, name: str, content: str | bytes) -> list[PromptRow]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_prompts(path))


def test_text_has_one_prompt_per_line(tmp_path: Path) -> None:
    content = '\ufeffa cat\r\n\n  \n  a dog, "quoted" \nZoë\'s 水彩\u2028one line'
    expected = [
        PromptRow(0, "a cat", None, 1),
        PromptRow(1, '  a dog, "quoted" ', None, 4),
        PromptRow(2, "Zoë's 水彩\u2028one line", None, 5),
    ]
    assert rows(tmp_path, "p.txt", content) == expected
    assert rows(tmp_path, "no-suffix", content) == expected
    assert rows(tmp_path, "P.TXT", content) == expected


def test_csv_has_columns(tmp_path: Path) -> None:
    content = '\ufeffid,Prompt ,negative_prompt\n1,"a cat, sitting",\n\n2,"two\nlines",blurry\n'
    assert rows(tmp_path, "p.csv", content) == [
        PromptRow(0, "a cat, sitting", None, 2),
        PromptRow(1, "two\nlines", "blurry", 4),
    ]
    assert rows(tmp_path, "q.csv", "caption\na cat\n") == [PromptRow(0, "a cat", None, 2)]
    assert rows(tmp_path, "r.csv", "text,prompt\nno,yes\n") == [PromptRow(0, "yes", None, 2)]


def test_jsonl_has_objects_or_strings(tmp_path: Path) -> None:
    content = (
        '\ufeff{"prompt": "a cat", "negative_prompt": "blurry", "id": 7}\n\n'
        '"a \\ud83d\\ude00"\n{"caption": "c", "negative_prompt": null}\n'
    )
    assert rows(tmp_path, "p.jsonl", content) == [
        PromptRow(0, "a cat", "blurry", 1),
        PromptRow(1, "a 😀", None, 3),
        PromptRow(2, "c", None, 4),
    ]


LONG = "x" * (MAX_LINE_BYTES + 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", r"p\.txt: expected at least one prompt, found none; put"),
        ("p.txt", b"\n \n", "at least one prompt"),
        ("p.csv", b"", "at least one prompt"),
        ("p.csv", b"prompt\n", "at least one prompt"),
        ("p.jsonl", b"\n", "at least one prompt"),
        ("p.txt", b"\xef\xbb\xbfok\nab\xffc\n", r"p\.txt:2: expected UTF-8, found byte 0xff at offset 8; save"),
        ("p.txt", "a cat".encode("utf-16"), "p.txt:1: expected UTF-8, found byte 0xff at offset 0"),
        ("p.txt", b"ok\na\0b\n", r"p\.txt:2: expected text, found a NUL byte; save"),
        ("p.txt", b"one\rtwo\r", r"p\.txt:1: .* found a lone CR; save"),
        ("p.txt", f"ok\n{LONG}\n".encode(), r"p\.txt:2: expected at most 65536 bytes \(64 KiB\).* found more; split"),
        ("p.jsonl", json.dumps(LONG).encode(), r"p\.jsonl:1: expected at most 65536 bytes"),
        ("p.csv", f"prompt\n{LONG}\n".encode(), r"p\.csv:2: expected at most 65536 bytes"),
        ("p.csv", b'prompt\n"open\n' + b"line\n" * 20_000, r"p\.csv:\d+: expected at most 65536 bytes.*quote"),
        ("p.csv", b'prompt\nok\n"open\nend\n', r"p\.csv:3: expected CSV, found a fault: .*; correct"),
        ("p.csv", b"a,b\n1,2\n", r"found 'a', 'b'; rename the column of the prompts$"),
        ("p.csv", b"prompt,prompt\na,b\n", r"expected one column 'prompt', found 2; rename"),
        ("p.csv", b"prompt,negative_prompt,negative_prompt\na,b,c\n", "expected one column 'negative_prompt'"),
        ("p.csv", b"prompt\na cat, a dog\n", r"p\.csv:2: expected 1 cells as in the header, found 2; put"),
        ("p.csv", b"id,prompt\n1\n", r"p\.csv:2: expected 2 cells"),
        ("p.csv", b"id,prompt\n1, \n", r"p\.csv:2: expected text as 'prompt', found a blank; fill"),
        (
            "p.jsonl",
            b'"ok"\n{"prompt": \n',
            r"p\.jsonl:2: expected one JSON value, found a fault at column \d+: .*; corr",
        ),
        ("p.jsonl", b'"a" "b"\n', "found a fault at column 5: Extra data"),
        ("p.jsonl", b"[" * 60_000, "beyond all limits"),
        ("p.jsonl", b"9" * 5000, "beyond all limits"),
        ("p.jsonl", b"[1]\n", r"expected a JSON object or string, found list"),
        (
            "p.jsonl",
            b'{"promptt": "a"}\n',
            r"expected a key 'prompt'.* found 'promptt'; rename key 'promptt' to 'prompt'$",
        ),
        (
            "p.csv",
            b"id,promt\n1,a\n",
            r"p\.csv:1: expected a column .* found 'id', 'promt'; rename column 'promt' to 'prompt'$",
        ),
        ("p.csv", b"id,captoin\n1,a fox\n", r"rename column 'captoin' to 'prompt'$"),
        ("p.jsonl", b"{}\n", "found none; rename"),
        ("p.jsonl", b'{"prompt": 7}\n', "expected text as 'prompt', found int; put"),
        ("p.jsonl", b'{"prompt": "a", "negative_prompt": 7}\n', "expected text as 'negative_prompt', found int"),
        ("p.jsonl", b'""\n', "found a blank"),
        ("p.jsonl", b'"a\\u0000"\n', "found NUL"),
        ("p.jsonl", b'"a\\ud800"\n', "half of a surrogate pair"),
        ("p.yaml", b"- a\n", r"expected \.txt .*, \.csv or \.jsonl, found '\.yaml'; rename"),
    ],
)
def test_each_fault_names_file_line_and_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(PromptsFileError, match=message) as caught:
        rows(tmp_path, name, content)
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_call_itself_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(PromptsFileError, match="found a folder"):
        read_prompts(tmp_path)
    with pytest.raises(PromptsFileError, match="found nothing there"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(PromptsFileError, match="found nothing there"):
        read_prompts("a\0b.txt")
    with pytest.raises(PromptsFileError, match="File name too long"):
        read_prompts("a very long prompt " * 100)


def test_a_file_that_goes_away_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\n")
    prompts = read_prompts(path)
    path.unlink()
    with pytest.raises(PromptsFileError, match=r"p\.txt: cannot be read: No such file"):
        next(prompts)
    with pytest.raises(PromptsFileError, match="cannot be read: Input/output error"):
        list(read_prompts("/proc/self/mem"))


def test_good_rows_come_before_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"one\ntwo\n\xff\n")
    prompts = read_prompts(path)
    assert [next(prompts).text, next(prompts).text] == ["one", "two"]
    with pytest.raises(PromptsFileError, match=":3:"):
        next(prompts)


def test_standard_input_and_pipes_are_text() -> None:
    script = "from safegen.prompts import read_prompts; print([row.text for row in read_prompts('-')])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="a cat\nZoë\n".encode(),
        env=env,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.decode().strip() == "['a cat', 'Zoë']"
    reader, writer = os.pipe()
    os.write(writer, b"a cat\n")
    os.close(writer)
    assert [row.text for row in read_prompts(f"/dev/fd/{reader}")] == ["a cat"]
    os.close(reader)


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_memory_stays_constant(tmp_path: Path, name: str) -> None:
    row = '"' + "x" * 1000 + '"\n'
    path = tmp_path / name
    path.write_text('"prompt"\n' + row * 4000 + "x" * 4_000_000)
    prompts = read_prompts(path)
    tracemalloc.start()
    for _ in range(4000 if name == "p.csv" else 4001):  # a CSV file has a header
        next(prompts)
    with pytest.raises(PromptsFileError, match=r":4002: expected at most 65536 bytes"):
        next(prompts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(texts, st.none() | texts), min_size=1, max_size=5))
def test_csv_and_jsonl_give_back_what_was_put_in(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str | None]]
) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["prompt", "negative_prompt"])
    writer.writerows(pairs)
    objects: list[dict[str, Any]] = [{"prompt": text, "negative_prompt": negative} for text, negative in pairs]
    lines = "".join(json.dumps(item) + "\n" for item in objects)
    for name, content in (("p.csv", table.getvalue()), ("p.jsonl", lines)):
        found = rows(folder, name, content)
        assert [(row.text, row.negative) for row in found] == pairs
        assert [row.index for row in found] == list(range(len(pairs)))


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), name=st.sampled_from(["p.txt", "p.csv", "p.jsonl"]))
def test_arbitrary_bytes_give_rows_or_a_prompts_file_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    with contextlib.suppress(PromptsFileError):  # any other exception fails the test
        assert all(row.text.strip() for row in rows(folder, name, content))
