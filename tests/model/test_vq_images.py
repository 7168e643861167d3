"""A long document of many images of several sizes, with linear-time attention: it is learned, and continued."""

import numpy as np
import torch

from model.attention.codebook import VQConfig
from model.generate import generate
from model.sampling import Sampling
from model.writer import Request
from tests.model.support import Recorder, Words, batch_of, build, picture, tiny_config
from tests.model.test_generate import prompt_of, uncached

WINDOW = 16  # the patches of the largest image
SIZES = [(4, 4), (1, 3), (3, 2), (2, 4), (4, 1), (3, 3), (1, 1), (2, 2)]


def test_many_images_in_one_row_are_learned_and_continued(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    document = [part for n, size in enumerate(SIZES * 2) for part in (Words([n % 5, 7]), picture(rng, *size))]
    batch = batch_of([document])
    assert batch.token_BS.shape[1] > 10 * WINDOW
    model = build(tiny_config(attention="vq", vq=VQConfig(codes=12, window=WINDOW)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(60):
        losses = model(batch)
        (losses.text + losses.image + 1e-4 * losses.commit).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        for book in model.codebooks().values():
            book.update(book.take())
        totals.append((float(losses.text.detach()), float(losses.image.detach())))
    (first_text, first_image), (text, image) = totals[0], totals[-1]
    assert text < 0.5 * first_text
    assert image < 0.8 * first_image

    model.eval()
    request = Request(prompt_of(document), seed=0, begin_image=True, grid=(4, 4), max_text=1)
    recorder = Recorder(model.backbone.step)
    monkeypatch.setattr(model.backbone, "step", recorder)
    (segments,) = generate(model, [request], Sampling(temperature=0, steps=2))
    _, hidden, _ = uncached(model, request, segments)
    start, steps = len(request.prompt.token) + 3, 16  # <boi> and the size are read with the prompt
    assert len(recorder.results) >= steps
    for k in range(steps):
        torch.testing.assert_close(recorder.results[k][0, 0], hidden[start + k], rtol=0, atol=1e-4)
