"""Triton's interpreter takes Python that its compiler refuses, such as `return None`. So each
variant of a kernel that the tests interpret also goes through the compiler's front end, once.

The interpreter replaces the compiler in a process where TRITON_INTERPRET is set, so the front end
is in another: `python -m tests.kernels.variants` answers a line of JSON with another.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
TARGET = "cuda", 90, 32


def watch() -> None:
    """From here on a launch of our kernels fails if the compiler refuses it."""
    front_end, known, run = FrontEnd(), set(), interpreter.InterpretedFunction.run

    def checked(self, *args, grid, warmup, **kwargs):
        if self.fn.__module__.startswith("tim_kernels."):
            line = variant(self.fn, args, kwargs)
            if line not in known:
                front_end.check(line)
                known.add(line)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = checked


def variant(function, args, kwargs) -> str:
    """What selects the code of a launch."""
    parameters = inspect.signature(function).parameters
    values = dict(zip(parameters, args, strict=False)) | kwargs
    types, constants = {}, {}
    for name, parameter in parameters.items():
        value = values.pop(name)
        if parameter.annotation is tl.constexpr or value is None:
            types[name] = "constexpr"
            constants[name] = {"dtype": value.name} if isinstance(value, tl.dtype) else value
        elif isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i64"
    return json.dumps([function.__module__, function.__name__, types, constants, values])


class FrontEnd:
    """The other process, started when it is first needed."""

    process = None

    def check(self, line: str) -> None:
        if self.process is None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kernels.variants"], text=True, env=environment,
                cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        error = json.loads(answer) if answer else "it crashed"
        assert error is None, f"Triton's compiler refuses {line}: {error}"


def translate(line: str) -> None:
    """Raises what the front end raises."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    module, name, types, constants, options = json.loads(line)
    kernel = getattr(importlib.import_module(module), name)
    by_position = {
        (kernel.arg_names.index(name),): getattr(tl, DTYPES[value["dtype"]])
        if isinstance(value, dict) else value
        for name, value in constants.items()
    }  # fmt: skip
    source, target = ASTSource(kernel, types, by_position), GPUTarget(*TARGET)
    backend = make_backend(target)
    options = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source.make_ir(target, options, functions, modules, context)


DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    for line in sys.stdin:
        error = None
        try:
            translate(line)
        except Exception as raised:
            while raised.__cause__ is not None:
                raised = raised.__cause__
            error = str(raised)
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
