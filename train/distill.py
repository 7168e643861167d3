"""`python -m train.distill solver|consistency --checkpoint RUN_OR_DIR`: few steps from a trained flow.

solver        trains a small network that says where the slope of a step is taken (AMED, arXiv 2312.00094), and writes
              it into the checkpoint, as solver.safetensors. Draw with --sampler learned.
consistency   trains a copy of the diffusion head to jump where the flow leads (arXiv 2303.01469), and writes a run of
              its own. Draw with --sampler consistency, or with euler in one step.

The Transformer stays as it is; both read the rows that the run was trained on. Guidance is not distilled.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.command import OneLineParser, working
from model.batch import Batch, to_pixels
from model.config import HeadConfig
from model.diffusion.field import Field
from model.diffusion.guidance import Guidance
from model.diffusion.head import DiffusionHead
from model.diffusion.objective import Draws, draw, head_loss
from model.diffusion.path import PATHS
from model.diffusion.sampler import GRIDS, grid_of
from model.diffusion.solver import LearnedMidpoint, solver_loss
from model.ropeway import Ropeway
from train import checkpoint, pipeline
from train.config import CheckpointSection, Config
from train.generator import Generator
from train.optimizer import WeightAverage


@torch.no_grad()
def patches(model: Ropeway, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden state before every learned patch (N, D), its place (N, 4), and the patch in [-1, 1] (N, P)."""
    hidden_XD = model.hidden(batch).flatten(0, 1)
    slot = batch.targets()[1].flatten().nonzero()[:, 0]
    place = (batch.row_BS, batch.col_BS, batch.rows_BS, batch.cols_BS)
    location_N4 = torch.stack([column.flatten()[slot + 1] for column in place], dim=-1)
    ordinal = (batch.rows_BS > 0).flatten().cumsum(0) - 1
    return hidden_XD[slot], location_N4, to_pixels(batch.patches_NP[ordinal[slot + 1]])


def batches(config: Config, generator: Generator, updates: int) -> Iterator[Batch]:
    """Rows of the run, from the first on."""
    mixture = pipeline.make_mixture(config, generator.encoder, "train")
    device = generator.model.token_embedding.weight.device
    for update in tqdm(range(updates), disable=not sys.stderr.isatty(), unit="update"):
        first = update * config.data.rows_per_step
        rows = list(range(first, first + config.data.rows_per_step))
        yield pipeline.make_batch(mixture, rows, config.run.seed).to(device)


