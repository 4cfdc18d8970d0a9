"""`python -m rlvr_landscape_plugin.cluster`: the command of `sweep/cluster.py`."""

import sys

from rlvr_landscape_plugin.sweep.cluster import ClusterConfig, ClusterSweepConfig, main

__all__ = ["ClusterConfig", "ClusterSweepConfig", "main"]

if __name__ == "__main__":
    sys.exit(main())
