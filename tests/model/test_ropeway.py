"""The whole model: its loss in plain formulas, packing, padding, gradients, initialisation."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model.ropeway as ropeway
from model.attention import KINDS
from model.batch import Batch, to_pixels
from model.config import HeadConfig
from model.diffusion.objective import draw
from model.ropeway import Ropeway
from tests.model.support import VOCABULARY, Words, batch_of, build, pack, picture, random_document, tiny_config


def fixed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time and noise by the order of patches in the batch, whatever rows they lie in."""

    def by_order(count_B, seed_B, patch_width, config, device):  # type: ignore[no-untyped-def]
        return draw([sum(count_B)], [77], patch_width, config, device)

    monkeypatch.setattr(ropeway, "draw", by_order)


def losses_and_gradients(model: Ropeway, batch: Batch) -> tuple[torch.Tensor, ...]:
    model.zero_grad()
    losses = model(batch)
    (losses.text + losses.image).backward()
    return losses.text.detach(), losses.image.detach(), *(p.grad.clone() for p in model.parameters())  # type: ignore[union-attr]


def assert_same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["tv", "tie"])
def test_packed_rows_equal_single_documents(kind, positions, monkeypatch) -> None:
    fixed_draws(monkeypatch)
    rng = np.random.default_rng(4)
    documents = [random_document(rng) for _ in range(6)]
    model = build(tiny_config(attention=kind, positions=positions))
    packed = losses_and_gradients(model, batch_of(documents[:2], documents[2:]))
    assert packed[1] > 0
    assert_same(packed, losses_and_gradients(model, batch_of(*([document] for document in documents))))


def test_packing_check_finds_a_leak(monkeypatch) -> None:
    """Negative control: rows taken for single documents give another loss."""
    fixed_draws(monkeypatch)
    rng = np.random.default_rng(4)
    documents = [random_document(rng) for _ in range(6)]
    batch, model = batch_of(documents), build()
    leaking = type(batch.documents).of(torch.ones_like(batch.document_BS))
    object.__setattr__(batch, "documents", leaking)
    singles = losses_and_gradients(model, batch_of(*([document] for document in documents)))
    with pytest.raises(AssertionError):
        assert_same(losses_and_gradients(model, batch), singles)


def test_padding_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    documents = [random_document(rng) for _ in range(3)]
    model, longest = build(), len(pack(documents).token)
    tight = losses_and_gradients(model, batch_of(documents, length=longest))
    assert_same(losses_and_gradients(model, batch_of(documents, length=longest + 37)), tight)


def test_noised_context_hides_learned_images_from_what_follows_and_nothing_else() -> None:
    rng = np.random.default_rng(5)
    shown = picture(rng, 2, 2)
    rows = [[[Words([1, 2]), picture(rng, 2, 3), Words([3])], [shown._replace(learn=False), Words([1, 3])]]]
    clean, noised = (build(tiny_config(context_noise=noise)) for noise in (0.0, 1.0))
    batch = batch_of(*rows)
    one, two = clean.hidden(batch)[0], noised.hidden(batch)[0]
    first = int((batch.rows_BS[0] > 0).nonzero()[0])  # the first patch of the learned image
    assert torch.equal(one[:first], two[:first])
    same_document = batch.document_BS[0] == 1
    assert not torch.isclose(one[first:][same_document[first:]], two[first:][same_document[first:]]).all(1).any()
    torch.testing.assert_close(one[batch.document_BS[0] == 2], two[batch.document_BS[0] == 2])
    assert torch.equal(noised.eval().hidden(batch), clean.eval().hidden(batch))


def test_noised_context_is_a_function_of_the_row() -> None:
    rng = np.random.default_rng(6)
    rows = [[random_document(rng) for _ in range(2)] for _ in range(3)]
    model = build(tiny_config(context_noise=0.5))
    whole = model(batch_of(*rows))
    parts = [model(replace(batch_of(row), seed_B=(seed,)))
             for row, seed in zip(rows, batch_of(*rows).seed_B, strict=True)]  # fmt: skip
    assert whole.image.item() == pytest.approx(sum(part.image.item() for part in parts), rel=1e-4)
    assert whole.text.item() == pytest.approx(sum(part.text.item() for part in parts), rel=1e-4)


