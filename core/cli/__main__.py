"""``python -m mortice.core.cli``: the command without its script."""

from __future__ import annotations

import sys

from mortice.core.cli.main import main

sys.exit(main())
