"""The tasksets of verifiers' own repository, for compare_tasksets.py: options, scripted replies, local stand-in data.

Data sets that a taskset asks a hub for are small directories of the same layout in the working directory, where
`datasets.load_dataset` finds them first. The tasksets' own code runs unchanged.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import verifiers.v1 as vf


@dataclass(frozen=True)
class Call:
    """A scripted reply that calls a tool."""

    name: str
    arguments: Mapping[str, str]


Script = Callable[["vf.Task", str], "Call | str"]
"""(task, what the tool said; "" before) → a reply that earns as much as it can."""


@dataclass(frozen=True)
class Case:
    """How one taskset is measured."""

    taskset: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    harness: Mapping[str, object] | None = None
    right: Script | None = None
    """What earns a reward; None: the answer that the task's data hold."""
    note: str = ""
    """What a reader of the table should know."""


def _answer(task: vf.Task, said: str) -> str:
    data = task.data.model_dump()
    info = data.get("info") or {}
    if truths := info.get("ground_truths"):
        return "<alphabetical_sorted>\n" + "\n".join(truths[0]) + "\n</alphabetical_sorted>"
    answer = str(data.get("answer") or "")
    return f"<reversed_text>{answer}</reversed_text>\n#### {answer}"


def answer_of(case: Case, task: vf.Task, said: str) -> Call | str:
    """The rewarded reply to a task."""
    return (case.right or _answer)(task, said)


def _looked_up(name: str, arguments: Callable[[vf.Task], Mapping[str, str]]) -> Script:
    """Call a tool once, then repeat what it said."""

    def reply(task: vf.Task, said: str) -> Call | str:
        return f"<answer>{said}</answer>" if said else Call(name, arguments(task))

    return reply


def _extra(task: vf.Task, key: str) -> str:
    return str(task.data.model_dump()[key])


def _code(task: vf.Task, said: str) -> str:
    return f"```python\nprint({_extra(task, 'expected')!r})\n```"


def _bash(task: vf.Task, said: str) -> Call | str:
    prompt = str(task.data.prompt)
    return "something" if said else Call("bash", {"command": prompt.split("`")[1]})


def _hook(task: vf.Task, said: str) -> str:
    marker = str(task.data.prompt).removeprefix("Reply with exactly ").rstrip(".")
    return "no marker" if marker == "JUDGE_BLOCK" else marker  # its judge is a language model of a provider


def _wordle(task: vf.Task, said: str) -> str:
    return "[apple]"


def _weather(task: vf.Task, said: str) -> Call | str:
    city = task.data.model_dump()["row"]["verifier_metadata"]["expected_city"]
    return said or Call("get_weather", {"city": city})


CASES: dict[str, Case] = {
    "alphabet_sort": Case({"max_turns": 2, "max_names_per_turn": 3}, note="stand-in data"),
    "bash_interception": Case(harness={"id": "bash"}, right=_bash, note="harness `bash`"),
    "code_golf": Case(options={"attempts": 1}, right=_code, note='`env.options = {"attempts": 1}`'),
    "color_codeword": Case(),
    "deepwiki": Case(
        right=_looked_up(
            "deepwiki_ask_question", lambda task: {"repoName": _extra(task, "name"), "question": "Which?"}
        ),
        note="a stand-in for the server, by the taskset's own `tools.url`",
    ),
    "glossary": Case(right=_looked_up("facts_lookup", lambda task: {"name": _extra(task, "name")})),
    "grayscale_interception": Case(),
    "gsm8k": Case(note="stand-in data"),
    "interception": Case(right=_hook),
    "kuhn_poker": Case(),
    "nemo_gym_weather": Case(right=_weather, note="verifiers waits 30 s for it"),
    "openenv_wordle": Case(note="its game is downloaded from a Hugging Face Space"),
    "proposer_solver": Case(),
    "reverse_text": Case(note="stand-in data"),
    "scratchpad": Case(right=_looked_up("scratchpad_roundtrip", lambda task: {"word": _extra(task, "word")})),
    "web_search_interception": Case(note="its harness is `codex`"),
    "wiki_search": Case(),
    "wordle": Case(right=_wordle, note="stand-in word list"),
}
"""Every taskset of `environments/`; the directory also holds `compact`, a harness."""

DEEPWIKI_STAND_IN = '''
"""Answers as the public DeepWiki server would, from a list."""
import verifiers.v1 as vf

class Config(vf.ToolsetConfig):
    pass

class Stand(vf.Toolset[Config]):
    @vf.tool
    def ask_question(self, repoName: str, question: str) -> str:
        """Ask a question about a repository."""
        return {"modelcontextprotocol/python-sdk": "Python", "tokio-rs/tokio": "Rust"}.get(repoName, "unknown")

if __name__ == "__main__":
    Stand.run()
'''

_NAMES = ("Ada Byron", "Grace Hopper", "Alan Turing", "Edsger Dijkstra", "Barbara Liskov", "Donald Knuth", "Tony Hoare")
_WORDS = ("apple", "house", "river", "stone", "bread", "chair", "cloud", "dream", "field", "glass", "heart", "light")


def write_stand_ins(folder: Path) -> dict[str, str]:
    """Write the local data below `folder`; returns environment variables that lead to it."""
    sums = [(3, 4), (12, 30), (7, 8), (20, 22), (5, 6), (40, 2)]
    rows = [
        {"question": f"Ann has {a} apples and buys {b} more. How many has she?", "answer": f"{a}+{b}\n#### {a + b}"}
        for a, b in sums
    ]
    _data_set(folder / "openai" / "gsm8k", "main", "test", rows)
    names = [{"names": [*_NAMES[i:], *_NAMES[:i]]} for i in range(len(_NAMES))]
    _data_set(folder / "kalomaze" / "alphabetic-arxiv-authors-it1", "default", "train", names)
    texts = [{"prompt": f"the {word} is {other}"} for word, other in zip(_WORDS, reversed(_WORDS), strict=True)]
    _data_set(folder / "PrimeIntellect" / "Reverse-Text-RL", "default", "train", texts)
    trivia = [{"question": "Which word is first?", "answer": "apple"}]
    _data_set(folder / "willcb" / "wiki-trivia-questions-v4", "default", "train", trivia)
    pages = [{"id": word, "title": word, "content": f"# {word}\nThe {word}."} for word in _WORDS]
    _data_set(folder / "willcb" / "rare-wiki-pages", "default", "train", pages)
    lists = folder / "nltk_data" / "corpora" / "words"
    lists.mkdir(parents=True)
    for name in ("en", "en-basic", "README"):
        (lists / name).write_text("\n".join(_WORDS) + "\n")
    tagger = folder / "nltk_data" / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    for part, content in (("weights", {}), ("tagdict", dict.fromkeys(_WORDS, "NN")), ("classes", ["NN"])):
        (tagger / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(content))
    (folder / "deepwiki_stand_in.py").write_text(textwrap.dedent(DEEPWIKI_STAND_IN))
    return {"NLTK_DATA": str(folder / "nltk_data"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}


def _data_set(folder: Path, name: str, split: str, rows: Sequence[Mapping[str, object]]) -> None:
    folder.mkdir(parents=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {split}.jsonl\n---\n"
    (folder / "README.md").write_text(card)
