"""Every mistake in the configuration is one clear line and exit status 2, before anything is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data.command import working
from model.ropeway import Ropeway
from tests.train.support import TIMEOUT, TINY, Result, assert_one_line, metrics, start
from train import settings
from train.config import Config, DataSection, FilesSection, OptimSection, RunSection, TextSection
from train.loop import set_up
from train.pipeline import make_tokenizer, vocabulary_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# Parameters in millions that the header or the name of a file promises, where it promises any.
SIZES = {"base-300m": (270, 360), "base-1b": (900, 1200), "base-7b": (6300, 8000)}

WRONG = [
    pytest.param(["--optim.lrr=3"], "optim.lrr", id="unknown-key"),
    pytest.param(["--model.head.widht=3"], "model.head.widht", id="unknown-key-nested"),
    pytest.param(["--data.shapes.documnts=3"], "data.shapes.documnts is not a key", id="unknown-key-optional-section"),
    pytest.param(["--data.files=[{pth: a}]"], "data.files.pth is not a key", id="unknown-key-in-list"),
    pytest.param(["--modle.dim=3"], "modle.dim", id="unknown-section"),
    pytest.param(["--run.step=3"], "run.step", id="abbreviation"),
    pytest.param(["stray"], "stray", id="stray-word"),
    pytest.param(["--run.steps"], "expected one argument", id="no-value"),
    pytest.param(["--optim.lr=fast"], "optim.lr: expected float, got fast", id="float"),
    pytest.param(["--optim.lr=nan"], "optim.lr", id="nan"),
    pytest.param(["--model.dim=1.5"], "model.dim: expected int, got 1.5", id="int"),
    pytest.param(["--eval.every=true"], "eval.every: expected int", id="bool-for-int"),
    pytest.param(["--run.threads=many"], "run.threads: expected int, got many", id="optional-int"),
    pytest.param(["--data.shapes.canvases=[[16]]"], "data.shapes.canvases", id="tuple"),
    pytest.param(["--run.precision=fp64"], "run.precision: expected Literal['auto', 'fp32', 'bf16']", id="literal"),
    pytest.param(["--model.dim=[1"], "model.dim", id="bad-yaml-value"),
    pytest.param(["--model.head=[1"], "model.head", id="bad-yaml-section"),
    pytest.param(["--run.steps=0"], "run.steps is 0; it must be at least 1", id="no-steps"),
    pytest.param(["--run.stop_after=0"], "run.stop_after", id="stop-at-once"),
    pytest.param(["--run.threads=-1"], "run.threads", id="negative-threads"),
    pytest.param(["--run.seed=-1"], "run.seed", id="negative-seed"),
    pytest.param(["--optim.muon_lr=0"], "optim.muon_lr is 0.0; it must be positive", id="no-muon-lr"),
    pytest.param(
        ["--optim.muon_lr=0.004", "--engine.backend=deepspeed"], "optim.muon_lr needs engine", id="muon-deepspeed"
    ),
    pytest.param(["--optim.lr=-1"], "optim.lr is -1.0; it must be positive", id="negative-lr"),
    pytest.param(["--optim.beta2=1"], "optim.beta2", id="beta"),
    pytest.param(["--optim.warmup_steps=-1"], "optim.warmup_steps", id="negative-warmup"),
    pytest.param(["--eval.sampler_steps=0"], "eval.sampler_steps", id="sampler-steps"),
    pytest.param(["--model.num_heads=3"], "model.dim 32 is not a multiple of model.num_heads 3", id="heads"),
    pytest.param(["--model.num_kv_heads=3"], "model.num_kv_heads 3", id="kv-heads"),
    pytest.param(["--model.positions=none"], "flatten, tie, tie_frac, tv, mrope", id="positions"),
    pytest.param(["--model.attention=none"], "model.attention 'none' is unknown", id="attention"),
    pytest.param(["--model.patch_size=7"], "data.shapes.canvases holds 16 x 16", id="canvas-patch"),
    pytest.param(["--engine.backend=none"], "engine.backend", id="backend"),
]

FILES = [
    pytest.param(b"run: {stps: 3}\n", "run.stps is not a key", id="unknown-key"),
    pytest.param(b"data: {shapes: {documents: x}}\n", "data.shapes.documents: expected int, got x", id="type"),
    pytest.param(b"model: {num_heads: 3}\n", "model.num_heads 3", id="combination"),
    pytest.param(b"run:\n  steps: [1\nmodel: 3\n", "wrong.yaml:3: not valid YAML", id="yaml"),
    pytest.param(b"run: !!python/object/apply:os.system ['exit 1']\n", "wrong.yaml:1: not valid YAML", id="python-tag"),
    pytest.param(b"- 1\n- 2\n", "wrong.yaml: must hold sections", id="list"),
    pytest.param(b"words\n", "wrong.yaml: must hold sections", id="words"),
    pytest.param(b"", "wrong.yaml: must hold sections", id="empty"),
    pytest.param(b"\xff\xfe\x00", "wrong.yaml: not a text file in UTF-8", id="binary"),
]

# What only shows when the parts are built.
SETUP = [
    pytest.param(["--engine.micro_batches=3"], "data.rows_per_step 4 is not a multiple of 3", id="micro-batches"),
    pytest.param(["--data.tokenizer=/no/where.json"], "/no/where.json", id="tokenizer"),
    pytest.param(["--data.files=[{path: /no/where.jsonl}]"], "/no/where.jsonl: cannot be read", id="data-file"),
    pytest.param(["--data.shapes=null"], "no data: set data.shapes", id="no-data"),
    pytest.param(["--run.init_from=/no/where"], "/no/where: no sound checkpoint there", id="init-from"),
    pytest.param(["--data.row_length=20"], "but data.row_length is 20", id="row-length"),
    pytest.param(["--data.min_patches=9", "--data.max_patches=8"], "min_patches 9", id="patches"),
    pytest.param(["--data.condition_dropout=2"], "condition_dropout is 2.0", id="dropout"),
    pytest.param(["--data.shapes.max_objects=9"], "max_objects", id="objects"),
]


def train(folder: Path, *arguments: str) -> Result:
    """`python -m train` with the tiny configuration, in the run folder folder/run."""
    return start(folder / "out", "train", *TINY, f"--run.dir={folder / 'run'}", *arguments).finish()


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_wrong_option_raises_one_error_that_names_it(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        settings.parse([*TINY, *arguments])
    assert words in " ".join(str(caught.value).split())


@pytest.mark.parametrize(("content", "words"), FILES)
def test_wrong_file_raises_one_error_that_names_it(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\S") as caught:
        settings.parse([*TINY, "--config", str(path)])
    assert words in " ".join(str(caught.value).split())


@pytest.mark.parametrize("place", ["missing.yaml", "."])
def test_missing_file(tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        settings.parse(["--config", str(tmp_path / place)])


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--optim.lrr=3"], id="unknown-key"),
        pytest.param(["--data.shapes.canvases=[[16]]"], id="wrong-type"),
        pytest.param(["--model.num_heads=3"], id="combination"),
        pytest.param(["--config", "/no/where.yaml"], id="missing-file"),
        pytest.param(["--model.head=[1"], id="bad-yaml"),
    ],
)
def test_command_ends_with_one_line_and_status_2(tmp_path: Path, arguments: list[str]) -> None:
    assert_one_line(train(tmp_path, *arguments), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "words"), SETUP)
def test_command_checks_what_it_builds(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert_one_line(train(tmp_path, *arguments), 2, words)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    result = start(tmp_path, "train", *TINY, f"--run.dir={tmp_path / 'run'}", "--model.ffn_dim=10000000000000").finish()
    assert_one_line(result, 1, "out of memory")
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_while_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"), working(2):
        torch.empty(10**15)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "you tried to allocate 4000000000000000 bytes" in error


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.log.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[log\]'"):
        set_up(settings.parse([*TINY, f"--run.dir={tmp_path / 'run'}", "--log.tensorboard=true"])[0])
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = start(tmp_path, "train", *TINY, f"--run.dir={tmp_path / 'run'}", "--log.tensorboard=true").finish()
    assert result.status == 0, result.err
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out*")).parent)).Reload()
    found = {event.step: event.value for event in events.Scalars("loss/text")}
    assert found == pytest.approx({line["step"]: line["loss/text"] for line in metrics(tmp_path / "run")}, abs=1e-5)


def test_run_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert_one_line(train(tmp_path), 2, "is a file; choose a folder")
    assert (tmp_path / "run").read_text() == "mine"


def test_python_m_train_from_a_shell(tmp_path: Path) -> None:
    """The same through a fresh interpreter, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "train", *TINY, f"--run.dir={tmp_path / 'run'}", "--model.dim=x"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert_one_line(Result(done.returncode, done.stdout, done.stderr), 2, "model.dim: expected int, got x")
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = train(tmp_path, "--dry_run")
    assert result.status == 0, result.err
    assert "step 1/8" in result.err
    assert not (tmp_path / "run").exists()


