"""Generation: equal to the parallel form, within the grammar, and the same pixels in every batch."""

import os
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from model import generate as generation
from model.attention import KINDS
from model.attention.dense import DenseAttention, DenseState
from model.attention.vq import VQState
from model.batch import Batch, to_bytes
from model.brush import Brush
from model.config import HeadConfig, ModelConfig
from model.diffusion.field import Field
from model.diffusion.guidance import Guidance
from model.diffusion.objective import OBJECTIVES
from model.diffusion.path import PATHS
from model.diffusion.sampler import GRIDS, SAMPLERS
from model.diffusion.solver import LearnedMidpoint
from model.generate import generate
from model.sampling import Sampling, choose_tokens
from model.streams import Streams
from model.writer import GeneratedImage, GeneratedText, Prompt, Request, Writer, mix
from tests.model.support import (
    VOCABULARY,
    Document,
    Picture,
    Recorder,
    Words,
    build,
    pack,
    picture,
    slots_of,
    tiny_config,
)
from train.precision import bf16_units

V = VOCABULARY


def prompt_of(document: Document, patch_size: int = 2) -> Prompt:
    row = pack([document], patch_size=patch_size)
    columns = {name: getattr(row, name)[:-1] for name in ("token", "row", "col", "rows", "cols")}
    return Prompt(**columns, patches=row.patches)


def document_of(segments: list) -> Document:
    return [Words(s.tokens) if isinstance(s, GeneratedText) else Picture(s.rows, s.cols, s.patches) for s in segments]


def same(one: list, other: list) -> bool:
    if [type(s) for s in one] != [type(s) for s in other]:
        return False
    return all(
        a.tokens == b.tokens
        if isinstance(a, GeneratedText)
        else (a.rows, a.cols) == (b.rows, b.cols) and np.array_equal(a.patches, b.patches)
        for a, b in zip(one, other, strict=True)
    )


def random_requests(count: int, patch_size: int = 2) -> list[Request]:
    rng, requests = np.random.default_rng(0), []
    for b in range(count):
        document: Document = [Words(rng.integers(0, V.pad, rng.integers(1, 70 if b == 4 else 12)).tolist())]
        if b % 2:
            document.insert(b % 3 % 2, picture(rng, *map(int, rng.integers(1, 4, 2)), patch_size=patch_size))
        grid = (2, 3) if b % 2 else None
        limits = {"max_images": 2, "max_text": 6, "max_patches": 6}
        requests.append(Request(prompt_of(document, patch_size), b, begin_image=b % 3 == 0, grid=grid, **limits))
    return requests


def uncached(model, request: Request, segments: list, drop_text: bool = False) -> tuple[list, torch.Tensor, np.ndarray]:
    """The whole sequence, prompt and generated slots, and its hidden states by the parallel form."""
    prompt = request.prompt
    slots = list(zip(prompt.token, prompt.row, prompt.col, prompt.rows, prompt.cols, strict=True))
    slots += [slot[:5] for slot in slots_of(document_of(segments))[1:]]
    if drop_text:
        slots = [slot for slot in slots if slot[0] >= V.pad]
    patches = [prompt.patches, *(s.patches for s in segments if isinstance(s, GeneratedImage))]
    columns = dict(zip(("token", "row", "col", "rows", "cols"), np.array(slots).T, strict=True))
    count = len(slots)
    row = type("Row", (), columns | {
        "document": np.ones(count, int), "index": np.arange(1, count + 1), "learn": np.ones(count, bool),
        "patches": np.concatenate(patches),
    })  # fmt: skip
    with torch.no_grad():
        return slots, model.hidden(Batch.collate([row], [0]))[0], np.concatenate(patches)


def slow_patch(model, hidden, place, noise, sampling: Sampling, unconditional=None, scale: float = 1.0):  # type: ignore[no-untyped-def]
    """One patch by plain Euler or Heun steps on the velocity."""
    head, config = model.diffusion_head, model.config.head

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        out = []
        for state in (hidden, unconditional) if unconditional is not None else (hidden,):
            says = head(z[None], torch.tensor([t]), head.condition(state[None], torch.tensor([place])))[0]
            v = {"x": (says - z) / (1 - t), "v": says, "eps": (z - says) / max(t, config.time_eps)}
            out.append(v[config.prediction])
        return out[0] if len(out) == 1 else out[1] + scale * (out[0] - out[1])

    z, n = noise * config.noise_scale, sampling.steps
    for k in range(n):
        t, h = k / n, 1 / n
        v = velocity(z, t)
        if sampling.sampler == "heun" and k < n - 1:
            v = (v + velocity(z + h * v, t + h)) / 2
        z = z + h * v
    return to_bytes(z).int()


