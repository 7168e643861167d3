"""`python -m train.inspect`: what is printed and written is what the model would read."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from tests.train.support import TINY
from train import inspect, pipeline, settings
from train.config import Config

ROOT = Path(__file__).resolve().parents[2]


def config(*arguments: str) -> Config:
    return settings.parse([*TINY, *arguments])[0]


def slots(out: str) -> list[list[str]]:
    """The lines of the slots: slot, document, index, content, p1, p2, learned."""
    pattern = r"(\d+) (\d+) (\d+) (.+) (\S+) (\S+) (learn|read)"
    return [list(match.groups()) for line in out.splitlines() if (match := re.fullmatch(pattern, line))]


def set_of(tmp_path: Path) -> str:
    """A file with one document: "Hi", read, and a picture of 1 x 2 patches of 8 x 8 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    Picture.fromarray(pixels).save(tmp_path / "p.png")
    path = tmp_path / "set.jsonl"
    path.write_text('{"id": "7", "segments": [{"text": "Hi", "learn": false}, {"image": "p.png"}]}\n')
    return f"--data.files=[{{path: {path}}}]"


def test_a_document_slot_by_slot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of docs/data-format.md, with the positions of RoPE-TV worked out by hand: L = 6 before the picture,
    of height 1 and width 2, so p1 = 6 + (2 - 1) / 2 + x and p2 = 6 + (2 - 2) / 2 + y; text goes on at 9."""
    inspect.run(config("--data.shapes=null", set_of(tmp_path), "--model.positions=tv"), 0, 0, tmp_path / "out")
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "document 0 of set (7): 10 slots of the 96 of a row"
    names = ["<|bos|>", "'H'", "'i'", "<|boi|>", "<|rows:1|>", "<|cols:2|>", "<|patch|>[1,1 of 1x2]",
             "<|patch|>[1,2 of 1x2]", "<|eoi|>", "<|eos|>"]  # fmt: skip
    p1 = ["1", "2", "3", "4", "5", "6", "7.5", "7.5", "9", "10"]
    p2 = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]
    learned = ["read"] * 3 + ["learn"] * 7
    assert slots(out) == [[str(k), "1", str(k + 1), names[k], p1[k], p2[k], learned[k]] for k in range(10)]
    (picture,) = (tmp_path / "out").iterdir()
    assert str(picture) == out.splitlines()[-1]
    assert np.array_equal(np.asarray(Picture.open(picture)), np.asarray(Picture.open(tmp_path / "p.png")))


def test_a_row_holds_what_the_mixture_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.run(config(), 5, None, tmp_path)
    out = capsys.readouterr().out
    settled = config()
    encoder = pipeline.make_encoder(settled, pipeline.make_tokenizer(settled.data))
    mixture = pipeline.make_mixture(settled, encoder, "train")
    row, found = mixture.row(5), slots(out)
    filled = np.count_nonzero(row.document)
    assert [int(line[1]) for line in found] == row.document[:filled].tolist()
    assert [line[6] == "learn" for line in found] == row.learn[:filled].tolist()
    assert ["patch" in line[3] for line in found] == (row.rows[:filled] > 0).tolist()
    assert f"\n{96 - filled} slots of padding\n" in out
    pictures = sorted(tmp_path.glob("*.png"), key=lambda path: int(path.stem.split("-")[-1]))
    stream, number = mixture.locate(5)
    images = [s for d in stream.documents(*stream.plan.row(number))[0] for s in d.segments if hasattr(s, "pixels")]
    assert len(pictures) == len(images) > 0
    for path, image in zip(pictures, images, strict=True):
        assert np.array_equal(np.asarray(Picture.open(path)), image.pixels)  # a grid already: not resampled


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--document", "300"], "there is no document 300; the sources hold documents 0 to 299"),
        (["--document", "-1"], "there is no document -1"),
        (["--row", "-3"], "row -3 does not exist"),
        (["--row", "1", "--document", "1"], "not allowed with"),
        (["--data.nothing", "1"], "data.nothing"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings.write(config(), tmp_path / "c.yaml")
    monkeypatch.setattr(sys, "argv", ["inspect", "--config", str(tmp_path / "c.yaml"), *arguments])
    with pytest.raises(SystemExit) as ended:
        inspect.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.inspect", "--config", "configs/quickstart.yaml", "--row", "3", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "<|patch|>[4,4 of 4x4]" in done.stdout
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`... | head` closes the pipe before all is written."""
    command = [sys.executable, "-m", "train.inspect", "--config", "configs/quickstart.yaml", "--data.row_length=4096"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
