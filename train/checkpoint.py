"""Checkpoints: a folder of safetensors, written whole or not at all, checked on the way in, never unpickled.

step-00000100/
    config.yaml         the run's configuration          tokenizer.json
    model.safetensors   raw weights                      ema.safetensors    their average
    optimizer/          one safetensors file per moment  state.json         step, rows seen, format
    manifest.json       size and SHA-256 of every file, written last
    solver.safetensors  a sampler that train.distill may add later

All tensors are whole, float32 and named after their parameter, so any backend and number of ranks reads what any other
wrote. More than SHARD_BYTES of one kind become model-00001-of-00002.safetensors and so on, with an index.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.tokenizer import Tokenizer
from model.diffusion.solver import LearnedMidpoint
from train import settings
from train.config import CheckpointSection, Config

FORMAT = 2
SHARD_BYTES = 4 * 2**30
SOLVER = "solver.safetensors"
_METADATA = {"format": "pt"}


@dataclass
class Checkpoint:
    """Everything that a run needs to go on exactly where it was. Randomness is a function of (seed, row), so the random
    state is the step itself. Tensors are made or read when they are asked for."""

    config: Config
    step: int
    """Optimizer steps done; the next one reads rows step * rows_per_step and on."""
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    skipped: int = 0
    """Steps whose gradient was not finite."""


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def step_folder(run: Path, step: int) -> Path:
    return folder_of(run) / f"step-{step:08d}"


class Saver:
    """Writes the checkpoints of a run. All ranks make the tensors together, rank 0 writes them in a thread."""

    def __init__(self, run: Path, tokenizer: Tokenizer, keep: CheckpointSection, writes: bool = True) -> None:
        """writes: whether this is rank 0."""
        self.run, self.tokenizer, self.keep, self.writes = run, tokenizer, keep, writes
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future[Path] | None = None

    def begin(self, checkpoint: Checkpoint, background: bool) -> None:
        """Make the tensors and have them written; `finish` says whether that worked.

        background: copy everything first, so that training can go on meanwhile.
        """
        target = step_folder(self.run, checkpoint.step)
        partial = target.with_name(target.name + ".tmp")
        kinds = {"model": checkpoint.model, "ema": checkpoint.ema}
        kinds |= {f"optimizer/{kind}": tensors for kind, tensors in checkpoint.optimizer.items()}
        # Only the thread touches the disk: where it fails, rank 0 must not leave the others alone in a collective.
        jobs: list[Future] = []
        if self.writes:
            jobs.append(self.thread.submit(_begin, partial, checkpoint, self.tokenizer))
        for kind, tensors in kinds.items():
            for number, shard in enumerate(_shards(tensors, copy=background)):
                if self.writes:
                    if not background:
                        wait(jobs)  # At most two shards are in memory.
                    jobs.append(self.thread.submit(save_file, shard, _shard_path(partial, kind, number), _METADATA))
        if self.writes:
            self.pending = self.thread.submit(self._complete, jobs, partial, target, list(kinds))

    def finish(self) -> Path | None:
        """Wait for the checkpoint that was begun, if one was; returns it on rank 0. Raises OSError on rank 0 if it
        could not be written; then older ones stay as they were."""
        pending, self.pending = self.pending, None
        return pending.result() if pending else None

    def _complete(self, jobs: list[Future], partial: Path, target: Path, kinds: list[str]) -> Path:
        try:
            for job in jobs:
                job.result()
            for kind in kinds:
                _name_shards(partial, kind)
            _publish(partial, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"{target} could not be written ({error}); older checkpoints stay as they were") from error
        _prune(self.run, target, self.keep)
        return target


def _begin(partial: Path, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    for left in partial.parent.glob("step-*.tmp"):  # of saves that were killed, at whatever step
        shutil.rmtree(left, ignore_errors=True)
    (partial / "optimizer").mkdir(parents=True)
    settings.write(checkpoint.config, partial / "config.yaml")
    tokenizer.save(partial / "tokenizer.json")
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "rows": checkpoint.step * checkpoint.config.data.rows_per_step,
        "skipped": checkpoint.skipped,
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1))


def _shards(tensors: Mapping[str, Tensor], copy: bool) -> Iterator[dict[str, Tensor]]:
    """The tensors in the host's memory, about SHARD_BYTES at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name in tensors:
        tensor = tensors[name].detach()
        # What is written while training goes on must not change under the writer's hands.
        tensor = (tensor.clone() if copy and tensor.device.type == "cpu" else tensor.cpu()).contiguous()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _shard_path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number + 1:05d}.safetensors"


