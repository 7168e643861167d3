"""`python -m launch.generate` on a model of a few training steps: what it writes, and what it says to wrong input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from data.document import Image, Text, from_json
from data.source.jsonl import Jsonl
from launch.generate import main as command
from tests.train.support import TIMEOUT, TINY, Result, assert_one_line, start
from train import checkpoint, generator

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a small red circle at the top left"
OTHER = "a large blue square at the center"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps; its own samples take 2 sampler steps."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    arguments = ("--run.steps=20", "--eval.sampler_steps=2", "--eval.guidance=1.5")
    result = start(folder.parent, "train", *TINY, f"--run.dir={folder}", *arguments).finish()
    assert result.status == 0, result.err
    return folder


@pytest.fixture(scope="module")
def drawn(run: Path) -> Path:
    """Five pictures of two prompts."""
    out = run.parent / "drawn"
    generate(
        run, "--prompt", PROMPT, "--prompt", OTHER, "--num-images", 2, "--size", "16x24", "--seed", 7, "--out", out
    )
    return out


def generate(run: Path, *arguments: object) -> str:
    """Run it to a good end; returns standard output."""
    result = refused(run, *arguments)
    assert result.status == 0, result.err
    assert result.err == ""
    return result.out


def refused(run: Path, *arguments: object) -> Result:
    return start(run.parent / "out", "launch.generate", "--checkpoint", run, *arguments).finish()


def pixels(path: Path) -> np.ndarray:
    with Picture.open(path) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)


def metadata(path: Path) -> dict:
    with Picture.open(path) as picture:
        return json.loads(picture.info["ropeway"])


@pytest.mark.slow  # compiles
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_drawing_from_the_command_line(run: Path, drawn: Path) -> None:
    out = run.parent / "compiled"
    generate(run, "--prompt", PROMPT, "--num-images", 2, "--size", "16x24", "--seed", 7, "--out", out, "--compile")
    one, other = (pixels(drawn / name).astype(int) for name in ("00000.png", "00001.png"))
    distance = np.abs(one - other).mean()
    for name, expected in (("00000.png", one), ("00001.png", other)):  # bf16 rounds otherwise, where there is
        assert np.abs(pixels(out / name) - expected).mean() < 0.2 * distance
        assert metadata(out / name)["compiled"]
        assert not metadata(drawn / name)["compiled"]


def test_compiling_needs_a_compiler(run: Path) -> None:
    arguments = ("--checkpoint", run, "--prompt", PROMPT, "--out", run.parent / "none", "--compile")
    command = start(run.parent / "out", "launch.generate", *arguments, environment={"CXX": "no-such-compiler"})
    assert_one_line(command.finish(), 2, "C++ compiler")


def test_prompts_give_pictures_with_their_settings(run: Path, drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == [*(f"{i:05d}.png" for i in range(4)), "prompts.jsonl"]
    records = [json.loads(line) for line in (drawn / "prompts.jsonl").read_text().splitlines()]
    for i, record in enumerate(records):
        path = drawn / f"{i:05d}.png"
        assert pixels(path).shape == (16, 24, 3)
        assert metadata(path) | {"file": path.name} == record
        assert record["prompt"] == (PROMPT if i < 2 else OTHER)
        assert record["seed"] == 7 + i
        assert (record["height"], record["width"]) == (16, 24)
        assert record["checkpoint"] == str(checkpoint.resolve(run))
        assert record["sampling"]["steps"] == 2  # where the command line is silent, as the run's own samples
        assert record["sampling"]["guidance"]["scale"] == 1.5
    pictures = [pixels(drawn / f"{i:05d}.png") for i in range(4)]
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert all(len(np.unique(picture)) > 10 for picture in pictures)  # else comparing pixels would show little


def test_metadata_is_enough_to_draw_the_picture_again(tmp_path: Path, drawn: Path) -> None:
    said = metadata(drawn / "00002.png")
    guidance = said["sampling"]["guidance"]
    generate(
        Path(said["checkpoint"]), "--prompt", said["prompt"], "--seed", said["seed"], "--weights", said["weights"],
        "--size", f"{said['height']}x{said['width']}", "--sampler", said["sampling"]["sampler"],
        "--steps", said["sampling"]["steps"], "--guidance", guidance["scale"],
        "--guidance-schedule", guidance["schedule"], "--out", tmp_path / "again",
    )  # fmt: skip
    assert np.array_equal(pixels(tmp_path / "again" / "00000.png"), pixels(drawn / "00002.png"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_change_pixels(tmp_path: Path, run: Path, drawn: Path, batch_size: int) -> None:
    generate(run, "--prompt", PROMPT, "--prompt", OTHER, "--num-images", 2, "--size", "16x24", "--seed", 7,
             "--out", tmp_path / "out", "--batch-size", batch_size)  # fmt: skip
    for i in range(4):
        assert np.array_equal(pixels(tmp_path / "out" / f"{i:05d}.png"), pixels(drawn / f"{i:05d}.png")), i


def test_what_was_drawn_before_a_failure_stays(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Memory runs out in the second batch."""
    batches, real, out = iter((True, False)), generator.generate, tmp_path / "out"

    def failing(*arguments: object, **options: object) -> object:
        if next(batches):
            return real(*arguments, **options)  # type: ignore[arg-type]
        raise MemoryError

    monkeypatch.setattr(generator, "generate", failing)
    options = ("--prompt", PROMPT, "--num-images", 3, "--batch-size", 2, "--size", "16x24", "--out", out)
    monkeypatch.setattr(sys, "argv", ["generate", "--checkpoint", str(run), *map(str, options)])
    with pytest.raises(SystemExit, match="1"):
        command()
    assert capsys.readouterr() == (f"{out / '00000.png'}\n{out / '00001.png'}\n", "error: out of memory\n")
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png", "prompts.jsonl"]
    assert len((out / "prompts.jsonl").read_text().splitlines()) == 2


