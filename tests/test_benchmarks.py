"""The command `python -m benchmarks` and its result files."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.__main__ import main, names


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


def test_result_files(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    rows: list[report.Row] = [{"system": "a", "cpu_seconds": 0.5}, {"system": "b", "cpu_seconds": 0.25}]
    result = report.Result(
        "example", rows, summary=rows, notes="What it means.", figure=figure, packages=["numpy", "no-such"]
    )
    paths = report.write(result, "python -m benchmarks example", tmp_path)

    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert len({path.stem for path in paths}) == 1
    assert paths[0].stem.startswith("example-2")
    content = json.loads(paths[0].read_text())
    assert list(content) == ["benchmark", "hardware", "versions", "command", "commit", "rows"]
    assert content["rows"] == rows
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
