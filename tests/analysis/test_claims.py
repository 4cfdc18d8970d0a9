"""Verdicts: rules, what they rest on, and that they are right where the truth is known."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from rlvr_landscape_analysis import AnalysisError, Bootstrap, synthetic, synthetic_designs
from rlvr_landscape_analysis.evidence import RunEvidence, analyse_evidence, check_runs, open_evidence
from rlvr_landscape_analysis.report.page import write_report
from rlvr_landscape_analysis.results import NOT_MEASURABLE, NOT_SUPPORTED, SUPPORTED, UNDECIDED
from rlvr_landscape_analysis.statistics.claims import (
    all_claims,
    claim_t1,
    claim_t2,
    claim_t3,
    decide,
)
from rlvr_landscape_analysis.statistics.comparable import common_radii
from rlvr_landscape_analysis.statistics.estimates import Estimate, combination, needed
from rlvr_landscape_analysis.statistics.ranges import crop, plain_by_range
from rlvr_landscape_analysis.statistics.two_way import means, prompt_means
from rlvr_landscape_analysis.statistics.wording import sampled, three_digits
from rlvr_landscape_analysis.synthetic_designs import CensusTruth, PathTruth

QUICK = Bootstrap(resamples=200)
DATA = Path(__file__).parent / "data"
START, LATER = (0.004, 0.008, 0.016, 0.03), (0.4, 0.8, 1.6, 3.0)


def run_of(
    correlations: dict[int, float], *, name="run", seed=0, mode="verifier", spread=0.06, **options
) -> RunEvidence:
    """Censuses whose correlation over directions is known by step; step 0 in units of θ, at the same relative radii."""
    options = {"pairs": 64, "prompts": 64, "rollouts": 8, **options}
    run = RunEvidence(name)
    for step, correlation in correlations.items():
        unit, radii = ("theta", START) if step == 0 else ("displacement", LATER)
        run.censuses[step] = synthetic_designs.census(
            CensusTruth(correlation=correlation, spread=spread), unit=unit, radii=radii, step=step, seed=seed, **options
        ).assign_attrs(reward_mode=mode)
    return run


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.4, -0.2), SUPPORTED),
        ((-0.05, 0.05), NOT_SUPPORTED),
        ((0.2, 0.4), NOT_SUPPORTED),
        ((-0.3, 0.1), UNDECIDED),
        ((-1.0, 1.0), UNDECIDED),
        ((np.nan, np.nan), UNDECIDED),
    ],
)
def test_verdicts_follow_their_rule(interval, verdict):
    assert decide(interval) == verdict


def test_an_effect_inside_the_negligible_band_is_not_supported():
    """What was once called supported: a contribution of −0.025 [−0.029, −0.021]."""
    assert decide((-0.029, -0.021)) == NOT_SUPPORTED


def test_what_would_decide_shrinks_each_part_of_the_variance():
    rng = np.random.default_rng(0)
    prompts = prompt_means(rng.normal(size=40), "p")
    half = float(prompts.quantile(0.95) * np.sqrt(prompts.variance()))
    assert needed(prompts, half / 2, 0.95) == (None, pytest.approx(160, rel=0.1))
    both = means(rng.normal(size=(20, 1)) + 0 * rng.normal(size=(1, 30)), "d", "p")
    half = float(both.quantile(0.95) * np.sqrt(both.variance()))
    directions, n = needed(both, half / 2, 0.95)
    assert directions == pytest.approx(80, rel=0.1)
    assert n == 30
    assert needed(both, 1e-9, 0.95) == (None, None)
    assert needed(None, 0.1, 0.95) == (None, None)


def test_combinations_know_what_estimates_share():
    rng = np.random.default_rng(0)
    common = rng.normal(size=50)
    one, other = (prompt_means(0.3 + 0.1 * (common + 0.1 * rng.normal(size=50)), "p") for _ in range(2))

    def estimate(part):
        low, high = part.interval()
        return Estimate(float(part.value), (float(low), float(high)), part, 1)

    value, (low, high) = combination([estimate(one), estimate(other)], [1.0, -1.0])
    exact = (one - other).interval()
    assert value == pytest.approx(float(one.value - other.value))
    assert high - low < 0.5 * float(one.interval()[1] - one.interval()[0])
    assert high - low >= 0.9 * float(exact[1] - exact[0])
    hole = Estimate(np.nan, (-1.0, 1.0), None, 1)
    assert combination([estimate(one), hole], [1.0, -1.0])[1] == (-2.0, 2.0)


def test_t1_is_supported_where_training_made_the_correlation():
    claim = claim_t1([run_of({0: 0.0, 10: -0.8, 40: -0.8})], [], QUICK)
    assert claim.verdict == SUPPORTED, claim.sentence
    assert (claim.runs, claim.directions, claim.prompts) == (1, 128, 64)
    assert claim.nearest == pytest.approx(0.4)
    assert sampled(claim).startswith("one run, 128 random directions")
    assert "step 0" in claim.overturn


def test_a_census_in_a_part_of_the_weight_space_decides_nothing_about_all_of_it():
    run = run_of({0: 0.0, 10: -0.8}, pairs=16)
    for data in run.censuses.values():
        data.attrs["direction_kind"] = "lora"
    for claim in (claim_t1([run], [], QUICK), claim_t2([run], QUICK)):
        assert claim.verdict == NOT_MEASURABLE
        assert "of the kind lora only, a part of the weight space" in claim.sentence
    assert any("'lora'" in note for note in analyse_evidence(run, bootstrap=QUICK).notes)


def test_an_untrained_policy_does_not_pass_t1():
    """The same correlation around step 0: nothing that training did."""
    same = claim_t1([run_of({0: -0.8, 10: -0.8, 40: -0.8})], [], QUICK)
    assert same.verdict != SUPPORTED, same.sentence
    alone = claim_t1([run_of({0: -0.8})], [], QUICK)
    assert alone.verdict == NOT_MEASURABLE
    assert "only snapshot 0" in alone.sentence
    without = claim_t1([run_of({10: -0.8})], [], QUICK)
    assert without.verdict == UNDECIDED
    assert "Nothing says yet whether training made it" in without.sentence
    assert without.directions_needed is None


def test_random_rewards_take_t1_away():
    run = run_of({0: 0.0, 10: -0.8})
    control = run_of({10: -0.8}, name="random", seed=0, mode="random")
    claim = all_claims([run, control], settings=QUICK)[0]
    assert claim.verdict != SUPPORTED
    assert "from runs on random rewards" in claim.sentence
    assert claim.runs == 1


def test_t1_is_not_supported_where_there_is_nothing():
    claim = claim_t1([run_of({0: 0.0, 10: 0.0, 40: 0.0}, pairs=128)], [], QUICK)
    assert claim.verdict == NOT_SUPPORTED, claim.sentence


def test_a_true_zero_with_the_spread_of_real_directions_is_not_supported_in_more_than_five_percent():
    """Directions differ 6 times as much as prompts' noise does, as seven real slices did; 32 pairs × 4 radii."""
    supported = 0
    for seed in range(60):
        run = run_of({0: 0.0, 10: 0.0, 40: 0.0}, seed=seed, pairs=32, rollouts=2, spread=0.08)
        supported += claim_t1([run], [], QUICK).verdict == SUPPORTED
    assert supported <= 3


