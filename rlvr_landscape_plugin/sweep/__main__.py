"""`python -m rlvr_landscape_plugin.sweep`."""

import sys

from rlvr_landscape_plugin.sweep import main

if __name__ == "__main__":
    sys.exit(main())
