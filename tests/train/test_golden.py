"""The first losses of the quickstart against committed ones: a change that claims to change no number must match.

`GOLDEN=write python -m pytest tests/train/test_golden.py` writes them anew; say in the commit why they changed.
"""

import json
import os
from pathlib import Path

import pytest

from train import pipeline, settings
from train.engine import Counts, TorchEngine
from train.generator import build_model
from train.optimizer import learning_rate
from train.ranks import Ranks

GOLDEN = Path("tests/golden/quickstart.json")
STEPS = 8


def first_losses() -> list[dict[str, float]]:
    """Loss sums, counts and gradient norms of the first steps, in float32 on one CPU thread."""
    config, _ = settings.parse(
        [
            "--config",
            "configs/quickstart.yaml",
            "--run.precision",
            "fp32",
            "--run.device",
            "cpu",
            "--data.rows_per_step",
            "2",
            "--optim.muon_lr",
            "null",  # it multiplies in bfloat16 where the processor can
        ]
    )
    tokenizer = pipeline.make_tokenizer(config.data)
    encoder = pipeline.make_encoder(config, tokenizer)
    model = build_model(config, tokenizer)
    model.initialise(config.run.seed)
    engine = TorchEngine(model, config, Ranks(config))
    rows = pipeline.StepRows(pipeline.make_mixture(config, encoder, "train"), config, 0, 1)
    found = []
    for step in range(STEPS):
        (batch,) = rows[step].batches
        counts = Counts(*batch.counts())
        losses = engine.micro_step(batch, counts, is_last=True)
        norm = engine.step(learning_rate(step, config.run.steps, config.optim))
        found.append(
            {
                "text": losses.text.item(),
                "image": losses.image.item(),
                "norm": norm,
                "texts": counts.text,
                "patches": counts.image,
            }
        )
    return found


def test_first_losses_of_the_quickstart() -> None:
    found = first_losses()
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    assert len(found) == len(expected) == STEPS
    for step, (now, then) in enumerate(zip(found, expected, strict=True)):
        # Other processors round matrix products otherwise; eight steps let that grow to about 1e-5.
        assert now == pytest.approx(then, rel=1e-4), f"step {step}"
    assert found[-1]["text"] / found[-1]["texts"] < found[0]["text"] / found[0]["texts"]
