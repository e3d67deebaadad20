"""How often the judge errs, measured on recorded noise: false alarms, and losses found within two nights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.core.measurement import Measurement
from fixtures.core.results import Result, Run, Table
from reports import store
from reports.nights import baseline, noises, record_noise, shifts, simulation
from reports.nights.noises import Noise, repeats, rounds, sigmas
from reports.nights.simulation import KL, Plant, Rate, false_alarms, found

PROMISED = 0.01  # nights with a false alarm
LOSS, RISE = math.log(0.95), math.log(1.10)
POWER = 0.95


@pytest.mark.parametrize("noise", [repeats, rounds], ids=["timings of a busy CPU", "intervals of an H200"])
@pytest.mark.parametrize("series", [15, 100])
def test_false_alarms(noise: Noise, series: int) -> None:
    """Less than one night in a hundred without a change has a regression, at the upper end of its interval."""
    rate = false_alarms(noise, series, nights=10_000)
    assert rate.nights == 10_000
    assert rate.high < PROMISED, rate


@pytest.mark.parametrize(
    "noise",
    [partial(rounds, freedom=3), noises.correlated, noises.gone_wrong, noises.steps],
    ids=["tails of 3 degrees", "AR(1) 0.5", "nights gone wrong", "shares"],
)
def test_false_alarms_under_stress(noise: Noise) -> None:
    """Of 50 noisy quantities the same holds with heavy tails, nights that hang together and nights gone wrong."""
    rate = false_alarms(noise, 50, nights=4_000)
    assert rate.share < PROMISED, rate


def test_throughput_loss() -> None:
    """A kernel that loses 5 % of its throughput is found within two nights, among 150 noisy quantities."""
    kernel = [
        float(np.median(sigmas(regime=name))) for name in ("single_stream", "batch_8", "saturated_64", "saturated_256")
    ]
    noise = partial(rounds, sigma=np.resize(kernel, 150))
    rate = found(noise, 150, Plant(LOSS, slice(0, len(kernel))))
    assert rate.low > POWER, rate


@pytest.mark.parametrize("regime", ["single_stream", "long_prompt"])
def test_throughput_loss_of_a_regime(regime: str) -> None:
    """So is a loss in a single regime that is measured to half a percent."""
    noise = partial(rounds, sigma=np.full(150, float(np.median(sigmas(regime=regime)))))
    rate = found(noise, 150, Plant(LOSS, slice(0, 1)))
    assert rate.low > POWER, rate


@pytest.mark.parametrize("sigma", [0.0, 0.01])
def test_kl_rise(sigma: float) -> None:
    """A rise of a KL by 10 % is found within two nights: without noise, as measured, and with a percent of it."""
    rate = found(partial(rounds, sigma=np.full(150, sigma)), 150, Plant(RISE, slice(0, 1)), quantity=KL)
    assert rate.low > POWER, rate


Fault = Callable[[pytest.MonkeyPatch], None]


def uncorrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantity judged as if it were the only one."""
    real = simulation.shifts
    monkeypatch.setattr(simulation, "shifts", lambda *given: replace(real(*given), tested=0))


def any_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise taken for known after one night, and no smallest effect: tonight beside the night before."""
    monkeypatch.setattr(baseline, "NIGHTS", 1)
    monkeypatch.setattr(baseline, "PRIOR_FREEDOM", 1e6)


def stuck_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise as the median step says, which does not see a second mode."""
    monkeypatch.setattr(baseline, "QUARTILE", 12.0)
    monkeypatch.setattr(baseline, "YOUNG", 10**6)


def unmeasured_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's noise, whatever the history says."""
    monkeypatch.setattr(baseline, "PRIOR_FREEDOM", 1e6)


@pytest.mark.parametrize("fault", [uncorrected, any_change, stuck_noise, unmeasured_noise])
def test_faults_raise_false_alarms(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge without its correction, its own noise or its history alarms on more than one night in a hundred."""
    fault(monkeypatch)
    rates = [false_alarms(noise, 100, nights=600) for noise in (repeats, rounds)]
    assert max(rate.low for rate in rates) > PROMISED, rates


def test_wild_nights_as_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean and deviation of every night, wild ones too, would miss the loss that the judge finds."""
    noise = partial(noises.gone_wrong, whole=True)
    quiet: Noise = lambda *given: noise(*given) * 0.3  # noqa: E731
    plant = Plant(LOSS, slice(0, 4))
    good = found(quiet, 20, plant).share
    monkeypatch.setattr(baseline, "ADMITTED", math.inf)
    assert found(quiet, 20, plant).share < good - 0.02


def test_rate() -> None:
    """A rate's interval is exact, and as wide as the few independent histories behind it make it."""
    alarms = np.zeros((20, 500), bool)
    none = simulation._rate(alarms)
    assert none.share == 0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 500), rel=1e-6)  # each history counts once
    alarms[0, :50] = True
    spread = simulation._rate(alarms)
    alarms[:] = False
    alarms[:10, :5] = True
    clustered = simulation._rate(alarms)
    assert spread.share == clustered.share == 0.005
    assert clustered.high > 1.5 * spread.high
    assert "0.50 %" in str(spread)