def test_loss_slot_by_slot() -> None:
    """Both losses from the hidden states with plain loops, the noise taken row by row."""
    rng = np.random.default_rng(2)
    rows = [[random_document(rng) for _ in range(2)] for _ in range(2)]
    rows[0][0].append(picture(rng, 2, 3))
    rows[1][1].append(Words([1, 2], learn=False))
    batch, model = batch_of(*rows), build()
    config = model.config.head
    with torch.no_grad():
        found, hidden = model(batch), model.hidden(batch)
        text, image, seen = 0.0, 0.0, 0
        for b in range(2):
            cases = []
            for s in range(batch.token_BS.shape[1]):
                is_patch = bool(batch.rows_BS[b, s] > 0)
                pixels = to_pixels(batch.patches_NP[seen]) if is_patch else None
                seen += is_patch
                if s == 0 or not batch.learn_BS[b, s] or batch.document_BS[b, s - 1] != batch.document_BS[b, s]:
                    continue
                if is_patch:
                    place = [int(c[b, s]) for c in (batch.row_BS, batch.col_BS, batch.rows_BS, batch.cols_BS)]
                    cases.append((hidden[b, s - 1], torch.tensor(place), pixels))
                else:
                    score = model.text_head.weight @ hidden[b, s - 1]
                    text += float(F.cross_entropy(score, batch.token_BS[b, s]))
            time, noise, _ = draw([len(cases)], [100 + b], 12, config, torch.device("cpu"))
            for n, (state, place, x) in enumerate(cases):
                for d in range(config.draws):
                    t, e = time[n * config.draws + d], noise[n * config.draws + d]
                    z = t * x + (1 - t) * e
                    head = model.diffusion_head
                    says = head(z[None], t, head.condition(state[None], place[None]))[0]
                    bounded = (1 - t).clamp_min(0.05)
                    image += float(((says - x) / bounded).square().mean()) / config.draws
    assert float(found.text) == pytest.approx(text, rel=1e-5)
    assert float(found.image) == pytest.approx(image, rel=1e-4)


def test_noise_of_a_row_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(5)
    rows = [pack([random_document(rng), [picture(rng, 2, 2)]], 70) for _ in range(3)]
    model = build()
    with torch.no_grad():
        together = model(Batch.collate(rows, [5, 6, 7]))
        alone = [model(Batch.collate([row], [seed])) for row, seed in zip(rows, [5, 6, 7], strict=True)]
    assert float(together.image) == pytest.approx(sum(float(one.image) for one in alone), rel=1e-5)
    assert float(together.text) == pytest.approx(sum(float(one.text) for one in alone), rel=1e-5)


@pytest.mark.parametrize("bottleneck", [None, 4])
@pytest.mark.parametrize("output", ["untied", "tied", "tied_half_swap"])
@pytest.mark.parametrize("kind", ["text", "image", "both"])
def test_every_parameter_gets_a_gradient(kind, output, bottleneck) -> None:
    rng = np.random.default_rng(0)
    documents = {
        "text": [[Words([1, 2, 3])], [Words([4])]],
        "image": [[picture(rng, 2, 2)], [picture(rng, 1, 3)]],
        "both": [[picture(rng, 2, 2), Words([1, 2])]],
    }[kind]
    batch = batch_of(documents, documents)
    if kind == "image":  # patches are the only targets
        object.__setattr__(batch, "learn_BS", batch.learn_BS & (batch.rows_BS > 0))
    model = build(tiny_config(output_embedding=output, patch_bottleneck=bottleneck))
    assert (batch.counts()[0] > 0, batch.counts()[1] > 0) == (kind != "image", kind != "text")
    losses = model(batch)
    (losses.text + losses.image).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        idle = (kind == "text" and ("diffusion" in name or "patch" in name)) or (
            kind == "image" and output == "untied" and "text_head" in name
        )
        assert bool((parameter.grad == 0).all()) == idle, name


def test_initialisation_is_a_function_of_the_seed_and_leaves_the_global_state_alone() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (build(seed=seed, silent=True) for seed in (1, 1, 2))
    torch.random.set_rng_state(state)
    before = torch.random.get_rng_state()
    one.initialise(1)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.token_embedding.weight, other.token_embedding.weight)


