"""`python -m transload` is the same command as `transload`."""

import sys

from transload.cli import main

if __name__ == "__main__":
    sys.exit(main())
