"""The report as a reader meets it: opened from a file in a real browser that may reach nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import ALPHAS, BETAS, make_analysis
from rlvr_landscape_analysis.report import page as module
from rlvr_landscape_analysis.report.page import write_report
from rlvr_landscape_analysis.report.pictures import landscape_name

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEY = (10, 1)


def browser_path() -> str:
    """An installed browser. Without one: skip, but fail in continuous integration, which has to install one."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    missing = None if found else f"no browser on PATH ({', '.join(BROWSERS)})"
    try:
        import playwright.sync_api  # noqa: F401  # its driver is what is asked for
    except ImportError:
        missing = "playwright is not installed (extra dev)"
    if missing is None and found is not None:
        return found
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(f"continuous integration must open the report: {missing}")
    pytest.skip(str(missing))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # As root, and in containers, the browser's own sandbox cannot start.
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A report of two snapshots and two slices on an asymmetric grid of 4 × 5 points; of its charts the first three."""
    every = module.recipes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "recipes", lambda analysis: every(analysis)[:3])
        folder = tmp_path_factory.mktemp("report") / "a report"
        yield write_report(make_analysis((0, 10), (0, 1)), folder, animation=False)[0]


@dataclass
class Opened:
    """A page and everything that went wrong in it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Open a file: `visit(path, width=…, colors=…)`. Every request beside that file is recorded and refused."""
    contexts = []

    def go(path: Path, *, width: int = 1200, height: int = 900, colors: str = "light") -> Opened:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colors)
        contexts.append(context)
        opened = Opened(context.new_page())
        address = path.resolve().as_uri()

        def guard(route: Any) -> None:
            if route.request.url == address:
                route.continue_()
            else:
                opened.requests.append(route.request.url)
                route.abort()

        opened.page.route("**/*", guard)
        opened.page.on("pageerror", lambda error: opened.errors.append(f"script: {error}"))
        opened.page.on(
            "console",
            lambda message: opened.errors.append(message.text) if message.type in ("error", "warning") else None,
        )
        opened.page.goto(address)
        return opened

    yield go
    for context in contexts:
        context.close()


def readout(page: Any, key: tuple[int, int]) -> dict[str, str]:
    """What a landscape's readout says."""
    figure = f"#{landscape_name(key)}"
    names = page.locator(f"{figure} .readout dt").all_text_contents()
    values = page.locator(f"{figure} .readout dd").all_text_contents()
    return dict(zip(names, values, strict=True))


def number(text: str) -> float:
    """The number at the front of a value."""
    return float(text.split(" ")[0].replace("−", "-"))


def place(page: Any, key: tuple[int, int], alpha: float, beta: float) -> tuple[float, float]:
    """Where a point of the grid lies in the window; the axes end half a cell beyond the outermost points."""
    box = page.locator(f"#{landscape_name(key)} .probe").bounding_box()
    xs, ys = ((np.concatenate([[v[0] - (v[1] - v[0]) / 2], [v[-1] + (v[-1] - v[-2]) / 2]])) for v in (ALPHAS, BETAS))
    x = box["x"] + box["width"] * (alpha - xs[0]) / (xs[1] - xs[0])
    y = box["y"] + box["height"] * (ys[1] - beta) / (ys[1] - ys[0])
    return x, y


def test_the_page_loads_without_errors_and_without_the_network(visit, report):
    opened = visit(report)
    images = opened.page.evaluate(
        "() => [...document.images].map((i) => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) >= 6
    assert all(complete and natural > 100 and width > 100 for complete, natural, width in images)
    assert opened.errors == []
    assert opened.requests == []


def test_the_guards_would_notice(visit, report, tmp_path):
    """The same checks on a page with a script error, a broken image and a request."""
    page = report.read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("<main>", '<main><img src="data:image/png;base64,AAAA"><img src="other.png">'))
    opened = visit(broken)
    assert opened.errors  # the policy refuses the file, and says so
    widths = opened.page.evaluate("() => [...document.images].map((i) => i.naturalWidth)")
    assert widths[:2] == [0, 0]
    unguarded = tmp_path / "unguarded.html"
    unguarded.write_text(
        page.replace("Content-Security-Policy", "X-None").replace(
            "<main>", '<main><img src="http://127.0.0.1:9/a.png">'
        )
    )
    assert visit(unguarded).requests == ["http://127.0.0.1:9/a.png"]
    changed = tmp_path / "changed.html"
    changed.write_text(page.replace('"use strict";', '"use strict"; fail();'))
    assert visit(changed).errors