def test_t1_says_when_no_radius_is_reached():
    run = run_of({0: 0.0, 10: -0.8})
    far = run.censuses[10]
    run.censuses[10] = far.assign(displacement_radius=far["displacement_radius"] * 20)
    claim = claim_t1([run], [], QUICK)
    assert claim.verdict == NOT_MEASURABLE
    assert "the nearest policy lies 8 displacements away" in claim.sentence
    assert any("nearest policy lies 8 displacements" in note for note in analyse_evidence(run).notes)


def test_t2_compares_steps_at_the_same_relative_radii():
    early = claim_t2([run_of({0: 0.0, 1: -0.4, 10: -0.8, 40: -0.8})], QUICK)
    assert early.verdict == SUPPORTED, early.sentence
    late = claim_t2([run_of({0: 0.0, 10: 0.0, 40: -0.9}, pairs=128)], QUICK)
    assert late.verdict == NOT_SUPPORTED, late.sentence
    missing = claim_t2([run_of({0: 0.0, 40: -0.9})], QUICK)
    assert missing.verdict == NOT_MEASURABLE
    assert "a step from 1 to 10" in missing.sentence
    apart = run_of({0: 0.0, 10: -0.8})
    other = apart.censuses[10]
    apart.censuses[10] = other.assign(realised_step=other["realised_step"] * 1000)
    assert "no relative radius in common" in claim_t2([apart], QUICK).sentence


def test_common_radii_lie_in_all_ranges():
    points = list(run_of({0: 0.0, 10: 0.0}, pairs=4, prompts=8).points.values())
    np.testing.assert_allclose(common_radii(points), START)


