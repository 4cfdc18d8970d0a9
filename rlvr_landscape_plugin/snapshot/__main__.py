"""`python -m rlvr_landscape_plugin.snapshot`."""

import sys

from rlvr_landscape_plugin.snapshot import main

if __name__ == "__main__":
    sys.exit(main())
