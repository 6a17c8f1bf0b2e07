"""``python -m bayescam`` is the console script."""

import sys

from bayescam.cli import main

if __name__ == "__main__":
    sys.exit(main())
