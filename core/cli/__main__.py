"""The entry point: catches Ctrl-C from the first import on.

``python -m mortice.core.cli`` is the command without its script.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> int:
    """Run the command line of this process; its exit code."""
    try:
        from mortice.core.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("mortice: error: interrupted", file=sys.stderr)
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