def test_the_policy_stops_what_is_slipped_in(visit, report, tmp_path):
    page = tmp_path / "slipped.html"
    page.write_text(report.read_text().replace("<main>", "<main><script>document.title = 'taken'</script>"))
    opened = visit(page)
    assert opened.page.title() != "taken"
    assert opened.page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert opened.requests == []


def test_a_sentence_per_claim_and_one_large_map_come_first(visit, report):
    opened = visit(report)
    tops = opened.page.evaluate(
        "() => ['claims', 'evidence', 'tables', 'provenance', 'glossary'].map((id) => "
        "document.getElementById(id).getBoundingClientRect().top)"
    )
    assert tops == sorted(tops)
    sentences = opened.page.locator("header .opening li a").all_text_contents()
    assert sentences == ["T1", "T2", "T3"], "one sentence per claim before anything else"
    first = opened.page.locator("main > *")
    assert [first.nth(i).get_attribute("id") for i in (0, 1)] == [landscape_name(KEY), "claims"]
    assert [badge.strip() for badge in opened.page.locator(".claim .badge").all_text_contents()] == [
        "supported",
        "undecided at this sample size",
        "not supported",
    ]


@pytest.mark.parametrize(("i", "j"), [(0, 0), (3, 0), (0, 4), (2, 1), (3, 3)])
def test_pointing_at_a_point_shows_its_values(visit, report, i, j):
    values = make_analysis((0, 10), (0, 1)).maps[KEY]
    page = visit(report).page
    page.locator(f"#{landscape_name(KEY)}").scroll_into_view_if_needed()
    page.mouse.move(*place(page, KEY, float(ALPHAS[i]), float(BETAS[j])))
    shown = readout(page, KEY)
    here = values.isel(alpha=i, beta=j)
    assert number(shown["α"]) == pytest.approx(ALPHAS[i])
    assert number(shown["β"]) == pytest.approx(BETAS[j])
    for name, variable in (
        ("radius", "radius"),
        ("reward", "reward"),
        ("KL, nat", "kl"),
        ("surrogate", "surrogate"),
        ("difference from the origin", "difference"),
    ):
        exact = float(here[variable])
        error = float(here[f"{variable}_se"]) if f"{variable}_se" in here else 1e-4
        assert number(shown[name]) == pytest.approx(exact, rel=1e-3, abs=error / 20), name
    error = float(shown["reward"].split("± ")[1])
    assert error == pytest.approx(float(here["reward_se"]), rel=0.05)
    # The pin lies on the point.
    pin = page.locator(f"#{landscape_name(KEY)} .pin").bounding_box()
    at = place(page, KEY, float(ALPHAS[i]), float(BETAS[j]))
    assert abs(pin["x"] + pin["width"] / 2 - at[0]) < 2
    assert abs(pin["y"] + pin["height"] / 2 - at[1]) < 2
    # Another one still shows its origin.
    other = make_analysis((0, 10), (0, 1)).maps[0, 0].sel(alpha=0, beta=0)
    assert number(readout(page, (0, 0))["reward"]) == pytest.approx(float(other["reward"]), abs=1e-3)


