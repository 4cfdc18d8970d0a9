"""The public surface is the one that public_surface.txt states; documents import what is there."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import public_surface
import pytest

ADVICE = (
    "The public surface changed. If that was not meant, users lose something: put it back. If it was, write "
    "tests/freeze/public_surface.txt again (python tests/freeze/public_surface.py) and list the change in CHANGELOG.md "
    'under "Deliberate changes of the public surface".'
)
NEEDS = {"Routes and bodies of the server": "fastapi", "Keys of [env.taskset] for rlvr-alphabet-sort": "verifiers"}
DOCUMENTS = [public_surface.ROOT / "README.md", *sorted((public_surface.ROOT / "docs").glob("*.md"))]


def code_blocks(document: Path) -> list[str]:
    """The Python code in a document."""
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("title", public_surface.SECTIONS)
def test_the_public_surface_changes_on_purpose_only(title: str) -> None:
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    stated, found = public_surface.stored().get(title, ""), public_surface.section(title)
    if stated != found:
        lines = difflib.unified_diff(stated.splitlines(), found.splitlines(), "public_surface.txt", "the code", n=1)
        pytest.fail("\n".join([ADVICE, *(line.rstrip("\n") for line in lines)]), pytrace=False)


def test_every_stated_section_is_compared() -> None:
    assert list(public_surface.stored()) == list(public_surface.SECTIONS)


def test_what_documents_import_is_there() -> None:
    statements = [
        line.partition("#")[0].strip()
        for document in DOCUMENTS
        for block in code_blocks(document)
        for line in block.splitlines()
        if re.match(r"(from|import) rlvr_", line)
    ]
    assert len(statements) >= 4, "the documents no longer show Python; look whether their code blocks are still found"
    for statement in statements:
        exec(statement, {})
