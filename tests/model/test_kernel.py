"""The Triton kernel of Transformer-VQ against the float64 reference of tests/model/test_vq.py: in Triton's interpreter
where there is no GPU, and on one where there is."""

import os
import subprocess
import sys

import pytest
import torch

from model.attention import vq
from model.attention.codebook import VQConfig
from model.attention.documents import Documents
from model.rope import Rotation
from tests.model.support import slow_vq
from tests.model.test_vq import exact_rotation

_WHERE = "Triton is not installed (extra `dev`, on Linux)"
pytest.importorskip("triton", reason=_WHERE, exc_type=ModuleNotFoundError)
kernel = pytest.importorskip("model.attention.kernel", reason=_WHERE, exc_type=ModuleNotFoundError)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about queries that are masked

HEADS, KV_HEADS, WIDTH = 4, 2, 8
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq, "_has_kernel", lambda x: True)


def errors(lengths: list[int], dtype: torch.dtype, device: str = "cpu", **changes: object) -> tuple[float, float]:
    """Largest errors of outputs and gradients, relative to the largest value of each, for one row of documents."""
    options = VQConfig(**({"codes": 6} | changes))
    kind = vq.VQAttention(WIDTH, KV_HEADS, 1e4, "alternate", options)
    kind = kind.to(dtype if dtype == torch.float64 else torch.float32)
    kind.codebook.initialise()
    document = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))[None]
    slots = document.shape[1]
    positions = torch.rand(1, slots, 2) * 30
    q, k, v = (torch.randn(1, slots, h, WIDTH).to(dtype).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS))
    expected = slow_vq(q[0], k[0], v[0], positions[0], document[0], kind.codebook.codewords_KCE, options.window,
                       options.band, options.grad_through_cache)[None]  # fmt: skip
    weight = torch.randn_like(expected).to(dtype)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    angles = exact_rotation(positions)
    if dtype != torch.float64:
        angles = Rotation(angles.cos.float(), angles.sin.float())
    moved = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
    out, _ = kind.to(device)(*moved, Rotation(*(a.to(device) for a in angles)), Documents.of(document).to(device))
    assert out.dtype == dtype
    found = torch.autograd.grad((out * weight.to(device)).sum(), moved)

    def error(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(((one.cpu().double() - other.double()).abs().max() / other.abs().max()).detach())

    return error(out, expected), max(error(one, other) for one, other in zip(found, wanted, strict=True))


CASES = {
    "uneven documents": ([22, 17, 3], {"window": 7}),
    "blocks of one slot": ([4], {"window": 1}),
    "block band": ([22, 17], {"window": 7, "band": "block"}),
    "in chunks": ([33], {"window": 8, "chunk_blocks": 2}),
    "in chunks of one block, block band": ([33], {"window": 8, "chunk_blocks": 1, "band": "block"}),
    "no gradient through the cache": ([25], {"window": 7, "grad_through_cache": False}),
    "several tiles": ([50], {"window": 20, "codes": 20}),
    "several tiles, block band": ([50], {"window": 20, "codes": 20, "band": "block"}),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_float64_in_the_interpreter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_LARGEST_TILE", 32)  # half of it for numbers wider than 16 bits
    lengths, changes = CASES[case]
    output, gradient = errors(lengths, torch.float64, **changes)
    assert output <= 1e-12
    assert gradient <= 1e-12


LOWER = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@interpreted
@pytest.mark.parametrize("dtype", LOWER)
def test_lower_precision_in_the_interpreter(dtype: torch.dtype) -> None:
    assert max(errors([25], dtype, window=7)) <= LOWER[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    lengths, changes = CASES[case]
    assert max(errors(lengths, dtype, "cuda", **changes)) <= LOWER[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("band", ["strict", "block"])
def test_large_blocks_on_a_gpu(band: str) -> None:
    assert max(errors([1500, 1100, 60], torch.bfloat16, "cuda", window=256, codes=256, band=band)) <= 2e-2


COMPILE = """
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from model.attention import kernel

WIDE = {"log_count", "log_sum", "dot"}
CONSTANTS = {"HEADS": 8, "SHARE": 2, "SIZE": 256, "CODES": 256, "WIDTH": 64, "PADDED": 64, "TILE": 64, "STRICT": True,
             "WIDE": tl.float32, "WIDEN": False, "THROUGH": True}
NUMBERS = {"scale": "fp32", "documents": "i32", "first": "i32", "blocks": "i32"} | dict.fromkeys(CONSTANTS, "constexpr")
for name in ("_forward", "_query_gradients", "_key_gradients", "_mean_gradients"):
    function = getattr(kernel, name)
    names = function.arg_names
    signature = {n: NUMBERS.get(n, "*fp32" if n in WIDE else "*bf16") for n in names}
    constants = {(names.index(n),): value for n, value in CONSTANTS.items() if n in names}
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_stages": 2})
    print(name, made.metadata.shared, len(made.asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_that_are_not_here(capability: int, tmp_path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 4
    assert max(shared) <= 99 * 1024  # what every GPU since Ampere gives to a block of threads
