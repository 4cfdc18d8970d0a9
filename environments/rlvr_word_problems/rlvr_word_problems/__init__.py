"""The taskset `rlvr-word-problems`; verifiers finds its classes through `__all__`."""

from rlvr_word_problems.taskset import WordProblemsEnv, WordProblemsTaskset

__all__ = ["WordProblemsEnv", "WordProblemsTaskset"]
