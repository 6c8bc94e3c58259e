"""`python -m adaptnet`, and what the command `adaptnet` starts."""

from __future__ import annotations

from jobs.cli import main as main

if __name__ == "__main__":
    main()
