"""Tests may import helpers as `tests.NAME`."""

import sys
from pathlib import Path

# `python -m pytest` has done so; a bare `pytest` has not.
sys.path[:0] = [root] if (root := str(Path(__file__).parents[1])) not in sys.path else []
