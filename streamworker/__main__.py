"""``python -m streamworker`` is the command line."""

import sys

from streamworker.cli import main

if __name__ == "__main__":
    sys.exit(main())
