"""A run that is killed at random moments, again and again, ends with the same bits as one that is left alone."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import kill
from train import checkpoint

pytestmark = pytest.mark.slow  # minutes: many starts of processes


def test_kills_of_one_process_change_nothing(tmp_path: Path) -> None:
    found = kill.torture(tmp_path, world=1, kills=3, steps=20, seed=0)
    assert found.problems == []
    assert len(found.kills) == sum(run["kills"] for run in found.runs) == 3
    assert {run["bit-equal"] for run in found.runs} == {"yes"}


@pytest.mark.slow
def test_kills_of_two_processes_change_nothing(tmp_path: Path) -> None:
    found = kill.torture(tmp_path, world=2, kills=12, steps=40, seed=0)
    assert found.problems == []
    assert len(found.kills) == 12
    assert {row["phase"] for row in found.kills} == {"start-up", "steps", "save"}
    assert {row["killed"] for row in found.kills} == {"all", "0", "1"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("straight") / "run"
    kill.undisturbed(place, world=1, steps=3)
    return place


def alter(run: Path, name: str) -> None:
    """Change the last bit of one number, and the manifest with it."""
    folder = checkpoint.resolve(run)
    tensors = load_file(folder / name)
    next(iter(tensors.values())).view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, folder / name, {"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def drop_line(path: Path) -> None:
    path.write_text("\n".join(path.read_text().split("\n")[1:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: alter(run, "model.safetensors"), "model "),
        (lambda run: alter(run, "ema.safetensors"), "ema "),
        (lambda run: alter(run, "optimizer/exp_avg_sq.safetensors"), "exp_avg_sq "),
        (lambda run: drop_line(run / "metrics.jsonl"), "metrics.jsonl"),
    ],
)
def test_the_comparison_notices_one_bit(
    tmp_path: Path, straight: Path, change: Callable[[Path], None], words: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert kill.differences(run, straight) == []
    change(run)
    (found,) = kill.differences(run, straight)
    assert found.startswith(words)


def test_the_record_of_samples_notices_another_row(tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(kill._record_of(straight), kill._record_of(run))
    assert kill.samples(run) == kill.samples(straight)
    assert kill.samples(straight).keys() == {(0, 0), (0, 1), (0, 2)}
    step, documents, digest = json.loads((kill._record_of(run) / "0").read_text().split("\n")[-1])
    documents[0][0] += 1
    with (kill._record_of(run) / "0").open("a") as file:
        file.write("\n" + json.dumps([step, documents, digest]))
    assert kill.samples(run) != kill.samples(straight)