def _name_shards(folder: Path, kind: str) -> None:
    """Give the shards of one kind their names: one file, or several with an index as Hugging Face writes it."""
    shards = sorted(folder.glob(f"{kind}-?????.safetensors"))
    if len(shards) == 1:
        shards[0].rename(folder / f"{kind}.safetensors")
        return
    files: dict[str, str] = {}
    for path in shards:
        path = path.rename(path.with_name(f"{path.stem}-of-{len(shards):05d}.safetensors"))
        files |= dict.fromkeys(safe_open(path, "pt").keys(), path.name)
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{kind}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _publish(partial: Path, target: Path) -> None:
    """Add the manifest, and put the finished folder in its place."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _sync(target.parent)
    _point(target.parent / "latest", target.name)


def _prune(run: Path, newest: Path, keep: CheckpointSection) -> None:
    # Later ones can only be unsound, passed over on resuming: they must not push out what is sound.
    for old in [folder for folder in _steps(run) if folder.name <= newest.name][: -keep.keep_last]:
        if keep.keep_every is None or int(old.name.removeprefix("step-")) % keep.keep_every:
            shutil.rmtree(old)


def load(folder: Path, check: bool = True) -> Checkpoint:
    """Open a checkpoint. Raises ValueError with one line if it is missing, truncated, altered or of a newer format.

    check: compare every file with the manifest; where another rank has done so, False saves the time.
    """
    if check:
        verify(folder)
    state = json.loads((folder / "state.json").read_text())
    moments = {path.name.split(".")[0].split("-")[0] for path in (folder / "optimizer").iterdir()}
    return Checkpoint(
        config=read_config(folder),
        step=state["step"],
        model=Weights(folder / "model"),
        ema=Weights(folder / "ema"),
        optimizer={kind: Weights(folder / "optimizer" / kind) for kind in sorted(moments)},
        skipped=state["skipped"],
    )


def newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint of a run, None if it has none; warns about every one that it passes over.
    Raises ValueError if there are some and none is sound."""
    found = _steps(run)
    for folder in reversed(found):
        try:
            return load(folder)
        except ValueError as error:
            warn(f"{error}; using the checkpoint before it")
    if found:
        raise ValueError(f"{folder_of(run)}: no checkpoint there is sound; restore one, or choose another run.dir")
    return None


def resolve(place: str | Path) -> Path:
    """The checkpoint meant by a run folder (its latest sound one) or a checkpoint, verified. Raises ValueError."""
    path = Path(place)
    if (path / "manifest.json").is_file():
        verify(path)
        return path
    for folder in reversed(_steps(path)):
        try:
            verify(folder)
            return folder
        except ValueError:
            continue
    raise ValueError(f"{path}: no sound checkpoint there; give a run folder or a checkpoint folder (step-...)")


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises ValueError naming the first that is missing or differs."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path}: missing from the checkpoint")
            if path.stat().st_size != expected["bytes"]:
                raise ValueError(f"{path}: truncated ({path.stat().st_size} bytes, not {expected['bytes']})")
            if _digest(path) != expected["sha256"]:
                raise ValueError(f"{path}: altered since it was written (its SHA-256 differs)")
        found = json.loads((folder / "state.json").read_text())["format"]
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: not a readable checkpoint ({type(error).__name__}: {error})") from None
    if found > FORMAT:
        raise ValueError(f"{folder}: written in format {found}, this version reads up to {FORMAT}; update Ropeway")


def read_config(folder: Path) -> Config:
    """The configuration of a checkpoint."""
    return settings.read(folder / "config.yaml")


class Weights(Mapping[str, Tensor]):
    """Tensors of one kind in a checkpoint, read when they are asked for. Raises ValueError for a broken file."""

    def __init__(self, stem: Path) -> None:
        """stem: such as .../step-00000100/model, without .safetensors."""
        single, index = (stem.with_name(stem.name + ending) for ending in (".safetensors", ".safetensors.index.json"))
        names = {single.name}
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
        self.files: dict[str, safe_open] = {}
        for path in sorted(stem.parent / name for name in names):
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
            self.files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def save_solver(folder: Path, solver: LearnedMidpoint) -> Path:
    """Add a solver to a checkpoint, in the place of the one it may have. The manifest does not name it."""
    path = folder / SOLVER
    partial = path.with_name(path.name + ".tmp")
    save_file(solver.state_dict(), partial, {"steps": str(solver.steps), "grid": solver.grid})
    partial.replace(path)
    return path


def load_solver(folder: Path, patch_width: int) -> LearnedMidpoint | None:
    """The solver of a checkpoint, None if it has none. Raises ValueError for a broken file or one of another model."""
    path = folder / SOLVER
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            solver = LearnedMidpoint(patch_width, int(said["steps"]), said["grid"])
            solver.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: no solver for this model ({error}); remove it or distill it anew") from None
    return solver


def _steps(run: Path) -> list[Path]:
    return sorted(path for path in folder_of(run).glob("step-*") if path.suffix != ".tmp")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(link: Path, name: str) -> None:
    """Write `name` into the file `link` in one move."""
    partial = link.with_name(link.name + ".tmp")
    partial.write_text(name + "\n")
    _sync(partial)
    partial.replace(link)