def test_initialisation_scales() -> None:
    with torch.no_grad():
        model = build(tiny_config(dim=128, num_kv_heads=4, num_layers=3, patch_size=4), silent=True)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.initialise(0)
    model.requires_grad_(False)
    assert all(p.isfinite().all() for p in model.parameters()), "initialise leaves a parameter unset"
    block = model.backbone.layers[1]
    assert float(block.self_attn.q_proj.weight.std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(block.self_attn.o_proj.weight.std()) == pytest.approx((128 * 6) ** -0.5, rel=0.05)
    down = block.mlp.down_proj.weight
    assert float(down.std()) == pytest.approx((down.shape[1] * 6) ** -0.5, rel=0.05)
    assert float(model.token_embedding.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert (block.input_layernorm.weight == 1).all()


@pytest.mark.parametrize("output", ["untied", "tied_half_swap", "tied"])
def test_loss_at_the_start(output) -> None:
    """About ln V for text; |x|^2 / max(1 - t, .05)^2 for patches."""
    rng = np.random.default_rng(0)
    words = [[Words(rng.integers(0, 16, 200).tolist())]]
    head = HeadConfig(width=24, depth=2, draws=64)
    model = build(tiny_config(dim=64, output_embedding=output, head=head), silent=True)
    with torch.no_grad():
        batch = batch_of(words)
        assert float(model(batch).text) / batch.counts()[0] == pytest.approx(np.log(VOCABULARY.size), abs=0.15)
        batch = batch_of([[picture(rng, 8, 8)]])
        power = to_pixels(batch.patches_NP).square().mean()
        # E[1 / max(1 - t, .05)^2] = 2.97 under the default law of time.
        assert float(model(batch).image) / 64 == pytest.approx(2.97 * float(power), rel=0.08)


def test_tied_weights_are_one_parameter() -> None:
    for output, same in (("untied", False), ("tied", True), ("tied_half_swap", True)):
        model = build(tiny_config(output_embedding=output))
        assert (model.text_head.weight is model.token_embedding.weight) == same
        assert (copy.deepcopy(model).text_head.weight is model.text_head.weight) is False


def test_patches_reach_their_own_slots() -> None:
    rng = np.random.default_rng(3)
    batch = batch_of([[picture(rng, 2, 2), Words([1])]], [[picture(rng, 1, 3)]], length=14)
    model = build()
    with torch.no_grad():
        pixels = to_pixels(batch.patches_NP)
        x = model.embed(batch.token_BS, batch.rows_BS > 0, pixels)
        expected = model.token_embedding(batch.token_BS)
        expected[batch.rows_BS > 0] = model.patch_embedding(pixels)
    assert torch.equal(x, expected)


def test_bfloat16_autocast_keeps_losses_in_float32_and_close() -> None:
    rng = np.random.default_rng(3)
    batch, model = batch_of([random_document(rng), [picture(rng, 3, 3)]]), build()
    with torch.no_grad():
        exact = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(batch)
    for one, other in zip(exact[:2], rough[:2], strict=True):
        assert other.dtype == torch.float32
        assert float(other) == pytest.approx(float(one), rel=0.05)


@pytest.mark.parametrize("draws", [1, 4])
def test_image_loss_by_time_adds_up(draws) -> None:
    rng = np.random.default_rng(3)
    batch = batch_of([random_document(rng), [picture(rng, 3, 3)]])
    head = HeadConfig(width=24, depth=2, draws=draws)
    losses = build(tiny_config(head=head))(batch)
    assert losses.image.requires_grad
    loss_T, count_T = losses.image_by_time
    assert not losses.image_by_time.requires_grad
    assert float(loss_T.sum() / draws) == pytest.approx(float(losses.image.detach()), rel=1e-5)
    counts = [int(n) for n in batch.seed_B], batch.targets()[1].sum(1).tolist()
    times = torch.cat(
        [draw([n], [seed], 12, head, torch.device("cpu")).time_M1 for seed, n in zip(*counts, strict=True)]
    )
    assert count_T.tolist() == [int(((times >= k / 10) & (times < (k + 1) / 10)).sum()) for k in range(10)]
