"""What the policy layer costs: resolving a large policy, judging a prompt's words by it, starting the command line.

Peers, in the same run and interleaved: a regular expression of all phrases (the plain way to look for many words), and
a Python that starts and imports nothing. Resolving is CPU-bound in one thread; its figure is CPU time, so that other
work on the machine does not count. No image model is loaded.
"""

from __future__ import annotations

import random
import re
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from floors import Floor, finish
from rich.console import Console

from safegen.policy.catalogue import Catalogue, Concept
from safegen.policy.hits import lexical_hits
from safegen.policy.resolve import ResolvedPolicy, resolve
from safegen.policy.schema import Policy

console = Console(stderr=True)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
CALLERS = 50


def large(rules: int, aliases: int) -> tuple[Policy, Catalogue]:
    """Returns a policy of so many rules, one concept each, with so many phrases for each concept, and exceptions."""
    made = random.Random(0)

    def words() -> str:
        return " ".join("".join(made.choices(string.ascii_lowercase, k=made.randint(4, 9))) for _ in range(2))

    concepts = [
        Concept(id=f"c-{k}", name=words(), category="ip-character", aliases=tuple(words() for _ in range(aliases - 1)))
        for k in range(rules)
    ]
    document = {
        "apiVersion": "safegen.dev/v1",
        "kind": "Policy",
        "metadata": {"id": "large", "version": "1.0.0"},
        "rules": [{"id": one.id, "concept": one.id, "category": one.category} for one in concepts],
        "exceptions": [
            {
                "id": f"x-{k}",
                "rules": [concepts[k % rules].id],
                "when": {"tenant": f"t-{k}"},
                "action": "flag",
                "reason": "r",
                "owner": "o",
                "expires": "2027-01-01",
            }
            for k in range(CALLERS)
        ],
    }
    catalogue = Catalogue({one.id: one for one in concepts}, frozenset(one.id for one in concepts))
    return Policy.model_validate(document), catalogue


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median CPU seconds of each task, measured in turns."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            started = time.process_time()
            task()
            taken[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def starting(rounds: int) -> dict[str, float]:
    """Returns the median CPU seconds (user and system) of processes that start, in turns."""
    safegen = "from safegen.cli.app import main; import sys; sys.argv = ['safegen', *{!r}]; main()"
    commands = {
        "python": "pass",
        "safegen --help": safegen.format(["--help"]),
        "safegen validate strict": safegen.format(["validate", "strict"]),
    }
    timed = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], stdout=subprocess.DEVNULL, check=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    )
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, code in commands.items():
            done = subprocess.run([sys.executable, "-c", timed, code], capture_output=True, text=True, check=True)
            taken[name].append(float(done.stdout))
    return {name: statistics.median(values) for name, values in taken.items()}


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    rules: Annotated[int, typer.Option(min=1)] = 500,
    aliases: Annotated[int, typer.Option(min=1)] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measures the policy layer against its floors; exit code 1 if one is missed."""
    policy, catalogue = large(rules, aliases)
    pattern = "|".join(re.escape(phrase) for concept in catalogue.concepts.values() for phrase in concept.phrases)

    def resolved() -> ResolvedPolicy:
        return resolve(policy, catalogue, available=(), now=NOW)

    def compiled() -> re.Pattern[str]:
        re.purge()
        return re.compile(pattern, re.IGNORECASE)

    console.print(f"{rules} rules of {aliases} phrases")
    ready, expression = resolved(), compiled()
    prompts = [" ".join(phrase.split()[:1]) + " in the rain" for phrase in ready.matcher.phrases[:200]]
    taken = interleaved(
        {
            "resolve": resolved,
            "peer: compile one expression": compiled,
            "another caller": lambda: [ready.at(NOW, {"tenant": f"t-{k}"}) for k in range(CALLERS)],
            "200 prompts": lambda: [lexical_hits(ready, prompt) for prompt in prompts],
            "peer: 200 prompts, one expression": lambda: [expression.search(prompt) for prompt in prompts],
        },
        rounds,
    )
    starts = starting(rounds)
    figures = {name: round(seconds, 5) for name, seconds in (taken | starts).items()}
    floors = [
        Floor.at_most(f"resolve {rules} rules x {aliases} phrases: CPU s", taken["resolve"], 0.5),
        Floor.at_most("another caller: ms", 1000 * taken["another caller"] / CALLERS, 10.0),
        Floor.at_most("safegen --help: CPU s", starts["safegen --help"], 0.3),
        Floor.at_most("safegen validate strict: CPU s", starts["safegen validate strict"], 0.3),
    ]
    report: dict[str, Any] = {
        "model": "none",
        "unit": "median CPU seconds",
        "rounds": rounds,
        "results": figures,
        "resolve / peer": round(taken["resolve"] / taken["peer: compile one expression"], 4),
    }
    for name, seconds in figures.items():
        console.print(f"{name:<36} {1000 * seconds:9.2f} ms")
    finish(report, floors, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
