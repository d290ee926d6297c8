"""Entry point of the `compare` job: python jobs/compare.py --config FILE [--set section.key=value ...]"""

import _path  # noqa: F401  makes the package of this checkout importable

# isort: split
from springtide.jobs import main

if __name__ == "__main__":
    main("compare")
