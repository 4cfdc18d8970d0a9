"""Loaded by every Python that has this directory on PYTHONPATH; does nothing unless PRIME_RL_ON_CPU=1."""

import os

if os.environ.get("PRIME_RL_ON_CPU") == "1":
    import prime_rl_on_cpu

    prime_rl_on_cpu.install()
