"""Puts this checkout's platform/ first on the import path, so that jobs run without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))
