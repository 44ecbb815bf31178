"""Findings in the forms that build servers read: JUnit XML, and SARIF 2.1.0 of OASIS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote
from xml.etree import ElementTree as Xml

from safegen._version import __version__
from safegen.cli.options import writing
from safegen.cli.render import json_text, plain

Level = Literal["error", "warning", "note"]

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass(frozen=True, slots=True)
class Reported:
    """One finding: which rule of the tool found it, how bad it is, and where (line and column from 1)."""

    rule: str
    level: Level
    message: str
    path: Path
    line: int = 1
    column: int = 1


def sarif(rules: Mapping[str, str], findings: Sequence[Reported]) -> dict[str, object]:
    """Returns a SARIF log of one run.

    Args:
        rules: What each rule of the tool looks for, by id.
        findings: The findings, in order; each of one of the rules.
    """
    numbers = {rule: k for k, rule in enumerate(rules)}
    driver = {
        "name": "safegen",
        "version": __version__,
        "rules": [{"id": rule, "shortDescription": {"text": text}} for rule, text in rules.items()],
    }
    results = [
        {
            "ruleId": one.rule,
            "ruleIndex": numbers[one.rule],
            "level": one.level,
            "message": {"text": one.message},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(one.path)},
                        "region": {"startLine": one.line, "startColumn": one.column},
                    }
                }
            ],
        }
        for one in findings
    ]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _uri(path: Path) -> str:
    """Returns a path as SARIF wants it: relative to the working directory where it lies below, else absolute."""
    whole = path.resolve()
    here = Path.cwd()
    return quote(whole.relative_to(here).as_posix()) if whole.is_relative_to(here) else whole.as_uri()


def write_sarif(path: Path, rules: Mapping[str, str], findings: Sequence[Reported]) -> None:
    """Writes a SARIF log.

    Raises:
        UsageError: The file could not be written.
    """
    with writing(path):
        path.write_text(json_text(sarif(rules, findings)) + "\n", "utf-8")


@dataclass(frozen=True, slots=True)
class Checked:
    """One thing that was tested: its name, where it stands, and what failed (empty if it passed)."""

    name: str
    line: int
    failures: tuple[str, ...]


def junit(suites: Iterable[tuple[Path, Sequence[Checked]]]) -> str:
    """Returns a JUnit report: a test suite per file, a test case per thing tested."""
    root = Xml.Element("testsuites", name="safegen")
    for path, checked in suites:
        suite = Xml.SubElement(root, "testsuite", {"name": plain(path.as_posix()), **_counts(checked)})
        for one in checked:
            case = Xml.SubElement(
                suite,
                "testcase",
                name=plain(one.name),
                classname=plain(path.stem),
                file=plain(path.as_posix()),
                line=str(one.line),
            )
            if one.failures:
                failure = Xml.SubElement(case, "failure", message=plain(one.failures[0]), type="expectation")
                failure.text = "\n".join(plain(text) for text in one.failures)
    every = [one for suite in root for one in suite]
    root.attrib |= {"tests": str(len(every)), "failures": str(sum(len(case) for case in every)), "errors": "0"}
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(checked: Sequence[Checked]) -> dict[str, str]:
    failed = sum(bool(one.failures) for one in checked)
    return {"tests": str(len(checked)), "failures": str(failed), "errors": "0", "skipped": "0"}


def write_junit(path: Path, suites: Iterable[tuple[Path, Sequence[Checked]]]) -> None:
    """Writes a JUnit report.

    Raises:
        UsageError: The file could not be written.
    """
    with writing(path):
        path.write_text(junit(suites), "utf-8")