def test_help_shows_defaults_and_documentation(tmp_path: Path) -> None:
    result = start(tmp_path, "train", "--help").finish()
    assert result.status == 0
    assert result.err == ""
    text = " ".join(result.out.split())
    for words in ("--optim.lr LR", "Peak learning rate.", "default: 0.001", "--run.dir", "default: runs/default"):
        assert words in text


def test_write_and_read_round_trip(tmp_path: Path) -> None:
    config = Config(
        run=RunSection(dir="a folder: with signs", steps=7, stop_after=3, threads=2),
        data=DataSection(text=TextSection(300), files=[FilesSection("a.jsonl"), FilesSection("b.jsonl", 3)]),
        optim=OptimSection(lr=1e-7, eps=1e-12),
    )
    for number, each in enumerate((Config(), config, settings.parse(TINY)[0])):
        path = tmp_path / f"{number}.yaml"
        settings.write(each, path)
        assert settings.read(path) == each


def test_later_files_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: {steps: 5, seed: 6}\nmodel: {dim: 64, head: {width: 48}}\n")
    (tmp_path / "b.yaml").write_text("run: {seed: 7}\n")
    arguments = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--model.head.depth=2"]
    config, dry_run = settings.parse(arguments)
    assert (config.run.steps, config.run.seed, config.model.dim) == (5, 7, 64)
    assert (config.model.head.width, config.model.head.depth) == (48, 2)
    assert config.optim == OptimSection()
    assert not dry_run


def test_small_numbers_of_yaml_stay_numbers() -> None:
    """YAML 1.1 reads 1e-3 (no dot) as a string."""
    assert settings.parse(["--optim.lr=1e-3"])[0].optim.lr == 1e-3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_builds(path: Path) -> None:
    config = settings.read(path)
    tokenizer = make_tokenizer(config.data)
    with torch.device("meta"):
        model = Ropeway(config.model, vocabulary_of(tokenizer))
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == sum(config.model.num_parameters(tokenizer.vocab_size).values())
    least, most = SIZES.get(path.stem, (0.1, 200))
    assert least <= built / 1e6 <= most
    assert yaml.safe_load(path.read_text())["run"]["dir"] == f"runs/{path.stem}"


def test_every_size_is_checked() -> None:
    assert {path.stem for path in CONFIGS if path.stem.startswith("base-")} == SIZES.keys()
