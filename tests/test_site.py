"""The documentation's site builds without a warning, and holds what its pages link to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="the site needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    assert not warnings
    return folder


def links_of(page):
    """Relative links and pictures of a page, without those of the theme."""
    found = re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text())
    return {link for link in found if "assets/" not in link}


@pytest.mark.slow
def test_every_page_of_the_documents_is_there_and_in_the_navigation(site):
    first = links_of(site / "index.html")
    for document in (ROOT / "docs").glob("*.md"):
        if document.name != "package.md":
            assert (site / f"{document.stem}.html").is_file()
            assert f"{document.stem}.html" in first


@pytest.mark.slow
def test_links_to_files_outside_docs_lead_to_copies_of_them(site):
    assert "repository/CITATION.cff" in links_of(site / "index.html")
    assert (site / "repository" / "CITATION.cff").read_bytes() == (ROOT / "CITATION.cff").read_bytes()
    assert (site / "repository" / "results" / "study" / "index.html").is_file()
    absent = [
        f"{page.relative_to(site)}: {link}"
        for page in site.rglob("*.html")
        for link in links_of(page)
        if page.name != "404.html" and not link.startswith("/") and not (page.parent / link).exists()
    ]
    assert not absent


@pytest.mark.slow
def test_the_reference_is_made_of_the_docstrings(site):
    text = re.sub(r"<[^>]+>", "", (site / "reference.html").read_text())
    assert "One dataset as the sweep wrote it, lazily." in text
    assert "Directory of the journal and the datasets." in text
    assert "::: " not in text
