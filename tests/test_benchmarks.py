"""The command `python -m benchmarks` and its result files."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import attention, quality, report
from benchmarks.__main__ import main, names
from benchmarks.generation import fastest, verdict
from benchmarks.peers import MODEL, cpu_seconds, series, summarise
from benchmarks.systems import AutoregressiveSystem, RopewaySystem, System, TransfusionSystem, caption_of, count
from data.source.digits import Digits


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "peers" in names()
    assert all(name in output and text in output for name, text in names().items())
    assert all(names().values()), "a benchmark without a docstring"


@pytest.mark.parametrize("arguments", [[], ["no-such"]])
def test_unknown_name_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "peers" in error


def test_attention_at_toy_lengths() -> None:
    result = attention.run([32, 64], [32], 32, heads=2, width=8, codes=4, window=8, chunk_blocks=2, rounds=1, steps=2)
    names = {(row["kind"], row["length"]) for row in result.rows}
    assert names == {(kind, length) for kind in ("dense", "vq", "vq block") for length in (32, 64)}
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in result.rows)
    assert result.figure


@pytest.mark.slow
def test_quality_of_a_few_steps(tmp_path: Path) -> None:
    result = quality.run(str(tmp_path), shapes_steps=2, text_steps=2, num=2, codes=8, text_window=16)
    assert {row["kind"] for row in result.rows} == {"dense", "vq", "hybrid"}
    assert {"bits per byte", "one object, caption exact"} <= {row["score"] for row in result.rows}


def test_result_files(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    rows: list[report.Row] = [{"system": "a", "cpu_seconds": 0.5}, {"system": "b", "cpu_seconds": 0.25}]
    result = report.Result(
        "example", rows, summary=rows, notes="What it means.", figure=figure, packages=["numpy", "no-such"]
    )
    paths = report.write(result, "python -m benchmarks example", "0123abc", tmp_path)

    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert len({path.stem for path in paths}) == 1
    assert paths[0].stem.startswith("example-2")
    content = json.loads(paths[0].read_text())
    assert list(content) == ["benchmark", "hardware", "versions", "command", "commit", "rows"]
    assert content["rows"] == rows
    assert content["commit"] == "0123abc"
    assert content["versions"]["torch"] == torch.__version__
    assert "numpy" in content["versions"]
    assert "no-such" not in content["versions"]
    text = paths[1].read_text()
    assert "| system | cpu_seconds |\n| --- | --- |\n| a | 0.5 |\n| b | 0.25 |" in text
    assert f"({paths[2].name})" in text


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_have_the_format(path: Path) -> None:
    content = json.loads(path.read_text())
    assert {"benchmark", "hardware", "versions", "command", "commit", "rows"} <= set(content)
    assert path.name.startswith(content["benchmark"] + "-")
    assert all(not isinstance(value, dict | list) for row in content["rows"] for value in row.values())
    assert path.with_suffix(".md").exists()


def _system(name: str) -> System:
    """One of the compared systems, small; skips the test where the peer is not installed."""
    small = replace(MODEL, dim=64, num_layers=2, num_heads=2, head=replace(MODEL.head, width=32, depth=1))
    try:
        if name == "ropeway":
            return RopewaySystem("Ropeway", small, 8)
        if name == "transfusion":
            return TransfusionSystem(1_000_000, 8, 2)
        return AutoregressiveSystem(name, 1_000_000, 8, 2)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["ropeway", "flow", "diffusion", "transfusion"])
def test_compared_systems_learn_and_draw(name: str) -> None:
    source, system = Digits("train", caption_fraction=0.0), _system(name)
    documents = [source.document(i) for i in range(8)]
    batch, optimizer = system.prepare(documents), torch.optim.AdamW(system.model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(8):
        losses.append(system.loss(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(losses[-1].detach()) < float(losses[0].detach())
    images = system.draw([caption_of(document) for document in documents[:3]])
    assert images.shape == (3, 8, 8, 3)
    assert str(images.dtype) == "uint8"
    assert system.positions(documents) >= 8 * 16


@pytest.mark.parametrize("name", ["flow", "diffusion", "transfusion"])
def test_peers_have_the_size_that_is_asked_for(name: str) -> None:
    assert count(_system(name).model) == pytest.approx(1_000_000, rel=0.1)


def test_ratio_is_taken_round_by_round() -> None:
    system = _system("ropeway")
    system.name = "other"

    def row(name: str, number: int, rate: float) -> report.Row:
        return {"system": name, "pass": "train", "round": number, "images_per_cpu_second": rate,
                "patches_per_cpu_second": rate, "positions_per_cpu_second": None}  # fmt: skip

    # The second round is twice as slow for both; written in another order than they were run.
    rows = [row("other", 1, 5.0), row("Ropeway", 0, 20.0), row("Ropeway", 1, 10.0), row("other", 0, 10.0)]
    assert series(rows, "other", "train") == [10.0, 5.0]
    assert list(summarise(system, "train", rows).values())[-1] == "2.00 (2.00 to 2.00)"


def test_cpu_seconds_leaves_out_waiting() -> None:
    assert cpu_seconds(lambda: time.sleep(0.3)) < 0.2


def test_equal_quality_is_no_worse_and_fastest() -> None:
    def row(name: str, rate: float, distance: float) -> report.Row:
        return {"system": name, "images_per_cpu_second": rate, "frechet_distance": distance}

    peer, slow, fast, worse = (
        row("peer, by default", 1, 5.0),
        row("Ropeway, 4 steps", 4, 4.0),
        row("Ropeway, 2 steps", 8, 5.0),
        row("Ropeway, 1 step", 16, 6.0),
    )
    compiled = row("Ropeway, compiled, 4 steps", 10, 4.0)
    first = row("Ropeway, first version", 2, 4.5)
    rows = [peer, slow, fast, worse, compiled, first]
    assert fastest(peer, rows) is compiled
    assert fastest(peer, rows, compiled=False) is fast
    default, again, old = verdict(rows, ["peer"]).splitlines()[2:]
    assert default.endswith("8.0, compiled 10.0 (peer, by default). The goal of 5 is reached.")
    assert again.endswith("8.0, compiled 10.0 (peer, by default). The goal of 5 is reached.")
    assert old.endswith("2.0, compiled 5.0 (Ropeway, first version). The goal of 5 is reached where compiled.")
    # As good as the peer's best but for a tenth, and twice as fast: ours with 2 steps is the fastest that is as good.
    _, said, _ = verdict([*rows, row("peer, 2 evaluations", 2.5, 5.4)], ["peer"]).splitlines()[2:]
    assert said.endswith("3.2, compiled 4.0 (peer, 2 evaluations). The goal of 5 is missed.")
    first = row("Ropeway, first version", 2, 1.0)
    assert fastest(first, [peer, slow, fast, worse, first]) is None
    said = verdict([*rows[:-1], first], ["peer"])
    assert "none is as good as Ropeway, first version. The goal of 5 is missed" in said
