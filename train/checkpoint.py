"""Checkpoints: a folder of safetensors, written whole or not at all, checked on the way in, never unpickled.

step-00000100/
    config.yaml         the run's configuration          tokenizer.json
    model.safetensors   raw weights                      ema.safetensors    their average
    optimizer/          one safetensors file per moment  state.json         step, rows seen, format
    manifest.json       size and SHA-256 of every file, written last
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizer import Tokenizer
from train import settings
from train.config import Config

FORMAT = 1


@dataclass
class Checkpoint:
    """Everything that a run needs to go on exactly where it was. Randomness is a function of (seed, row), so the random
    state is the step itself."""

    config: Config
    step: int
    """Optimizer steps done; the next one reads rows step * rows_per_step and on."""
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    skipped: int = 0
    """Steps whose gradient was not finite."""


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def save(run: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, keep_last: int) -> Path:
    """Write a checkpoint and move `latest` to it; then remove all but the last keep_last ones."""
    target = folder_of(run) / f"step-{checkpoint.step:08d}"
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "optimizer").mkdir(parents=True)
    settings.write(checkpoint.config, partial / "config.yaml")
    tokenizer.save(partial / "tokenizer.json")
    save_file(_contiguous(checkpoint.model), partial / "model.safetensors", {"format": "pt"})
    save_file(_contiguous(checkpoint.ema), partial / "ema.safetensors", {"format": "pt"})
    for kind, tensors in checkpoint.optimizer.items():
        save_file(_contiguous(tensors), partial / "optimizer" / f"{kind}.safetensors", {"format": "pt"})
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "rows": checkpoint.step * checkpoint.config.data.rows_per_step,
        "skipped": checkpoint.skipped,
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1))
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
    # Later ones can only be unsound, passed over on resuming: they must not push out what is sound.
    for old in [folder for folder in _steps(run) if folder.name <= target.name][:-keep_last]:
        shutil.rmtree(old)
    return target


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises ValueError with one line if it is missing, truncated, altered or of a newer format."""
    verify(folder)
    state = json.loads((folder / "state.json").read_text())
    return Checkpoint(
        config=read_config(folder),
        step=state["step"],
        model=read_weights(folder / "model.safetensors"),
        ema=read_weights(folder / "ema.safetensors"),
        optimizer={path.stem: read_weights(path) for path in sorted((folder / "optimizer").iterdir())},
        skipped=state["skipped"],
    )


def load_newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint of a run, None if it has none; warns about every one that it passes over."""
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises ValueError if it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
