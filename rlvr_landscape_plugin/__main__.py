"""`python -m rlvr_landscape_plugin`: the command `rlvr-landscape`."""

import sys

from rlvr_landscape_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
