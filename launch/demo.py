"""`python -m launch.demo`: train the quickstart, score it, draw pictures and curves. `make demo` runs this.

Everything goes through the commands that users type. The results are in runs/quickstart/demo/, index.html shows them.
"""

import html
import json
import subprocess
import sys
import time
from pathlib import Path

CONFIG = Path("configs/quickstart.yaml")
_IMAGES = 4  # per prompt
PROMPTS = (
    "a small red circle at the top left",
    "a large blue square at the center",
    "a medium green triangle at the bottom right",
    "a large orange ring at the left",
    "a small purple diamond at the top right",
    "a medium black cross at the bottom",
)


def main() -> None:
    """Exit status 0, or that of the first command that failed."""
    began = time.perf_counter()
    from train import settings

    run = Path(settings.read(CONFIG).run.dir)
    out = run / "demo"
    _run("train", "--config", str(CONFIG))
    trained = time.perf_counter()
    _run("train.evaluate", "--checkpoint", str(run), "--suite", "shapes")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    _run("launch.generate", "--checkpoint", str(run), *prompts, "--num-images", str(_IMAGES), "--size", "32x32",
         "--out", str(out / "pictures"), "--grid", "4", "--overwrite")  # fmt: skip
    drawn = sorted((out / "pictures").glob("0*.png"))[::_IMAGES]
    captions = _run("launch.generate", "--checkpoint", str(run), "--image", *map(str, drawn), capture=True)
    (out / "captions.txt").write_text(captions)
    plot_curves(run, out / "curves.png")
    scores = json.loads((run / "eval" / "shapes.json").read_text())["scores"]
    _write_page(out, scores, captions)
    print(f"\nScore on held-out captions: {scores['one object, drawn, all']:.1%} of pictures right, "
          f"{scores['one object, caption exact']:.1%} of captions right.")  # fmt: skip
    print(f"Training {trained - began:.0f} s, everything {time.perf_counter() - began:.0f} s. Open {out}/index.html")


def plot_curves(run: Path, path: Path) -> None:
    """Losses over steps, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5))
    for axis, kind, unit in zip(axes, ("text", "image"), ("nats per token", "velocity error per patch"), strict=True):
        for name, label in ((f"loss/{kind}", "training"), (f"held_out/{kind}", "held out, averaged weights")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 10 else "", label=label)
        axis.set(xlabel="step", ylabel=unit, title=f"{kind} loss", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _write_page(out: Path, scores: dict, captions: str) -> None:
    rows = "".join(f"<tr><td>{html.escape(k)}<td>{v:.4g}" for k, v in scores.items())
    prompts = "".join(f"<li>{html.escape(prompt)}" for prompt in PROMPTS)
    page = f"""<!doctype html><meta charset="utf-8"><title>Ropeway quickstart</title>
<style>body{{font:16px sans-serif;max-width:60em;margin:2em auto}}
img{{image-rendering:pixelated}}td{{padding:0 1em}}</style>
<h1>Ropeway quickstart</h1>
<h2>Pictures drawn from captions (one row each)</h2><ol>{prompts}</ol><img src="pictures/grid.png">
<h2>Captions written for pictures</h2><pre>{html.escape(captions)}</pre>
<h2>Score on held-out combinations</h2><table>{rows}</table>
<h2>Curves</h2><img src="curves.png">
"""
    (out / "index.html").write_text(page)


def _run(module: str, *arguments: str, capture: bool = False) -> str:
    command = [sys.executable, "-m", module, *arguments]
    print("\n$ python -m", module, *arguments, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    if capture:
        print(done.stdout, end="")
    return done.stdout or ""


if __name__ == "__main__":
    main()
