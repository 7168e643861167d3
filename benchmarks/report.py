"""The result files of a benchmark: JSON for programs, a Markdown table and a plot for readers, under one name."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from train.log import cpu_name

Row = dict[str, str | int | float | bool | None]
"""One measurement: flat, with the unit in the name of every key that has one."""

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """What a benchmark hands back."""

    benchmark: str
    rows: Sequence[Row]
    """Every measurement, not its average."""
    summary: Sequence[Row]
    """The table of the Markdown file: one row per line, the keys of the first row are the columns."""
    notes: str
    """Markdown below the table: what was compared, at which settings, and what the comparison leaves out."""
    figure: Figure | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    packages: Sequence[str] = ()
    """Distributions whose versions matter, beside Ropeway's and torch's."""


def hardware(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many of its cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()}, {cores} cores"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the named distributions; those that are not installed are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the working tree, with `-dirty` if tracked files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; floats with three significant digits."""

    def cell(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(result: Result, command: str, code: str | None, folder: Path = RESULTS) -> list[Path]:
    """Write `<benchmark>-<date>-<hardware>` as .json, .md and, if there is a figure, .png. Returns the paths.

    `code` is what `commit()` said when the benchmark began: the working tree may have moved on since.
    """
    machine, day = hardware(result.device), datetime.now(UTC).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", machine.lower())).strip("-")
    stem = folder / f"{result.benchmark}-{day}-{slug}"
    content: dict[str, Any] = {
        "benchmark": result.benchmark,
        "hardware": machine,
        "versions": versions(result.packages),
        "command": command,
        "commit": code,
        "rows": list(result.rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    picture = f"\n![{result.benchmark}]({paths[2].name})\n" if result.figure else ""
    named = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    paths[1].write_text(
        f"# {result.benchmark}\n\n{day}, {machine}; {named}; commit {content['commit']}.\n\n`{command}`\n\n"
        f"{table(result.summary)}\n{picture}\n{result.notes.strip()}\n",
        encoding="utf-8",
    )
    if not result.figure:
        return paths[:2]
    result.figure.savefig(paths[2], dpi=150, bbox_inches="tight")
    return paths
