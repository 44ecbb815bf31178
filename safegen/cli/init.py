"""`safegen init`: a policy with its tests to start from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from safegen.cli import options
from safegen.cli.render import say, show
from safegen.errors import UsageError

EXAMPLE = "Example: safegen init policies --name house"

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go; made if it is not there.")]
Name = Annotated[str, typer.Option("--name", help="Id of the policy, in kebab case; names the files too.")]


def init(folder: Folder = Path(), name: Name = "house") -> None:
    """Write a policy to start from, tests for it, and the schema that an editor completes it from.

    The policy only observes until its `mode` is changed. Nothing that is there already is overwritten.
    """
    from safegen.policy.json_schema import schema_file, schema_text
    from safegen.policy.scaffold import POLICY, POLICY_TEST

    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise UsageError(f"--name {name}: expected kebab case, such as house or house-strict")
    schema = schema_file("draft-07")
    files = {
        f"{name}.yaml": POLICY.replace("NAME", name).replace("SCHEMA", schema),
        f"{name}.policytest.yaml": POLICY_TEST.replace("NAME", name),
        schema: schema_text("draft-07"),
    }
    taken = [folder / file for file in files if (folder / file).exists() and file != schema]
    if taken:
        raise UsageError(f"{taken[0]} is there already, and init overwrites nothing; choose another --name or folder")
    options.check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        path = folder / file
        with options.writing(path):
            path.write_text(text, encoding="utf-8", newline="\n")
        show(str(path))
    say(f"next: read {folder / name}.yaml, then `safegen validate {folder / name}.yaml`")
