"""The taskset `rlvr-alphabet-sort`; verifiers finds its classes through `__all__`."""

from rlvr_alphabet_sort.taskset import AlphabetSortEnv, AlphabetSortTaskset

__all__ = ["AlphabetSortEnv", "AlphabetSortTaskset"]
