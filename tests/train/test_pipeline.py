"""Rows of a step are the same for any number of ranks and micro-batches, and a pure function of the step."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from model.batch import Batch
from tests.train.support import TINY
from train import pipeline, settings
from train.config import Config, DataSection, EngineSection, FilesSection
from train.pipeline import StepRows

COLUMNS = [field.name for field in fields(Batch) if field.name.endswith("_BS")]
CONFIG = settings.parse([*TINY, "--data.rows_per_step=8"])[0]


def make(config: Config, rank: int = 0, world: int = 1) -> StepRows:
    encoder = pipeline.make_encoder(config, pipeline.make_tokenizer(config.data))
    return StepRows(pipeline.make_mixture(config, encoder, "train"), config, rank, world)


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """All rows of some micro-batches as one."""
    columns = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in COLUMNS}
    seeds = torch.tensor([seed for batch in batches for seed in batch.seed_B])
    return columns | {"patches": torch.cat([batch.patches_NP for batch in batches]), "seeds": seeds}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 7])
def test_any_split_holds_the_same_rows(step: int, world: int, micro: int) -> None:
    whole = make(CONFIG)[step]
    assert len(whole) == 1
    assert whole[0].token_BS.shape == (8, 96)
    config = replace(CONFIG, engine=EngineSection(micro_batches=micro))
    shares = [make(config, rank, world)[step] for rank in range(world)]
    assert all(len(share) == micro for share in shares)
    assert all(len(batch.token_BS) == 8 // world // micro for share in shares for batch in share)
    assert_same(joined(whole), joined([batch for share in shares for batch in share]))


def test_a_step_depends_on_its_number_alone() -> None:
    rows, again = make(CONFIG), make(CONFIG)
    first = [joined(rows[step]) for step in (0, 1, 40, 3)]
    second = [joined(again[step]) for step in (3, 40, 0, 1)]
    for a, b in zip(first, (second[2], second[3], second[1], second[0]), strict=True):
        assert_same(a, b)
    assert not torch.equal(first[0]["token_BS"], first[1]["token_BS"])


def test_other_seeds_give_other_rows_and_noise() -> None:
    other = replace(CONFIG, run=replace(CONFIG.run, seed=CONFIG.run.seed + 1))
    a, b = joined(make(CONFIG)[0]), joined(make(other)[0])
    assert not torch.equal(a["token_BS"], b["token_BS"])
    assert not set(a["seeds"].tolist()) & set(b["seeds"].tolist())


def test_seeds_of_rows_are_distinct_and_fit_a_generator() -> None:
    rows = make(CONFIG)
    seeds = [seed for step in range(150) for seed in rows[step][0].seed_B]
    assert len(set(seeds)) == len(seeds) == 1200
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    # High bits vary too: the seeds are spread over the whole range.
    assert len({seed >> 55 for seed in seeds}) > 200


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_gives_the_steps_in_order(workers: int) -> None:
    rows = make(CONFIG)
    loaded = list(pipeline.load(rows, 2, 7, workers))
    assert len(loaded) == 5
    for step, batches in zip(range(2, 7), loaded, strict=True):
        assert_same(joined(batches), joined(rows[step]))


def test_a_step_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="rows_per_step 8 is not a multiple of 3"):
        make(CONFIG, 0, 3)


def test_held_out_rows_keep_their_conditions() -> None:
    """With certain dropout, training pictures have no caption before them; held-out pictures do."""
    config = replace(CONFIG, data=replace(CONFIG.data, condition_dropout=1.0))
    encoder = pipeline.make_encoder(config, pipeline.make_tokenizer(config.data))
    boi = encoder.tokenizer.boi

    def before_drawn_pictures(split: pipeline.Split) -> set[int]:
        mixture, found = pipeline.make_mixture(config, encoder, split), set()
        for row in map(mixture.row, range(8)):
            starts = (row.token == boi) & row.learn
            found |= set((row.index[starts] - 2).tolist())  # text slots between <bos> and <boi>
        return found

    assert before_drawn_pictures("train") == {0}
    assert min(before_drawn_pictures("test")) > 0


def test_splits_share_no_document() -> None:
    encoder = pipeline.make_encoder(CONFIG, pipeline.make_tokenizer(CONFIG.data))
    texts = {
        split: {s.text for d in pipeline.make_mixture(CONFIG, encoder, split).documents(0, np.arange(200))
                for s in d.segments if hasattr(s, "text")}
        for split in ("train", "test")
    }  # fmt: skip
    assert not texts["train"] & texts["test"]


def test_no_source_is_refused_and_files_have_no_held_out_part() -> None:
    with pytest.raises(ValueError, match=r"no data: set data\.shapes"):
        pipeline.make_sources(DataSection(), "train")
    assert pipeline.make_sources(DataSection(files=[FilesSection("a.jsonl")]), "test") == []
