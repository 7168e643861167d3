"""Measures against known answers, and suites on a model that knows nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.source.digits import arrays
from data.source.shapes import Scene, Thing, caption, held_out_captions, parse_caption, render
from data.source.stdlib import StandardLibrary
from model.sampling import Sampling
from tests.train.support import TINY, assert_one_line, start
from train import checkpoint, settings
from train.config import TextSection
from train.evaluate import SUITES, Task, _gray, _true, frechet_distance, image_loss, saturated, seam_energy
from train.evaluate import shapes as shapes_suite
from train.evaluate import text as text_suite
from train.generator import Generator


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    arguments = ("--run.stop_after=1", "--eval.sampler_steps=2")
    result = start(folder.parent / "out", "train", *TINY, f"--run.dir={folder}", *arguments).finish()
    assert result.status == 0, result.err
    return folder


def test_every_true_caption_of_a_scene_counts() -> None:
    red, blue = Thing("red", "circle", "small"), Thing("blue", "square", "large")
    picture = render(Scene((red, blue), relations=("above",)), 32, 32, np.random.default_rng(0))
    assert _true(caption(Scene((red, blue), relations=("above",))), picture)
    assert _true(caption(Scene((blue, red), relations=("below",))), picture)
    assert not _true(caption(Scene((blue, red), relations=("above",))), picture)
    assert not _true(caption(Scene((red, Thing("blue", "square", "small")), relations=("above",))), picture)
    assert not _true(caption(Scene((blue,), place="at the bottom")), picture), "it leaves an object out"
    assert not _true("a red circle", picture), "no caption"


def test_frechet_distance_of_gaussians() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for axis-parallel Gaussians; the samples are made to have exactly these moments."""
    random = np.random.default_rng(0)

    def exactly(mean: list[float], deviation: list[float]) -> np.ndarray:
        x = random.normal(size=(5000, 3))
        x -= x.mean(0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        return x * np.array(deviation) + np.array(mean)

    a, b = exactly([1, 2, 3], [1, 2, 0.5]), exactly([1, 0, 6], [3, 2, 1])
    assert frechet_distance(a, b) == pytest.approx(4 + 9 + 4 + 0 + 0.25, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_one_vector_is_not_a_number() -> None:
    assert math.isnan(frechet_distance(np.zeros((1, 3)), np.zeros((5, 3))))


def test_frechet_distance_of_commuting_and_other_covariances() -> None:
    """Against the definition with the symmetric root: Tr(A + B - 2 (A^1/2 B A^1/2)^1/2)."""
    random = np.random.default_rng(1)
    a, b = (random.normal(size=(200, 6)) @ random.normal(size=(6, 6)) for _ in range(2))

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    half = root(cov_a)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root(half @ cov_b @ half))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_where_some_pixels_never_change() -> None:
    """The corners of real digits are always black, so their covariance is singular."""
    train, test = _gray(arrays("train")[0]), _gray(arrays("test")[0])
    assert frechet_distance(test, test) == pytest.approx(0, abs=1e-3)
    same, other = frechet_distance(train, test), frechet_distance(train, test[:, ::-1])
    assert 0 < same < 0.1 * other


def test_seam_energy() -> None:
    ramp = np.arange(16) * 10
    smooth = np.broadcast_to((ramp[:, None] + ramp)[..., None] // 2, (16, 16, 3)).astype(np.uint8)
    assert seam_energy([smooth], 4) == pytest.approx(1)
    tiles = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    assert seam_energy([tiles], 4) > 1e6  # all steps are at the borders
    grid = smooth.copy()
    grid[::4] = grid[:, ::4] = 0  # dark lines at the first pixels of every patch
    assert seam_energy([grid], 4) > 1.3
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    assert seam_energy(noise, 4) == pytest.approx(1, abs=0.02)
    # A step across one border of four in each direction: (3 + 10) / 4 / 1 where all other steps are 1.
    one = np.arange(16) + 9 * (np.arange(16) >= 8)
    picture = np.broadcast_to((one[:, None] + one)[..., None], (16, 16, 3)).astype(np.uint8)
    assert seam_energy([picture], 4) == pytest.approx((1 + 10 + 1) / 3)


def test_seam_energy_of_pictures_of_several_sizes() -> None:
    ramp = np.arange(32, dtype=np.uint8) * 3
    wide, tall = (np.stack([ramp[:h, None] + ramp[:w]] * 3, axis=-1) for h, w in ((16, 24), (32, 16)))
    assert seam_energy([wide, tall], 8) == pytest.approx(1)


def test_bits_per_byte_of_uniform_logits(run: Path, tmp_path: Path) -> None:
    """Without knowledge every token costs log2 V bits; a document has one token more than bytes."""
    generator = Generator.load(run)
    config = checkpoint.read_config(checkpoint.resolve(run))
    config = replace(config, data=replace(config.data, text=TextSection(1024)))
    task = Task(generator, config, Sampling(), 4, 0, tmp_path, False)
    with torch.no_grad():
        generator.model.text_head.weight.zero_()
    scores = text_suite(task)
    source = StandardLibrary("test", 1024)
    size = sum(len(source.document(i).segments[0].text.encode()) for i in range(4))
    assert scores["documents"] == 4
    assert scores["bytes"] == size
    expected = math.log2(generator.tokenizer.vocab_size) * (size + 4) / size
    assert scores["bits per byte"] == pytest.approx(expected, rel=1e-6)


def test_image_loss_of_a_head_that_always_says_gray(run: Path) -> None:
    """|x|^2 / (1 - t)^2 with the mean of 1 / (1 - t)^2 being 2.97 under the default law of times."""
    generator = Generator.load(run)
    with torch.no_grad():
        for parameter in generator.model.diffusion_head.patch_out.parameters():
            parameter.zero_()
    expected = {255: 2.97, 204: 0.36 * 2.97, 127: 0.0}
    for byte, loss in expected.items():
        pictures = [np.full((32, 32, 3), byte, np.uint8)] * 20
        assert image_loss(generator, ["a caption"] * 20, pictures) == pytest.approx(loss, rel=0.15, abs=1e-3)


def test_gap_of_a_head_that_always_says_gray(run: Path, tmp_path: Path) -> None:
    """It is right about its own pictures, which are gray, and wrong about real ones."""
    generator = Generator.load(run)
    with torch.no_grad():
        for parameter in generator.model.diffusion_head.patch_out.parameters():
            parameter.zero_()
    config = checkpoint.read_config(checkpoint.resolve(run))
    scores = shapes_suite(Task(generator, config, Sampling(steps=2), 12, 0, tmp_path, False))
    held_out, own = (scores[f"one object, image loss, {which} pictures"] for which in ("held-out", "own"))
    assert own < 1e-3 < 0.3 < held_out
    assert scores["one object, image loss, gap"] == pytest.approx(own - held_out)


def test_shapes_suite_on_a_model_that_knows_nothing(run: Path) -> None:
    """Negative control: the oracle gives nothing away."""
    command = ("--checkpoint", run, "--suite", "shapes", "--num", 12)
    result = start(run.parent / "out", "train.evaluate", *command).finish()
    assert result.status == 0, result.err
    saved = json.loads((run / "eval" / "shapes.json").read_text())
    scores = saved["scores"]
    assert scores["one object, pictures drawn"] == scores["one object, pictures read"] == 12
    assert scores["one object, drawn, all"] == scores["one object, caption exact"] == 0
    assert saved["sampling"]["steps"] == 2
    assert saved["checkpoint"] == str(checkpoint.resolve(run))
    assert "one object, drawn, all: 0.0000" in result.out
    assert (run / "eval" / "shapes-one-object.png").is_file()
    wrong = [json.loads(line) for line in (run / "eval" / "shapes-one-object-wrong.jsonl").read_text().splitlines()]
    assert [line["drawn"] for line in wrong if "drawn" in line] == held_out_captions()[:12]
    assert len(wrong) == 24


@pytest.mark.slow
def test_digits_suite_on_a_model_that_knows_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("--data.shapes=null", "--data.digits={}", "--model.patch_size=4", "--run.stop_after=1")
    assert start(tmp_path, "train", *TINY, f"--run.dir={run}", *arguments).finish().status == 0
    command = ("--checkpoint", run, "--suite", "digits", "--num", 80, "--steps", 2)
    result = start(tmp_path, "train.evaluate", *command).finish()
    assert result.status == 0, result.err
    scores = json.loads((run / "eval" / "digits.json").read_text())["scores"]
    assert scores["recognised as prompted"] < 0.3
    assert scores["classifier on the real test split"] > 0.95
    assert scores["test split, caption exact"] < 0.3
    real = scores["frechet distance, training split to test split"]
    assert scores["frechet distance to the test split"] > 10 * real


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite=shapes", "--num=0"], "--num is 0; it must be at least 1"),
        (["--suite=shapes", "--steps=0"], "sampler steps is 0"),
        (["--suite=shapes", "--sampler=magic"], "'magic' is unknown; choose one of euler, heun"),
        (["--suite=shapes", "--guidance=-1"], "guidance scale is -1.0"),
        (["--suite=text"], "suite text needs a model that was trained with data.text"),
        (["--suite=faces"], "invalid choice: 'faces'"),
        (["--suite=shapes", "--no-such-option"], "--no-such-option"),
        ([], "--suite"),
    ],
)
def test_wrong_options(run: Path, arguments: list[str], words: str) -> None:
    result = start(run.parent / "out", "train.evaluate", "--checkpoint", run, *arguments).finish()
    assert_one_line(result, 2, words)