def mixed_seed(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(seed, stream))


@pytest.mark.parametrize(
    ("prediction", "sampler", "scale", "attention"),
    [
        ("x", "euler", 1.0, "dense"),
        ("x", "heun", 1.0, "dense"),
        ("x", "euler", 2.5, "dense"),
        ("v", "euler", 1.0, "dense"),
        ("eps", "heun", 2.5, "dense"),
        *(("x", "euler", 2.5, kind) for kind in (*KINDS, ["vq", "dense"]) if kind != "dense"),
    ],
)
def test_cached_generation_equals_the_parallel_form(prediction, sampler, scale, attention) -> None:
    """Greedy text is the argmax of the uncached logits, and patches are what the head draws from uncached states."""
    head = HeadConfig(width=24, depth=2, prediction=prediction, noise_scale=1.5)
    model = build(tiny_config(head=head, attention=attention))
    sampling = Sampling(temperature=0, sampler=sampler, steps=4, guidance=Guidance(scale, "constant"))
    requests, checked = random_requests(5), Counter[str]()
    for request, segments in zip(requests, generate(model, requests, sampling), strict=True):
        slots, hidden, patches = uncached(model, request, segments)
        _, free, _ = uncached(model, request, segments, drop_text=True)
        with torch.no_grad():
            logits = model.text_head.logits(hidden)
        images, written, seen, dropped = 0, 0, len(request.prompt.patches), 0
        start = len(request.prompt.token)
        given = {start} if request.begin_image else set()
        words = sum(len(s.tokens) for s in segments if isinstance(s, GeneratedText))
        pictures = sum(isinstance(s, GeneratedImage) for s in segments)
        if words >= request.max_text and pictures >= request.max_images:
            given.add(len(slots) - 1)  # ended by the limit, not by the model
        for k in range(1, len(slots)):
            token, *place = (int(n) for n in slots[k])
            dropped += int(slots[k - 1][0] < V.pad)
            if k < start or k in given:
                continue
            if place[2]:
                if place[:2] == [1, 1]:
                    images += 1
                    noise = torch.randn(place[2] * place[3], 12, generator=mixed_seed(request.seed, images))
                ordinal = (place[0] - 1) * place[3] + place[1] - 1
                other = free[k - 1 - dropped] if scale != 1 else None
                with torch.no_grad():
                    expected = slow_patch(model, hidden[k - 1], place, noise[ordinal], sampling, other, scale)
                difference = (expected - torch.from_numpy(patches[seen]).int()).abs()
                assert difference.max() <= 1  # rounding on the edge of two bytes
                assert (difference > 0).float().mean() < 0.2
                seen += 1
                checked["patch"] += 1
            elif token < V.pad or token in (V.eos, V.boi):
                allowed = torch.ones(V.size, dtype=torch.bool)
                allowed[V.pad :] = False
                allowed[: V.pad] = written < request.max_text
                written += token < V.pad
                allowed[V.eos] = True
                allowed[V.boi] = images < request.max_images
                assert token == int(logits[k - 1].masked_fill(~allowed, -torch.inf).argmax())
                checked["text"] += 1
            elif request.grid is None and token >= V.first_row:
                first = V.first_row if token < V.first_col else V.first_col
                across = 1 if first == V.first_row else int(slots[k - 1][0]) - V.first_row + 1
                most = min(V.max_grid, max(1, request.max_patches // across))
                assert token - first == int(logits[k - 1, first : first + most].argmax())
                checked["size"] += 1
    assert min(checked[kind] for kind in ("patch", "text", "size")) >= 2, checked


def test_hidden_states_of_every_step_equal_the_parallel_form(monkeypatch) -> None:
    model, request = build(), random_requests(4)[3]
    recorder = Recorder(model.backbone.step)
    monkeypatch.setattr(model.backbone, "step", recorder)
    (segments,) = generate(model, [request], Sampling(steps=2))
    _, hidden, _ = uncached(model, request, segments)
    start = len(request.prompt.token) + 3  # <boi> and the size are read with the prompt
    steps = min(len(recorder.results), len(hidden) - start)
    assert steps > 8
    for k in range(steps):
        torch.testing.assert_close(recorder.results[k][0, 0], hidden[start + k], rtol=0, atol=1e-5)


# Two threads beside other test processes starve each other: minutes instead of seconds.
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("dim", "width", "patch_size"), [(32, 24, 2), (96, 72, 4)])
def test_samples_do_not_depend_on_their_batch(dim, width, patch_size, scale, threads, monkeypatch) -> None:
    """Not a bit, hidden states included: rows, prompts and threads of other samples must not change the rounding."""
    model = build(tiny_config(dim=dim, patch_size=patch_size, head=HeadConfig(width=width, depth=2)))
    requests = random_requests(11, patch_size)
    states: list[torch.Tensor] = []
    advance = Streams.advance

    def recording(self, *arguments):  # type: ignore[no-untyped-def]
        states.append(self.hidden_RD.clone())
        advance(self, *arguments)

    asked: list[int] = []  # seeds, which are the numbers of the samples, in the order of the rows of logits
    scores: dict[int, list[torch.Tensor]] = {b: [] for b in range(11)}
    uniform = Writer.uniform

    def asking(self) -> torch.Tensor:  # type: ignore[no-untyped-def]
        asked.append(self.request.seed)
        return uniform(self)

    def choosing(logits_NV: torch.Tensor, *arguments) -> torch.Tensor:  # type: ignore[no-untyped-def]
        for b, row in zip(asked, logits_NV, strict=True):
            scores[b].append(row.clone())
        asked.clear()
        return choose_tokens(logits_NV, *arguments)

    monkeypatch.setattr(Streams, "advance", recording)
    monkeypatch.setattr(Writer, "uniform", asking)
    monkeypatch.setattr(generation, "choose_tokens", choosing)

    def run(batch: list[Request]) -> tuple[list, list[torch.Tensor], dict[int, list[torch.Tensor]]]:
        states.clear()
        for rows in scores.values():
            rows.clear()
        out = generate(model, batch, Sampling(steps=2, guidance=Guidance(scale, "constant")))
        return out, list(states), {b: list(rows) for b, rows in scores.items()}

    torch.set_num_threads(threads)
    try:
        singles = [run([request]) for request in requests]
        for size in (1, 2, 3, 5, 8, 11):
            out, found, chosen_from = run(requests[:size])
            for b in range(size):
                (alone,), expected, expected_scores = singles[b]
                assert all(torch.equal(x, y) for x, y in zip(chosen_from[b], expected_scores[b], strict=True))
                assert same(out[b], alone), f"sample {b} of a batch of {size}"
                for here, there in zip(found, expected, strict=False):
                    assert torch.equal(here[b], there[0]), f"hidden states of sample {b} of a batch of {size}"
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not bf16_units(torch.device("cpu")), reason="this processor has no units for bfloat16")
def test_samples_in_bf16_do_not_depend_on_longer_ones_of_their_batch() -> None:
    """On CPUs short documents are attended in float32, long ones in bfloat16."""
    model, rng = build(), np.random.default_rng(0)
    prompts = [prompt_of([Words(rng.integers(0, V.pad, length).tolist())]) for length in (300, 500, 530)]
    requests = [Request(prompt, seed, begin_image=True, grid=(2, 3), max_text=0) for seed, prompt in enumerate(prompts)]
    with torch.autocast("cpu", torch.bfloat16):
        alone = [generate(model, [request], Sampling(steps=2))[0] for request in requests]
        for batch in ((0, 1), (1, 2), (0, 1, 2)):
            together = generate(model, [requests[b] for b in batch], Sampling(steps=2))
            assert all(same(made, alone[b]) for made, b in zip(together, batch, strict=True))


