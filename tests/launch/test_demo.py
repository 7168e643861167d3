"""`python -m launch.demo` from a configuration of a few steps."""

import json
from pathlib import Path

import pytest

from launch import demo
from tests.train.support import TINY
from train import settings


@pytest.mark.slow
def test_the_demo_leaves_pictures_captions_curves_and_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    run = tmp_path / "run"
    options = (
        *TINY,
        f"--run.dir={run}",
        "--data.shapes.canvases=[[32,32]]",
        "--run.steps=20",
        "--eval.sampler_steps=2",
    )
    settings.write(settings.parse(list(options))[0], tmp_path / "tiny.yaml")
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "tiny.yaml")
    demo.main()
    out = run / "demo"
    page = (out / "index.html").read_text()
    for name in ("pictures/grid.png", "curves.png"):
        assert (out / name).stat().st_size > 1000
        assert name in page
    assert len((out / "captions.txt").read_text().splitlines()) == 6
    scores = json.loads((run / "eval" / "shapes.json").read_text())["scores"]
    assert f"{scores['one object, drawn, all']:.1%} of pictures right" in capfd.readouterr().out
