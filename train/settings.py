"""Reading the configuration: YAML files, `--section.key value`, and one clear line for every mistake."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    result.add_argument(
        "--dry_run",
        action="store_true",
        help="estimate memory and time, run one step, write and read a checkpoint, leave nothing",
    )
    result.add_argument("--local_rank", type=int, help="set by some launchers; ignored")
    result.add_class_arguments(Config, None, instantiate=True)
    return result


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """(configuration, dry_run). Raises ValueError with one line for an unknown key, a wrong type, an impossible
    combination or a missing file."""
    reader = parser()
    try:
        _check_files(arguments)
        values = reader.parse_args(list(arguments))
        initial = reader.instantiate(values)
    except argparse.ArgumentError as error:
        raise ValueError(_plain(error.message)) from None
    return Config(**{name: initial[name] for name in Config.__dataclass_fields__}), bool(values.dry_run)


def _check_files(arguments: Sequence[str]) -> None:
    """Raises ValueError naming the first --config file that is no YAML mapping; jsonargparse would not name it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", nargs="?", default=[])
    for path in finder.parse_known_args(list(arguments))[0].config:
        if path is None:
            continue  # The real parser reports that the file is missing.
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text file in UTF-8") from None
        except yaml.MarkedYAMLError as error:
            line = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else path
            raise ValueError(f"{line}: not valid YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: must hold sections such as `run: {{steps: 1000}}`")


def _plain(message: str) -> str:
    """What jsonargparse says over several lines and in Python's types, in a few words."""
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    if unknown := re.search(r"(?:Group '([\w.]+)' does not accept option|Option) '([^']+)'", message):
        return f"{'.'.join(filter(None, (unknown[1] or key, unknown[2])))} is not a key of the configuration"
    wanted = re.search(r"Expected an? (?!dot import)(.+?)(?:\. Got value|\n)", message)
    got = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and wanted and got:
        kind = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>|typing\.", r"\1", wanted[1])
        return f"{key}: expected {kind}, got {got[1]}"
    return message


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
