"""The KL divergence at two points of a census once more, by other code: transformers and NumPy in float32.

    python scripts/check_kl.py RUN/census/census_step000040.nc --snapshot RUN/run/snapshots/step_000040

The moved policies are drawn by the recipe of docs/measurement.md, the checkpoint's own completions come from the
journal beside the dataset, and each is scored in one forward pass without padding. An adapter is merged by PEFT. The
points are those of the first two directions: the first at the smallest radius, the second, walked the other way, at the
largest. Exit code 1 if a KL differs from the sweep's by more than --tolerance, nat per token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

POINTS = ((0, 0, 0), (1, 1, -1))
"""Positions on the dimensions direction, sign and radius."""


def load(snapshot: Path, threads: int) -> Any:
    """The policy of a snapshot as a transformers model in float32; an adapter is merged into its base model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    adapter = snapshot / "adapter_config.json"
    base = snapshot
    if adapter.is_file():
        from rlvr_landscape_plugin.snapshot import open_snapshot

        opened = open_snapshot(snapshot).base
        assert opened is not None, "an adapter has a base model"
        base = opened.path
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, local_files_only=True)
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(snapshot)).merge_and_unload()  # pyright: ignore[reportCallIssue]
    return model.eval()


def draw(seed: int, axis: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The noise of one tensor, by the recipe of docs/measurement.md."""
    text = f"numpy-philox-sha256-v1\x00{seed}\x00{axis}\x00{name}".encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def move(model: Any, origin: dict[str, np.ndarray], seed: int, axis: str, distance: float) -> None:
    """Place the policy at `distance`, in parts of each tensor's norm, along a random direction."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theta = origin[name].astype(np.float64)
            noise = draw(seed, axis, name, theta.shape).astype(np.float64)
            scale = np.linalg.norm(theta) / np.linalg.norm(noise)
            parameter.copy_(torch.from_numpy((theta + distance * scale * noise).astype(np.float32)))


def completions(base: xr.Dataset) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each segment of the checkpoint's batch, and which of them were sampled."""
    ends = np.cumsum(base["segment_length"].values)[:-1]
    ids, sampled = base["token_id"].values, base["token_sampled"].values.astype(bool)
    return list(zip(np.split(ids, ends), np.split(sampled, ends), strict=True))


def score(model: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Σ log π of the sampled tokens of each row, float64, nat."""
    import torch

    found = []
    for tokens, sampled in rows:
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            table = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), dim=-1)
        chosen = table.gather(1, ids[1:, None])[:, 0].numpy()
        found.append(float(chosen[sampled[1:]].sum()))
    return np.array(found)


def check(census: Path, snapshot: Path, rows: int, threads: int) -> list[dict[str, float]]:
    """Of each of `POINTS`: where it is, the mean KL per token of the sweep and of this script."""
    with xr.open_dataset(census) as opened:
        data = opened.load()
    journal = census.parent / f"step{int(data['step']):06d}_census" / "base.nc"
    if not journal.is_file():
        raise SystemExit(f"error: {journal} is missing; the journal of the sweep must lie beside its dataset")
    with xr.open_dataset(journal) as opened:
        base = opened.load()
    drawn = json.loads(data.attrs["configuration"])["slice"]
    if drawn["normalization"] != "tensor" or drawn["include"] != ["*"] or drawn["exclude"] or "alpha" in drawn:
        raise SystemExit(
            f"error: {census}: this script draws random directions of all tensors, normalised by tensor, only"
        )
    chosen = completions(base)[:rows]
    places = [(int(p), int(r)) for p, r in zip(base["segment_prompt"], base["segment_rollout"], strict=True)][:rows]
    tokens = sum(int(sampled.sum()) for _, sampled in chosen)
    model = load(snapshot, threads)
    origin = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    start = score(model, chosen)
    found = []
    for at in POINTS:
        direction, sign, radius = at
        point = data.isel(direction=direction, sign=sign, radius=radius)
        distance = float(point["sign"]) * float(point["relative_radius"])
        move(model, origin, int(point["direction_seed"]), str(point["direction_axis"].item()), distance)
        sweep = sum(float(point["kl_k1"].isel(prompt=p).values[r]) for p, r in places)
        mine = float((start - score(model, chosen)).sum())
        found.append(
            {
                "relative_radius": abs(distance),
                "completions": len(chosen),
                "tokens": tokens,
                "sweep": sweep / tokens,
                "transformers": mine / tokens,
                "difference": abs(sweep - mine) / tokens,
            }
        )
    return found


def main() -> int:
    """Compare, write, and say whether all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="dataset of a census; its journal lies beside it")
    parser.add_argument("--snapshot", type=Path, required=True, help="the snapshot that was measured")
    parser.add_argument("--write", type=Path, metavar="JSON", help="file to write")
    parser.add_argument("--rows", type=int, default=16, help="completions of the checkpoint (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nat per token (default: %(default)s)")
    args = parser.parse_args()
    if not args.census.is_file():
        raise SystemExit(f"error: {args.census} is no file; give the dataset of a finished census")

    from rlvr_landscape_plugin.files import replace_text

    points = check(args.census, args.snapshot, args.rows, args.threads)
    result = {"tolerance": args.tolerance, "points": points}
    print(json.dumps(result))
    if args.write is not None:
        replace_text(args.write, [json.dumps(result, indent=1) + "\n"])
    return 0 if all(point["difference"] <= args.tolerance for point in points) else 1


if __name__ == "__main__":
    sys.exit(main())