def test_the_overlay_lies_on_the_axes_of_the_picture(visit, report):
    """Pixels tell: just inside the overlay's edges is colour, just outside is the white page of the figure."""
    page = visit(report).page
    inside, outside = page.evaluate(
        """(id) => {
          const image = document.querySelector(`#${id} img`);
          const canvas = document.createElement('canvas');
          canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
          const context = canvas.getContext('2d');
          context.drawImage(image, 0, 0);
          const frame = image.getBoundingClientRect();
          const box = document.querySelector(`#${id} .probe`).getBoundingClientRect();
          const scale = image.naturalWidth / frame.width;
          const at = (x, y) => [...context.getImageData((x - frame.left) * scale, (y - frame.top) * scale, 1, 1).data];
          const ring = (d) => [
            at(box.left - d, box.top + 0.37 * box.height), at(box.right + d, box.top + 0.37 * box.height),
            at(box.left + 0.37 * box.width, box.top - d), at(box.left + 0.37 * box.width, box.bottom + d)];
          return [ring(-4), ring(4)];
        }""",
        landscape_name(KEY),
    )
    assert all(min(pixel[:3]) < 200 for pixel in inside)
    assert all(min(pixel[:3]) > 225 for pixel in outside)


def test_the_keyboard_reads_values_too(visit, report):
    page = visit(report).page
    page.locator(f"#{landscape_name(KEY)} .probe").focus()
    assert number(readout(page, KEY)["α"]) == number(readout(page, KEY)["β"]) == 0
    for key in ("ArrowRight", "ArrowUp", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    shown = readout(page, KEY)
    assert (number(shown["α"]), number(shown["β"])) == (0.05, 0.15)
    page.keyboard.press("ArrowLeft")
    assert number(readout(page, KEY)["α"]) == 0


def test_what_is_missing_is_said_and_hostile_text_stays_text(visit, tmp_path):
    opened = visit(write_report(make_analysis((0,), (0,), defined=False), tmp_path, animation=False)[0])
    page = opened.page
    assert opened.errors == []
    assert page.locator("b[onmouseover]").count() == 0
    page.locator("#landscape_step000000_slice0 .probe").focus()
    for key in ("ArrowLeft", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    shown = readout(page, (0, 0))
    assert shown["reward"] == "not defined"
    assert "surrogate" not in shown
    assert "nan" not in page.inner_text("body").lower().split()


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_its_window(visit, report, width):
    page = visit(report, width=width).page
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_text_can_be_read(visit, report, colors):
    """Contrast of text and ground, by WCAG's formula, for the kinds of text that the page has."""
    page = visit(report, colors=colors).page
    ratios = page.evaluate(
        """() => {
          const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
            .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
          const ground = (e) => { while (e) { const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$|transparent/.test(c)) return c; e = e.parentElement; } return 'rgb(255, 255, 255)'; };
          const found = {};
          for (const s of ['p', 'a', 'td', 'th', '.badge', 'figcaption', '.lede', 'dt', 'dd', 'code', '.files'])
            for (const e of document.querySelectorAll(s)) {
              const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
              found[s] = Math.min(found[s] ?? 99, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)); }
          return found;
        }"""
    )
    assert len(ratios) >= 10
    assert min(ratios.values()) >= 4.5, ratios


@pytest.mark.slow
def test_real_snapshots_give_a_whole_report(visit, tmp_path):
    """Three snapshots of a GRPO run of the shipped policy, by the command a user types."""
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "data" / "laptop", run)
    done = subprocess.run(
        [sys.executable, "-m", "rlvr_landscape_analysis", str(run), "--resamples", "500", "--threshold", "0.75"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "T1 not measurable" in done.stdout
    assert "−0.28 within ±0.075, −0.85 within ±0.15, −0.92 within ±0.3 at step 10" in done.stdout
    assert "T2 not measurable" in done.stdout
    opened = visit(run / "report" / "report.html")
    assert opened.errors == []
    assert opened.requests == []
    images = opened.page.locator("img")
    assert images.count() >= 15
    for i in range(images.count()):
        images.nth(i).scroll_into_view_if_needed()
        assert images.nth(i).evaluate("e => e.complete && e.naturalWidth > 0")
    assert "synthetic" not in opened.page.inner_text("body").lower()
    assert (run / "report" / "figures" / "landscape.gif").stat().st_size > 0
