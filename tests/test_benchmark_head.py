"""The table of the diffusion head: what is to do, what was done, and what the table says of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import head
from benchmarks.head_rows import SETTINGS, Setting, label
from benchmarks.report import Row
from model.diffusion.guidance import Guidance
from model.sampling import Sampling


def cells(tmp_path: Path, rows: list[str] | None = None, data: tuple[str, ...] = ("digits", "shapes")) -> list:
    return head.plan(data, rows, 2, 10, 5, tmp_path)


def test_every_row_can_be_trained_and_every_cell_has_its_own_file(tmp_path: Path) -> None:
    planned = cells(tmp_path)  # reads every configuration
    assert {cell.setting.name for cell in planned} == {setting.name for setting in SETTINGS}
    assert max(Counter(cell.scores for cell in planned).values()) == 1
    assert [cell.seed for cell in planned] == sorted(cell.seed for cell in planned)
    smaller = {(cell.data, cell.config.data.rows_per_step) for cell in planned if cell.setting.name == "patches of 4"}
    assert smaller == {("digits", 5), ("shapes", 20)}


def test_rows_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    default = next(cell for cell in cells(tmp_path, ["default"], ("digits",))).config
    (v,) = {cell.config.model for cell in cells(tmp_path, ["prediction v"], ("digits",))}
    assert v.head.prediction == "v"
    assert {name for name in vars(v) if getattr(v, name) != getattr(default.model, name)} == {"head"}
    changed = {name for name in vars(v.head) if getattr(v.head, name) != getattr(default.model.head, name)}
    assert changed == {"prediction"}


def test_rows_by_factor_and_unknown_ones(tmp_path: Path) -> None:
    chosen = {cell.setting.name for cell in cells(tmp_path, ["patch size", "default"], ("shapes",))}
    assert chosen == {"default", "patches of 4", "patches of 16"}
    with pytest.raises(ValueError, match="nothing like it"):
        cells(tmp_path, ["nothing like it"])


def test_labels() -> None:
    assert label(Sampling(steps=4)) == "euler 4"
    guidance = Guidance(3, "interval", 0.3, 1, renormalise=True)
    assert label(Sampling(sampler="heun", steps=8, grid="edm", guidance=guidance, clamp=True)) == (
        "heun 8 edm grid guidance 3 interval from 0.3 renormalised clamped"
    )
    assert label(Sampling(steps=2, guidance=Guidance(3))) == ("euler 2 guidance 3 interval from 0 to 0.3")


def test_killed_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Setting("default", ""),
        Setting(
            "few steps", "sampler", drawings=(Sampling(steps=1), Sampling(sampler="heun", steps=2)), model="default"
        ),
    )
    monkeypatch.setattr(head, "SETTINGS", rows)
    monkeypatch.setattr(head, "announce", lambda cells, planned: None)
    arguments = {"data": "digits", "rows": ["few steps"], "seeds": 1, "pictures": 10, "steps": 2, "folder": tmp_path}
    with pytest.raises(ValueError, match="nothing was measured"):
        head.run(**arguments, minutes=0)  # type: ignore[arg-type]
    first = head.run(**arguments)  # type: ignore[arg-type]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = head.run(**arguments)  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    assert again.rows == first.rows
    assert [row["evaluations_per_picture"] for row in first.rows] == [16, 48]
    assert all(row["pictures"] == 10 and float(row["cpu_seconds_per_picture"] or 0) > 0 for row in first.rows)
    lost = next(tmp_path.rglob("heun-2-10.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    head.run(**arguments)  # type: ignore[arg-type]
    after = json.loads(lost.read_text())
    assert {key for key in before if before[key] != after[key]} <= {"CPU seconds per picture"}
    assert {path for path in files if path.stat().st_mtime_ns != files[path]} == {lost, lost.with_name("digits.png")}
    changed = replace(rows[0], options=(("model.head.time_mean", -1.0),))
    monkeypatch.setattr(head, "SETTINGS", (changed, rows[1]))
    with pytest.raises(ValueError, match="trained with other settings"):
        head.run(**arguments)  # type: ignore[arg-type]


def test_known_results_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "announce", lambda cells, planned: None)
    worked: list[str] = []
    monkeypatch.setattr(head, "work", lambda cell: worked.append(label(cell.sampling)))
    old = row("default", "euler 16", 0, 97.0, 16) | {"training_steps": 2}
    other_length = row("default", "heun 50", 0, 90.0, 99) | {"training_steps": 3}
    file = tmp_path / "head.json"
    file.write_text(json.dumps({"benchmark": "head", "commit": "abc", "rows": [old, other_length]}))
    result = head.run("digits", ["default"], 1, 10, 2, folder=tmp_path, known=[file])
    assert worked == ["heun 50"]
    assert result.rows == [old | {"commit": "abc"}]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"commit": "def", "rows": [old | {"accuracy_percent": 96.0}]}))
    with pytest.raises(ValueError, match=r"other.json disagrees with another file"):
        head.run("digits", ["default"], 1, 10, 2, folder=tmp_path, known=[file, other])
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"--known .*head.json is not a result file"):
        head.run("digits", ["default"], 1, 10, 2, folder=tmp_path, known=[file])


def row(name: str, drawn: str, seed: int, accuracy: float, evaluations: int) -> Row:
    sampler, steps = drawn.split()
    return {"data": "digits", "row": name, "factor": "", "seed": seed, "drawn": drawn, "sampler": sampler,
            "steps": int(steps), "evaluations_per_patch": evaluations, "accuracy_percent": accuracy,
            "frechet_distance": None, "seam_energy_over_real": 1.0, "image_loss_held_out": None, "pictures": 10,
            "image_loss_own": None, "captions_exact_percent": None, "cpu_seconds_per_picture": 0.002,
            "saturated_percent": None, "training_tflop": 3.0}  # fmt: skip


def test_summary_and_notes(tmp_path: Path) -> None:
    rows = [
        row("default", "heun 50", 0, 97.0, 99), row("default", "heun 50", 1, 99.0, 99),
        row("shortcut", "euler 4", 0, 96.0, 4), row("shortcut", "euler 4", 1, 96.5, 4),
        row("shortcut", "euler 1", 0, 95.9, 1), row("shortcut", "euler 8", 0, 98.0, 8),
    ]  # fmt: skip
    summary = head.summarise(rows[:2])
    assert summary["right, %"] == "98.0 (97.0 to 99.0)"
    assert summary["Frechet distance"] is None
    assert summary["CPU ms / picture"] == "2.0 (2.0 to 2.0)"
    assert summary["seeds"] == 2
    text = head.notes(rows, cells(tmp_path, ["default"], ("digits",)))
    assert "50 steps of Heun: 98.0 % right." in text
    assert "4 evaluations or less: shortcut, euler 4 (96.2 %).\n" in text
    assert len(head.figure(rows).axes) == 2