def update(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One step of the optimizer; returns the loss. Raises ValueError if the gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    if not torch.isfinite(nn.utils.clip_grad_norm_(module.parameters(), 1.0)):
        raise ValueError("the gradient is not finite; lower --lr")
    optimizer.step()
    return float(loss.detach())


def head_of(generator: Generator) -> DiffusionHead:
    """The head to distil. Raises ValueError for a model that draws without one."""
    if not generator.model.diffusion_head:
        raise ValueError("the checkpoint has model.image_mode transfusion; it must be autoregressive")
    return generator.model.diffusion_head


def draws_of(batch: Batch, patch_width: int, head: HeadConfig) -> Draws:
    """The draws that training would make."""
    count_B = batch.targets()[1].sum(1).tolist()
    return draw(count_B, list(batch.seed_B), patch_width, head, batch.token_BS.device)


def distill_solver(generator: Generator, config: Config, steps: int, grid: str, updates: int, lr: float
                   ) -> tuple[LearnedMidpoint, list[float]]:  # fmt: skip
    """The solver for `steps` steps, and the loss of every update."""
    head, settings, width = head_of(generator), config.model.head, config.model.patch_width
    times = grid_of(grid, steps, PATHS[settings.path])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        solver = LearnedMidpoint(width, steps, grid).to(generator.model.token_embedding.weight.device)
    optimizer, losses = torch.optim.Adam(solver.parameters(), lr), []
    for batch in batches(config, generator, updates):
        hidden_ND, location_N4, x_NP = patches(generator.model, batch)
        condition_NW = head.condition(hidden_ND, location_N4)
        if settings.objective == "shortcut":
            condition_NW = condition_NW + head.shortcut_in(torch.zeros(len(x_NP), device=x_NP.device))
        noise_NP = draws_of(batch, width, replace(settings, draws=1)).noise_MP
        ones_N1 = x_NP.new_ones(len(x_NP), 1)
        field = Field(head, settings, Guidance())
        field.begin(condition_NW, ones_N1)
        losses.append(update(solver_loss(solver, field, noise_NP * (1 - times[0]), times), solver, optimizer))
    return solver, losses


def consistency_config(config: Config, steps: int) -> Config:
    """That of the new model. Raises ValueError for a model that is no flow."""
    old = config.model.head
    if old.objective != "matching":
        raise ValueError(f"the checkpoint has model.head.objective {old.objective}; it must be matching")
    head = replace(old, objective="consistency", loss="x", time_law="uniform", consistency_steps=steps)
    return replace(config, model=replace(config.model, head=head), eval=replace(config.eval, sampler_steps=2))


class ConsistencyLesson:
    """A copy of a model's head that learns to jump where the flow leads. The model itself stays as it is."""

    def __init__(self, model: Ropeway, head: HeadConfig, lr: float, decay: float, ema_decay: float,
                 from_data: bool = False) -> None:  # fmt: skip
        """head: of the copy, with objective consistency. decay: of the average whose jumps are the target; 0: the copy
        itself. ema_decay: of the average that is kept. from_data: a time and the next lie on the line to the data, not
        where the flow goes."""
        assert model.diffusion_head is not None
        self.model, self.head, self.decay = model, head, decay
        self.student = copy.deepcopy(model.diffusion_head).requires_grad_(True)
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.flow = None if from_data else model.diffusion_head
        self.optimizer, self.updates = torch.optim.Adam(self.student.parameters(), lr), 0
        self.ema = WeightAverage(dict(self.student.named_parameters()), ema_decay)

    def learn(self, batch: Batch) -> float:
        """One update; returns its loss. Raises ValueError if the gradient is not finite."""
        hidden_ND, location_N4, x_NP = patches(self.model, batch)
        draws = draws_of(batch, x_NP.shape[1], self.head)
        loss_M = head_loss(self.student, hidden_ND, location_N4, x_NP, draws, self.head, self.target, self.flow)
        loss = update(loss_M.mean(), self.student, self.optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1 - self.decay)
        self.ema.update(dict(self.student.named_parameters()), self.updates)
        self.updates += 1
        return loss

    def averaged(self) -> dict[str, Tensor]:
        """The average of the copy's weights, by the names that they have in the model."""
        return _of_model(self.ema.parts)

    def raw(self) -> dict[str, Tensor]:
        """The copy's weights, by the names that they have in the model."""
        return _of_model(dict(self.student.named_parameters()))


def _of_model(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"diffusion_head.{name}": part.detach() for name, part in parts.items()}


def distill_consistency(generator: Generator, config: Config, updates: int, lr: float, decay: float, from_data: bool
                        ) -> tuple[checkpoint.Checkpoint, list[float]]:  # fmt: skip
    """The new model, of which config is, and the loss of every update."""
    model = generator.model
    head_of(generator)
    model.solver = None  # It would not serve the new head.
    lesson = ConsistencyLesson(model, config.model.head, lr, decay, config.optim.ema_decay, from_data)
    losses = [lesson.learn(batch) for batch in batches(config, generator, updates)]
    raw, averaged = (model.tensors() | parts for parts in (lesson.raw(), lesson.averaged()))
    return checkpoint.Checkpoint(config, updates, raw, averaged, {}), losses


def write_run(made: checkpoint.Checkpoint, generator: Generator, out: Path) -> Path:
    """A run folder of the new model. Returns its only checkpoint; raises OSError if it cannot be written."""
    config = replace(made.config, run=replace(made.config.run, dir=str(out), steps=made.step))
    saver = checkpoint.Saver(out, generator.tokenizer, CheckpointSection())
    saver.begin(replace(made, config=config), background=False)
    return saver.finish() or out


def main() -> None:
    """Exit status 0: done; 2: wrong input, nothing was written; 1: something failed in the middle of work."""
    arguments = _parser().parse_args()
    with working(2):
        for name in ("steps", "updates"):
            if getattr(arguments, name) < (2 if arguments.kind == "solver" and name == "steps" else 1):
                raise ValueError(f"--{name} is {getattr(arguments, name)}; it is too small")
        folder = checkpoint.resolve(arguments.checkpoint)
        generator = Generator.load(folder, "ema", arguments.device)
        generator.model.requires_grad_(False)
        head_of(generator)
        config = checkpoint.read_config(folder)
        if arguments.kind == "consistency":
            config = consistency_config(config, arguments.steps)
            if arguments.out.exists():
                raise ValueError(f"--out {arguments.out} exists; choose a new folder")
    with working(1):
        if arguments.kind == "solver":
            solver, losses = distill_solver(generator, config, arguments.steps, arguments.grid, arguments.updates,
                                            arguments.lr)  # fmt: skip
            target = checkpoint.save_solver(folder, solver)
        else:
            made, losses = distill_consistency(
                generator, config, arguments.updates, arguments.lr, arguments.decay, arguments.from_data
            )
            target = write_run(made, generator, arguments.out)
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"loss {first:.5f} at first, {last:.5f} at last")
    print(target)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m train.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, steps, what, updates, lr in (
        ("solver", 4, "steps of the solver, at least 2", 200, 1e-2),
        ("consistency", 32, "times on which jumps shall agree", 400, 5e-4),
    ):
        kind = kinds.add_parser(name)
        kind.add_argument("--checkpoint", required=True, help="run folder (its latest checkpoint) or checkpoint folder")
        kind.add_argument("--steps", type=int, default=steps, help=f"{what} (default: {steps})")
        kind.add_argument("--updates", type=int, default=updates, help=f"steps of training (default: {updates})")
        kind.add_argument("--lr", type=float, default=lr, help=f"learning rate of Adam (default: {lr:g})")
        kind.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        if name == "solver":
            kind.add_argument("--grid", default="uniform", choices=GRIDS, help="grid of times (default: uniform)")
        else:
            kind.add_argument("--out", type=Path, required=True, help="folder of the new run")
            kind.add_argument(
                "--decay",
                type=float,
                default=0.95,
                help="of the average whose jumps are the target; 0: the head itself (default: 0.95)",
            )
            kind.add_argument(
                "--from_data",
                action="store_true",
                help="go from a time to the next on the line to the data, not as the flow says",
            )
    return parser


if __name__ == "__main__":
    main()
