"""Rows of a step are the same for any number of ranks and micro-batches, and a pure function of the step."""

import json
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Picture

from data.document import Document
from data.encode import Encoder, drop_condition
from data.source.shapes import Shapes
from model.batch import Batch
from tests.train.support import TINY, resolutions
from train import pipeline, settings
from train.config import Config, DataSection, DigitsSection, EngineSection, FilesSection
from train.pipeline import Step, StepRows, balance

COLUMNS = [field.name for field in fields(Batch) if field.name.endswith("_BS")]
CONFIG = settings.parse([*TINY, "--data.rows_per_step=8"])[0]


def make(config: Config, rank: int = 0, world: int = 1) -> StepRows:
    encoder = pipeline.make_encoder(config, pipeline.make_tokenizer(config.data))
    return StepRows(pipeline.make_mixture(config, encoder, "train"), config, rank, world)


def joined(*steps: Step) -> dict[str, torch.Tensor]:
    """All rows of some steps, or of the shares of one, as one."""
    batches = [batch for step in steps for batch in step.batches]
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
    assert len(whole.batches) == 1
    assert whole.batches[0].token_BS.shape == (8, 96)
    config = replace(CONFIG, engine=EngineSection(micro_batches=micro))
    shares = [make(config, rank, world)[step] for rank in range(world)]
    assert all(len(share.batches) == micro for share in shares)
    assert all(len(batch.token_BS) == 8 // world // micro for share in shares for batch in share.batches)
    assert_same(joined(whole), joined(*shares))


def test_a_step_depends_on_its_number_alone() -> None:
    rows, again = make(CONFIG), make(CONFIG)
    first = [joined(rows[step]) for step in (0, 1, 40, 3)]
    second = [joined(again[step]) for step in (3, 40, 0, 1)]
    for a, b in zip(first, (second[2], second[3], second[1], second[0]), strict=True):
        assert_same(a, b)
    assert not torch.equal(first[0]["token_BS"], first[1]["token_BS"])


def test_documents_are_padded_to_the_windows_of_the_model() -> None:
    """No document is computed in more windows of `vq` than it fills; by groups for long windows, some would be."""

    def surplus(window: int) -> int:  # windows of 11 slots
        model = ["--model.attention=vq", f"--model.vq.window={window}", "--model.vq.codes=8", "--data.max_patches=6"]
        groups = make(settings.parse([*TINY, *model, "--data.rows_per_step=8"])[0])[0].batches[0].documents.groups
        return sum(int((-(-group.slot_GL.shape[1] // 11) + -group.valid_GL.sum(1) // 11).sum()) for group in groups)

    assert surplus(11) == 0
    assert surplus(64) > 0


def test_other_seeds_give_other_rows_and_noise() -> None:
    other = replace(CONFIG, run=replace(CONFIG.run, seed=CONFIG.run.seed + 1))
    a, b = joined(make(CONFIG)[0]), joined(make(other)[0])
    assert not torch.equal(a["token_BS"], b["token_BS"])
    assert not set(a["seeds"].tolist()) & set(b["seeds"].tolist())


def test_seeds_of_rows_are_distinct_and_fit_a_generator() -> None:
    rows = make(CONFIG)
    seeds = [seed for step in range(150) for seed in rows[step].batches[0].seed_B]
    assert len(set(seeds)) == len(seeds) == 1200
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    # High bits vary too: the seeds are spread over the whole range.
    assert len({seed >> 55 for seed in seeds}) > 200


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_gives_the_steps_in_order(workers: int) -> None:
    """All of them are kept: the memory that they came in has been used again by then."""
    rows = make(CONFIG)
    loaded = list(pipeline.load(rows, 2, 18, workers))
    assert len(loaded) == 16
    for step, found in zip(range(2, 18), loaded, strict=True):
        assert_same(joined(found), joined(rows[step]))


@pytest.mark.parametrize("sources", [["--data.text.max_bytes=90", "--data.shapes=null"], []])
def test_a_step_travels_whole(sources: list[str]) -> None:
    """Also without any patch, and where the bytes of one tensor end in the middle of a word of the next."""
    config = settings.parse([*TINY, "--data.rows_per_step=3", "--data.row_length=95", *sources])[0]
    step = replace(make(config)[1], replaced=["one"])
    wrap = pipeline.Wrapper(2)
    parcel = wrap(step)
    assert all(tensor.device.type == "meta" for tensor in parts(parcel.outline))
    arrived = parcel.copy().unwrap()
    smaller, larger = wrap(step), wrap(replace(step, batches=step.batches * 2))
    assert smaller.content_N.data_ptr() != parcel.content_N.data_ptr()
    assert len(parts(larger.unwrap())) == 2 * len(parts(step))
    assert len(parts(arrived)) > 10
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(parts(arrived), parts(step), strict=True))
    assert arrived.replaced == ["one"]
    assert [batch.seed_B for batch in arrived.batches] == [batch.seed_B for batch in step.batches]
    assert [b.documents.squared_lengths for b in arrived.batches] == [b.documents.squared_lengths for b in step.batches]


def parts(step: Step) -> list[torch.Tensor]:
    """Every tensor of a step."""
    found: list[torch.Tensor] = []
    for batch in step.batches:
        found += [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        found += [tensor for group in batch.documents.groups for tensor in (group.slot_GL, group.valid_GL)]
    return found


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
        split: {s.text for d in pipeline.make_mixture(CONFIG, encoder, split).streams[0].documents(0, np.arange(200))[0]
                for s in d.segments if hasattr(s, "text")}
        for split in ("train", "test")
    }  # fmt: skip
    assert not texts["train"] & texts["test"]


def test_no_source_is_refused_and_files_have_no_held_out_part() -> None:
    with pytest.raises(ValueError, match=r"no data: set data\.shapes"):
        pipeline.make_sources(DataSection(), "train")
    assert pipeline.make_sources(DataSection(files=[FilesSection("a.jsonl")]), "test") == []


# ---- ranks, epochs and resuming --------------------------------------------------------------------------------------

SMALL = settings.parse([*TINY, "--data.shapes.documents=70", "--data.rows_per_step=6"])[0]


def read(rows: StepRows, first: int, last: int) -> list[list[tuple[int, bytes]]]:
    """(seed, bytes) of every row of this rank, step by step, as the loader hands them out."""
    return [
        [
            (seed, batch.token_BS[k].numpy().tobytes() + batch.learn_BS[k].numpy().tobytes())
            for batch in step.batches
            for k, seed in enumerate(batch.seed_B)
        ]
        for step in pipeline.load(rows, first, last, 0)
    ]


@pytest.mark.parametrize("weights", [False, True])
def test_two_epochs_on_one_two_and_three_ranks_with_a_change_on_the_way(weights: bool) -> None:
    """Every layout reads, in the same order, the rows of the mixture, which hold each document once per epoch."""
    data = replace(SMALL.data, digits=DigitsSection(weight=1.0), shapes=replace(SMALL.data.shapes, weight=3.0))
    config = replace(SMALL, data=data) if weights else SMALL
    mixture = make(config).mixture
    shapes = mixture.streams[0]

    # What the plan says, row by row: two whole epochs of the 70 pictures, each of them once in each.
    places = [mixture.locate(r) for r in range(600)]
    inside = [r for r, (stream, n) in enumerate(places) if stream is shapes and stream.plan.row(n)[0] < 2]
    used = [shapes.plan.row(places[r][1]) for r in inside]
    for epoch in (0, 1):
        assert sorted(id for e, ids in used if e == epoch for id in ids.tolist()) == list(range(70))
    steps = inside[-1] // 6 + 1
    assert 5 < steps < 100

    rows = [mixture.row(r) for r in range(6 * steps)]
    seeds = pipeline.row_seeds(list(range(6 * steps)), config.run.seed)
    expected = {seed: row.token.astype(np.int64).tobytes() + row.learn.tobytes()
                for seed, row in zip(seeds, rows, strict=True)}  # fmt: skip
    orders = []
    for worlds in ((1,), (2,), (3,), (1, 3), (3, 2), (2, 1)):
        middle = steps // 2 if len(worlds) == 2 else steps
        found: list[list[tuple[int, bytes]]] = []
        for world, first, last in zip(worlds, (0, middle), (middle, steps), strict=False):
            shares = [read(make(config, rank, world), first, last) for rank in range(world)]
            found += [[row for share in step for row in share] for step in zip(*shares, strict=True)]
        for number, step in enumerate(found):
            assert {seed for seed, _ in step} == set(seeds[6 * number : 6 * number + 6])
        everything = [row for step in found for row in step]
        assert len(everything) == len(expected)
        assert dict(everything) == expected
        orders.append(everything)
    assert all(order == orders[0] for order in orders)


def test_what_was_seen_does_not_depend_on_how_it_was_read() -> None:
    rows = make(SMALL, 1, 3)
    counted = [0, 0]
    for r in range(6 * 12):
        stream, n = rows.mixture.locate(r)
        counted[0] += len(stream.plan.row(n)[1])
        counted[1] += np.count_nonzero(rows.mixture.row(r).document)
    seen = make(SMALL).mixture.seen(6 * 12)["shapes"]
    assert [seen.documents, seen.slots] == counted
    assert seen.epochs == seen.documents / 70


# ---- equal work ------------------------------------------------------------------------------------------------------


def imbalance(costs: np.ndarray, ranks: int) -> float:
    """Work of the busiest rank over the mean, less 1."""
    shares = costs.reshape(ranks, -1).sum(1)
    return float(shares.max() / shares.mean() - 1)


@given(st.lists(st.floats(0, 1e9), max_size=40))
def test_balance_is_a_permutation(costs: list[float]) -> None:
    assert sorted(balance(costs)) == list(range(len(costs)))


def test_ranks_carry_equal_work_with_pictures_and_text() -> None:
    """Rows of pictures, where the head works on every patch, and rows of text, half and half."""
    arguments = [*TINY, "--data.text.max_bytes=80", "--data.text.weight=1", "--data.shapes.weight=1",
                 "--data.condition_dropout=0", "--data.rows_per_step=32", "--model.head.width=256"]  # fmt: skip
    rows = make(settings.parse(arguments)[0])
    before: dict[int, list[float]] = {2: [], 4: [], 8: []}
    after: dict[int, list[float]] = {2: [], 4: [], 8: []}
    for step in range(8):
        numbers = rows.numbers(step)
        assert sorted(numbers) == list(range(32 * step, 32 * step + 32))
        costs = {number: rows.cost(number) for number in numbers}
        for ranks in before:
            before[ranks].append(imbalance(np.array([costs[number] for number in sorted(numbers)]), ranks))
            after[ranks].append(imbalance(np.array([costs[number] for number in numbers]), ranks))
    for ranks in before:
        print(f"{ranks} ranks: {np.mean(before[ranks]):.3f} before, {np.mean(after[ranks]):.3f} after")
        assert np.mean(after[ranks]) < 0.5 * np.mean(before[ranks])
        assert np.mean(after[ranks]) < 0.05


def test_the_cost_of_a_row_is_that_of_its_batch() -> None:
    rows = make(CONFIG)
    for row in range(5):
        batch = pipeline.make_batch(rows.mixture, [row], 0)
        work = rows.mixture.work(row)
        assert work.slots == int((batch.document_BS > 0).sum())
        assert work.patches == len(batch.patches_NP)
        assert work.squared_lengths == batch.documents.squared_lengths


# ---- weights, stages, prepared data, files that cannot be read -------------------------------------------------------


def test_stages_change_weights_and_resolution() -> None:
    stages = ["--data.stages=[{from_step: 2, weights: {digits: 1}}, {from_step: 4, max_patches: 2}]",
              "--data.shapes.weight=1", "--data.digits={weight: 1}"]  # fmt: skip
    mixture = make(settings.parse([*TINY, *stages])[0]).mixture
    names = [[mixture.locate(r)[0].sources[0].name for r in range(first, first + 8)] for first in (0, 8, 16)]
    assert names[0].count("shapes") == names[2].count("shapes") == 4
    assert set(names[1]) == {"digits"}
    patches = [max(mixture.row(r).rows.max() * mixture.row(r).cols.max() for r in range(first, first + 8))
               for first in (0, 16)]  # fmt: skip
    assert patches == [6, 2]
    # Another resolution begins its sources anew, in another order.
    first, later = (next(s for s in [mixture.locate(r)[0] for r in range(at, at + 8)] if s.sources[0].name == "shapes")
                    for at in (0, 16))  # fmt: skip
    assert first is not later
    assert first.seed != later.seed


def test_prepared_sets_of_two_resolutions_one_after_the_other(tmp_path: Path) -> None:
    arguments = resolutions(tmp_path)
    config = settings.parse(arguments)[0]
    rows = make(config)
    grids = [[int((batch.rows_BS * batch.cols_BS).max()) for batch in rows[step].batches] for step in range(6)]
    assert [set(found) <= {1, 2, 3, 4} for found in grids] == [True] * 3 + [False] * 3
    assert max(max(found) for found in grids) == 16
    # What a process reads does not depend on where it began, nor on the number of ranks.
    for step in (2, 3, 5):
        assert_same(joined(rows[step]), joined(make(config)[step]))
        assert_same(joined(rows[step]), joined(*(make(config, rank, 2)[step] for rank in (0, 1))))
    seen = rows.mixture.seen(6 * config.data.rows_per_step)
    assert seen["low"].documents > 0 < seen["high"].documents
    assert rows.mixture.seen(3 * config.data.rows_per_step)["high"].documents == 0
    # A set is still refused where it is read with other patches than it was prepared for.
    wrong = settings.parse([*arguments[:-1], "--data.stages=[{from_step: 3, weights: {low: 1}, max_patches: 16}]"])[0]
    with pytest.raises(ValueError, match="low: was prepared with max_patches 4, the run has 16"):
        make(wrong)


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 0, and one of them above 0"):
        make(settings.parse([*TINY, "--data.shapes.weight=0"])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.shapes.weight=1", "--data.digits={}"], "some sources of data have a weight and others none"),
        (["--data.stages=[{from_step: 3, weights: {shapes: 1}}]"], "stage from step 3 has weights; give every source"),
        (["--data.stages=[{from_step: 5}, {from_step: 5}]"], r"begin at steps \[5, 5\]; they must be above 0"),
        (["--data.stages=[{from_step: 0}]"], r"begin at steps \[0\]; they must be above 0"),
    ],
)
def test_impossible_weights_and_stages_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.parse([*TINY, *arguments])


def test_weights_of_unknown_sources_and_equal_names_are_refused(tmp_path: Path) -> None:
    stage = ["--data.shapes.weight=1", "--data.stages=[{from_step: 3, weights: {words: 1}}]"]
    with pytest.raises(ValueError, match=r"step 3 has a weight for 'words'; the sources are shapes$"):
        make(settings.parse([*TINY, *stage])[0])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "set.jsonl").write_text('{"segments": [{"text": "x"}]}\n')
    paths = ", ".join(f"{{path: {tmp_path / folder / 'set.jsonl'}, weight: 1}}" for folder in ("a", "b"))
    with pytest.raises(ValueError, match=r"two sources of data have the same name.*shapes, set, set"):
        make(settings.parse([*TINY, "--data.shapes.weight=1", f"--data.files=[{paths}]"])[0])


class StandIn:
    """What `data.source.prepared.Prepared` promises, on drawn shapes."""

    name = "stand-in"

    def __init__(self, path: str) -> None:
        self.inner = Shapes(int(path), "train", 40, ((16, 16),))
        encoder = pipeline.make_encoder(SMALL, pipeline.make_tokenizer(SMALL.data))
        documents = [self.inner.document(k, pixels=False) for k in range(40)]
        whole = [encoder.length(document) for document in documents]
        self.slots = np.array([whole, [encoder.length(drop_condition(d)) for d in documents]], np.int32)
        self.patches = np.full(40, 4, np.int32)

    def __len__(self) -> int:
        return 40

    def check(self, encoder: Encoder) -> None:
        if encoder.max_patches != 16:
            raise ValueError("stand-in was prepared for 16 patches")

    def document(self, index: int, pixels: bool = True) -> Document:
        return self.inner.document(index, pixels)


def test_prepared_data(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("data.source.prepared")
    module.Prepared = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "data.source.prepared", module)
    arguments = [*TINY, "--data.shapes=null", "--data.prepared=[{path: '7', repeats: 2}]"]
    mixture = make(settings.parse(arguments)[0]).mixture
    stream = mixture.streams[0]
    assert stream.plan.num_documents == 80
    ids = [id for r in range(80) for epoch, ids in [stream.plan.row(r)] if epoch == 0 for id in ids.tolist()]
    assert sorted(ids) == list(range(80))
    with pytest.raises(ValueError, match="prepared for 16 patches"):
        make(settings.parse([*arguments, "--data.max_patches=9"])[0])


def test_what_cannot_be_read_is_replaced_alike_on_every_layout(tmp_path: Path) -> None:
    for number in range(12):
        Picture.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / f"{number}.png")
    broken = tmp_path / "5.png"
    broken.write_bytes(broken.read_bytes()[:400])  # the header is whole
    lines = [json.dumps({"segments": [{"text": str(k)}, {"image": f"{k}.png"}]}) + "\n" for k in range(12)]
    (tmp_path / "set.jsonl").write_text("".join(lines))
    config = settings.parse(
        [*TINY, "--data.shapes=null", f"--data.files=[{{path: {tmp_path / 'set.jsonl'}}}]", "--data.rows_per_step=6"]
    )[0]
    whole = [make(config)[step] for step in range(4)]
    reasons = [reason for step in whole for reason in step.replaced]
    assert len(reasons) >= 2  # once per epoch
    assert len(set(reasons)) == 1
    assert str(broken) in reasons[0]
    for step in (3, 1):
        shares = [make(config, rank, 3)[step] for rank in range(3)]
        assert_same(joined(whole[step]), joined(*shares))
        assert [reason for share in shares for reason in share.replaced] == whole[step].replaced
