"""Whole images by diffusion inside the backbone: who sees whom, what is learned, and drawing by hand."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from model import ropeway
from model.batch import Batch, to_bytes, to_pixels
from model.config import HeadConfig
from model.diffusion.guidance import Guidance
from model.diffusion.objective import OBJECTIVES, Draws, draw
from model.diffusion.sampler import SAMPLERS
from model.generate import generate
from model.ropeway import Ropeway
from model.sampling import Sampling
from model.writer import GeneratedImage, Prompt, Request
from tests.model.support import VOCABULARY, Document, Words, batch_of, build, pack, picture, tiny_config

RNG = np.random.default_rng(0)
DOCUMENT: Document = [Words([1, 2, 3]), picture(RNG, 2, 2), Words([4, 5]), picture(RNG, 1, 3), Words([6])]
IMAGES = [range(7, 11), range(17, 20)]
"""Slots of the two images: <bos>, three words, <boi>, two sizes before the first one."""
HEAD = HeadConfig(width=24, depth=2)


def whole(**changes: object) -> Ropeway:
    return build(tiny_config(image_mode="transfusion", **{"head": HEAD} | changes))


def jacobian(model: Ropeway, batch: Batch) -> torch.Tensor:
    """Whether hidden state i depends on embedding j, (S, S) bool."""
    with torch.no_grad():
        x = model.embed(batch.token_BS, batch.rows_BS > 0, to_pixels(batch.patches_NP))

    def first_row(x: torch.Tensor) -> torch.Tensor:
        return model.read(x, model.angles(batch.grid), batch.documents, batch.grid)[0][0]

    return torch.autograd.functional.jacobian(first_row, x)[:, :, 0].abs().amax((1, 3)) > 0


def test_patches_see_their_image_and_nothing_else_sees_ahead() -> None:
    batch = batch_of([DOCUMENT])
    size = batch.token_BS.shape[1]
    expected = torch.ones(size, size).tril().bool()
    for image in IMAGES:
        assert (batch.rows_BS[0, list(image)] > 0).all()
        expected[image.start : image.stop, image.start : image.stop] = True
    assert torch.equal(jacobian(whole(), batch), expected)
    causal = jacobian(build(tiny_config(head=HEAD)), batch)
    assert torch.equal(causal, torch.ones(size, size).tril().bool()), "control: image mode autoregressive"


def test_packing_changes_nothing() -> None:
    model, other = whole(), [Words([9]), picture(RNG, 3, 2)]
    packed = model.hidden(batch_of([DOCUMENT, other, DOCUMENT[:2]], [other]))
    for row, start, document in ((0, 0, DOCUMENT), (1, 0, other)):
        alone = model.hidden(batch_of([document]))[0]
        torch.testing.assert_close(packed[row, start : start + len(alone)], alone, rtol=0, atol=1e-5)
    start = len(pack([DOCUMENT, other]).token)
    alone = model.hidden(batch_of([DOCUMENT[:2]]))[0]
    torch.testing.assert_close(packed[0, start : start + len(alone)], alone, rtol=0, atol=1e-5)


def drawn(head: HeadConfig, batch: Batch) -> Draws:
    """Of the two images of DOCUMENT in the first row: one time for each, from a stream of its own."""
    seed = batch.seed_B[0]
    noise = draw([7], [seed], 12, replace(head, draws=1), torch.device("cpu")).noise_MP
    images = draw([2], [seed ^ ropeway._IMAGE_STREAM], 0, replace(head, draws=1), torch.device("cpu"))
    image = [0, 0, 0, 0, 1, 1, 1]
    return Draws(images.time_M1[image], noise, images.steps_M1[image])


@pytest.mark.parametrize("prediction", ["x", "v", "eps"])
def test_loss_by_hand(prediction) -> None:
    """Image by image: one time and its noise, the sequence with noised patches, the error in v."""
    head = replace(HEAD, prediction=prediction)
    model, batch = whole(head=head).train(), batch_of([DOCUMENT], [[Words([7]), picture(RNG, 2, 1, learn=False)]])
    losses = model(batch)
    draws = drawn(head, batch)
    time, noise = draws.time_M1, draws.noise_MP
    clean = to_pixels(batch.patches_NP)
    z = time * clean[:7] + (1 - time) * noise
    times = torch.cat((time[:, 0], torch.ones(2)))  # a picture that is only read is clean
    x = model.embed(batch.token_BS, batch.rows_BS > 0, torch.cat((z, clean[7:])), model.sequence_head.embed_time(times))
    hidden = model.read(x, model.angles(batch.grid), batch.documents, batch.grid)[0]
    says = model.sequence_head(hidden[0, [slot for image in IMAGES for slot in image]])
    v = {"x": (says - z) / (1 - time).clamp_min(0.05), "v": says, "eps": (z - says) / time.clamp_min(0.05)}[prediction]
    right = (clean[:7] - z) / (1 - time).clamp_min(0.05) if prediction == "x" else clean[:7] - noise
    torch.testing.assert_close(losses.image, (v - right).square().mean(1).sum())
    text_BS, _ = batch.targets()
    logits = model.text_head.logits(hidden[text_BS])
    target = batch.token_BS.roll(-1, 1)[text_BS]
    torch.testing.assert_close(losses.text, torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    assert float(losses.image_by_time[1].sum()) == 7
    losses.image.backward()
    losses_of_text = model(batch).text
    losses_of_text.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def head_of(objective: str, **changes: object) -> HeadConfig:
    law = {"time_law": "uniform", "loss": "x"} if objective == "consistency" else {}
    return replace(HEAD, objective=objective, **law | changes)  # type: ignore[arg-type]


def test_shortcut_by_hand() -> None:
    """A row with one image that is asked for a jump and one that is not: the jump is the mean of two of half its size,
    taken with the other image as it is; the text is read beside the images as they are noised."""
    head = head_of("shortcut", prediction="v")
    seed = next(n for n in count() if (drawn(head, seeded(n)).steps_M1[[0, 4], 0] > 0).tolist() == [False, True])
    model, batch = whole(head=head).train(), seeded(seed)
    draws, clean = drawn(head, batch), to_pixels(batch.patches_NP)
    (t, noise, n), jump = draws, slice(4, 7)

    def says(z: torch.Tensor, time: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        added = model.sequence_head.embed_time(time[:, 0]) + model.sequence_head.shortcut_in(steps[:, 0])
        x = model.embed(batch.token_BS, batch.rows_BS > 0, z, added)
        nonlocal hidden
        hidden = model.read(x, model.angles(batch.grid), batch.documents, batch.grid)[0]
        return model.sequence_head(hidden[0, [slot for image in IMAGES for slot in image]])

    hidden = torch.zeros(())
    z = t * clean + (1 - t) * noise
    half, target = 0.5 / n[4], clean - noise
    with torch.no_grad():
        steps = n.clone()
        steps[jump] *= 2
        first = says(z, t, steps)[jump]
        moved, later = z.clone(), t.clone()
        moved[jump] += half * first
        later[jump] += half
        target[jump] = (first + says(moved, later, steps)[jump]) / 2
    losses = model(batch)
    torch.testing.assert_close(losses.image, (says(z, t, n) - target).square().mean(1).sum())
    text_BS, _ = batch.targets()
    logits, token = model.text_head.logits(hidden[text_BS]), batch.token_BS.roll(-1, 1)[text_BS]
    torch.testing.assert_close(losses.text, torch.nn.functional.cross_entropy(logits, token, reduction="sum"))
    (gradient,) = torch.autograd.grad(losses.image, [model.sequence_head.shortcut_in.weight])
    rows = {0, 7 - int(n[4].log2())}
    assert {row for row in range(8) if gradient[row].any()} == rows, "no gradient through the target"


def seeded(seed: int) -> Batch:
    return replace(batch_of([DOCUMENT]), seed_B=(seed,))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_everything_and_packing_changes_nothing(objective) -> None:
    model, other = whole(head=head_of(objective)).train(), [Words([9]), picture(RNG, 3, 2)]
    losses = model(batch_of([DOCUMENT, other], [other]))
    (losses.image + losses.text).backward()
    assert losses.image > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert float(losses.image_by_time[1].sum()) == 7 + 6 + 6
    one, two = seeded(3), replace(batch_of([DOCUMENT, [Words([5] * 9)]]), seed_B=(3,))
    torch.testing.assert_close(model(one).image, model(two).image)


def test_a_fourth_of_the_images_jump_also_where_rows_hold_one() -> None:
    head = replace(head_of("shortcut"), draws=1)
    steps = torch.cat([draw([1], [seed], 0, head, torch.device("cpu")).steps_M1 for seed in range(400)])
    assert int((steps > 0).sum()) == 100


@pytest.mark.parametrize(
    ("objective", "sampler"), [("consistency", "consistency"), ("ddpm", "ddpm"), ("shortcut", "euler")]
)
def test_an_objective_is_learned_and_drawn(objective, sampler) -> None:
    """Two pictures of one patch by heart, each for its word, from noise in four steps."""
    head = head_of(objective, prediction="v" if objective == "ddpm" else "x", consistency_steps=4)
    model = build(tiny_config(image_mode="transfusion", head=head), silent=True).train()
    rng = np.random.default_rng(1)
    documents = [[Words([word]), picture(rng, 1, 1)] for word in (1, 2)]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(250):
        batch = replace(batch_of(documents * 4), seed_B=(step,))
        optimizer.zero_grad()
        (model(batch).image / 8).backward()
        optimizer.step()
    requests = [Request(prompt_of(document[:1]), 3, True, (1, 1), max_text=0) for document in documents]
    drawn = [image.patches for (image,) in generate(model, requests, Sampling(steps=4, sampler=sampler))]
    errors = np.array([[np.abs(one.astype(float) - d[1].patches).mean() for one in drawn] for d in documents])
    assert np.diag(errors).max() < 0.3 * np.diag(errors[::-1]).min(), errors


def test_rows_without_images() -> None:
    for objective in OBJECTIVES:
        losses = whole(head=head_of(objective)).train()(batch_of([[Words([1, 2])]]))
        (losses.text + losses.image).backward()
        assert losses.image.item() == 0


def prompt_of(document: Document) -> Prompt:
    row = pack([document])
    columns = {name: getattr(row, name)[:-1] for name in ("token", "row", "col", "rows", "cols")}
    return Prompt(**columns, patches=row.patches)


@pytest.mark.parametrize(("scale", "schedule"), [(1.0, "constant"), (2.5, "constant"), (2.5, "interval")])
def test_drawing_by_hand(scale, schedule) -> None:
    """Prompts of different lengths in one batch, two images each, the second after the clean first one."""
    model = whole()
    documents: list[Document] = [[Words([1])], [Words([2, 3, 4]), picture(RNG, 2, 2), Words([5])]]
    requests = [Request(prompt_of(d), n, True, (2, 3), max_images=1 + n, max_text=0) for n, d in enumerate(documents)]
    with torch.no_grad():
        model.text_head.weight[VOCABULARY.eos] = 0
        drawn = generate(
            model, requests, Sampling(steps=3, temperature=0, guidance=Guidance(scale, schedule, high=0.5))
        )
    for request, document, segments in zip(requests, documents, drawn, strict=True):
        image = segments[0]
        assert isinstance(image, GeneratedImage)

        def velocity(z: torch.Tensor, time: float, words: bool, document=document) -> torch.Tensor:  # type: ignore[no-untyped-def]
            kept = [s for s in document if words or not isinstance(s, Words)]
            empty = picture(RNG, 2, 3)
            batch = batch_of([[*kept, empty]])
            clean = to_pixels(batch.patches_NP)
            noised = torch.cat((clean[:-6], z))
            times = torch.cat((torch.ones(len(clean) - 6), torch.full((6,), time)))
            x = model.embed(batch.token_BS, batch.rows_BS > 0, noised, model.sequence_head.embed_time(times))
            hidden = model.read(x, model.angles(batch.grid), batch.documents, batch.grid)[0]
            return (model.sequence_head(hidden[batch.rows_BS > 0][-6:]) - z) / (1 - time)

        from model.writer import mix

        z = torch.randn(6, 12, generator=torch.Generator().manual_seed(mix(request.seed, 1)))
        with torch.no_grad():
            for step in range(3):
                without = velocity(z, step / 3, words=False)
                own = scale if schedule == "constant" or step / 3 < 0.5 else 1
                z = z + (without + own * (velocity(z, step / 3, words=True) - without)) / 3
        assert np.abs(to_bytes(z).numpy().astype(int) - image.patches).max() <= 1


def test_what_follows_reads_the_image_that_was_drawn() -> None:
    """Greedy text after an image equals the argmax of the whole sequence, computed at once."""
    model = whole()
    request = Request(prompt_of([Words([1, 2])]), 3, True, (2, 2), max_text=4)
    (segments,) = generate(model, [request], Sampling(steps=2, temperature=0))
    assert len(segments) == 2, "nothing was said: choose another seed"
    image, text = segments
    document = [Words([1, 2]), *batchable(image), Words(text.tokens)]
    hidden = model.hidden(batch_of([document]))[0]
    start = len(pack([[Words([1, 2]), *batchable(image)]]).token) - 2
    logits = model.text_head.logits(hidden)
    logits[:, VOCABULARY.pad :] = -torch.inf
    assert logits[start : start + len(text.tokens)].argmax(-1).tolist() == text.tokens


def batchable(image: GeneratedImage) -> Document:
    from tests.model.support import Picture

    return [Picture(image.rows, image.cols, image.patches)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_same_from_the_same_seed(sampler) -> None:
    model = whole()
    requests = [Request(prompt_of([Words([n])]), n, True, (2, 2), max_text=0) for n in range(3)]
    sampling = Sampling(steps=3, sampler=sampler, guidance=Guidance(2.0, "constant"))
    together = generate(model, requests, sampling)
    for request, (image,) in zip(requests, together, strict=True):
        ((alone,),) = generate(model, [request], sampling)
        assert np.abs(alone.patches.astype(int) - image.patches).max() <= 1


@pytest.mark.parametrize("wrong", [{"attention": "vq"}, {"context_noise": 0.5}])
def test_what_does_not_go_together(wrong) -> None:
    with pytest.raises(ValueError, match=r"image_mode transfusion.*choose"):
        tiny_config(image_mode="transfusion", **wrong)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parameter_count(objective) -> None:
    model = whole(head=head_of(objective))
    assert sum(p.numel() for p in model.parameters()) == sum(model.config.num_parameters(VOCABULARY.size).values())
