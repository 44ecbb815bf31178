"""`safegen schema`: the JSON Schema of policy files."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from safegen.cli.render import write

EXAMPLE = "Example: safegen schema --draft draft-07 > policy.schema.json"


class Dialect(StrEnum):
    """The drafts of JSON Schema that are published."""

    NEWEST = "2020-12"
    DRAFT_07 = "draft-07"


Draft = Annotated[
    Dialect, typer.Option("--draft", help="Draft of JSON Schema; yaml-language-server (VS Code) reads draft-07.")
]


def schema(draft: Draft = Dialect.NEWEST) -> None:
    """Print the JSON Schema of policy files, from which editors complete and check while one types.

    The first line of a policy tells the editor where it lies: `# yaml-language-server: $schema=policy.schema.json`.
    """
    from safegen.policy.json_schema import schema_text

    write(schema_text("draft-07" if draft == Dialect.DRAFT_07 else "2020-12"))
