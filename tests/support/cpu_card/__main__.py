"""``python -m tests.support.cpu_card``: tests of a GPU on a card that is the CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.support.cpu_card import run_tests


def main() -> int:
    """Parse the arguments, run pytest; its exit status."""
    parser = argparse.ArgumentParser("python -m tests.support.cpu_card", description=__doc__, allow_abbrev=False)
    parser.add_argument("--capability", default="9.0", help="compute capability of the card (default: 9.0)")
    parser.add_argument("--folder", type=Path, default=Path("build/cpu-card"), help="where driver and kernels are kept")
    chosen, rest = parser.parse_known_args()
    return run_tests(rest, chosen.folder.resolve(), chosen.capability).returncode


if __name__ == "__main__":
    sys.exit(main())
