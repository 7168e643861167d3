"""The backbone: causality of the whole stack, decoding equal to the parallel form, parts against plain formulas."""

import numpy as np
import pytest
import torch

from model.attention import KINDS
from model.attention.dense import KEY_MULTIPLE
from model.attention.documents import Documents
from model.rope import Rotation
from model.transformer import Backbone, SwiGLU
from tests.model.support import Words, batch_of, build, picture, tiny_config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_hidden_states_see_only_the_past_of_their_document(kind, qk_norm) -> None:
    rng = np.random.default_rng(0)
    batch = batch_of([[Words([1, 2]), picture(rng, 2, 2)], [Words([3, 4, 5])]], [[Words([6])]], length=18)
    model = build(tiny_config(attention=kind, qk_norm=qk_norm))
    x = model.embed(batch.token_BS, batch.rows_BS > 0, batch.patches_NP.float() / 127.5 - 1).detach().requires_grad_()
    hidden, _ = model.backbone(x, model.angles(batch.grid), batch.documents)
    weight = torch.randn(hidden.shape[-1])
    document = batch.document_BS
    for b in range(2):
        for i in range(18):
            (gradient,) = torch.autograd.grad((hidden[b, i] * weight).sum(), x, retain_graph=True)
            sees = gradient.abs().sum(-1) > 0
            expected = torch.zeros_like(sees)
            expected[b, : i + 1] = (document[b, : i + 1] == document[b, i]) & (document[b, i] > 0)
            expected[b, i] = True  # a padding slot sees itself through the residual stream, and nothing else
            assert torch.equal(sees, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_equal_forward(kind) -> None:
    rng = np.random.default_rng(1)
    rows = [[[Words([1, 2, 3]), picture(rng, 2, 3), Words([4, 5, 6, 7])]], [[Words(list(range(14)))]]]
    whole = batch_of(*rows, length=20)
    model = build(tiny_config(attention=kind))
    split = 9
    with torch.no_grad():
        expected = model.hidden(whole)
        angles = model.angles(whole.grid)
        x = model.embed(whole.token_BS, whole.rows_BS > 0, whole.patches_NP.float() / 127.5 - 1)
        prompt = Documents.of(whole.document_BS[:, :split])
        out, states = model.backbone.prefill(x[:, :split], Rotation(*(a[:, :split] for a in angles)), prompt)
        torch.testing.assert_close(out, expected[:, :split], rtol=0, atol=5e-6)
        for t in range(split, 16):
            here = Rotation(*(a[:, t : t + 1] for a in angles))
            out = model.backbone.step(x[:, t : t + 1], here, torch.full((2,), t), KEY_MULTIPLE, states)
            torch.testing.assert_close(out[:, 0], expected[:, t], rtol=0, atol=5e-6)


def test_swiglu() -> None:
    mlp, x = SwiGLU(8, 24), torch.randn(3, 8)
    gate = x @ mlp.gate_proj.weight.T
    expected = (gate / (1 + (-gate).exp()) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_names_are_those_of_llama_and_qwen() -> None:
    names = {name for name, _ in Backbone(tiny_config(num_layers=1)).named_parameters()}
    block = "layers.0."
    linear = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    norms = ["self_attn.q_norm.weight", "self_attn.k_norm.weight", "input_layernorm.weight",
             "post_attention_layernorm.weight"]  # fmt: skip
    assert names == {"norm.weight", *(block + name for name in linear + norms)}


def test_rms_norm_of_queries_makes_scores_independent_of_their_scale() -> None:
    model = build(tiny_config(num_layers=1))
    batch = batch_of([[Words([1, 2, 3, 4])]])
    with torch.no_grad():
        before = model.hidden(batch)
        model.backbone.layers[0].self_attn.q_proj.weight.mul_(50)
        torch.testing.assert_close(model.hidden(batch), before, rtol=0, atol=1e-3)
