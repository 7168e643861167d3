"""The rows of the table of benchmarks.head: which models are trained, and how pictures are drawn from each."""

from dataclasses import dataclass

from model.diffusion.guidance import Guidance
from model.sampling import Sampling

STEPS = (1, 2, 4, 8, 16, 50)


@dataclass(frozen=True)
class Setting:
    """A model, and the ways to draw from it."""

    name: str
    factor: str
    options: tuple[tuple[str, object], ...] = ()
    """What its training changes of the base, one after the other: every one must leave a valid configuration."""
    drawings: tuple[Sampling, ...] = (Sampling(steps=16),)
    model: str = ""
    """Draw from the model of this setting instead of training one."""
    distilled: bool = False
    """The model is distilled from that of the default."""
    from_data: bool = False
    """Distilled without asking the default where the way goes: consistency training that begins at a trained flow."""
    data: tuple[str, ...] = ("digits", "shapes")


def _draw(sampler: str, *steps: int, **changes: object) -> tuple[Sampling, ...]:
    return tuple(Sampling(sampler=sampler, steps=n, **changes) for n in steps)  # type: ignore[arg-type]


def _patches(size: int, rows: int, data: str) -> Setting:
    """As many pictures per step as at the default size: smaller patches make longer documents."""
    options = (("model.patch_size", size), ("data.rows_per_step", rows))
    return Setting(f"patches of {size}", "patch size", options, data=(data,))


_CONSISTENCY = (("model.head.time_law", "uniform"), ("model.head.loss", "x"),
                ("model.head.objective", "consistency"))  # fmt: skip

SETTINGS = (
    Setting("default", "", drawings=(*_draw("euler", 16), *_draw("heun", 50))),
    Setting("shortcut", "objective", (("model.head.objective", "shortcut"),), _draw("euler", 16, 1, 2, 4, 8)),
    Setting("consistency", "objective", _CONSISTENCY, _draw("consistency", 1, 2, 4, 8), data=("digits",)),
    # Its errors are those of neighbouring jumps, some 30 times as small as those of a flow in v.
    Setting("consistency, little text", "objective", (*_CONSISTENCY, ("optim.text_weight", 0.5 / 32)),
            _draw("consistency", 1, 2, 4), data=("digits",)),
    Setting("distilled", "objective", (), (*_draw("consistency", 1, 2, 4, 8), *_draw("euler", 16)), distilled=True),
    Setting("distilled from data", "objective", (), _draw("consistency", 1, 2, 4), distilled=True, from_data=True),
    Setting("few steps", "sampler", drawings=(*_draw("euler", 1, 2, 4, 8), *_draw("heun", 1, 2, 4, 8),
            *_draw("learned", 2, 4, 8)), model="default"),
    Setting("many steps", "sampler", drawings=(*_draw("euler", 50), *_draw("heun", 16)), model="default",
            data=("shapes",)),
    Setting("whole images", "image mode", (("model.image_mode", "transfusion"),), _draw("euler", 16, 4, 50)),
    Setting("whole images, shortcut", "image mode", (("model.image_mode", "transfusion"),
            ("model.head.objective", "shortcut")), _draw("euler", 16, 1, 2, 4), data=("digits",)),
    Setting("prediction v", "prediction", (("model.head.prediction", "v"),)),
    Setting("prediction eps", "prediction", (("model.head.prediction", "eps"),),
            (*_draw("euler", 16), *_draw("euler", 16, clamp=True))),
    _patches(1, 20, "digits"),
    _patches(4, 5, "digits"),
    _patches(4, 20, "shapes"),
    _patches(16, 5, "shapes"),
    Setting("loss x", "loss", (("model.head.loss", "x"),), data=("digits",)),
    Setting("loss eps", "loss", (("model.head.loss", "eps"),), data=("digits",)),
    Setting("time uniform", "time law", (("model.head.time_law", "uniform"),), data=("digits",)),
    Setting("time (-2.2, 1.3)", "time law", (("model.head.time_mean", -2.2), ("model.head.time_std", 1.3)),
            data=("digits",)),
    Setting("time (-0.8, 0.8)", "time law", (("model.head.time_mean", -0.8), ("model.head.time_std", 0.8)),
            data=("shapes",)),
    Setting("time (0, 1)", "time law", (("model.head.time_mean", 0.0), ("model.head.time_std", 1.0)), data=("digits",)),
    Setting("1 draw", "draws", (("model.head.draws", 1),)),
    Setting("8 draws", "draws", (("model.head.draws", 8),), data=("digits",)),
    Setting("2 scales", "loss scales", (("model.head.loss_scales", 2),), data=("digits",)),
    Setting("context noise", "context noise", (("model.context_noise", 0.5),)),
    Setting("guidance", "guidance", drawings=(
        *_draw("euler", 16, guidance=Guidance(1.5, "constant")),
        *_draw("euler", 16, guidance=Guidance(3, "constant")),
        *_draw("euler", 16, guidance=Guidance(3, "constant"), clamp=True),
        *_draw("euler", 16, guidance=Guidance(3, "constant", renormalise=True)),
        *_draw("euler", 16, guidance=Guidance(3, "interval", 0.3, 1)),
        *_draw("euler", 16, guidance=Guidance(3)),
        *_draw("euler", 16, guidance=Guidance(3, "linear")),
    ), model="default"),
    Setting("DDPM, cosine, v", "objective", (("model.head.path", "cosine"), ("model.head.prediction", "v"),
            ("model.head.objective", "ddpm"), ("model.head.time_law", "uniform")),
            (*_draw("euler", 16), *_draw("ddpm", 16, 50)), data=("digits",)),
    Setting("samplers", "sampler", drawings=(
        *_draw("euler", 50), *_draw("heun", 16),
        *(drawing for name in ("midpoint", "geometric", "ddpm", "sde") for drawing in _draw(name, *STEPS)),
        *_draw("euler", 2, 4, 8, 16, grid="edm"), *_draw("heun", 2, 4, 8, 16, grid="edm"),
    ), model="default", data=("digits",)),
)  # fmt: skip
"""The rows of the table, the ones that say most first."""


def label(sampling: Sampling) -> str:
    """What differs from the Sampling of a plain `euler`, in words."""
    guidance = sampling.guidance
    parts = [sampling.sampler, str(sampling.steps)]
    parts += [f"{sampling.grid} grid"] if sampling.grid != "uniform" else []
    if guidance.scale != 1:
        until = f" to {guidance.high:g}" if guidance.high < 1 else ""
        when = {"constant": "", "linear": " linear", "interval": f" interval from {guidance.low:g}{until}"}
        parts += [f"guidance {guidance.scale:g}{when[guidance.schedule]}"]
    return " ".join(parts + ["renormalised"] * guidance.renormalise + ["clamped"] * sampling.clamp)
