"""The house's rules: imports go down only and by name, files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 400
# The rooms of each package, lowest first; those on one line do not know each other. A package's
# own __init__ is above all of them. `tim` may import `tim_kernels`, never the other way.
LEVELS = {
    "tim": [
        ["captions", "checks", "files", "processes", "provenance", "requirements"],
        ["data", "models", "transports"],
        ["encoders", "objective", "sampling"],
        ["config", "images"],
        ["checkpoints"],
        ["pipelines", "training"],
        ["opening"],
        ["evaluation", "generate"],
        ["app"],
        ["__main__", "assets", "cli", "comfyui"],
        ["__init__"],
    ],
    "tim_kernels": [
        ["checks", "names"],
        ["coefficients"],
        ["launch"],
        ["dispatch"],
        ["fp8", "segments"],
        [
            "ada_layer_norm", "attention", "linear", "qk_norm_rope", "quantise_rows", "swiglu",
            "time_pair_embedding", "transition_inputs", "transition_loss", "transition_step",
        ],
        ["network"],
        ["explain"],
        ["__init__"],
    ],
}  # fmt: skip
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in LEVELS}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for paths in FILES.values()
    for path in paths
}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def modules_of(package: str) -> list[str]:
    return [module for module in MODULES if module.partition(".")[0] == package]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module of this repository that `module` imports, at its head or later, and the line."""
    is_package = MODULES[module].name == "__init__.py"
    for node in ast.walk(TREES[module]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                origin = ".".join(filter(None, (*parents, node.module)))
            # A name is a module of its own, or stands in the package's __init__.
            names = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else origin for name in names]
        yield from ((name, node.lineno) for name in names if name in MODULES)


def room_and_level(module: str) -> tuple[str, int]:
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0] or "__init__"
    levels = [level for level, rooms in enumerate(LEVELS[package]) if room in rooms]
    assert levels, f"{module}: give the room {room!r} its place in LEVELS"
    return room, levels[0]


@pytest.mark.parametrize("package", LEVELS)
def test_imports_go_down(package):
    wrong = []
    for module in modules_of(package):
        room, level = room_and_level(module)
        for other, line in imports(module):
            if other.partition(".")[0] != package:
                goes_down = package == "tim"
            else:
                other_room, other_level = room_and_level(other)
                goes_down = other_room == room or other_level < level
            if not goes_down:
                wrong.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", LEVELS)
def test_no_circle(package):
    """Within a room too: a depth-first walk never meets a module that it is inside of."""
    done = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for other, _ in imports(module):
                if other.partition(".")[0] == package:
                    visit(other, (*path, module))
            done.add(module)

    for module in modules_of(package):
        visit(module, ())


@pytest.mark.parametrize("package", LEVELS)
def test_no_import_of_ours_by_a_string(package):
    """What is imported by a string is somebody else's, and its name does not hang on ours."""
    wrong = []
    for module in modules_of(package):
        for node in ast.walk(TREES[module]):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            if called not in ("import_module", "__import__", "run_module", "find_spec"):
                continue
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            parts = [part for argument in given for part in ast.walk(argument)]
            texts = [part.value for part in parts if isinstance(part, ast.Constant)]
            names = [part.id for part in parts if isinstance(part, ast.Name)]
            is_ours = any(
                str(text).startswith(".") or str(text).partition(".")[0] in LEVELS for text in texts
            )
            is_made = any(isinstance(part, (ast.JoinedStr, ast.BinOp)) for part in parts)
            if is_ours or is_made or {"__name__", "__package__"} & {*names}:
                wrong.append(f"{MODULES[module].relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_tim_kernels_imports_itself_relatively():
    """So that two versions fit into one process, each under a name of its own."""
    wrong = []
    for module in modules_of("tim_kernels"):
        for node in ast.walk(TREES[module]):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            if any(name.partition(".")[0] in LEVELS for name in names):
                wrong.append(f"{MODULES[module].relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", LEVELS)
def test_files_are_short(package):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES[package]
    }
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}
