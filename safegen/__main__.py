"""`python -m safegen` is the `safegen` command."""

from __future__ import annotations

from safegen.cli.app import main

if __name__ == "__main__":
    main()
