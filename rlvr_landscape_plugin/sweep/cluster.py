"""The command `rlvr-landscape cluster @ sweep.toml --cluster.shards 8`: one sweep as a job array, by submitit.

Every job runs `--shard i/n` of the same sweep with a server of its own, or with its share of `server.urls`; all of them
write to one `output`, and the job that finishes last writes the datasets. Sending the jobs again continues the sweep.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rlvr_landscape_plugin.config import StrictConfig, SweepConfig, dry_run_report, load_config
from rlvr_landscape_plugin.errors import ConfigurationError, LandscapeError, run_cli, suggest

TIMEOUTS = 100
"""How often a job may reach its time limit, and continue, before submitit gives it up."""


class ClusterConfig(StrictConfig):
    """How the jobs run."""

    shards: int = Field(default=1, ge=1)
    """Jobs; each measures its share of every slice's points."""
    executor: Literal["slurm", "local"] = "slurm"
    """submitit's executor; `local` runs the jobs as processes of this machine and waits for them."""
    parameters: dict[str, Any] = {}
    """For submitit's `update_parameters`, such as { slurm_partition = "gpu", gpus_per_node = 1, timeout_min = 600 }."""
    folder: Path | None = None
    """submitit's logs and job files; default: `jobs` in `output`."""


class ClusterSweepConfig(SweepConfig):
    """A sweep and the jobs that share it."""

    cluster: ClusterConfig = ClusterConfig()
    """The jobs."""

    @model_validator(mode="after")
    def _shares(self) -> ClusterSweepConfig:
        if self.shard is not None:
            raise ValueError(f"shard = {self.shard!r} is what each job gets; set cluster.shards instead")
        if self.server.urls and len(self.server.urls) < self.cluster.shards:
            raise ValueError(
                f"{len(self.server.urls)} server.urls for cluster.shards = {self.cluster.shards}: a server serves one "
                "shard only; name more servers, ask for fewer shards, or leave urls out so that each job starts one"
            )
        if self.server.port is not None and self.cluster.shards > 1:
            raise ValueError("server.port is one port for several servers; leave it out, each job finds a free one")
        return self

    def jobs(self) -> list[SweepConfig]:
        """The configuration of each job."""
        count = self.cluster.shards
        sweep = self.model_dump(exclude={"cluster"})
        parts = []
        for index in range(count):
            server = sweep["server"] | {"urls": self.server.urls[index::count]}
            parts.append(SweepConfig.model_validate(sweep | {"server": server, "shard": f"{index + 1}/{count}"}))
        return parts


class ShardJob:
    """What submitit runs: one shard; it runs again after the scheduler has taken the machine away."""

    def __call__(self, config: dict[str, Any]) -> list[str]:
        """Measure; returns the datasets that this job wrote or found."""
        from rlvr_landscape_plugin.display import Display
        from rlvr_landscape_plugin.sweep import run_sweep

        with Display() as display:
            return [str(path) for path in asyncio.run(run_sweep(SweepConfig.model_validate(config), display))]

    def checkpoint(self, config: dict[str, Any]) -> Any:
        """submitit's hook before a time-out or preemption: the journal is the checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, config)


def submit(config: ClusterSweepConfig) -> list[Any]:
    """Submit the jobs; returns submitit's objects for them. Raises `ConfigurationError` for what submitit refuses."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigurationError("job arrays need submitit: pip install 'rlvr-landscape[cluster]'") from error
    folder = config.cluster.folder or Path(config.output) / "jobs"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=config.cluster.executor, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**{"name": "landscape", **config.cluster.parameters})
        with executor.batch():
            return [executor.submit(ShardJob(), part.model_dump(mode="json")) for part in config.jobs()]
    except (NameError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigurationError(f"submitit refuses these jobs (cluster.*): {error}") from error


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit code. `prog`: what the user typed, for the usage line."""

    def run() -> None:
        config = load_config(sys.argv[1:] if argv is None else argv, ClusterSweepConfig, prog)
        if config.dry_run:
            print(dry_run_report(config))
            return
        jobs = submit(config)
        for job in jobs:
            print(f"job {job.job_id}  log {job.paths.stderr}")
        if config.cluster.executor == "local":
            failures = [job for job in jobs if job.exception() is not None]
            if failures:
                raise LandscapeError(
                    f"{len(failures)} of {len(jobs)} shards failed; finished points are kept, the same command "
                    f"continues. The first: {failures[0].exception()}"
                )
            print("\n".join(sorted({path for job in jobs for path in job.result()})))
        suggest(f"rlvr-landscape {'report' if config.cluster.executor == 'local' else 'status'} {config.output}")

    return run_cli(run)
