"""The command `rlvr-landscape cluster @ sweep.toml --cluster.shards 8`: one sweep as a job array, by submitit.

Every job runs `--shard i/n` of the same sweep with a server of its own, or with its share of `server.urls`; all of them
write to one `output`, and the job that finishes last writes the datasets. Sending the jobs again continues the sweep.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlvr_landscape_plugin.config import StrictConfig, SweepConfig, load_config
from rlvr_landscape_plugin.errors import ConfigurationError, LandscapeError, run_cli, suggest, user_message
from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE

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

    @field_validator("parameters")
    @classmethod
    def _parsed(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Tables and lists of one parameter, which a command line gives as JSON."""
        return {key: _parsed(f"cluster.parameters.{key}", value) for key, value in parameters.items()}


def _parsed(key: str, value: Any) -> Any:
    if not (isinstance(value, str) and value.lstrip().startswith(("{", "["))):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key} = {value!r} is not JSON: {error.msg} at character {error.pos + 1}") from error


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
        from rlvr_landscape_plugin.sweep.command import run_to_end

        # submitit raises again what a job raises, which ends its process with a traceback of submitit's own code.
        sys.excepthook = _show_error
        return [str(path) for path in run_to_end(SweepConfig.model_validate(config))]

    def checkpoint(self, config: dict[str, Any]) -> Any:
        """submitit's hook before a time-out or preemption: the journal is the checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, config)


def _show_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What ends a job's log: one message for a user's error, as a sweep without jobs shows it."""
    message = user_message(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(message, file=sys.stderr)


def _said(job: Any) -> str:
    """The error with which a failed job ended, from its log; otherwise submitit's."""
    _, found, message = (job.stderr() or "").rpartition("\nerror: ")
    return message.strip() if found else str(job.exception())


@contextlib.contextmanager
def _token_in_environment(token: str | None) -> Iterator[None]:
    """Jobs inherit the environment, which nobody else can read; submitit's job files are readable."""
    before = os.environ.get(TOKEN_VARIABLE)
    if token is not None:
        os.environ[TOKEN_VARIABLE] = token
    try:
        yield
    finally:
        os.environ.pop(TOKEN_VARIABLE, None)
        if before is not None:
            os.environ[TOKEN_VARIABLE] = before


def submit(config: ClusterSweepConfig) -> list[Any]:
    """Submit the jobs; returns submitit's objects for them. Raises `ConfigurationError` for what submitit refuses."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigurationError("job arrays need submitit: pip install 'rlvr-landscape[cluster]'") from error
    folder = config.cluster.folder or Path(config.output) / "jobs"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # who can write to a pickle can run code in the job
        executor = submitit.AutoExecutor(folder=folder, cluster=config.cluster.executor, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**{"name": "landscape", **config.cluster.parameters})
        with _token_in_environment(config.server.token), executor.batch():
            parts = [part.model_dump(mode="json", exclude={"server": {"token"}}) for part in config.jobs()]
            return [executor.submit(ShardJob(), part) for part in parts]
    except (NameError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigurationError(f"submitit refuses these jobs (cluster.*): {error}") from error


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit code. `prog`: what the user typed, for the usage line."""

    def run() -> None:
        config = load_config(sys.argv[1:] if argv is None else argv, ClusterSweepConfig, prog)
        if config.dry_run:
            from rlvr_landscape_plugin.sweep.cost import dry_run

            dry_run(config, config.cluster.shards)
            return
        jobs = submit(config)
        for job in jobs:
            print(f"job {job.job_id}  log {job.paths.stderr}")
        if config.cluster.executor == "local":
            failures = [job for job in jobs if job.exception() is not None]
            if failures:
                raise LandscapeError(
                    f"{len(failures)} of {len(jobs)} shards failed; finished points are kept, the same command "
                    f"continues. The first: {_said(failures[0])}"
                )
            print("\n".join(sorted({path for job in jobs for path in job.result()})))
        suggest(f"rlvr-landscape {'report' if config.cluster.executor == 'local' else 'status'} {config.output}")

    return run_cli(run)