def test_a_suite_of_pictures_that_the_model_cannot_draw(tmp_path: Path) -> None:
    place = f"--run.dir={tmp_path / 'run'}"
    large = ("--model.patch_size=16", "--data.shapes.canvases=[[16, 16]]")
    trained = start(tmp_path / "out", "train", *TINY, place, "--run.stop_after=1", *large).finish()
    assert trained.status == 0, trained.err
    step = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    result = start(tmp_path / "out", "train.evaluate", "--checkpoint", step, "--suite=digits").finish()
    assert_one_line(result, 2, "a picture of 8 x 8 pixels cannot be drawn")
    assert not list(tmp_path.rglob("eval"))


def test_missing_checkpoint(tmp_path: Path) -> None:
    result = start(tmp_path, "train.evaluate", "--checkpoint", tmp_path / "none", "--suite=shapes").finish()
    assert_one_line(result, 2, "no sound checkpoint there")


def test_every_suite_has_its_default_number() -> None:
    from train.evaluate import _DEFAULT_NUM

    assert SUITES.keys() == _DEFAULT_NUM.keys()


class Painter(Task):
    """Draws what each caption says, but nothing for every third one."""

    def draw(self, prompts, sizes):  # type: ignore[no-untyped-def]
        random = np.random.default_rng(0)
        drawn = [render(parse_caption(prompt), *size, random) for prompt, size in zip(prompts, sizes, strict=True)]
        return [np.full_like(p, 240) if i % 3 == 0 else p for i, p in enumerate(drawn)], 0.0


