"""`python -m benchmarks NAME [options]`: run one benchmark and write its result files."""

import ast
import sys
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser

from benchmarks import report


def names() -> dict[str, str]:
    """Every benchmark, a module of this package with a function `run`, and the first line of its docstring."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names with the options after it. Returns the exit code."""
    known = names()
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [options]      (python -m benchmarks NAME --help lists the options)\n")
        print("\n".join(f"  {known_name:12s} {text}" for known_name, text in known.items()))
        return 0
    if name not in known:
        print(f"error: no benchmark {name!r}; choose one of {', '.join(known)}", file=sys.stderr)
        return 2
    code = report.commit()
    run = import_module(f"benchmarks.{name}").run
    parser = ArgumentParser(prog=f"python -m benchmarks {name}")
    parser.add_function_arguments(run)
    options = vars(parser.parse_args(arguments[1:]))
    try:
        result = run(**options)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    paths = report.write(result, " ".join(["python -m benchmarks", *arguments]), code)
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
