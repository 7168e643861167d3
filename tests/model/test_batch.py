"""Collating, targets and the conversion of pixels."""

import numpy as np
import torch

from model.batch import Batch, to_bytes, to_pixels
from tests.model.support import COLUMNS, VOCABULARY, Words, batch_of, pack, picture, random_document


def test_targets_slot_by_slot() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = []
        for _ in range(3):
            documents = [random_document(rng) for _ in range(2)]
            rows.append([[s._replace(learn=bool(rng.random() < 0.7)) for s in document] for document in documents])
        batch = batch_of(*rows)
        text, image = batch.targets()
        num_text = num_image = 0
        for b in range(3):
            for s in range(batch.token_BS.shape[1]):
                following = s + 1 < batch.token_BS.shape[1] and batch.document_BS[b, s + 1] == batch.document_BS[b, s]
                learned = bool(following and batch.learn_BS[b, s + 1])
                patch = learned and bool(batch.token_BS[b, s + 1] == VOCABULARY.patch)
                assert text[b, s] == (learned and not patch)
                assert image[b, s] == patch
                num_text, num_image = num_text + (learned and not patch), num_image + patch
        assert batch.counts() == (num_text, num_image)


def test_the_slot_of_the_announcement_predicts_the_first_patch_and_the_last_patch_the_end() -> None:
    batch = batch_of([[Words([1]), picture(np.random.default_rng(0), 1, 2)]])
    assert batch.token_BS[0].tolist() == [17, 1, 19, 22, 31, 21, 21, 20, 18]
    text, image = batch.targets()
    assert image[0].nonzero()[:, 0].tolist() == [4, 5]
    assert text[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6, 7]


def test_collate_keeps_columns_patches_and_seeds() -> None:
    rng = np.random.default_rng(1)
    rows = [pack([random_document(rng)], 60) for _ in range(4)]
    batch = Batch.collate(rows, [7, 8, 9, 10])
    for name in COLUMNS:
        column = getattr(batch, f"{name}_BS")
        assert column.dtype == (torch.bool if name == "learn" else torch.int64)
        assert np.array_equal(column.numpy(), np.stack([getattr(row, name) for row in rows]))
    assert np.array_equal(batch.patches_NP.numpy(), np.concatenate([row.patches for row in rows]))
    assert batch.seed_B == (7, 8, 9, 10)
    assert len(batch.patches_NP) == int((batch.rows_BS > 0).sum())
    moved = batch.to("cpu")
    assert torch.equal(moved.token_BS, batch.token_BS)
    assert moved.seed_B == batch.seed_B
    assert moved.documents.squared_lengths == batch.documents.squared_lengths


def test_pixels_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(every)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(to_bytes(pixels), every)
    assert to_bytes(torch.tensor([-5.0, 7.0, 0.0])).tolist() == [0, 255, 128]


def test_the_first_slot_of_a_document_is_never_predicted_from_the_document_before() -> None:
    row = pack([[Words([1])], [Words([2])]], 8)
    row.learn[:6] = True  # even where a producer of rows marks what cannot be learned
    text, image = Batch.collate([row], [0]).targets()
    assert text[0].tolist() == [True, True, False, True, True, False, False, False]
    assert not image.any()