def test_scenes_are_scored_by_their_number_of_objects(run: Path, tmp_path: Path) -> None:
    generator = Generator.load(run)
    config = settings.parse([*TINY, "--data.shapes.max_objects=3", "--data.shapes.canvases=[[32, 32]]"])[0]
    scores = shapes_suite(Painter(generator, config, Sampling(), 90, 0, tmp_path, False, only_draw=True))
    assert scores["one object, drawn, all"] == scores["scenes, drawn, all"] == pytest.approx(2 / 3, abs=0.02)
    parts = [scores[f"scenes of {n}, drawn, all"] for n in (1, 2, 3)]
    assert all(0.4 < part < 0.9 for part in parts)
    assert len(set(parts)) > 1
    counts = [scores[f"scenes of {n}, pictures drawn"] for n in (1, 2, 3)]
    assert sum(counts) == scores["scenes, pictures drawn"]
    whole = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
    assert whole == pytest.approx(scores["scenes, drawn, all"])


def test_saturated() -> None:
    picture = np.full((2, 2, 3), 7, np.uint8)
    assert saturated([picture]) == 0
    picture[0, 0], picture[1, 1, 2] = 255, 0
    assert saturated([picture, np.zeros((4, 4, 3), np.uint8)]) == pytest.approx((4 / 12 + 1) / 2)
