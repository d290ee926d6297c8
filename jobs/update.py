"""Entry point of the `update` job: python jobs/update.py --config FILE [--set section.key=value ...]"""

import _path  # noqa: F401  makes the package of this checkout importable

# isort: split
from springtide.jobs import main

if __name__ == "__main__":
    main("update")