def boundaries(start: np.ndarray, end: np.ndarray, rollouts=64) -> RunEvidence:
    run = RunEvidence("run")
    for step, rates in ((0, start), (40, end)):
        run.boundaries[step] = synthetic_designs.boundary(rates, rollouts=rollouts, step=step)
    return run


def test_t3_follows_what_was_done():
    start = np.repeat([0.3, 0.0], 60)
    sharpened, discovered = np.repeat([0.7, 0.0], 60), np.concatenate([start[:60], np.repeat([0.5, 0.0], 30)])
    claim = claim_t3([boundaries(start, sharpened)], QUICK)
    assert claim.verdict == SUPPORTED, claim.sentence
    assert "pass@64" in claim.sentence
    claim = claim_t3([boundaries(start, discovered)], QUICK)
    assert claim.verdict == NOT_SUPPORTED, claim.sentence
    still = claim_t3([boundaries(start, start)], QUICK)
    assert still.verdict == UNDECIDED, still.sentence
    fallen = claim_t3([boundaries(sharpened, start)], QUICK)
    assert fallen.verdict == NOT_MEASURABLE
    assert "pass@1 fell" in fallen.sentence
    few = claim_t3([boundaries(start, sharpened, rollouts=8)], QUICK)
    assert few.verdict == NOT_MEASURABLE
    assert "k = 16" in few.sentence
    assert claim_t3([], QUICK).verdict == NOT_MEASURABLE


def test_t3_needs_room_in_which_exploration_could_show():
    """pass@64 of rates of 0.3 is 1 before training: that it does not rise says nothing."""
    start, later = np.repeat([0.3, 0.04], 60), np.repeat([0.7, 0.04], 60)
    claim = claim_t3([boundaries(start, later)], QUICK)
    passed = {k: 1 - np.mean((1 - start) ** k) for k in (16, 32, 64)}
    gain = np.mean(later - start)
    (k,) = [k for k in passed if 1 - passed[k] > 0.4 * gain >= 1 - passed.get(2 * k, 1)]
    assert k == 32, "at 64, what is left is less than 0.4 times the gain"
    assert f"and pass@{k} by" in claim.sentence
    easy = claim_t3([boundaries(np.full(60, 0.3), np.full(60, 0.7))], QUICK)
    assert easy.verdict == NOT_MEASURABLE
    assert "pass@16 is 0.99" in easy.sentence
    assert "harder tasks or a higher pass threshold" in easy.sentence
    # Room for 0.4 times the gain, but not for a rise that could be told from it.
    start, later = np.repeat([0.3, 0.3, 0.0], [28, 28, 8]), np.repeat([0.9, 0.3, 0.0], [28, 28, 8])
    assert 0 < 1 - 0.875 * (1 - 0.7**16) - 0.4 * np.mean(later - start) < 0.03
    close = claim_t3([boundaries(start, later)], QUICK)
    assert close.verdict == NOT_MEASURABLE, close.sentence
    assert "could be told from 0.4 times the gain" in close.sentence
    start = np.repeat([0.3, 0.04], 60)
    harder = [boundaries(np.full(60, 0.3), np.full(60, 0.7)), boundaries(start, np.repeat([0.3, 0.6], 60))]
    assert claim_t3(harder[1:], QUICK).verdict == NOT_SUPPORTED


def test_t3_of_several_runs_is_about_runs():
    rng = np.random.default_rng(0)
    start = np.repeat([0.3, 0.0], 60)
    runs = []
    for i in range(3):
        run = boundaries(start, np.clip(start + (start > 0) * rng.uniform(0.1, 0.5), 0, 1))
        run.name = f"run {i}"
        runs.append(run)
    claim = claim_t3(runs, QUICK)
    single = claim_t3(runs[:1], QUICK)
    assert claim.runs == 3
    assert claim.interval[1] - claim.interval[0] > single.interval[1] - single.interval[0]
    with pytest.raises(AnalysisError, match="two runs are called 'run 0'"):
        check_runs([runs[0], runs[0]])


