"""The report: complete in itself, true to the analysis, safe with hostile data, and the command that writes it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from factory import ALPHAS, BETAS, NASTY, make_analysis
from rlvr_landscape_analysis.__main__ import main, parser
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.report import page as module
from rlvr_landscape_analysis.report import pictures
from rlvr_landscape_analysis.report.page import json_block, write_report
from rlvr_landscape_analysis.report.pictures import landscape_name, shown_landscapes
from rlvr_landscape_analysis.report.recipes import Recipe
from rlvr_landscape_analysis.synthetic import write_run

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """A page as elements, visible text and problems of nesting."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.blocks: dict[str, str] = {}
        self.problems: list[str] = []
        self._stack: list[tuple[str, str]] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag, _ in self._stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._stack.append((tag, dict(attrs).get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        if not self._stack or self._stack.pop()[0] != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes nothing")

    def handle_data(self, data: str) -> None:
        tag, name = self._stack[-1] if self._stack else ("", "")
        if tag in ("script", "style"):
            key = name or tag
            self.blocks[key] = self.blocks.get(key, "") + data
        else:
            self.text.append(data)

    @property
    def data(self) -> dict:
        return json.loads(self.blocks["landscape-data"])

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report of a poor run with hostile text in it."""
    folder = tmp_path_factory.mktemp("full")
    write_report(make_analysis((0, 10), (0,), defined=False), folder, now=NOW)
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one figure beside the landscapes, for speed."""
    every = module.recipes
    monkeypatch.setattr(module, "recipes", lambda analysis: every(analysis)[1:2])


def test_the_page_is_well_formed(full):
    page = Page(full / "report.html")
    assert page.problems == []
    ids = page.attributes("id")
    assert len(set(ids)) == len(ids)


def test_the_page_needs_nothing_but_itself(full):
    page = Page(full / "report.html")
    for name in ("src", "srcset", "action", "data", "poster", "background"):
        for value in page.attributes(name):
            assert value.startswith("data:image/png;base64,"), value[:80]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form")]
    for target in page.attributes("href"):
        if target.startswith("#"):
            assert target[1:] in page.attributes("id")
        else:
            assert not re.match(r"[a-z]+:|//", target), target
            assert (full / target).is_file(), target
    assert not re.search(r"url\(|@import", page.blocks["style"])
    assert not re.search(r"fetch|XMLHttp|import\(|https?:", page.blocks["script"])
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_the_policy_names_exactly_this_style_and_script(full):
    page = Page(full / "report.html")
    (policy,) = [
        a["content"] for t, a in page.tags if t == "meta" and "Content-Security" in (a.get("http-equiv") or "")
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for directive, block in (("style-src", "style"), ("script-src", "script")):
        digest = base64.b64encode(hashlib.sha256(page.blocks[block].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    # The policy comes before anything that it governs.
    assert [tag for tag, _ in page.tags[:4]] == ["html", "head", "meta", "meta"]


def test_hostile_text_stays_text(full):
    page = Page(full / "report.html")
    text = "".join(page.text)
    assert text.count(NASTY) >= 3  # an attribute, a claim, a note and footnotes
    assert page.source.count("</script>") == 2
    assert "<b onmouseover" not in page.source


def test_no_nan_is_shown(full):
    text = " ".join(Page(full / "report.html").text)
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", text)
    assert "not defined" in text


def test_claims_come_first_and_say_all(full, tmp_path, few):
    page = Page(write_report(make_analysis(), tmp_path, animation=False, now=NOW)[0])
    text = "".join(page.text)
    order = [
        text.index(word) for word in ("It is −0.30 [−0.40, −0.20].", "Over training", "Correlations over the slice")
    ]
    order += [text.index(word) for word in ("configuration_sha256", "Linear partial and smooth")]
    assert order == sorted(order)
    badges = [attrs["class"] for _, attrs in page.tags if "badge" in (attrs.get("class") or "")]
    # In the summary, then with the whole claim.
    assert badges == ["badge supported", "badge undecided", "badge not-supported"] * 2
    assert "about 12\u202f000 prompts, if the estimate stays" in text
    assert "90%" in text  # the level of this analysis
    holes = Page(full / "report.html")
    badges = [attrs["class"] for _, attrs in holes.tags if "badge" in (attrs.get("class") or "")]
    # What was not measured is one line of the summary.
    assert badges == ["badge undecided", "badge undecided", "badge not-measurable"]
    assert "Of the claims that are tested, T2 cannot be answered from what was measured; what it needs." in "".join(
        holes.text
    )


def test_the_first_lines_say_what_the_picture_shows(full):
    head, _, rest = (full / "report.html").read_text().partition("<main>")
    assert "The map shows policies around the checkpoint (the cross). Each square is one of them" in head
    assert rest.strip().startswith('<figure class="leading map"')


def test_provenance_is_whole(full):
    text = "".join(Page(full / "report.html").text)
    for attribute in ("configuration_sha256", "snapshot_sha256", "prompts_sha256", "servers", "packages", "git_commit"):
        assert attribute in text
    assert f"{10:064x}" in text
    assert '"vllm": "0.32.0"' in text
    assert "200 resamples of the prompts, seed 3, intervals at 90%" in text
    assert "step 0: 3% of the rollouts failed." in text


def test_the_glossary_explains_every_linked_column(full):
    ids = Page(full / "report.html").attributes("id")
    assert {f"term-{term}" for term in module.COLUMN_TERMS.values()} <= set(ids)


def test_values_under_the_pointer_are_those_of_the_maps(full):
    data = Page(full / "report.html").data
    analysis = make_analysis((0, 10), (0,), defined=False)
    assert set(data) == {landscape_name(key) for key in analysis.maps}
    names = {"radius": "radius", "reward": "reward", "KL, nat": "kl", "difference from the origin": "difference"}
    for key, values in analysis.maps.items():
        here = data[landscape_name(key)]
        assert here["alpha"] == ALPHAS.tolist()
        assert here["beta"] == BETAS.tolist()
        assert [row["name"] for row in here["rows"]] == [
            "radius",
            "reward",
            "difference from the origin",
            "KL, nat",
        ]  # and no surrogate: it was not measured
        for row in here["rows"]:
            exact = values[names[row["name"]]].transpose("alpha", "beta").values
            shown = np.array(row["values"], dtype=float)
            np.testing.assert_allclose(shown, exact, rtol=1e-5)
            assert (row["values"][0][0] is None) == bool(np.isnan(exact[0, 0]))
        errors = {row["name"]: row["errors"] for row in here["rows"]}
        assert errors["radius"] is None
        assert errors["reward"] == [[None] * len(BETAS)] * len(ALPHAS)
        np.testing.assert_allclose(errors["KL, nat"], values["kl_se"].values, rtol=1e-5)


def test_the_overlay_lies_within_the_picture_with_the_aspect_of_the_grid(full):
    page = Page(full / "report.html")
    name = landscape_name((0, 0))
    here = page.data[name]
    left, bottom, width, height = here["axes"]
    assert 0 < left < left + width < 1
    assert 0 < bottom < bottom + height < 1
    assert here["xlim"] == pytest.approx([-0.15, 0.275])
    assert here["ylim"] == pytest.approx([-0.4, 0.175])
    image = next(
        {k: str(v) for k, v in a.items()}
        for t, a in page.tags
        if t == "img" and a["alt"] == "Reward landscape, step 0, slice 0"
    )
    aspect = (height * float(image["height"])) / (width * float(image["width"]))
    assert aspect == pytest.approx(0.575 / 0.425, rel=0.02)


def test_maps_in_any_order_give_the_same_values():
    from rlvr_landscape_analysis import figures

    values = make_analysis().maps[1, 0]
    turned = values.isel(alpha=slice(None, None, -1), beta=[2, 0, 4, 1, 3]).transpose("beta", "alpha")
    found = [pictures.hover_data(v, figures.reward_landscape(v)["ax"]) for v in (values, turned)]
    assert found[0]["rows"] == found[1]["rows"]
    assert found[0]["alpha"] == found[1]["alpha"]


def test_json_cannot_end_its_element():
    text = json_block({"</script>": "<!-- & \u2028 -->"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script>": "<!-- & \u2028 -->"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_block([float("nan")])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_equal_analyses_give_equal_files(tmp_path, few):
    later = datetime(2027, 1, 1, tzinfo=UTC)
    for name, now in (("a", NOW), ("b", later)):
        write_report(make_analysis((0, 1), (0,)), tmp_path / name, now=now)
    one, other = (contents(tmp_path / name) for name in "ab")
    assert {name for name in one | other if one.get(name) != other.get(name)} == {"report.html"}
    stamp, moved = b"2026-01-02T03:04:05Z", b"2027-01-01T00:00:00Z"
    assert one["report.html"].replace(stamp, moved) == other["report.html"]
    assert one["report.html"].count(stamp) == 2  # for machines and for readers, side by side


def test_an_old_report_is_replaced_and_other_files_stay(tmp_path, few):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "mine.csv").write_text("mine")
    (tmp_path / "report.html").write_text("old")
    written = write_report(make_analysis((0, 1), (0,)), tmp_path, now=NOW)
    assert (tmp_path / "tables" / "mine.csv").read_text() == "mine"
    assert "old" not in (tmp_path / "report.html").read_text()[:10]
    assert written[0] == tmp_path / "report.html"
    assert len(set(written)) == len(written)
    assert {str(p.relative_to(tmp_path)) for p in written} == set(contents(tmp_path)) - {"tables/mine.csv"}
    assert (tmp_path / "figures" / "landscape.gif").read_bytes()[:4] == b"GIF8"


def test_a_place_that_cannot_hold_a_report_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AnalysisError, match="choose another --out"):
        write_report(make_analysis((0,), (0,)), tmp_path / "file")


def test_which_landscapes_are_shown():
    assert shown_landscapes([(10, 1), (0, 0)]) == [(0, 0), (10, 1)]
    several = [(step, seed) for step in range(6) for seed in range(3)]
    assert shown_landscapes(several) == [(step, 0) for step in range(6)]
    many = shown_landscapes([(step, seed) for step in range(0, 250, 10) for seed in (4, 7)])
    assert len(many) == pictures.MAX_LANDSCAPES
    assert many[0] == (0, 4)
    assert many[-1] == (240, 4)


def test_a_large_run_stays_a_small_page(tmp_path, monkeypatch, few):
    monkeypatch.setattr(pictures, "MAX_LANDSCAPES", 2)
    monkeypatch.setattr(pictures.shown_landscapes, "__defaults__", (2,))
    page = Page(write_report(make_analysis((0, 1, 10), (0,)), tmp_path, animation=False, now=NOW)[0])
    assert set(page.data) == {landscape_name((0, 0)), landscape_name((10, 0))}
    assert "2 of 3 landscapes are shown here" in "".join(page.text)
    assert "figures/landscape_step000001_slice0.pdf" in page.attributes("href")
    monkeypatch.setattr(pictures, "MAX_INLINE_BYTES", 0)
    page = Page(write_report(make_analysis((0,), (0,)), tmp_path, animation=False, now=NOW)[0])
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "Too large for this page; see the file." in "".join(page.text)


def test_what_cannot_be_drawn_is_named(tmp_path, monkeypatch):
    def refuse() -> dict:
        raise AnalysisError("there is <nothing> to draw")

    monkeypatch.setattr(module, "recipes", lambda analysis: [Recipe("x", "A figure", "Words.", refuse)])
    page = Page(write_report(make_analysis((0,), (0,)), tmp_path, now=NOW)[0])
    assert "A figure: there is <nothing> to draw." in "".join(page.text)


def test_a_bare_analysis_still_gives_a_report(tmp_path, few):
    analysis = make_analysis((3,), (0,))
    analysis.diagnostics, analysis.slices, analysis.claims, analysis.profiles = {}, None, [], {}
    analysis.over_training = analysis.over_training.drop_vars([str(n) for n in analysis.over_training.data_vars])
    analysis.training = analysis.training[["reward"]]
    analysis.maps[3, 0] = analysis.maps[3, 0][["reward"]].assign_attrs(synthetic="mixed")
    text = "".join(Page(write_report(analysis, tmp_path, now=NOW)[0]).text)
    assert "No claim was tested." in text
    assert "Synthetic data." in text


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, steps=(0, 1), points=(5, 3), prompts=16, rollouts=2)
    return folder


def test_the_command_writes_figures_and_report(run, capsys, few):
    assert main([str(run), "--resamples", "100", "--no-animation"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("next: open "), "and nothing else"
    assert printed.err.count("\n") == 1
    figures = [line.removeprefix("figure ") for line in printed.out.splitlines() if line.startswith("figure ")]
    assert sorted(figures) == sorted(str(path) for path in (run / "figures").iterdir())
    assert [Path(path).name for path in figures] == [
        f"landscape_step{step:06d}_slice0.{kind}" for step in (0, 1) for kind in ("pdf", "png")
    ]
    for claim in ("T1", "T2", "T3"):
        assert re.search(rf"^{claim} (supported|not supported|undecided|not measurable)", printed.out, re.MULTILINE)
    assert printed.out.splitlines()[-1] == f"report {run / 'report' / 'report.html'}"
    page = Page(run / "report" / "report.html")
    assert page.problems == []
    assert "100 resamples of the prompts, seed 0, intervals at 95%" in "".join(page.text)
    assert not (run / "report" / "figures" / "landscape.gif").exists()


def test_the_command_takes_steps_and_settings(run, tmp_path, few):
    options = ["--steps", "1", "--seed", "7", "--level", "0.9", "--resamples", "150"]
    assert main([str(run), "--out", str(tmp_path / "elsewhere"), *options]) == 0
    page = Page(tmp_path / "elsewhere" / "report.html")
    assert set(page.data) == {landscape_name((1, 0))}
    assert "150 resamples of the prompts, seed 7, intervals at 90%" in "".join(page.text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resamples", "10"], "10 resamples are too few"),
        (["--level", "1.5"], "confidence level 1.5"),
        (["--steps", "0", "77"], "no finished dataset of step 77"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, options, message, capsys):
    assert main([str(run), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_wrong_directory_is_named(tmp_path, capsys):
    for folder in (tmp_path / "absent", tmp_path):
        assert main([str(folder)]) == 2
        assert f"error: {folder}" in capsys.readouterr().err


def test_the_command_line_is_frozen():
    options = {option for action in parser()._actions for option in action.option_strings}
    assert options == {
        *("-h", "--help", "--out", "--resamples", "--seed", "--level", "--threshold", "--steps", "--no-animation"),
    }


def test_help_loads_no_statistics():
    code = (
        "import sys; from rlvr_landscape_analysis.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'scipy.stats', 'matplotlib', 'rlvr_landscape_analysis.report.page'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")


def test_the_page_s_parts_are_in_the_package():
    folder = Path(module.__file__).parent / "assets"
    parts = ["comparison.html", "glossary.html", "macros.html", "report.css", "report.js", "template.html"]
    assert sorted(os.listdir(folder)) == parts


@pytest.mark.parametrize(("steps", "panels"), [((0,), set()), ((0, 10), {"panels", "panels_shared"})])
def test_no_picture_is_shown_twice(tmp_path, monkeypatch, steps, panels):
    """A single landscape stands alone; of several, the page shows each once and all of them on one scale."""
    every = module.recipes
    monkeypatch.setattr(module, "recipes", lambda analysis: [one for one in every(analysis) if not one.detail])
    page = Page(write_report(make_analysis(steps, (0,)), tmp_path, animation=False, now=NOW)[0])
    images = page.attributes("src")
    assert len(set(images)) == len(images) >= len(steps)
    assert {path.stem for path in (tmp_path / "figures").glob("panels*.png")} == panels
    shown = {name.removeprefix("figure-") for name in page.attributes("id") if name.startswith("figure-panels")}
    assert shown == panels - {"panels"}
    for name in panels:
        assert f"figures/{name}.pdf" in page.attributes("href")
    if len(steps) == 1:
        return
    landscapes, charts = page.source.index('class="gallery maps"'), page.source.index('class="gallery charts"')
    assert landscapes < charts
