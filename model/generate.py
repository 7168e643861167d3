"""Interleaved generation: text token by token; after <boi> the grid size, then patch by patch; then text again.

What a sample must begin with is read as part of its prompt, and nothing is read when all are done. All samples advance
together, whatever each one is writing (model/writer.py). With guidance every sample has a second, unconditional stream
that holds the same sequence without its text, and perhaps a third that also lacks the images of the prompt; all streams
are rows of one batch (model/streams.py). Patches are drawn by model/brush.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from model.brush import Brush, paint
from model.ropeway import Ropeway
from model.sampling import Sampling, choose_tokens
from model.streams import Streams
from model.writer import Request, Segment, Writer


def generate(
    model: Ropeway, requests: Sequence[Request], sampling: Sampling, progress: bool = False
) -> list[list[Segment]]:
    """Generate all requests as one batch; returns the new segments of each. progress shows a bar over slots.

    Raises ValueError for a grid outside the vocabulary's limits.
    """
    limit = model.vocabulary.max_grid
    for request in requests:
        if request.grid and not (min(request.grid) >= 1 and max(request.grid) <= limit):
            raise ValueError(f"a grid of {request.grid[0]} x {request.grid[1]} patches is outside 1 .. {limit}")
    model.eval()
    with _rounded_once(model), torch.inference_mode():
        return _generate(model, requests, sampling, progress)


@contextmanager
def _rounded_once(model: nn.Module) -> Iterator[None]:
    """Under autocast: meanwhile the weights of linears are in its precision, but for those of a FloatLinear. Autocast
    itself would round them again for every product, since in inference mode it keeps nothing."""
    device = next(model.parameters()).device.type
    own = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    linears = [module for module in model.modules() if own and type(module) is nn.Linear]
    parameters = [p for linear in linears for p in linear.parameters() if p.dtype == torch.float32]
    whole = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.get_autocast_dtype(device))
        yield
    finally:
        for parameter, data in zip(parameters, whole, strict=True):
            parameter.data = data


def _generate(model: Ropeway, requests: Sequence[Request], sampling: Sampling, progress: bool) -> list[list[Segment]]:
    writers = [Writer(request, model.vocabulary, model.config.patch_width) for request in requests]
    streams = Streams(model, writers, sampling.guidance.streams)
    brush: Brush | None = None
    with tqdm(total=streams.capacity, disable=not progress, unit="slot", leave=False) as bar:
        while any(not writer.done for writer in writers):
            draws = [b for b, writer in enumerate(writers) if writer.phase == "patch"]
            begun = [b for b in draws if writers[b].written == 0]
            streams.begin_images(begun, writers)
            if begun and model.sequence_head:
                paint(model, model.sequence_head, writers, begun, streams, sampling)
                bar.update(max(writers[b].written for b in begun))
                continue
            if begun or brush is None or brush.draws != draws:
                brush = Brush(model, writers, draws, streams, sampling)
            if draws:
                brush.draw()
                for b in draws:
                    writers[b].write_patch()
            tokens = _choose(model, writers, draws, streams, sampling)
            streams.put(tokens)
            bar.update()
            if any(not writer.done for writer in writers):
                streams.advance(draws, tokens)
    drawn_BTP = streams.drawn()
    return [writer.result(drawn_BTP[b]) for b, writer in enumerate(writers)]


def _choose(model: Ropeway, writers: list[Writer], draws: list[int], streams: Streams,
            sampling: Sampling) -> dict[int, int]:  # fmt: skip
    """The next token of every sample that is not done and does not draw; it is written."""
    writing = [b for b, writer in enumerate(writers) if not writer.done and b not in draws]
    tokens = {b: writers[b].forced() for b in writing}
    asks = [b for b, token in tokens.items() if token is None]
    if asks:
        device = streams.hidden_RD.device
        logits_NV = model.text_head.logits(streams.hidden_RD)[asks]
        allowed_NV = torch.stack([writers[b].allowed() for b in asks]).to(device)
        uniform_N = torch.cat([writers[b].uniform() for b in asks]).to(device)
        chosen = choose_tokens(logits_NV.masked_fill(~allowed_NV, -torch.inf), sampling, uniform_N)
        tokens |= dict(zip(asks, chosen.tolist(), strict=True))
    for b, token in tokens.items():
        assert token is not None
        writers[b].write(token)
    return tokens  # type: ignore[return-value]