def write(run: RunEvidence, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for design, group in (("census", run.censuses), ("path", run.paths), ("boundary", run.boundaries)):
        for step, data in group.items():
            data.to_netcdf(folder / f"{design}_step{step:06d}.nc")


@pytest.mark.slow
def test_a_directory_with_all_designs_is_read_and_claimed(tmp_path):
    run = run_of({0: 0.0, 10: -0.8}, pairs=16)
    run.boundaries = boundaries(np.repeat([0.3, 0.0], 32), np.repeat([0.7, 0.0], 32)).boundaries
    run.paths[10] = synthetic_designs.path({"displacement": PathTruth(kl=0.5)}, rollouts=8)
    write(run, tmp_path)
    synthetic.write_run(tmp_path, steps=(0, 10), points=5, prompts=32)
    found = rla.analyse_run(tmp_path, bootstrap=QUICK)
    assert found.evidence is not None
    assert sorted(found.evidence.census) == [0, 10]
    assert sorted(found.evidence.change) == [40]
    assert np.isfinite(found.evidence.path[10]["advantage"].sel(position=1.0)).all()
    assert "back along displacement" in found.claims[2].sentence
    assert "plain correlation over a 2-D slice" in found.claims[0].sentence
    page = write_report(found, tmp_path / "report", animation=False)[0].read_text()
    assert "Share of random directions that improve the reward" in page
    assert "Would overturn it" in page
    for name in ("frontier", "correlation_by_radius", "density_by_radius", "curvature", "boundary"):
        assert (tmp_path / "report" / "figures" / f"{name}.pdf").is_file()
    only = open_evidence(tmp_path, steps={10})
    assert (sorted(only.censuses), sorted(only.boundaries)) == ([10], [])
    (tmp_path / "census_step000010.nc").rename(tmp_path / "census_step000020.nc")
    with pytest.raises(AnalysisError, match="its name says 20"):
        open_evidence(tmp_path)


def test_datasets_on_different_rewards_are_told_apart():
    run = run_of({0: 0.0, 10: 0.0}, pairs=4, prompts=8)
    run.censuses[10] = run.censuses[10].assign_attrs(reward_mode="random")
    with pytest.raises(AnalysisError, match="different rewards"):
        all_claims([run], settings=QUICK)


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "shares"),
    [(DATA / "laptop", (0.25, 0.5, 1.0)), (DATA / "club", (0.25, 0.5, 1.0)), (DATA / "long", (0.34, 0.67, 1.0))],
    ids=["laptop", "club", "long"],
)
def test_a_slice_alone_gives_no_verdict_whatever_its_range(folder, shares, tmp_path):
    """Verdicts do not change when the same data are cropped; the published number does, and is shown with its range."""
    files = sorted(folder.glob("landscape_step*.nc"))
    # First and last snapshot: what is compared is the crop, not training.
    files = [files[0], files[-1]]
    verdicts, widest = {}, 0.0
    for share in shares:
        target = tmp_path / f"{share}"
        target.mkdir()
        for file in files:
            if share == 1.0:
                shutil.copy(file, target)
                continue
            with xr.open_dataset(file) as data:
                crop(data.load(), share).to_netcdf(target / file.name)
        found = rla.analyse_run(target, bootstrap=QUICK)
        verdicts[share] = [claim.verdict for claim in found.claims]
        assert "depends on the range" in found.claims[0].sentence
        data = found.ranges[max(found.ranges)]
        widest = max(widest, float(np.ptp(data["plain"].values[np.isfinite(data["plain"].values)])))
    assert list(verdicts.values()) == [[NOT_MEASURABLE] * 3] * 3
    assert widest > 0.02


def test_the_plain_correlation_by_range_equals_numpy():
    with xr.open_dataset(DATA / "laptop" / "landscape_step000010_slice0.nc") as raw:
        data = raw.load()
    found = plain_by_range(rla.per_prompt(data), bootstrap=QUICK)
    for share in (0.25, 0.5, 1.0):
        part = crop(data, share)
        kl, reward = (part[name].values.astype(float).mean((2, 3)).ravel() for name in ("kl_k1", "reward"))
        assert float(found["plain"].sel(share=share)) == pytest.approx(np.corrcoef(kl, reward)[0, 1], abs=1e-10)
    assert found["points"].values.tolist() == [9, 25, 81]
    np.testing.assert_allclose(found["half_width"], [0.075, 0.15, 0.3])


def test_a_real_untrained_policy_passes_nothing(tmp_path):
    shutil.copy(DATA / "laptop" / "landscape_step000000_slice0.nc", tmp_path)
    assert SUPPORTED not in [claim.verdict for claim in rla.analyse_run(tmp_path, bootstrap=QUICK).claims]


def test_large_ratios_are_written_in_plain_digits():
    assert [three_digits(value) for value in (3580.4, 99.96, 5.784)] == ["3,580", "100", "5.78"]
