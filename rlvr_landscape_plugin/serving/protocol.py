"""The wire format between client and endpoint: message types, and arrays as base64 in JSON. No pickle, no torch."""

from __future__ import annotations

import binascii
from typing import Any

import msgspec
import numpy as np

PROTOCOL = 5
"""Raised whenever a message changes; client and server must agree."""
MAX_BODY_BYTES = 256 * 2**20
MAX_REQUESTS = 1024
"""Turns or sequences in one call; a server that works through more answers nothing else meanwhile."""
LOGPROBS_MODE = "raw_logprobs"
"""vLLM's `--logprobs-mode` of a server that is started here: log π of the policy itself, whatever the sampling."""
TOKEN_VARIABLE = "RLVR_LANDSCAPE_TOKEN"
"""Environment variable with the bearer token, on both sides."""
ROOTS_VARIABLE = "RLVR_LANDSCAPE_ROOTS"
"""Environment variable of the server: directories it may read snapshots and directions from."""
MOVE_PATH_VARIABLE = "RLVR_LANDSCAPE_MOVE_PATH"
"""Environment variable of the server: `kernel` (the default: wherever it passes its check) or `loader`; engine.py."""
SPIN_VARIABLE = "RLVR_LANDSCAPE_SPIN"
"""Environment variable of the server: 1 leaves vLLM's busy waiting on a CPU as it is; worker/waiting.py."""
DIRECTIONS_MEMORY_VARIABLE = "RLVR_LANDSCAPE_DIRECTIONS_MEMORY"
"""Environment variable of the server: `auto` (the default), `float32`, `half` or `regenerated`; memory.py."""


class LoadCall(msgspec.Struct, forbid_unknown_fields=True):
    """Body of /landscape/load."""

    snapshot: str
    slice: dict[str, Any]
    directions: dict[str, str] = {}
    """Axis → file of its direction, on the server's file system, for each axis that is not drawn from the seed."""
    base: str = ""
    """Directory of the model that `snapshot` belongs to, if that is an adapter."""


class AheadCall(msgspec.Struct, forbid_unknown_fields=True):
    """Body of /landscape/ahead."""

    slice: dict[str, Any]
    load: str
    """Name of the load whose snapshot is meant, as the server answered it."""


class MoveCall(msgspec.Struct, forbid_unknown_fields=True):
    """Body of /landscape/move."""

    alpha: float
    beta: float
    load: str | None = None
    """Name of the load whose slice is meant, as the server answered it; None: whichever slice is loaded."""


class Sampling(msgspec.Struct, forbid_unknown_fields=True):
    """What all requests of a call share."""

    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: list[int] = []


class GenerateItem(msgspec.Struct, forbid_unknown_fields=True):
    """One turn to sample."""

    prompt: str
    """Token ids, int32 little endian, base64."""
    seed: int
    max_tokens: int


class GenerateCall(msgspec.Struct, forbid_unknown_fields=True):
    """Body of /landscape/generate."""

    requests: list[GenerateItem]
    sampling: Sampling
    version: str | None = None


class ScoreCall(msgspec.Struct, forbid_unknown_fields=True):
    """Body of /landscape/score."""

    sequences: list[str]
    """Token ids of each whole sequence, int32 little endian, base64."""
    first: list[int] = []
    """The first token of each whose log π is asked for; those before may be answered as NaN. Empty: all of them."""
    version: str | None = None


def pack(array: np.ndarray) -> str:
    """Base64 of a little-endian int32 or float32 array."""
    return binascii.b2a_base64(np.ascontiguousarray(array).tobytes(), newline=False).decode("ascii")


def unpack_ids(text: str) -> np.ndarray:
    """Token ids, int32, 1-D, read-only."""
    return np.frombuffer(binascii.a2b_base64(text), dtype="<i4")


def unpack_logprobs(text: str) -> np.ndarray:
    """Log-probabilities in nat, float32, 1-D, read-only."""
    return np.frombuffer(binascii.a2b_base64(text), dtype="<f4")


def logprobs_problem(mode: str | None, sampling: Sampling) -> str | None:
    """Why the log-probabilities of a server in this `--logprobs-mode` are not those of the policy; None if they are.

    Raw and processed ones are the same at temperature 1 and top_p 1. `mode` None: the server does not say.
    """
    plain = sampling.temperature == 1 and sampling.top_p == 1
    if mode == LOGPROBS_MODE or (plain and mode in ("processed_logprobs", None)):
        return None
    if mode is not None and mode.endswith("_logits"):
        return f"the server runs with --logprobs-mode {mode}, so it answers logits; start it with {LOGPROBS_MODE}"
    said = "does not say its --logprobs-mode" if mode is None else f"runs with --logprobs-mode {mode}"
    return (
        f"the server {said}; at sampling.temperature = {sampling.temperature:g} and sampling.top_p = "
        f"{sampling.top_p:g} its log-probabilities would be those of the distribution that was sampled from, while "
        f"scores are those of the policy at temperature 1: start it with --logprobs-mode {LOGPROBS_MODE}, or set both "
        "to 1"
    )
