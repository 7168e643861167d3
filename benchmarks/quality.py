"""What linear-time attention costs in quality: dense, vq and a hybrid with the same data, parameters and steps.

Pictures and captions as in the quickstart, scored by its oracle, and long texts of the standard library, scored in bits
per byte of held-out files. Started again with the same options, it goes on where it was stopped.
"""

import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks.report import Result, Row

_KINDS = {"dense": "dense", "vq": "vq", "hybrid": "[vq,vq,vq,dense]"}
_SHORT = ("--model.vq.decay=0.95", "--model.vq.reset_below=1")
"""Of codebooks in a short training: keys move more per step than over a long one."""
_LAYERS = ("--model.dim=128", "--model.num_layers=4", "--model.num_heads=4", "--optim.lr=3e-3")


def run(folder: str = "runs/quality", shapes_steps: int = 400, text_steps: int = 300, num: int = 100, codes: int = 256,
        text_window: int = 256) -> Result:  # fmt: skip
    """Train and score six models, one after the other.

    Args:
        folder: of the runs. Use another one for other options.
        shapes_steps, text_steps: of each run.
        num: pictures, captions and texts that are scored.
        codes: codewords per head, of the texts; the pictures have 64.
        text_window: of the texts; that of the pictures is 16, the patches of one.
    """
    tasks = {
        "text": (f"--run.steps={text_steps}", "--data.text.max_bytes=4000", "--data.tokenizer=bytes",
                 "--data.row_length=4096", "--data.rows_per_step=1", "--data.max_patches=16",
                 f"--model.vq.window={text_window}", f"--model.vq.codes={codes}", "--optim.warmup_steps=50", *_LAYERS),
        "shapes": ("--config=configs/quickstart.yaml", f"--run.steps={shapes_steps}", "--data.max_patches=16",
                   "--model.vq.window=16", "--model.vq.codes=64", *_LAYERS),
    }  # fmt: skip
    rows: list[Row] = []
    for suite, options in tasks.items():
        for kind in tqdm(_KINDS, suite, unit="run"):
            place = Path(folder) / f"{suite}-{kind}"
            scores = place / "eval" / f"{suite}.json"
            if not scores.exists():
                _call("train", *options, f"--run.dir={place}", f"--model.attention={_KINDS[kind]}",
                      *_SHORT, "--checkpoint.every=100", "--eval.every=0", "--run.threads=1")  # fmt: skip
                _call("train.evaluate", f"--checkpoint={place}", f"--suite={suite}", f"--num={num}")
            found = json.loads(scores.read_text(encoding="utf-8"))["scores"]
            rows += [{"suite": suite, "kind": kind, "score": name, "value": value} for name, value in found.items()]
    summary: list[Row] = []
    for part, name in dict.fromkeys((row["suite"], row["score"]) for row in rows):
        line: Row = {"suite": part, "score": name}
        line |= {str(row["kind"]): row["value"] for row in rows if (row["suite"], row["score"]) == (part, name)}
        summary.append(line)
    bits = next(line for line in summary if line["score"] == "bits per byte")
    change = {kind: float(bits[kind] or 0) / float(bits["dense"] or 1) - 1 for kind in ("vq", "hybrid")}
    notes = (
        f"Four layers of width 128; hybrid has vq in all but the last. Windows and codewords: 16 and 64 for pictures, "
        f"{text_window} and {codes} for texts of up to 4000 bytes in rows of 4096. {shapes_steps} and {text_steps} "
        f"steps, one seed and {num} scored. Bits per byte against dense: "
        f"vq {change['vq']:+.1%}, hybrid {change['hybrid']:+.1%}."
    )
    return Result("quality", rows, summary, notes)


def _call(module: str, *arguments: str) -> None:
    """Run `python -m module`; raises OSError if it fails, after its own message."""
    if subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.DEVNULL).returncode:
        raise OSError(f"python -m {module} failed; its message is above")
