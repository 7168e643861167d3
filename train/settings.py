"""Reading the configuration: YAML files, `--section.key value`, and one clear line for every mistake."""

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from train.config import Config

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parser() -> ArgumentParser:
    """The command line of `python -m train`."""
    result = ArgumentParser(
        prog="python -m train",
        description="Train a model on text and images. A run found in run.dir is resumed.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    result.add_argument("--config", action="config", help="YAML file; later files and options override earlier ones")
    result.add_argument("--dry_run", action="store_true", help="build everything, run one step, write nothing")
    result.add_argument("--local_rank", type=int, help="set by some launchers; ignored")
    result.add_class_arguments(Config, None, instantiate=True)
    return result


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """(configuration, dry_run). Raises ValueError with one line for an unknown key, a wrong type, an impossible
    combination or a missing file."""
    reader = parser()
    try:
        values = reader.parse_args(list(arguments))
        initial = reader.instantiate_classes(values)
    except ArgumentError as error:
        raise ValueError(error.message) from None
    return Config(**{name: initial[name] for name in Config.__dataclass_fields__}), bool(values.dry_run)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dictionaries and lists, as in YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(asdict(config))


def write(config: Config, path: Path) -> None:
    """Save a configuration as YAML."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def read(path: Path) -> Config:
    """Load a configuration that `write` saved."""
    return parse(["--config", str(path)])[0]


def fail(message: object, status: int) -> NoReturn:
    """End the process with one line. Status 2: the input is wrong; 1: something failed in the middle of work."""
    print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(status)
