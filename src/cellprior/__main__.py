"""``python -m cellprior``: the command line."""

import sys

from cellprior.cli import main

if __name__ == "__main__":
    sys.exit(main())
