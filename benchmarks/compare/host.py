"""What a call of an op costs the host, as a multiple of `F.layer_norm` on a tiny tensor.

    TRITON_INTERPRET=1 python -m benchmarks host [--json rows.json]

Triton's path from the public function to the launch, which is left out (`grid.dry`): no GPU is
needed, and Triton's own launcher is not counted. Both are timed by turns in one run, so that a
slower machine is not a slower op. With gradients means a call that autograd has to remember.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from tim_kernels import use_backend
from tim_kernels.launch import grid

from ..cases.calls import calls
from ..clock.timing import by_turns, ratio
from ..record.rows import Host
from ..record.table import text

CALLS = "gated_residual_ada_layer_norm", "qk_norm_rope of packed qkv", "swiglu"
MOST = {
    False: 5.5,
    True: 9.0,
}  # multiples without and with gradients; the longest call's, and noise


def measured(rounds: int = 21, device: str = "cpu") -> Iterator[Host]:
    x = torch.randn(2, 64, device=device)
    every = calls(768, 64, torch.float32, batch=1, grid=(2, 2), latent=(4, 4, 4), device=device)
    for call in [call for call in every if call.name in CALLS]:
        for has_gradients in (False, True):
            tensors = [tensor.requires_grad_(has_gradients) for tensor in call.tensors]
            with use_backend("triton"), grid.dry(), torch.set_grad_enabled(has_gradients):
                runs = (
                    lambda tensors=tensors, call=call: call.function(*tensors, *call.constants),
                    lambda: F.layer_norm(x, (64,)),
                )
                for run in runs * 3:
                    run()
                own, base = by_turns(runs, device, rounds, least_ms=2.0)
            taken = ratio(own, base)
            yield Host(
                op=call.name, has_gradients=has_gradients, us=1e3 * taken.base_ms,
                layer_norm_us=1e3 * taken.ms, multiple=taken.ratio, most=MOST[has_gradients],
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the rows too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = list(measured(device="cuda" if torch.cuda.is_available() else "cpu"))
    print(text(found, Host.columns))
    if args.json:
        args.json.write_text(json.dumps([row.json() for row in found]))
