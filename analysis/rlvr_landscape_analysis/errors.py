"""The error of the analysis that a user can cause or repair."""

from __future__ import annotations


class AnalysisError(ValueError):
    """A dataset or a request that cannot be analysed; the message says what was wrong, where, and what to do."""
