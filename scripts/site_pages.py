"""Pages of the documentation's site that lie outside docs/: the README, and every file that a page links to.

A hook of MkDocs (mkdocs.yml). The README becomes the first page; another file keeps its path below `repository/`. Links
are rewritten accordingly, so that the same Markdown works in the repository and on the site; a link to a folder without
a README becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
FIRST = "README.md"
ELSEWHERE = "repository/"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_TO_FOLDER = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s#]+)\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make anchors as GitHub does, letters of other alphabets included."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and all that is linked, links of linked pages included."""
    waiting = [FIRST, *(DOCS + file.src_uri for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith(DOCS):
            files.append(_made(path, config))
        if path.endswith(".md"):
            for target in _targets(path):
                if target not in seen:
                    seen.add(target)
                    waiting += [] if target.startswith(DOCS) else [target]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their files are on the site."""
    source = _source(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _resolved(source, match[2])
        if target is None:
            return match[0]
        relative = posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{relative}{match[3] or ''}{match[4]}"

    def unlinked(match: re.Match[str]) -> str:
        folder = ROOT / posixpath.dirname(source) / match[2]
        return match[1] if folder.is_dir() and _resolved(source, match[2]) is None else match[0]

    parts = _CODE.split(markdown)
    return "".join(
        part if _CODE.fullmatch(part) else _LINK.sub(moved, _TO_FOLDER.sub(unlinked, part)) for part in parts
    )


def _made(path: str, config: MkDocsConfig) -> File:
    if path.endswith(".md"):
        return File.generated(config, _place(path), content=(ROOT / path).read_text())
    return File.generated(config, _place(path), abs_src_path=str(ROOT / path))


def _targets(path: str) -> list[str]:
    """Files of the repository that a page links to."""
    text = _CODE.sub("", (ROOT / path).read_text())
    return [target for match in _LINK.finditer(text) if (target := _resolved(path, match[2])) is not None]


def _resolved(source: str, link: str) -> str | None:
    """The file that a link of `source` names, as a path in the repository; a directory's README. None: no such file."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if "://" in link or target.startswith(".."):
        return None
    if (ROOT / target).is_dir():
        target += "/README.md"
    return target if (ROOT / target).is_file() else None


def _place(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path == FIRST:
        return "index.md"
    return path.removeprefix(DOCS) if path.startswith(DOCS) else ELSEWHERE + path


def _source(src_uri: str) -> str:
    """Where a page of the site is in the repository."""
    if src_uri == "index.md":
        return FIRST
    return src_uri.removeprefix(ELSEWHERE) if src_uri.startswith(ELSEWHERE) else DOCS + src_uri
