"""Tasks that are prepared and scored in a runtime, as gsm8k and code_golf of verifiers' repository are."""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["RuntimeQuizTaskset"]

VERIFY = b"""
import pathlib, sys
print(float(sys.argv[1].strip() == pathlib.Path("answer.txt").read_text()))
"""


class RuntimeQuizConfig(vf.TasksetConfig):
    slow: bool = False


class RuntimeQuizTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    def runtime_env(self) -> dict[str, str]:
        return {"QUIZ": str(self.data.idx)}

    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        await runtime.write("answer.txt", str(self.data.name).encode())
        await runtime.write("verify.py", VERIFY)
        trace.info["prepared"] = True

    async def finalize(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        await runtime.write("said.txt", trace.last_reply.encode())

    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        result = await runtime.run(["python3", "verify.py", trace.last_reply], {})
        if result.exit_code:
            raise RuntimeError(result.stderr)
        return float(result.stdout)

    @vf.metric
    async def letters(self, runtime: vf.Runtime) -> dict[str, float]:
        said = await runtime.run(["sh", "-c", "wc -c < said.txt; echo $QUIZ"], {})
        length, quiz = said.stdout.split()
        return {"letters said": float(length), "quiz": float(quiz)}


class SlowTask(RuntimeQuizTask):
    async def setup(self, runtime: vf.Runtime) -> None:
        await runtime.run(["sleep", "30"], {})


class RuntimeQuizTaskset(vf.Taskset[RuntimeQuizTask, RuntimeQuizConfig]):
    def load(self) -> Iterator[RuntimeQuizTask]:
        for idx, answer in enumerate(("four", "five", "six")):
            data = vf.TaskData(idx=idx, name=answer, prompt=f"Say {answer}", timeout=vf.TaskTimeout(setup=20))
            if self.config.slow:
                data = data.model_copy(update={"timeout": vf.TaskTimeout(setup=0.2)})
            yield (SlowTask if self.config.slow else RuntimeQuizTask)(data, vf.TaskConfig())