def test_recorded_noise_has_a_provenance() -> None:
    """The recorded noise says how it was recorded, on what machine and with what versions."""
    kept = json.loads(noises.RECORDED.read_text(encoding="utf-8"))
    assert kept["repeats"]["how"]
    assert kept["repeats"]["machine"]["cpu"]
    assert kept["repeats"]["versions"]["torch"]
    assert min(len(values) for values in kept["repeats"]["series"].values()) >= 40
    shipped = Path(record_noise.__file__).parents[1] / "measured"
    intervals = [row for file in sorted(shipped.glob("*.json")) for row in record_noise.intervals(file)]
    files = "reports/measured/*.json -o reports/nights/noise.json"
    assert kept["intervals"] == intervals, f"python -m reports.nights.record_noise --intervals {files}"


def test_drawn_noise_is_the_recorded_one() -> None:
    """What is drawn has the recorded values, and blocks of runs keep their order."""
    kept = np.array(list(json.loads(noises.RECORDED.read_text())["repeats"]["series"].values())) / 100
    drawn = repeats(np.random.default_rng(0), 30, 3, 20)
    assert drawn.shape == (30, 3, 20)
    assert set(np.unique(drawn[:, :, 0])) <= set(kept[0])
    blocks = repeats(np.random.default_rng(0), 12, 1, 1, block=6)[:6, 0, 0]
    doubled = np.r_[kept[0], kept[0]].tolist()
    assert any(doubled[at : at + 6] == blocks.tolist() for at in range(len(kept[0])))
    spread = rounds(np.random.default_rng(0), 4000, 1, 1, sigma=np.array([0.01]))
    assert spread.std() == pytest.approx(0.01, rel=0.1)


def test_recording(tmp_path: Path) -> None:
    """Repeats of a run become noise to draw from: every timed quantity that all of them have."""
    files = []
    for place, value in enumerate((10.0, 11.0, 9.0)):
        timed = Measurement("median time", value, "ms")
        extra = (Measurement("x", 1.0, "ms"),) if not place else ()
        result = Result("suites/test_s.py::test_a[cpu]", "passed", "", measurements=(timed, *extra))
        store.save(Run({"machine": {"cpu": "c"}, "versions": {}}, [result]), tmp_path / f"{place}.json")
        files.append(str(tmp_path / f"{place}.json"))
    record_noise.main([*files, "--how", "by hand", "-o", str(tmp_path / "noise.json")])
    kept: dict[str, Any] = json.loads((tmp_path / "noise.json").read_text())
    assert kept["repeats"]["series"] == {"test_a cpu: median time, ms": [0.0, 9.53, -10.54]}
    assert kept["intervals"] == []


def test_intervals_are_recorded_beside_repeats_that_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More runs' intervals can be read without the repeats' own runs; where there are no repeats a line says so."""
    table = Table("Throughput", ("regime", "kernel", "low", "high"), (("alone", "marlin", 0.9, 1.1),))
    result = Result("suites/test_t.py::test_t[alone]", "passed", "", tables=(table,))
    run, output = tmp_path / "run.json", tmp_path / "noise.json"
    store.save(Run({}, [result]), run)
    record = ["--intervals", str(run), "-o", str(output)]
    for wrong, told in ((record, "no repeats to keep"), ([str(run), *record], "--how says what RESULTS are")):
        with pytest.raises(SystemExit):
            record_noise.main(wrong)
        assert told in capsys.readouterr().err
        assert not output.exists()
    output.write_text("[")
    with pytest.raises(SystemExit):
        record_noise.main(record)
    output.write_text('{"repeats": {"how": "by hand"}, "intervals": []}')
    record_noise.main(record)
    kept = json.loads(output.read_text())
    assert kept["repeats"] == {"how": "by hand"}
    assert [row["high"] for row in kept["intervals"]] == [1.1]


def test_intervals_of_more_rounds_tell_of_the_same_noise(tmp_path: Path) -> None:
    """An interval of eighteen rounds is held for what it is: by Student's t of 17 degrees, where six rounds have 5."""
    columns = ("regime", "kernel", "low", "high")
    results = []
    for regime, number in (("alone", 6.0), ("by eights", 18.0)):
        counted = Measurement("rounds counted, fewest of a condition", number)
        table = Table("Throughput", columns, ((regime, "marlin", 0.9, 1.1), (regime, "fp16", None, None)))
        about = {"measurements": (counted,), "tables": (table,)}
        results.append(Result(f"suites/test_t.py::test_t[{regime}]", "passed", "", **about))  # type: ignore[arg-type]
    run = str(tmp_path / "run.json")
    store.save(Run({}, results), Path(run))
    record_noise.main([run, "--how", "by hand", "--intervals", run, "-o", str(tmp_path / "n")])
    half = math.log(1.1 / 0.9) / 2
    assert noises.sigmas(tmp_path / "n", "alone") == pytest.approx([half / 2.5706], rel=1e-4)
    assert noises.sigmas(tmp_path / "n", "by eights") == pytest.approx([half / 2.1098], rel=1e-4)


def test_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints every rate with its interval."""
    simulation.main(["--nights", "40", "--series", "5", "--histories", "10"])
    printed = capsys.readouterr().out
    assert printed.count("nights") > 15
    assert all(name in printed for name in simulation.NOISES)
    assert str(Rate(0.5, 0.25, 0.75, 4)) == "50.00 % (25.00 to 75.00 %) of 4 nights"
    assert shifts.RATE < PROMISED