def test_weights_are_rounded_once_for_all_products(monkeypatch) -> None:
    """Under autocast. The pixels do not change, and afterwards, also after an error, the weights are what they were."""
    model, request = build(), image_request(0)
    kept = {name: value.clone() for name, value in model.state_dict().items()}

    def drawn() -> tuple[list, int]:
        with torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as p:
            out = generate(model, [request], Sampling(steps=2))
        shape = list(model.backbone.layers[0].mlp.down_proj.weight.shape)
        casts = [event for event in p.events() if event.name == "aten::_to_copy" and event.input_shapes[0] == shape]
        return out[0], len(casts)

    once, casts = drawn()
    assert casts == model.config.num_layers
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_rounded_once", lambda _: nullcontext())
        every_time, casts = drawn()
    assert casts > 3 * model.config.num_layers
    assert same(once, every_time)
    monkeypatch.setattr(Brush, "draw", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn()
    with torch.autocast("cpu", torch.bfloat16), generation._rounded_once(model), generation._rounded_once(model):
        pass
    assert all(value.dtype == torch.float32 and torch.equal(value, kept[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("image_mode", ["autoregressive", "transfusion"])
def test_progress_counts_patches(image_mode, monkeypatch, capsys) -> None:
    model, counted = build(tiny_config(image_mode=image_mode)), []
    monkeypatch.setattr(generation.tqdm, "update", lambda bar, n=1: counted.append(n))
    generate(model, [image_request(0, grid=(3, 4), max_text=0)], Sampling(steps=2), progress=True)
    assert sum(counted) == 12
    assert "slot" in capsys.readouterr().err


@pytest.mark.parametrize("attention", KINDS)
def test_a_prompt_that_several_samples_share_is_read_once(attention, monkeypatch) -> None:
    model = build(tiny_config(attention=attention))
    rng = np.random.default_rng(0)
    one, two = ([Words([1, 2, 3]), picture(rng, 2, 2)], [Words([3, 2])])
    requests = [
        Request(prompt_of(document), seed, begin_image=True, grid=(2, 2), max_text=3)
        for seed, document in enumerate([one, two] * 6)
    ]
    alone = [generate(model, [request], Sampling(steps=2))[0] for request in requests]
    prefill = Recorder(model.backbone.prefill)
    monkeypatch.setattr(model.backbone, "prefill", prefill)
    together = generate(model, requests, Sampling(steps=2))
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    ((hidden, _),) = prefill.results
    assert len(hidden) == 8, "two prompts, filled up"


def test_order_of_the_batch_and_global_state_change_nothing() -> None:
    model, requests = build(), random_requests(5)
    torch.manual_seed(1)
    one = generate(model, requests, Sampling(steps=2))
    torch.manual_seed(2)
    two = generate(model, requests[::-1], Sampling(steps=2))[::-1]
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


def image_request(seed: int, **changes: object) -> Request:
    settings: dict = {"begin_image": True, "grid": (2, 2), "max_text": 1}
    return Request(prompt_of([Words([1, 2, 3])]), seed, **(settings | changes))


def test_another_seed_gives_other_pixels() -> None:
    out = generate(build(), [image_request(seed) for seed in (1, 2, 1)], Sampling(steps=2))
    assert same(out[0], out[2])
    assert not np.array_equal(out[0][0].patches, out[1][0].patches)


@pytest.mark.parametrize("schedule", ["constant", "linear", "interval"])
def test_guidance_of_scale_one_is_no_guidance(schedule, monkeypatch) -> None:
    model, requests = build(), random_requests(5)
    plain = generate(model, requests, Sampling(steps=3))
    recorder = Recorder(model.backbone.step)
    monkeypatch.setattr(model.backbone, "step", recorder)
    guided = generate(model, requests, Sampling(steps=3, guidance=Guidance(1.0, schedule)))
    assert all(same(a, b) for a, b in zip(plain, guided, strict=True))
    assert all(len(out) == 8 for out in recorder.results), "the second stream was run for nothing"


def test_guidance_of_scale_zero_ignores_the_text() -> None:
    model = build()
    requests = [Request(prompt_of([Words(words)]), 5, True, (2, 2), max_text=0) for words in ([1, 2], [9], [3] * 5)]
    out = generate(model, requests, Sampling(steps=3, guidance=Guidance(0.0, "constant")))
    assert same(out[0], out[1])
    assert same(out[0], out[2])
    plain = generate(model, requests, Sampling(steps=3))
    assert not same(plain[0], plain[1])


def test_guidance_without_text_changes_at_most_the_rounding() -> None:
    """Both branches are equal, so the scale does not matter."""
    model = build()
    requests = [Request(prompt_of([]), seed, True, (2, 2), max_text=0) for seed in range(3)]
    plain = generate(model, requests, Sampling(steps=3))
    guided = generate(model, requests, Sampling(steps=3, guidance=Guidance(4.0, "constant")))
    for one, other in zip(plain, guided, strict=True):
        assert np.abs(one[0].patches.astype(int) - other[0].patches).max() <= 1


def head_of(objective: str) -> HeadConfig:
    changes = {"time_law": "uniform", "loss": "x"} if objective == "consistency" else {}
    return HeadConfig(width=24, depth=2, objective=objective, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_on_the_way_depends_on_the_sample_alone(sampler, objective) -> None:
    model = build(tiny_config(head=head_of(objective)))
    requests = [image_request(seed, grid=(1, 2), max_text=0) for seed in (3, 4, 5)]
    sampling = Sampling(steps=3, sampler=sampler)
    together = generate(model, requests, sampling)
    for request, out in zip(requests, together, strict=True):
        assert same(generate(model, [request], sampling)[0], out)
    assert not same(together[0], together[1])
    other = generate(model, requests, replace(sampling, noise_temperature=0.3))
    adds_noise = sampler in ("ddpm", "sde", "consistency")
    assert same(other[0], together[0]) != adds_noise


@pytest.mark.parametrize("path", PATHS)
def test_noise_temperature_is_a_factor_on_the_noise(path) -> None:
    """Also of a learned variance; another key, and the next noise of the same patch, are others."""
    config = HeadConfig(width=24, depth=2, path=path, objective="ddpm", noise_scale=1.5)
    head = build(tiny_config(head=config)).diffusion_head
    z, key, condition = torch.randn(4000, 12), torch.arange(4000), torch.zeros(4000, 24)

    def noises(temperature: float, learned: bool) -> list[torch.Tensor]:
        field = Field(head, config, Guidance(), temperature, learned_variance=learned)
        field.begin(condition, torch.ones(4000, 1), key)
        field(z, 0.5)
        return [field.noise(0.5, 0.75) for _ in range(2)]

    with torch.no_grad():
        plain, cold, learned, cold_learned = (noises(t, which) for which in (False, True) for t in (1.0, 0.3))
    torch.testing.assert_close(cold[0], 0.3 * plain[0])
    torch.testing.assert_close(cold_learned[0], 0.3 * learned[0])
    assert float(plain[0].std()) == pytest.approx(1.5, rel=0.01)
    assert abs(float(torch.corrcoef(torch.stack([x.flatten() for x in plain]))[0, 1])) < 0.02
    assert not torch.allclose(learned[0], plain[0])


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("grid", GRIDS)
def test_patches_of_a_ddpm_path(path, grid, monkeypatch) -> None:
    """Euler's steps on the path are those of DDIM: noise and clean patch, mixed anew for the next time."""
    head = HeadConfig(width=24, depth=2, path=path, prediction="v", noise_scale=1.5)
    model, times, calls = build(tiny_config(head=head)), [], []
    embed_time = model.diffusion_head.embed_time
    monkeypatch.setattr(model.diffusion_head, "embed_time", lambda time: (times.append(time[0]), embed_time(time))[1])
    model.diffusion_head.register_forward_hook(lambda _, given, out: calls.append((given[0][0], out[0])))
    (image,) = generate(model, [image_request(3, grid=(1, 1), max_text=0)], Sampling(steps=5, grid=grid, clamp=False))[
        0
    ]
    seen = [(z, time, out) for (z, out), time in zip(calls, times, strict=True)]
    points = [PATHS[path].at(time) for time in times]
    for (z, _, v), at, (found, _, _), after in zip(seen[:-1], points[:-1], seen[1:], points[1:], strict=True):
        x, e = at.alpha * z + at.sigma * v, at.sigma * z - at.alpha * v
        torch.testing.assert_close(found, after.alpha * x + after.sigma * e, rtol=1e-3, atol=1e-3)
    (z, _, v), at = seen[-1], points[-1]
    assert (to_bytes(at.alpha * z + at.sigma * v).int() - torch.from_numpy(image.patches[0]).int()).abs().max() <= 1


@pytest.mark.parametrize(("sampler", "steps", "wish"), [("euler", 4, 4), ("euler", 3, 0), ("heun", 4, 0)])
def test_shortcuts_are_asked_for_where_steps_are_jumps(sampler, steps, wish) -> None:
    model = build(tiny_config(head=head_of("shortcut")))
    asked: list[set[float]] = []
    model.diffusion_head.shortcut_in.register_forward_pre_hook(lambda _, steps: asked.append(set(steps[0].tolist())))
    generate(model, [image_request(1)], Sampling(sampler=sampler, steps=steps))
    assert asked == [{wish}] * 4


def test_third_stream_lacks_the_images_of_the_prompt() -> None:
    model, rng = build(), np.random.default_rng(0)
    pictures = [picture(rng, 2, 2) for _ in range(2)]
    requests = [Request(prompt_of([Words([1]), image]), 5, True, (2, 2), max_text=0) for image in pictures]
    ignored = Sampling(steps=2, guidance=Guidance(0.0, "constant", image_scale=0.0))
    one, other = generate(model, requests, ignored)
    assert np.abs(one[0].patches.astype(int) - other[0].patches).max() <= 1, "neither text nor image shall matter"
    one, other = generate(model, requests, Sampling(steps=2, guidance=Guidance(0.0, "constant")))
    assert not same(one, other)
    bare = [image_request(seed) for seed in range(3)]  # no image in the prompt: its scale changes nothing
    two, three = (
        generate(model, bare, Sampling(steps=2, guidance=Guidance(2.0, "constant", image_scale=s))) for s in (1.0, 5.0)
    )
    for a, b in zip(two, three, strict=True):
        assert np.abs(a[0].patches.astype(int) - b[0].patches).max() <= 1


def test_clamp_keeps_what_evaluations_point_to_in_range() -> None:
    model = build()
    with torch.no_grad():
        model.diffusion_head.patch_out.weight.mul_(30)
    wild = generate(model, [image_request(1, max_text=0)], Sampling(steps=4))[0]
    tame = generate(model, [image_request(1, max_text=0)], Sampling(steps=4, clamp=True))[0]
    assert not same(wild, tame)
    one_step = [generate(model, [image_request(1, max_text=0)], Sampling(steps=1, clamp=flag))[0] for flag in (0, 1)]
    assert same(*one_step)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_the_grammar_is_never_violated(sampler, temperature) -> None:
    model = build()
    with torch.no_grad():
        model.text_head.weight.mul_(30)  # strong opinions, among them for tokens that are out of place
    rng, requests = np.random.default_rng(0), []
    for seed in range(40):
        request = Request(
            prompt_of([Words([int(rng.integers(16))])]), seed, bool(seed % 2), [None, (1, 1), (3, 2)][seed % 3],
            max_images=int(rng.integers(0, 4)), max_text=int(rng.integers(0, 9)), max_patches=int(rng.integers(1, 9)),
        )  # fmt: skip
        requests.append(request)
    kinds = Counter()
    for request, segments in zip(requests, generate(model, requests, Sampling(temperature, sampler=sampler, steps=1)),
                                 strict=True):  # fmt: skip
        images = [s for s in segments if isinstance(s, GeneratedImage)]
        words = [s for s in segments if isinstance(s, GeneratedText)]
        assert len(images) <= request.max_images
        assert sum(len(s.tokens) for s in words) <= request.max_text
        assert all(s.tokens and all(0 <= token < V.pad for token in s.tokens) for s in words)
        for image in images:
            assert image.patches.shape == (image.rows * image.cols, 12)
            assert image.patches.dtype == np.uint8
            assert image.rows * image.cols <= (np.prod(request.grid) if request.grid else request.max_patches)
            if request.grid:
                assert (image.rows, image.cols) == request.grid
        for one, other in pairwise(segments):
            assert not (isinstance(one, GeneratedText) and isinstance(other, GeneratedText))
        if request.begin_image and request.max_images:
            assert isinstance(segments[0], GeneratedImage)
        kinds.update(type(s).__name__ for s in segments)
    assert kinds["GeneratedImage"] > 10
    assert kinds["GeneratedText"] > 5


def biased(*tokens: int) -> torch.nn.Module:
    """A model whose final norm gives a constant state, so that these tokens win, the first ones most."""
    model = build()
    with torch.no_grad():
        model.text_head.weight.zero_()
        model.backbone.norm.weight.zero_()
        model.backbone.norm.weight[0] = 1

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out = torch.full((len(hidden), V.size), -50.0)
        for rank, token in enumerate(tokens):
            out[:, token] = 50.0 - rank
        return out

    model.text_head.logits = logits  # type: ignore[method-assign, assignment]
    return model


GREEDY = Sampling(temperature=0, steps=1)


def test_max_text() -> None:
    ((text,),) = generate(biased(3), [Request(prompt_of([]), 0, max_images=0, max_text=7)], GREEDY)
    assert text.tokens == [3] * 7
    assert generate(biased(3), [Request(prompt_of([]), 0, max_images=0, max_text=0)], GREEDY) == [[]]


def test_end_of_sequence() -> None:
    assert generate(biased(V.eos), [Request(prompt_of([]), 0)], GREEDY) == [[]]


def test_several_images_and_their_limit() -> None:
    segments = generate(biased(V.boi, 5), [Request(prompt_of([]), 0, grid=(1, 2), max_images=3, max_text=4)], GREEDY)
    assert [type(s).__name__ for s in segments[0]] == ["GeneratedImage"] * 3 + ["GeneratedText"]
    assert segments[0][3].tokens == [5] * 4
    patches = [s.patches for s in segments[0][:3]]
    assert not np.array_equal(patches[0], patches[1]), "images of one sample share their noise"


def test_free_grid_respects_the_budget() -> None:
    best = (V.first_row + 4, V.first_col + 7, V.boi)
    request = Request(prompt_of([]), 0, max_images=1, max_text=1, max_patches=20)
    ((image, *_),) = generate(biased(*best, V.first_col + 3), [request], GREEDY)
    assert (image.rows, image.cols) == (5, 4)  # 5 x 8 would be 40


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("attention", ["dense", pytest.param("vq", marks=pytest.mark.slow)])
def test_compiled_drawing_draws_the_same(attention, monkeypatch) -> None:
    """Up to rounding; and still whatever the batch, also where samples pass KEY_MULTIPLE and begin images at other
    times; and all of it stays compiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    config = tiny_config(attention=attention, head=HeadConfig(width=24, depth=2))
    requests = random_requests(9)  # more than one fills of the rows of a batch
    sampling = Sampling(steps=2, temperature=0, guidance=Guidance(2.0, "constant"))
    torch.manual_seed(0)
    expected = generate(build(config), requests, sampling)
    torch.manual_seed(0)
    model = build(config)
    model.compile_drawing()
    found = generate(model, requests, sampling)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            if isinstance(a, GeneratedText):
                assert a == b
            else:
                assert np.abs(a.patches.astype(int) - b.patches).max() <= 1
    for request, out in zip(requests[3:], found[3:], strict=True):
        assert same(generate(model, [request], sampling)[0], out)


@pytest.mark.parametrize("grid", [(0, 2), (2, 9), (-1, 1)])
def test_impossible_grid_is_refused(grid) -> None:
    with pytest.raises(ValueError, match=r"grid.*1 \.\. 8"):
        generate(build(), [image_request(0, grid=grid)], GREEDY)


def test_image_only() -> None:
    (segments,) = generate(build(), [image_request(0, max_text=0)], Sampling(steps=2))
    assert [type(s) for s in segments] == [GeneratedImage]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.6), (1.5, 5, 0.8), (1.0, 100, 0.01)],
)
def test_token_frequencies_equal_the_filtered_distribution(temperature, top_k, top_p) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 2
    logits[4] = -torch.inf
    logits[7] = logits[2]  # a tie
    weights = np.exp(logits.double().numpy() / temperature)
    weights /= weights.sum()
    order = sorted(range(12), key=lambda n: (-weights[n], n))
    kept, reached = [], 0.0
    for rank, token in enumerate(order):
        if (top_k and rank >= top_k) or reached >= top_p:
            break
        kept.append(token)
        reached += weights[token]
    expected = np.array([weights[n] / reached if n in kept else 0.0 for n in range(12)])
    count = 50_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = choose_tokens(logits.expand(count, 12), Sampling(temperature, top_k, top_p), uniform)
    np.testing.assert_allclose(np.bincount(chosen, minlength=12) / count, expected, atol=2e-4)


def test_extreme_uniform_numbers_never_choose_a_forbidden_token() -> None:
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, 0.0]]).repeat(2, 1)
    uniform = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose_tokens(logits, Sampling(), uniform).tolist() == [1, 3]
    assert choose_tokens(logits, Sampling(temperature=0), uniform).tolist() == [1, 1]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"sampler": "magic"}, {"steps": 0}]
)
def test_sampling_refusals(wrong) -> None:
    with pytest.raises(ValueError, match="sampl"):
        Sampling(**wrong)


class Transfers(TorchDispatchMode):
    """Counts what is sent to a device: copies that name one, and new tensors of given numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        copied = function.name().startswith("aten::to") and kwargs.get("device") is not None
        self.count += copied or function is torch.ops.aten.detach_.default  # how torch.tensor ends, in inference mode
        return function(*args, **kwargs)


def empty_state(kind: torch.nn.Module, rows: int, config: ModelConfig) -> DenseState | VQState:
    """A state on the meta device."""
    if isinstance(kind, DenseAttention):
        return DenseState(*torch.zeros(2, rows, config.kv_heads, 128, config.head_width, device="meta").unbind())
    keys, values = torch.zeros(2, rows, config.kv_heads, kind._ring, config.head_width, device="meta").unbind()
    code, summed = keys[..., 0].long(), torch.zeros(rows, dtype=torch.long, device="meta")
    return VQState(keys, code, values, *kind._empty_sums(values.transpose(1, 2)), summed)


LEAKS = {
    "nothing": lambda hidden: None,
    "item": lambda hidden: hidden.sum().item(),
    "truth": lambda hidden: bool(hidden.sum() > 0),
    "mask": lambda hidden: hidden[hidden[:, 0] > 0],
    "download": lambda hidden: hidden.cpu(),
    "upload": lambda hidden: torch.ones(2).to(hidden.device),
    "numbers": lambda hidden: torch.tensor([1.0, 2.0], device=hidden.device),
}


@pytest.mark.parametrize(
    ("objective", "path", "sampler", "scale", "leak"),
    [
        *(("matching", "flow", "euler", 1.0, leak) for leak in LEAKS),
        ("matching", "cosine", "heun", 2.0, "nothing"),
        ("shortcut", "flow", "euler", 1.0, "nothing"),
        ("matching", "flow", "sde", 1.0, "nothing"),
        ("ddpm", "cosine", "ddpm", 2.0, "nothing"),
        ("consistency", "flow", "consistency", 1.0, "nothing"),
        ("matching", "flow", "midpoint", 1.0, "nothing"),
        ("matching", "cosine", "geometric", 1.0, "nothing"),
        ("matching", "flow", "learned", 1.0, "nothing"),
        ("matching", "linear", "learned", 2.0, "nothing"),
    ],
)
@pytest.mark.parametrize("attention", KINDS)
def test_patches_need_no_word_between_host_and_device(
    objective, path, sampler, scale, leak, attention, monkeypatch
) -> None:
    """On the meta device, where nothing has a value that one could wait for; and nothing is sent per patch."""
    draw = Brush.draw

    def leaking(self) -> None:  # type: ignore[no-untyped-def]
        draw(self)
        LEAKS[leak](self.streams.hidden_RD)

    def reading(self, lengths: list[int], like: list[int]) -> None:  # type: ignore[no-untyped-def]
        self.longest = 64
        self.states = [empty_state(layer.self_attn.kind, len(lengths), model.config) for layer in model.backbone.layers]
        self.hidden_RD = torch.zeros(len(lengths), model.config.dim, device="meta")

    monkeypatch.setattr(Brush, "draw", leaking)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    # Once per prompt, and once at the end:
    monkeypatch.setattr(Streams, "read", reading)
    monkeypatch.setattr(Streams, "drawn", lambda self: np.zeros(self.patch_RTP.shape, np.uint8))
    model = build(tiny_config(attention=attention, head=replace(head_of(objective), path=path)))
    model.solver = LearnedMidpoint(model.config.patch_width, 4, "uniform")
    model = model.to("meta")

    def sent(grid: tuple[int, int]) -> int:
        requests = [Request(prompt_of([Words([1] * n)]), n, True, grid, max_text=0) for n in (1, 4)]
        with Transfers() as transfers:
            generate(model, requests, Sampling(steps=4, sampler=sampler, guidance=Guidance(scale, "constant")))
        return transfers.count

    if leak in ("nothing", "upload", "numbers"):
        sent((1, 2))  # what is sent once for all
        counts = sent((1, 2)), sent((3, 4))
        assert counts[0] > 0
        assert (counts[0] == counts[1]) == (leak == "nothing"), counts
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            sent((1, 2))
