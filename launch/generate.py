"""`python -m launch.generate --checkpoint RUN_OR_DIR ...`: pictures from prompts, captions of pictures, documents.

--prompt "a small red circle at the top left" --num-images 4 --out DIR     draw pictures
--prompts-file FILE --out DIR                                              draw for every line
--image picture.png [more.png ...]                                         describe pictures
--document doc.json --out DIR                                              go on with an interleaved document
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data.command import OneLineParser, working
from data.document import Document, Image, Text, from_json
from data.image import load_image
from model.diffusion.guidance import Guidance
from model.diffusion.sampler import GRIDS, LEARNED, SAMPLERS
from model.sampling import Sampling, sampler_of
from train import checkpoint
from train.generator import Generator, Order, sampling_of
from train.log import commit
from train.samples import save_grid, save_png


@dataclass(frozen=True)
class Line:
    """A prompt with how often, how large and from which seed on to draw it."""

    prompt: str
    num_images: int
    size: tuple[int, int] | None
    seed: int | None


def main() -> None:
    """Exit status 0: done; 2: wrong input, nothing was written; 1: something failed in the middle of work."""
    arguments = _parser().parse_args()
    with working(2):
        folder = checkpoint.resolve(arguments.checkpoint)
        generator = Generator.load(folder, arguments.weights, arguments.device, arguments.compile)
        sampling = _sampling(arguments, folder)
        sampler_of(generator.model, sampling)
        _check(arguments, generator)
        if arguments.image:
            pictures = [load_image(path) for path in arguments.image]
        elif arguments.document:
            path = arguments.document
            document = from_json(path.read_bytes(), path.parent, where=str(path))
            # Between and around the new pictures there may be new texts.
            most = len(document.segments) + 2 * arguments.num_images + 1
            targets = _targets(arguments, ["document.jsonl", *(_image_name(n) for n in range(most))])
        else:
            lines = _read_prompts(arguments)
            for line in lines:
                generator.tokenizer.count(line.prompt)  # raises for what is not Unicode
                if line.size:
                    generator.grid(*line.size)
            jobs = [(line, i) for line in lines for i in range(line.num_images)]
            names = [f"{i:05d}.png" for i in range(len(jobs))]
            targets = _targets(arguments, [*names, "prompts.jsonl", *(["grid.png"] if arguments.grid else [])])
    with working(1):
        if arguments.image:
            _describe(generator, sampling, arguments, pictures)
        elif arguments.document:
            _continue(generator, sampling, arguments, document, targets[0], folder)
        else:
            _draw(generator, sampling, arguments, jobs, targets, folder)


def _draw(generator: Generator, sampling: Sampling, arguments: argparse.Namespace, jobs: list[tuple[Line, int]],
          targets: list[Path], folder: Path) -> None:  # fmt: skip
    seeds = [arguments.seed + n if line.seed is None else line.seed + i for n, (line, i) in enumerate(jobs)]
    orders = [
        Order(Document((Text(line.prompt),)), seed, begin_image=True, size=line.size, max_text=0)
        for (line, _), seed in zip(jobs, seeds, strict=True)
    ]
    made = generator.as_made(orders, sampling, arguments.batch_size, progress=sys.stderr.isatty())
    pictures, settings = [], _settings(sampling, arguments, folder)
    for parts, (line, _), seed, target in zip(made, jobs, seeds, targets, strict=False):
        image = parts[0]
        assert isinstance(image, Image)
        assert image.pixels is not None
        record = {"prompt": line.prompt, "seed": seed, "height": image.height, "width": image.width, **settings}
        save_png(image.pixels, target, ropeway=json.dumps(record))
        with (arguments.out / "prompts.jsonl").open("w" if target == targets[0] else "a") as records:
            print(json.dumps({"file": target.name, **record}), file=records)
        tqdm.write(str(target), file=sys.stdout)
        pictures += [image.pixels] * bool(arguments.grid)
    if arguments.grid:
        save_grid(pictures, arguments.grid, arguments.out / "grid.png")
        print(arguments.out / "grid.png")


def _describe(generator: Generator, sampling: Sampling, arguments: argparse.Namespace, pictures: list) -> None:
    captions = generator.captions(
        pictures, sampling, arguments.seed, arguments.max_text, arguments.batch_size, progress=sys.stderr.isatty()
    )
    for path, caption in zip(arguments.image, captions, strict=True):
        print(f"{path}: {caption}" if len(captions) > 1 else caption)


def _settings(sampling: Sampling, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """What every picture tells of how it was made."""
    return {"checkpoint": str(folder), "weights": arguments.weights, "sampling": asdict(sampling),
            "compiled": arguments.compile, "commit": commit()}  # fmt: skip


def _continue(generator: Generator, sampling: Sampling, arguments: argparse.Namespace, document: Document,
              target: Path, folder: Path) -> None:  # fmt: skip
    order = Order(document, arguments.seed, size=arguments.size, max_images=arguments.num_images,
                  max_text=arguments.max_text)  # fmt: skip
    (parts,) = generator([order], sampling, progress=sys.stderr.isatty())
    segments, settings = [], _settings(sampling, arguments, folder)
    for number, part in enumerate((*document.segments, *parts)):
        if isinstance(part, Text):
            segments.append({"text": part.text, "learn": part.learn})
        elif part.pixels is not None:
            name = _image_name(number)
            record = {"document": document.id, "seed": arguments.seed, **settings}
            made_here = number >= len(document.segments)
            save_png(part.pixels, arguments.out / name, **({"ropeway": json.dumps(record)} if made_here else {}))
            segments.append({"image": name, "learn": part.learn})
    result = {"id": document.id, "source": "launch.generate", "segments": segments}
    target.write_text(json.dumps(result, ensure_ascii=False) + "\n")
    for segment in segments[len(document.segments) :]:
        print(segment.get("text", arguments.out / segment.get("image", "")))


def _read_prompts(arguments: argparse.Namespace) -> list[Line]:
    """Prompts of --prompt and --prompts-file (.jsonl: an object per line, else a prompt per line)."""
    default = Line("", arguments.num_images, arguments.size, None)
    lines = [Line(prompt, default.num_images, default.size, None) for prompt in arguments.prompt or []]
    if arguments.prompts_file:
        path = arguments.prompts_file
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text file in UTF-8") from None
        for number, text in enumerate(content.split("\n"), 1):
            if not text.strip():
                continue
            try:
                lines.append(_prompt_line(text, default) if path.suffix == ".jsonl" else
                             Line(text, default.num_images, default.size, None))  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not lines:
        raise ValueError(f"{arguments.prompts_file}: holds no prompts")
    return lines


def _prompt_line(text: str, default: Line) -> Line:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    kinds = {"prompt": str, "num_images": int, "size": str, "seed": int}
    if not isinstance(values, dict) or "prompt" not in values:
        raise ValueError('expected an object with "prompt", such as {"prompt": "a red circle"}')
    for key, value in values.items():
        if key not in kinds or type(value) is not kinds[key]:
            raise ValueError(f'"{key}": {json.dumps(value)} is not one of {", ".join(kinds)}, or has another type')
    if values.get("num_images", 1) < 1:
        raise ValueError(f'"num_images" is {values["num_images"]}; it must be at least 1')
    size = _size(values["size"]) if "size" in values else default.size
    return Line(values["prompt"], values.get("num_images", default.num_images), size, values.get("seed"))


def _image_name(segment: int) -> str:
    return f"image-{segment:03d}.png"


def _check(arguments: argparse.Namespace, generator: Generator) -> None:
    """Raises ValueError for what cannot be done, or not together."""
    kinds = (arguments.prompt or arguments.prompts_file, arguments.image, arguments.document)
    if sum(map(bool, kinds)) != 1:
        raise ValueError("give one of --prompt (and --prompts-file), --image and --document")
    for name in ("num_images", "batch_size", "grid"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if arguments.grid and (arguments.image or arguments.document):
        raise ValueError("--grid is for pictures of --prompt and --prompts-file")
    if arguments.max_text < 0:
        raise ValueError(f"--max-text is {arguments.max_text}; it must not be negative")
    if arguments.size:
        generator.grid(*arguments.size)


def _targets(arguments: argparse.Namespace, names: list[str]) -> list[Path]:
    """Paths to write. Raises ValueError if there is no --out, or something is there already."""
    if arguments.out is None:
        raise ValueError("--out DIR is needed: where shall the result go?")
    targets = [arguments.out / name for name in names]
    there = [path for path in targets if path.exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{there[0]} exists; choose another --out, or give --overwrite")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return targets


def _sampling(arguments: argparse.Namespace, folder: Path) -> Sampling:
    """Settings of the command line; where it is silent, those of the run's own samples."""
    usual = sampling_of(checkpoint.read_config(folder))
    low, high = arguments.guidance_interval
    scale = usual.guidance.scale if arguments.guidance is None else arguments.guidance
    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        guidance=Guidance(
            scale, arguments.guidance_schedule, low, high, arguments.guidance_image, arguments.guidance_renormalise
        ),
        sampler=arguments.sampler or usual.sampler,
        steps=usual.steps if arguments.steps is None else arguments.steps,
        grid=arguments.time_grid,
        time_shift=arguments.time_shift,
        noise_temperature=arguments.noise_temperature,
        clamp=arguments.clamp,
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"size {text!r} is not HEIGHTxWIDTH in pixels, such as 32x48")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def size(text: str) -> tuple[int, int]:
        try:
            return _size(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    add = parser.add_argument
    add("--checkpoint", required=True, help="run folder (its latest checkpoint) or checkpoint folder")
    add("--weights", default="ema", choices=["ema", "raw"], help="averaged or raw weights (default: ema)")
    add("--prompt", action="append", help="caption to draw; may be given several times")
    add("--prompts-file", type=Path, help="a prompt per line, or .jsonl: {prompt, num_images, size, seed}")
    add("--image", type=Path, nargs="+", help="pictures to describe")
    add("--document", type=Path, help="document in the canonical schema to go on from (docs/data-format.md)")
    add("--num-images", type=int, default=1, help="pictures per prompt, or in the document at most (default: 1)")
    add("--size", type=size, help="HEIGHTxWIDTH of pictures in pixels (default: the model chooses)")
    add("--seed", type=int, default=0, help="seed of the first sample; the next have seed + 1, ... (default: 0)")
    add("--guidance", type=float, help="scale of classifier-free guidance, 1 is off (default: the run's eval.guidance)")
    add("--guidance-schedule", default=Guidance.schedule, choices=["interval", "linear", "constant"],
        help="when pictures are guided: within an interval of times, more from patch to patch, always, which gives "
             "fringes (default: interval)")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, default=(Guidance.low, Guidance.high), metavar=("LOW", "HIGH"),
        help=f"times of the interval schedule, 0 noise, 1 data (default: {Guidance.low} {Guidance.high})")  # fmt: skip
    add("--guidance-image", type=float, default=1.0,
        help="guidance scale of the images in the prompt, 1 is off (default: 1)")  # fmt: skip
    add("--guidance-renormalise", action="store_true", help="guided velocities are no longer than conditional ones")
    add("--sampler", choices=[*SAMPLERS, LEARNED],
        help="sampler of a patch (default: consistency for a head with that objective, else euler)")  # fmt: skip
    add("--steps", type=int, help="sampler steps per patch (default: the run's eval.sampler_steps)")
    add("--time-grid", default="uniform", choices=GRIDS, help="where the steps lie in time (default: uniform)")
    add("--time-shift", type=float, default=1.0,
        help="factor on noise over signal along the steps; n suits pictures n times as wide (default: 1)")  # fmt: skip
    add("--noise-temperature", type=float, default=1.0,
        help="factor on the noise that ddpm, sde and consistency add (default: 1)")  # fmt: skip
    add("--clamp", action="store_true", help="keep what each head evaluation points to within the range of pixels")
    add("--temperature", type=float, default=0.0, help="of text; 0 takes the most probable token (default: 0)")
    add("--top-k", type=int, default=0, help="keep the k most probable tokens; 0 keeps all (default: 0)")
    add("--top-p", type=float, default=1.0, help="keep tokens up to this total probability (default: 1)")
    add("--max-text", type=int, default=256, help="tokens of text at most (default: 256)")
    add("--compile", action="store_true", help="torch.compile what draws patches and writes text: half a minute or "
        "more at first; pays from tens of thousands of small pictures on (docs/decisions.md, 44)")  # fmt: skip
    add("--batch-size", type=int, default=64, help="samples at a time; does not change them (default: 64)")
    add("--out", type=Path, help="folder for the results")
    add("--grid", type=int, metavar="COLUMNS", help="also write all pictures as one grid.png")
    add("--overwrite", action="store_true", help="replace results that are there")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser


if __name__ == "__main__":
    main()
