"""Checkpoints are written whole or not at all, checked on the way in, and never unpickled."""

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model
from torch import Tensor, nn

from data.tokenizer import Tokenizer
from tests.train.support import cut, flip
from train import checkpoint, settings
from train.checkpoint import Checkpoint, Saver
from train.config import CheckpointSection, Config, RunSection

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = Tokenizer.bytes(4)
STEP = "step-00000001"


def make(step: int, **changes: int) -> Checkpoint:
    def tensors(kind: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(10 * step + kind)
        return {
            "b.weight": torch.randn(3, 4, generator=random),
            "a.bias": torch.randn(5, generator=random),
            "c.rounded": torch.randn(2, 2, generator=random).bfloat16(),
        }

    moments = {"exp_avg": tensors(2), "exp_avg_sq": tensors(3)}
    return Checkpoint(Config(run=RunSection(seed=step)), step, tensors(0), tensors(1), moments, **changes)


def write(run: Path, state: Checkpoint, background: bool = False, **keep: int) -> Path:
    saver = Saver(run, TOKENIZER, CheckpointSection(**keep))
    saver.begin(state, background)
    folder = saver.finish()
    assert folder is not None
    assert saver.finish() is None
    return folder


def save(run: Path, step: int, keep_last: int = 9) -> Path:
    return write(run, make(step), keep_last=keep_last)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.config, a.step, a.skipped) == (b.config, b.step, b.skipped)
    assert_same(a.model, b.model)
    assert_same(a.ema, b.ema)
    assert a.optimizer.keys() == b.optimizer.keys()
    for kind in a.optimizer:
        assert_same(a.optimizer[kind], b.optimizer[kind])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and the manifest with it, as another program could."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": checkpoint._digest(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


NAMES = ("config.yaml", "tokenizer.json", "model.safetensors", "ema.safetensors", "optimizer/exp_avg.safetensors",
         "state.json")  # fmt: skip
DAMAGE: list = [
    *(pytest.param(lambda f, n=n: cut(f / n), f"{n}: truncated", id=f"cut-{n}") for n in NAMES),
    *(pytest.param(lambda f, n=n: flip(f / n), f"{n}: altered", id=f"flip-{n}") for n in NAMES),
    *(pytest.param(lambda f, n=n: (f / n).unlink(), f"{n}: missing", id=f"without-{n}") for n in NAMES),
    pytest.param(lambda f: (f / "manifest.json").unlink(), "not a readable checkpoint", id="without-manifest"),
    pytest.param(lambda f: cut(f / "manifest.json"), "not a readable checkpoint", id="cut-manifest"),
    pytest.param(lambda f: (f / "manifest.json").write_text("[]"), "not a readable checkpoint", id="list-manifest"),
    pytest.param(lambda f: (f / "manifest.json").write_bytes(b"\xff"), "not a readable", id="binary-manifest"),
    pytest.param(lambda f: (f / "manifest.json").write_text('{"state.json": 3}'), "not a readable", id="odd-manifest"),
    pytest.param(
        lambda f: rewrite(f, "state.json", b'{"format": 3, "step": 1, "skipped": 0}'),
        "format 3, this version reads up to 2; update Ropeway", id="newer-format",
    ),
    pytest.param(lambda f: rewrite(f, "state.json", b"{}"), "not a readable checkpoint", id="no-format"),
    pytest.param(
        lambda f: rewrite(f, "model.safetensors", b"no tensors"), "not a readable safetensors file", id="no-tensors"
    ),
    pytest.param(
        lambda f: rewrite(f, "model.safetensors", torch_file()), "not a readable safetensors file", id="pickle"
    ),
]  # fmt: skip


def torch_file() -> bytes:
    """A pickle that would write a file if anything unpickled it."""
    return b"cos\nsystem\n(S'touch UNPICKLED'\ntR."


def test_round_trip(tmp_path: Path) -> None:
    folder = write(tmp_path, make(7, skipped=2), keep_last=1)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert_equal(checkpoint.load(folder), make(7, skipped=2))
    assert settings.read(folder / "config.yaml").run.seed == 7
    assert Tokenizer.load(folder / "tokenizer.json").vocab_size == TOKENIZER.vocab_size
    assert (folder.parent / "latest").read_text().strip() == folder.name
    state = json.loads((folder / "state.json").read_text())
    assert state["rows"] == 7 * Config().data.rows_per_step


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() | {"manifest.json"} == files(folder).keys()


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damage_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path, 1)
    damage(folder)
    with pytest.raises(ValueError, match=r"\S") as caught:
        checkpoint.load(folder)
    assert words in str(caught.value)
    assert STEP in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "UNPICKLED").exists()