def test_other_seeds_weights_and_guidance_change_pixels(tmp_path: Path, run: Path, drawn: Path) -> None:
    """Negative control of the two tests before."""
    before = pixels(drawn / "00000.png")
    for name, options in {
        "seed": ("--seed", 8),
        "weights": ("--seed", 7, "--weights", "raw"),
        "guidance": ("--seed", 7, "--guidance", 4),
        "steps": ("--seed", 7, "--steps", 3),
        "sampler": ("--seed", 7, "--sampler", "heun"),
    }.items():
        generate(run, "--prompt", PROMPT, "--size", "16x24", *options, "--out", tmp_path / name)
        assert not np.array_equal(pixels(tmp_path / name / "00000.png"), before), name


def test_the_model_chooses_the_size(tmp_path: Path, run: Path) -> None:
    generate(run, "--prompt", PROMPT, "--num-images", 3, "--out", tmp_path / "out")
    for i in range(3):
        height, width, _ = pixels(tmp_path / "out" / f"{i:05d}.png").shape
        assert height % 8 == width % 8 == 0
        assert 1 <= height * width // 64 <= 16


def test_grid(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "out"
    said = generate(run, "--prompt", PROMPT, "--num-images", 5, "--size", "16x16", "--grid", 3, "--out", out)
    assert said.splitlines() == [*(str(out / f"{i:05d}.png") for i in range(5)), str(out / "grid.png")]
    sheet = pixels(out / "grid.png")
    factor = sheet.shape[1] // (3 * 18 + 2)
    assert sheet.shape == ((2 * 18 + 2) * factor, (3 * 18 + 2) * factor, 3)
    small = sheet[::factor, ::factor]
    assert np.array_equal(small[20:36, 20:36], pixels(out / "00004.png"))
    assert (small[20:36, 38:54] == 255).all()


def test_prompts_file_of_text(tmp_path: Path, run: Path, drawn: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n\n{OTHER}\n")
    generate(run, "--prompts-file", prompts, "--size", "16x24", "--seed", 8, "--out", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [(PROMPT, 8), (OTHER, 9)]
    assert np.array_equal(pixels(tmp_path / "out" / "00001.png"), pixels(drawn / "00002.png"))


def test_prompts_file_of_json_lines(tmp_path: Path, run: Path, drawn: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": OTHER, "num_images": 2, "size": "16x24", "seed": 9}, {"prompt": "été \u2028 in a line"}]
    prompts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    generate(run, "--prompts-file", prompts, "--prompt", PROMPT, "--size", "16x16", "--out", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPT, OTHER, OTHER, "été \u2028 in a line"]
    assert [line["seed"] for line in lines] == [0, 9, 10, 3]
    assert [(line["height"], line["width"]) for line in lines] == [(16, 16), (16, 24), (16, 24), (16, 16)]
    assert np.array_equal(pixels(tmp_path / "out" / "00001.png"), pixels(drawn / "00002.png"))


def test_results_are_not_overwritten(tmp_path: Path, run: Path) -> None:
    arguments = ("--prompt", PROMPT, "--size", "16x16", "--out", tmp_path / "out")
    generate(run, *arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert_one_line(refused(run, *arguments, "--seed", 5), 2, "00000.png exists", "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    generate(run, *arguments, "--seed", 5, "--overwrite")
    assert (tmp_path / "out" / "00000.png").read_bytes() != before["00000.png"]


def test_pictures_are_described(run: Path, drawn: Path) -> None:
    one, two = drawn / "00000.png", drawn / "00001.png"
    said = generate(run, "--image", one, "--max-text", 12)
    both = generate(run, "--image", one, two, "--max-text", 12)
    assert both.startswith(f"{one}: {said.rstrip(chr(10))}")
    assert f"{two}: " in both
    assert len(said.rstrip("\n").encode()) <= 3 * 12  # a token that is no UTF-8 becomes a character of 3 bytes


def test_a_document_is_continued(tmp_path: Path, run: Path, drawn: Path) -> None:
    shutil.copy(drawn / "00000.png", tmp_path / "picture.png")
    document = tmp_path / "doc.json"
    segments = [{"text": "See this: "}, {"image": "picture.png", "learn": False}, {"text": " and"}]
    document.write_text(json.dumps({"id": "mine", "segments": segments}, indent=1))
    arguments = ("--document", document, "--out", tmp_path / "out", "--size", "16x16", "--max-text", 20,
                 "--temperature", 1, "--num-images", 2)  # fmt: skip
    said = generate(run, *arguments)
    (line,) = (tmp_path / "out" / "document.jsonl").read_text().splitlines()
    result = from_json(line, tmp_path / "out")
    assert result.id == "mine"
    assert Jsonl(tmp_path / "out" / "document.jsonl").document(0) == result
    given, made = result.segments[:3], result.segments[3:]
    assert given[0] == Text("See this: ")
    assert isinstance(given[1], Image)
    assert not given[1].learn
    assert np.array_equal(given[1].pixels, pixels(drawn / "00000.png"))
    assert given[2] == Text(" and")
    assert made
    assert sum(isinstance(segment, Image) for segment in made) <= 2
    for segment in made:
        if isinstance(segment, Image):
            assert (segment.height, segment.width) == (16, 16)
            number = result.segments.index(segment)
            assert metadata(tmp_path / "out" / f"image-{number:03d}.png")["document"] == "mine"
        else:
            assert segment.text in said
    assert_one_line(refused(run, *arguments), 2, "document.jsonl exists")


def test_help(run: Path) -> None:
    said = generate(run, "--help")
    for words in ("--prompt", "HEIGHTxWIDTH", "default: 64", "canonical schema"):
        assert words in said


WRONG = [
    pytest.param([], "give one of --prompt", id="nothing-to-do"),
    pytest.param(["--prompt", "a", "--image", "b.png"], "give one of --prompt", id="two-things-to-do"),
    pytest.param(["--prompt", "a", "--no-such-option"], "--no-such-option", id="unknown-option"),
    pytest.param(["--prompt", "a", "--steps", "few"], "--steps: invalid int value: 'few'", id="type"),
    pytest.param(["--prompt", "a", "--sampler", "magic"], "invalid choice: 'magic'", id="sampler"),
    pytest.param(["--prompt", "a", "--steps", "0"], "sampler steps is 0", id="steps"),
    pytest.param(["--prompt", "a", "--num-images", "0"], "--num-images is 0", id="no-images"),
    pytest.param(["--prompt", "a", "--batch-size", "0"], "--batch-size is 0", id="batch-size"),
    pytest.param(["--prompt", "a", "--grid", "-1"], "--grid is -1", id="grid"),
    pytest.param(["--image", "b.png", "--grid", "2"], "--grid is for pictures of --prompt", id="grid-of-captions"),
    pytest.param(["--prompt", "a", "--guidance", "-1"], "guidance scale is -1.0", id="guidance"),
    pytest.param(["--prompt", "a", "--guidance-interval", "0.9", "0.1"], "guidance interval", id="interval"),
    pytest.param(["--prompt", "a", "--top-p", "0"], "0 < top_p <= 1", id="top-p"),
    pytest.param(["--prompt", "a", "--size", "33x32"], "33 x 32 pixels cannot be drawn", id="size-33x32"),
    pytest.param(["--prompt", "a", "--size", "0x0"], "0 x 0 pixels cannot be drawn", id="size-0x0"),
    pytest.param(["--prompt", "a", "--size", "800000x8"], "multiples of 8, 8 to 64", id="size-huge"),
    pytest.param(["--prompt", "a", "--size", "abc"], "size 'abc' is not HEIGHTxWIDTH", id="size-abc"),
    pytest.param(["--prompt", "a", "--size", "32"], "size '32' is not HEIGHTxWIDTH", id="size-one-number"),
    pytest.param(["--prompt", "a\udcff"], "text is not valid Unicode", id="prompt-no-unicode"),
    pytest.param(["--prompts-file", "/no/where.txt"], "/no/where.txt", id="no-prompts-file"),
    pytest.param(["--document", "/no/where.json"], "/no/where.json", id="no-document"),
    pytest.param(["--image", "/no/where.png"], "/no/where.png", id="no-image"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_wrong_options(tmp_path: Path, run: Path, arguments: list[str], words: str) -> None:
    assert_one_line(refused(run, *arguments, "--out", tmp_path / "out"), 2, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("5", "expected an object"),
        ("[]", "expected an object"),
        ('"a"', "expected an object"),
        ('{"size": "16x16"}', "expected an object"),
        ('{"prompt": 3}', '"prompt": 3'),
        ('{"prompt": "a", "colour": 1}', '"colour"'),
        ('{"prompt": "a", "seed": "x"}', '"seed": "x"'),
        ('{"prompt": "a", "seed": null}', '"seed": null'),
        ('{"prompt": "a", "num_images": 0}', '"num_images" is 0'),
        ('{"prompt": "a", "num_images": true}', '"num_images": true'),
        ('{"prompt": "a", "size": [16, 16]}', '"size": [16, 16]'),
        ('{"prompt": "a", "size": "16"}', "size '16' is not HEIGHTxWIDTH"),
    ],
)
def test_wrong_line_of_a_prompts_file(tmp_path: Path, run: Path, line: str, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    result = refused(run, "--prompts-file", path, "--out", tmp_path / "out")
    assert_one_line(result, 2, f"{path}:2: ", words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe", "not a text file in UTF-8"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.jsonl", b'{"prompt": "a", "size": "17x16"}', "17 x 16 pixels cannot be drawn"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_wrong_prompts_file(tmp_path: Path, run: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = refused(run, "--prompts-file", tmp_path / name, "--out", tmp_path / "out")
    assert_one_line(result, 2, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"segments": [{"text": "a", "colour": 1}]}', "unknown key 'colour'"),
        (b'{"segments": [{"image": "missing.png"}]}', "missing.png"),
    ],
)
def test_wrong_document(tmp_path: Path, run: Path, content: bytes, words: str) -> None:
    path = tmp_path / "doc.json"
    path.write_bytes(content)
    assert_one_line(refused(run, "--document", path, "--out", tmp_path / "out"), 2, str(path), words)
    assert not (tmp_path / "out").exists()


def test_document_with_an_unknown_size(tmp_path: Path, run: Path) -> None:
    path = tmp_path / "doc.json"
    path.write_text('{"segments": [{"text": "a"}]}')
    result = refused(run, "--document", path, "--size", "33x32", "--out", tmp_path / "out")
    assert_one_line(result, 2, "33 x 32 pixels cannot be drawn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\nand then nothing"])
def test_unreadable_image(tmp_path: Path, run: Path, content: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert_one_line(refused(run, "--image", path), 2, str(path))


def test_truncated_image(tmp_path: Path, run: Path, drawn: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes((drawn / "00000.png").read_bytes()[:-200])
    assert_one_line(refused(run, "--image", path), 2, str(path))


@pytest.mark.parametrize("what", [("--prompt", "a"), ("--document", "doc.json")])
def test_no_out(tmp_path: Path, run: Path, what: tuple[str, str]) -> None:
    (tmp_path / "doc.json").write_text('{"segments": [{"text": "a"}]}')
    option, value = what
    value = str(tmp_path / value) if option == "--document" else value
    assert_one_line(refused(run, option, value), 2, "--out DIR is needed")


def test_out_that_is_a_file(tmp_path: Path, run: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert_one_line(refused(run, "--prompt", "a", "--out", tmp_path / "out"), 2, "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_missing_checkpoint(tmp_path: Path) -> None:
    result = refused(tmp_path / "none", "--prompt", "a", "--out", tmp_path / "pictures")
    assert_one_line(result, 2, f"{tmp_path / 'none'}: no sound checkpoint there")
    assert_one_line(start(tmp_path, "launch.generate", "--prompt", "a").finish(), 2, "--checkpoint")
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("name", ["ema.safetensors", "config.yaml", "tokenizer.json", "manifest.json"])
def test_truncated_checkpoint(tmp_path: Path, run: Path, name: str) -> None:
    folder = tmp_path / "step-00000020"
    shutil.copytree(checkpoint.resolve(run), folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    result = refused(folder, "--prompt", "a", "--out", tmp_path / "pictures")
    assert_one_line(result, 2, str(folder), "not a readable checkpoint" if name == "manifest.json" else "truncated")
    assert not (tmp_path / "pictures").exists()


def test_python_m_launch_generate_from_a_shell(tmp_path: Path) -> None:
    """The same through a fresh interpreter, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.generate", "--checkpoint", str(tmp_path), "--prompt", "a"],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert_one_line(Result(done.returncode, done.stdout, done.stderr), 2, "no sound checkpoint there")
