"""`python -m train.evaluate --checkpoint RUN_OR_DIR --suite shapes`: score a checkpoint on data it never saw.

shapes   pictures drawn from held-out captions, and captions of held-out pictures, read by the exact oracle
digits   pictures of prompted digits, recognised by an independent classifier; Frechet distance and seam energy
text     bits per byte of held-out files of the Python standard library
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture

from data.command import OneLineParser, working
from data.document import Document, Image, Text
from data.source import digits as digits_source
from data.source import shapes_oracle
from data.source.shapes import Shapes, held_out_captions, parse_caption
from data.source.stdlib import StandardLibrary
from model.batch import Batch
from model.diffusion.guidance import Guidance
from model.diffusion.sampler import LEARNED, SAMPLERS
from model.sampling import Sampling, sampler_of
from model.text_head import bits_per_byte
from train import checkpoint
from train.config import Config, ShapesSection
from train.generator import Generator, sampling_of
from train.log import environment
from train.samples import image_then_text, save_grid


@dataclass(frozen=True)
class Task:
    """What a suite works on."""

    generator: Generator
    config: Config
    sampling: Sampling
    num: int
    seed: int
    out: Path
    progress: bool
    only_draw: bool = False
    """Leave out the captions of real pictures and the losses."""

    def draw(self, prompts: Sequence[str], sizes: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], float]:
        """The pictures, and the CPU seconds that each one took."""
        began = time.process_time()
        pictures = self.generator.pictures(prompts, sizes, self.sampling, self.seed, self.progress)
        return pictures, (time.process_time() - began) / max(len(pictures), 1)


Scores = dict[str, float]


def shapes(task: Task) -> Scores:
    """Attributes right in pictures of held-out captions; held-out pictures whose caption is true, and to the letter."""
    section = task.config.data.shapes or ShapesSection()
    scores = _shapes(task, section, 1, held_out_captions(), "one object")
    if section.max_objects > 1:
        scores |= _shapes(task, section, section.max_objects, None, "scenes")
    return scores


def _shapes(task: Task, section: ShapesSection, max_objects: int, captions: list[str] | None, name: str) -> Scores:

    def held_out(seed: int) -> tuple[list[np.ndarray], list[str]]:
        source = Shapes(seed, "test", task.num, section.canvases, max_objects, caption_fraction=1.0)
        pairs = [pair for pair in map(image_then_text, map(source.document, range(task.num))) if pair]
        return [image.pixels for image, _ in pairs if image.pixels is not None], [text.text for _, text in pairs]

    real, expected = held_out(section.seed + 1)  # another seed than the training pictures have
    prompts = (captions or expected)[: task.num]
    sizes = [section.canvases[i % len(section.canvases)] for i in range(len(prompts))]
    drawn, seconds = task.draw(prompts, sizes)
    found = [shapes_oracle.score(picture, prompt) for picture, prompt in zip(drawn, prompts, strict=True)]
    keys = {key for score in found for key in score}
    patch = task.config.model.patch_size
    scores = {
        f"{name}, pictures drawn": len(prompts),
        **{f"{name}, drawn, {key}": _mean([score[key] for score in found if key in score]) for key in sorted(keys)},
        f"{name}, frechet distance to held-out pictures": frechet_distance(_small(drawn), _small(real)),
        f"{name}, the same of other held-out pictures": frechet_distance(
            _small(held_out(section.seed + 2)[0]), _small(real)
        ),
        f"{name}, seam energy": seam_energy(drawn, patch),
        f"{name}, seam energy, held-out pictures": seam_energy(real, patch),
        f"{name}, saturated": saturated(drawn),
        f"{name}, saturated, held-out pictures": saturated(real),
        f"{name}, CPU seconds per picture": seconds,
    }
    numbers = range(1, max_objects + 1) if max_objects > 1 else ()
    for number in numbers:
        having = _having(number, prompts)
        scores[f"{name} of {number}, pictures drawn"] = len(having)
        scores[f"{name} of {number}, drawn, all"] = _mean([found[i]["all"] for i in having])
    if task.only_draw:
        return scores
    said = task.generator.captions(real, Sampling(temperature=0), progress=task.progress)
    right = [_true(text, picture) for text, picture in zip(said, real, strict=True)]
    exact = [text == wanted for text, wanted in zip(said, expected, strict=True)]
    slug = name.replace(" ", "-")
    save_grid(drawn[:64], 8, task.out / f"shapes-{slug}.png")
    _write_lines(task.out / f"shapes-{slug}-wrong.jsonl", [
        *({"drawn": prompt, **score} for prompt, score in zip(prompts, found, strict=True) if not score["all"]),
        *({"read": text, "expected": wanted} for text, wanted, true in zip(said, expected, right, strict=True)
          if not true),
    ])  # fmt: skip
    scores |= {f"{name}, {key}": value for key, value in _drift(task, prompts, drawn, expected, real).items()}
    # Of several objects there are several true captions ("A above B", "B below A"), of one object only one.
    scores |= {f"{name}, pictures read": len(real), f"{name}, caption true": _mean(right),
               f"{name}, caption exact": _mean(exact)}  # fmt: skip
    for number in numbers:
        scores[f"{name} of {number}, caption true"] = _mean([right[i] for i in _having(number, expected)])
    return scores


def _having(number: int, captions: Sequence[str]) -> list[int]:
    """Which captions are of so many objects."""
    return [i for i, caption in enumerate(captions) if len(parse_caption(caption).things) == number]


def _true(caption: str, picture: np.ndarray) -> bool:
    """Whether the oracle sees in the picture what the caption says, no more and no less."""
    try:
        return shapes_oracle.score(picture, caption)["all"]
    except ValueError:  # no caption at all
        return False


def digits(task: Task) -> Scores:
    """Prompted digits that an independent classifier recognises; distances to the real test split."""
    from sklearn.svm import SVC

    train_pixels, train_labels = digits_source.arrays("train")
    test_pixels, test_labels = digits_source.arrays("test")
    classifier = SVC(gamma=0.001, C=10).fit(_gray(train_pixels), train_labels)
    wanted = np.arange(task.num) % 10
    prompts = [digits_source.caption(int(digit)) for digit in wanted]
    pictures, seconds = task.draw(prompts, [test_pixels.shape[1:3]] * task.num)
    drawn = np.stack(pictures)
    save_grid(pictures[:100], 10, task.out / "digits.png", gap=1)
    patch = task.config.model.patch_size
    scores = {
        "pictures drawn": task.num,
        "recognised as prompted": _mean(classifier.predict(_gray(drawn)) == wanted),
        "classifier on the real test split": classifier.score(_gray(test_pixels), test_labels),
        "frechet distance to the test split": frechet_distance(_gray(drawn), _gray(test_pixels)),
        "frechet distance, training split to test split": frechet_distance(_gray(train_pixels), _gray(test_pixels)),
        "seam energy": seam_energy(drawn, patch),
        "seam energy, test split": seam_energy(test_pixels, patch),
        "seam energy, training split": seam_energy(train_pixels, patch),
        "saturated": saturated(drawn),
        "saturated, test split": saturated(test_pixels),
        "CPU seconds per picture": seconds,
    }
    if task.only_draw:
        return scores
    said = task.generator.captions(list(test_pixels), Sampling(temperature=0), progress=task.progress)
    real_prompts = [digits_source.caption(int(digit)) for digit in test_labels]
    return scores | {
        "test split, caption exact": _mean(
            [text == digits_source.caption(label) for text, label in zip(said, test_labels, strict=True)]
        ),
        **_drift(task, prompts, drawn, real_prompts, test_pixels),
    }


@torch.inference_mode()
def text(task: Task) -> Scores:
    """Bits per byte of held-out documents, the end of each document counted in."""
    section = task.config.data.text
    assert section is not None
    source = StandardLibrary("test", section.max_bytes)
    count = min(task.num, len(source))
    nats, model = 0.0, task.generator.model
    device = model.token_embedding.weight.device
    encoded = [task.generator.encoder.encode(source.document(i)) for i in range(count)]
    for columns in encoded:
        batch = Batch.collate([columns], [0]).to(device)
        nats += model(batch).text.item()
    segments = [segment for i in range(count) for segment in source.document(i, pixels=False).segments]
    size = sum(len(segment.text.encode()) for segment in segments if isinstance(segment, Text))
    return {"documents": count, "bytes": size, "bits per byte": bits_per_byte(nats, size)}


SUITES: dict[str, Callable[[Task], Scores]] = {suite.__name__: suite for suite in (shapes, digits, text)}
"""Every suite by name. A new one is one function added here."""
_DEFAULT_NUM = {"shapes": 540, "digits": 1000, "text": 500}


def frechet_distance(a_NP: np.ndarray, b_NP: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of vectors (the formula of FID, arXiv 1706.08500). NaN where
    a set has one vector only."""
    if min(len(a_NP), len(b_NP)) < 2:
        return float("nan")
    mean_a, mean_b = a_NP.mean(0), b_NP.mean(0)
    cov_a, cov_b = np.cov(a_NP, rowvar=False), np.cov(b_NP, rowvar=False)

    def root(covariance: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    # The trace of the root of cov_a cov_b, without a root of a matrix that may be singular (pixels that never change).
    cross = np.linalg.svd(root(cov_a) @ root(cov_b), compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * cross)


def seam_energy(pictures: Sequence[np.ndarray] | np.ndarray, patch: int) -> float:
    """Mean absolute step between neighbouring pixels across patch borders, over the same inside patches.

    1 where patches join as smoothly as pixels do; compare with the value of real pictures. NaN where all pixels are at
    borders, or none is.
    """
    across, inside = [], []
    for picture in pictures:
        for axis in (0, 1):
            steps = np.abs(np.diff(picture.astype(np.float64), axis=axis)).mean(axis=(1 - axis, 2))
            at_border = np.arange(1, len(steps) + 1) % patch == 0
            across.append(steps[at_border])
            inside.append(steps[~at_border])
    outer, inner = np.concatenate(across), np.concatenate(inside)
    return float(outer.mean() / max(inner.mean(), 1e-12)) if outer.size and inner.size else float("nan")


def saturated(pictures: Sequence[np.ndarray] | np.ndarray) -> float:
    """Part of the numbers that are 0 or 255, the ends of the range. Too strong guidance shows there as fringes."""
    return _mean([((picture == 0) | (picture == 255)).mean() for picture in pictures])


def _drift(task: Task, prompts: Sequence[str], drawn: Sequence[np.ndarray] | np.ndarray, real_prompts: Sequence[str],
           real: Sequence[np.ndarray] | np.ndarray) -> Scores:  # fmt: skip
    """The loss of the head on real pictures (every patch after the true ones) and on the model's own (every patch after
    what it drew itself). A model of the true distribution has the same on both. More on its own: drawing drifts away.
    Less: what it draws is smoother than real pictures, and so easier to predict."""
    held_out, own = image_loss(task.generator, real_prompts, real), image_loss(task.generator, prompts, drawn)
    return {"image loss, held-out pictures": held_out, "image loss, own pictures": own,
            "image loss, gap": own - held_out}  # fmt: skip


@torch.inference_mode()
def image_loss(generator: Generator, captions: Sequence[str], pictures: Sequence[np.ndarray] | np.ndarray) -> float:
    """Loss per patch of up to 100 pictures behind their captions; the i-th picture always gets the same noise."""
    device = generator.model.token_embedding.weight.device
    total = patches = 0.0
    for i, (caption, pixels) in enumerate(zip(captions[:100], pictures[:100], strict=True)):
        document = Document((Text(caption), Image(pixels.shape[0], pixels.shape[1], pixels)))
        batch = Batch.collate([generator.encoder.encode(document)], [i]).to(device)
        total += generator.model(batch).image.item()
        patches += batch.counts()[1]
    return total / max(patches, 1)


def _small(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Means over an eighth of height by an eighth of width, (N, 192) in 0..255: few enough numbers for a covariance."""
    resized = [np.asarray(Picture.fromarray(picture).resize((8, 8), Picture.Resampling.BOX)) for picture in pictures]
    return np.stack(resized).reshape(len(pictures), -1).astype(np.float64)


def _gray(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) bytes to (N, H * W) in 0..16, the range of the original digits."""
    return pixels.astype(np.float64).mean(-1).reshape(len(pixels), -1) * 16 / 255


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(task: Task, suite: str, folder: Path) -> dict:
    """Run a suite on the checkpoint in folder and write its result to task.out, as JSON. Returns the result."""
    task.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    scores = SUITES[suite](task)
    result = {
        "suite": suite,
        "checkpoint": str(folder),
        "scores": scores,
        "sampling": asdict(task.sampling),
        "seed": task.seed,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
        "command": " ".join(["python -m train.evaluate", *sys.argv[1:]]),
    }
    (task.out / f"{suite}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = OneLineParser(
        prog="python -m train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="run folder (its latest checkpoint) or checkpoint folder")
    parser.add_argument("--suite", required=True, choices=SUITES, help="what to score")
    parser.add_argument("--num", type=int, help="pictures or documents (default: 540 shapes, 1000 digits, 500 texts)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: eval.guidance of the run)")
    parser.add_argument("--steps", type=int, help="sampler steps per patch (default: eval.sampler_steps of the run)")
    parser.add_argument("--sampler", help=f"one of {', '.join((*SAMPLERS, LEARNED))} (default: consistency for a head "
                        "with that objective, else euler)")  # fmt: skip
    parser.add_argument(
        "--weights", default="ema", choices=["ema", "raw"], help="averaged or raw weights (default: ema)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results (default: eval/ in the run folder, or beside a checkpoint outside of one)",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args()
    with working(2):
        folder = checkpoint.resolve(arguments.checkpoint)
        config = checkpoint.read_config(folder)
        generator = Generator.load(folder, arguments.weights, arguments.device)
        usual = sampling_of(config)
        sampling = replace(
            usual,
            guidance=usual.guidance if arguments.guidance is None else Guidance(arguments.guidance),
            sampler=arguments.sampler or usual.sampler,
            steps=usual.steps if arguments.steps is None else arguments.steps,
        )
        sampler_of(generator.model, sampling)
        num = _DEFAULT_NUM[arguments.suite] if arguments.num is None else arguments.num
        if num < 1:
            raise ValueError(f"--num is {num}; it must be at least 1")
        if arguments.suite == "text" and config.data.text is None:
            raise ValueError("suite text needs a model that was trained with data.text")
        sizes = {"digits": [(digits_source.SIDE,) * 2], "shapes": (config.data.shapes or ShapesSection()).canvases}
        for size in sizes.get(arguments.suite, ()):
            generator.grid(*size)
        place = folder.resolve().parent
        out = arguments.out or (place.parent if checkpoint.folder_of(place.parent) == place else place) / "eval"
        task = Task(generator, config, sampling, num, arguments.seed, out, sys.stderr.isatty())
    with working(1):
        result = evaluate(task, arguments.suite, folder)
    for name, value in result["scores"].items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