@pytest.mark.parametrize(("damage", "words"), DAMAGE[::5])
def test_the_checkpoint_before_a_damaged_one_is_used(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    warnings: list[str] = []
    found = checkpoint.newest(tmp_path, warnings.append)
    assert found is not None
    assert_equal(found, make(1))
    assert len(warnings) == 1
    assert words in warnings[0]
    assert "using the checkpoint before it" in warnings[0]
    assert "\n" not in warnings[0]


def test_resolve_passes_over_a_damaged_one(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.resolve(tmp_path) == second
    assert checkpoint.resolve(second) == second
    cut(second / "ema.safetensors")
    assert checkpoint.resolve(tmp_path) == first
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.resolve(second)


@pytest.mark.parametrize("place", ["", "checkpoints", "nothing"])
def test_resolve_refuses_what_is_no_checkpoint(tmp_path: Path, place: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no sound checkpoint there"):
        checkpoint.resolve(tmp_path / place)


def test_only_damaged_ones_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    cut(save(tmp_path, 1) / "model.safetensors")
    with pytest.raises(ValueError, match="no checkpoint there is sound"):
        checkpoint.newest(tmp_path, lambda message: None)


@pytest.mark.parametrize("fails_at", ["save_file", "_digest", "_sync", "rename"])
@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_failure_in_the_middle_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str, calls_before: int
) -> None:
    old = save(tmp_path, 1)
    before = files(old)
    owner = Path if fails_at == "rename" else checkpoint
    real, calls = getattr(owner, fails_at), iter(range(100))

    def failing(*arguments: object, **options: object) -> object:
        if next(calls) == (0 if fails_at == "rename" else calls_before):
            raise OSError("no space left on the device")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, fails_at, failing)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2, keep_last=1)
    monkeypatch.undo()
    assert files(old) == before
    assert (old.parent / "latest").read_text().strip() == STEP
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1
    # The next attempt is not in the way of what the first left.
    save(tmp_path, 2, keep_last=1)
    assert sorted(path.name for path in old.parent.iterdir()) == ["latest", "step-00000002"]


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    cut(folder / "model.safetensors")
    (folder / "optimizer" / "left-over.safetensors").write_bytes(b"")
    save(tmp_path, 1)
    assert_equal(checkpoint.load(folder), make(1))


def test_keep_last(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 200):
        save(tmp_path, step, keep_last=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-00000010", "step-00000200"]


def test_a_damaged_later_one_does_not_push_out_sound_ones(tmp_path: Path) -> None:
    """After falling back from step 9 to step 5, the run writes step 6: that must stay, whatever else is there."""
    save(tmp_path, 5)
    cut(save(tmp_path, 9) / "model.safetensors")
    save(tmp_path, 6, keep_last=1)
    found = checkpoint.newest(tmp_path, lambda message: None)
    assert found is not None
    assert found.step == 6


def test_views_and_shared_memory_are_saved_as_they_look(tmp_path: Path) -> None:
    state = make(1)
    state.model = {"transposed": torch.arange(6.0).view(2, 3).t(), "row": torch.arange(6.0).view(2, 3)[1]}
    folder = write(tmp_path, state)
    assert_same(checkpoint.load(folder).model, {k: v.clone() for k, v in state.model.items()})


def test_keep_every(tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30, 35):
        write(tmp_path, make(step), keep_last=2, keep_every=20)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-00000020", "step-00000030", "step-00000035"]


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files of one kind, read as one; the library that defines the index reads them too."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60)
    folder = write(tmp_path, make(3))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors*")}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
            "optimizer/exp_avg_sq-00002-of-00002.safetensors"} <= names  # fmt: skip
    assert "model.safetensors" not in names
    assert_equal(checkpoint.load(folder), make(3))
    model = nn.Module()
    for name, tensor in make(3).model.items():
        owner, _, leaf = name.rpartition(".")
        model.add_module(owner, nn.Module()) if owner else None
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.zeros_like(tensor)))
    load_torch_model(model, folder)
    assert_same(dict(model.named_parameters()), make(3).model)


def test_in_the_background_the_state_of_the_moment_is_saved(tmp_path: Path) -> None:
    state = make(1)
    saver = Saver(tmp_path, TOKENIZER, CheckpointSection())
    saver.begin(state, background=True)
    for tensor in (*state.model.values(), *state.optimizer["exp_avg"].values()):
        tensor.zero_()
    folder = saver.finish()
    assert folder is not None
    assert_equal(checkpoint.load(folder), make(1))


def test_other_ranks_make_the_tensors_and_write_nothing(tmp_path: Path) -> None:
    asked: list[str] = []

    class Asked(dict):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    state = make(1)
    state.ema = Asked(state.ema)
    saver = Saver(tmp_path, TOKENIZER, CheckpointSection(), writes=False)
    saver.begin(state, background=False)
    assert saver.finish() is None
    assert asked == list(state.ema)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["train", "launch", "model", "data"])
def test_nothing_is_unpickled(package: str) -> None:
    """No file of the package can unpickle: neither the modules that do, nor torch.load, numpy.load with pickles."""
    bad = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    imported = [alias.name for alias in names]
                case ast.ImportFrom(module=module, names=names):
                    imported = [f"{module}.{alias.name}" for alias in names] + [str(module)]
                case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "jit" as attribute):
                    imported = [f"torch.{attribute}"]
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    imported = ["pickle"]
                case _:
                    continue
            forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch.load", "torch.jit"}
            bad += [f"{path.name}:{name}" for name in imported if name in forbidden or name.split(".")[0] in forbidden]
    assert bad == []
