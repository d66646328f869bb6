"""Everything here that is a command but the GPU gate, which is `python -m benchmarks.gate`.

    python -m benchmarks COMMAND [--help]

traffic     launches, bytes, FLOPs and roofline times; needs no GPU
training    memory and roofline of training a preset, by GPU; needs no GPU
resources   registers, spills and 16-byte accesses of the compiled kernels; needs no GPU
spills      which tiles of float32 attention spill, by architecture; needs no GPU
cpu         every op and whole networks against PyTorch's own on this CPU, by turns
host        what a call of an op costs the host; needs no GPU
packed      pictures of many sizes: packed, padded and one by one; needs no GPU
derivative  error and price of dF/dt: difference quotient and forward mode
fp8         error of whole networks with FP8 blocks, and the digits they draw; needs no GPU
products    registers and spills of products by quack-kernels on Hopper; needs no GPU
tune        tile sizes and warps: timed on a GPU, else guessed from compiled code
limits      what limits each kernel by its compiled code, beside its aim: estimates
fastest     which backend "auto" takes, from the committed results
report      the committed results as Markdown, into README.md
"""

import sys


def main() -> None:
    command, *options = sys.argv[1:] or ["--help"]
    sys.argv[0] = f"python -m benchmarks {command}"
    match command:  # each imports what it needs alone
        case "traffic":
            from .static.traffic import main as run
        case "training":
            from .static.training import main as run
        case "resources":
            from .static.resources import main as run
        case "spills":
            from .static.spills import main as run
        case "cpu":
            from .compare.cpu import main as run
        case "host":
            from .compare.host import main as run
        case "packed":
            from .compare.packed import main as run
        case "derivative":
            from .compare.derivative import main as run
        case "fp8":
            from .compare.fp8 import main as run
        case "products":
            from .static.products import main as run
        case "tune":
            from .tune.tuner import main as run
        case "limits":
            from .report.limits import main as run
        case "fastest":
            from .report.fastest import main as run
        case "report":
            from .report.markdown import main as run
        case _:
            sys.exit(__doc__)
    run(options)


if __name__ == "__main__":
    main()
