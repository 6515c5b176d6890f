"""The rules of the house, read off the source: who may import whom, sizes, names, the version, documented commands.

Every check takes the root of a tree and returns its violations; the last test plants one of each and sees it found.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# What a part of bsfast may import besides the standard library and its own files. A part without a row may import what
# OTHERS_MAY_IMPORT says. Experiments are in no list: nothing but tests may import them.
MAY_IMPORT = {
    "bsfast/reference.py": ["torch"],
    "bsfast/layout.py": ["torch"],
    "bsfast/ops": ["torch", "triton", "bsfast.layout", "bsfast.triton", "bsfast._native"],
    "bsfast/triton": ["torch", "triton", "bsfast.layout"],
    "bsfast/nn": ["torch", "bsfast.ops", "bsfast.layout"],
    # The plan and the memory order of a whole network are chosen here; operators are reached through bsfast.nn only.
    "bsfast/fuse": ["torch", "bsfast.nn", "bsfast.layout", "bsfast.ops.plan"],
    "bsfast/hessian": ["torch", "scipy", "bsfast.ops"],
    "bsfast/analysis": ["torch"],
    "bsfast/plotting": ["numpy", "matplotlib"],
    "bsfast/toy.py": ["numpy", "bsfast._native", "bsfast._toy_numpy"],
    "bsfast/_toy_numpy.py": ["numpy"],
}
OTHERS_MAY_IMPORT = ["torch", "numpy", "bsfast"]
ONLY_INSIDE_FUNCTIONS = {
    "bsfast/ops": ["triton", "bsfast.triton"],
    "bsfast/hessian": ["scipy"],
    "bsfast/__init__.py": ["torch", "numpy", "bsfast"],
}
# These know every experiment; any other file of experiments/X knows experiments.common and its own folder.
LOOKS_AT = {
    "experiments/hessian": "experiments.classifier",  # it measures the networks that the other trains
    "experiments/class_transfer": "experiments.segmentation",  # which segments its parts
}
KNOW_ALL_EXPERIMENTS = {f"experiments/{name}.py" for name in ("__main__", "cli", "demo", "figure")}

# Headers with a dot that are not ours: vector intrinsics. Standard C++ headers have none.
INTRINSICS = {"immintrin.h", "arm_neon.h"}
KERNEL_HEADERS = {"shape.h", "isa.h"}

MAX_LINES = 400
LONGER_WITH_REASON: dict[str, str] = {}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
NOT_VAGUE = {"experiments/common", "tests/experiments/common"}
# Files that hold the version for another reason: its one home, the history, and pins of other packages.
MAY_HOLD_VERSION = {"pyproject.toml", "CHANGELOG.md", "requirements-dev.txt"}
TEXT_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".cff", ".yaml", ".css"}
CODE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
FOLDERS = ("bsfast", "csrc", "experiments", "tests")


class Import(NamedTuple):
    """One imported module, and whether that happens when the file is loaded."""

    name: str
    at_load: bool


def test_house_imports():
    assert import_violations(ROOT) == []


def test_house_experiments():
    assert experiment_violations(ROOT) == []


def test_house_operator_namespace():
    assert namespace_violations(ROOT) == []


def test_house_kernel_includes():
    assert include_violations(ROOT) == []


def test_house_file_lengths():
    assert length_violations(ROOT) == []


def test_house_names():
    assert name_violations(ROOT) == []


def test_house_version_is_typed_once():
    assert version_violations(ROOT) == []


def test_house_commands_exist():
    assert command_violations(ROOT) == []


def import_violations(root: Path) -> list[str]:
    """Imports of bsfast and setup.py that the table does not allow."""
    found = []
    for path in [*files(root, "bsfast", {".py"}), *root.glob("setup.py")]:
        part = next((part for part in MAY_IMPORT if is_in(name_of(root, path), part)), name_of(root, path))
        allowed = [*MAY_IMPORT.get(part, OTHERS_MAY_IMPORT), module_of(part)]
        if path.name == "setup.py":
            allowed.append("setuptools")
        for module, _ in imports(root, path):
            if not is_standard(module) and not any(is_in(module, name, ".") for name in allowed):
                found.append(f"{name_of(root, path)} imports {module}")
        for lazy_part, lazy in ONLY_INSIDE_FUNCTIONS.items():
            if is_in(name_of(root, path), lazy_part):
                late = [name for name, at_load in imports(root, path) if at_load]
                found += [
                    f"{name_of(root, path)} imports {module} outside a function"
                    for module in late
                    if any(is_in(module, name, ".") for name in lazy)
                ]
    return found


def experiment_violations(root: Path) -> list[str]:
    """Experiments that import another experiment or a private name of bsfast."""
    found = []
    for path in files(root, "experiments", {".py"}):
        name = name_of(root, path)
        folder = str(PurePosixPath(*PurePosixPath(name).parts[:2]))
        own = [module_of(folder), "experiments.common", *([LOOKS_AT[folder]] if folder in LOOKS_AT else [])]
        for module, _ in imports(root, path):
            private = is_in(module, "bsfast", ".") and any(part.startswith("_") for part in module.split("."))
            other = is_in(module, "experiments", ".") and not any(
                module == "experiments" or is_in(module, known, ".") for known in own
            )
            if private or (other and name not in KNOW_ALL_EXPERIMENTS):
                found.append(f"{name} imports {module}")
    return found


def namespace_violations(root: Path) -> list[str]:
    """Uses of ``torch.ops.bsfast`` or ``"bsfast::..."`` outside bsfast/ops."""
    found = []
    for path in [*files(root, "bsfast", {".py"}), *files(root, "experiments", {".py"})]:
        if is_in(name_of(root, path), "bsfast/ops"):
            continue
        for node in ast.walk(parse(path)):
            attribute = isinstance(node, ast.Attribute) and ast.unparse(node).endswith("ops.bsfast")
            string = isinstance(node, ast.Constant) and str(node.value).startswith("bsfast::")
            if attribute or string:
                found.append(f"{name_of(root, path)}:{node.lineno} names the operators")
    return found


def include_violations(root: Path) -> list[str]:
    """Includes of CPU kernels beyond the standard library, intrinsics, shape.h, isa.h and headers of csrc/cpu."""
    found = []
    for path in files(root, "csrc/cpu", {".cpp", ".h"}):
        if path.name.endswith("_ops.cpp") or path.name == "tensors.h":  # these know torch
            continue
        for opening, header in re.findall(r'(?m)^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text()):
            standard = opening == "<" and (header in INTRINSICS or not re.search(r"[./]", header))
            own = opening == '"' and (header in KERNEL_HEADERS or header.startswith("cpu/"))
            if not (standard or own):
                found.append(f"{name_of(root, path)} includes {header}")
    return found


def length_violations(root: Path) -> list[str]:
    """Files of code over 400 lines that do not say why."""
    found = []
    for path in all_files(root, CODE_SUFFIXES):
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES and name_of(root, path) not in LONGER_WITH_REASON:
            found.append(f"{name_of(root, path)} has {lines} lines")
    return found


def name_violations(root: Path) -> list[str]:
    """Files and folders whose name says nothing."""
    found = set()
    for path in all_files(root, CODE_SUFFIXES):
        name = PurePosixPath(name_of(root, path))
        for part in (name, *name.parents):
            if part.stem.removeprefix("test_").strip("_") in VAGUE_NAMES and str(part) not in NOT_VAGUE:
                found.add(f"{part} has a vague name")
    return sorted(found)


def version_violations(root: Path) -> list[str]:
    """Files that repeat the version of pyproject.toml."""
    version = re.search(r'(?m)^version = "([^"]+)"', (root / "pyproject.toml").read_text())
    assert version, "pyproject.toml must have the version"
    pattern = re.compile(rf"(?<![\w.])(?<!cff-version: )v?{re.escape(version[1])}(?![\w]|\.\d)")
    return [
        f"{name_of(root, path)} repeats the version"
        for path in all_files(root, TEXT_SUFFIXES)
        if name_of(root, path) not in MAY_HOLD_VERSION and pattern.search(path.read_text())
    ]


def command_violations(root: Path) -> list[str]:
    """``make`` commands in the documents without such a target."""
    targets = set(re.findall(r"(?m)^([\w-]+):(?!=)", (root / "Makefile").read_text()))
    found = []
    for path in sorted(root.glob("*.md")):
        for command in re.findall(r"(?m)(?:^\s*(?:\$ )?|`)make((?: +[\w=./-]+)*)", code_of(path.read_text())):
            goals = [word for word in command.split() if "=" not in word and not word.startswith("-")]
            found += [f"{path.name}: make {goal}" for goal in goals if goal not in targets]
    return found


def code_of(text: str) -> str:
    """Return the fenced blocks of a Markdown text, without trailing comments, and its `inline code`."""
    fenced = re.findall(r"(?ms)^```[^\n]*\n(.*?)^```", text)
    inline = re.findall(r"`[^`\n]+`", re.sub(r"(?ms)^```.*?^```", "", text))
    return "\n".join([*(re.sub(r"\s+#.*", "", block) for block in fenced), *inline])


def files(root: Path, folder: str, suffixes: set[str]) -> list[Path]:
    return sorted(path for path in (root / folder).rglob("*") if path.suffix in suffixes and path.is_file())


def all_files(root: Path, suffixes: set[str]) -> list[Path]:
    top = [path for path in root.iterdir() if path.is_file() and path.suffix in suffixes]
    return sorted([*top, *(path for folder in FOLDERS for path in files(root, folder, suffixes))])


def name_of(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_in(name: str, parent: str, separator: str = "/") -> bool:
    return name == parent or name.startswith(parent + separator)


def is_standard(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(root: Path, path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands; relative names become absolute, submodules get full names."""
    tree = parse(path)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(function, ast.If) and ast.unparse(function.test).endswith("TYPE_CHECKING"))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_load = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root).parent.parts
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                target = root.joinpath(*source.split("."), alias.name)
                is_module = target.is_dir() or target.with_suffix(".py").exists() or alias.name.startswith("_")
                yield Import(f"{source}.{alias.name}" if is_module else source, at_load)


class Plant(NamedTuple):
    """A file that breaks a rule, the check that must see it, and what the check says."""

    check: Callable[[Path], list[str]]
    path: str
    text: str
    says: str


PLANTS = [
    Plant(import_violations, "bsfast/reference.py", "import numpy", "bsfast/reference.py imports numpy"),
    Plant(import_violations, "bsfast/ops/a.py", "from bsfast import nn", "bsfast/ops/a.py imports bsfast.nn"),
    Plant(import_violations, "bsfast/nn/a.py", "from ..fuse import b", "bsfast/nn/a.py imports bsfast.fuse"),
    Plant(import_violations, "bsfast/nn/a.py", "import bsfast", "bsfast/nn/a.py imports bsfast"),
    Plant(import_violations, "bsfast/fuse/a.py", "import bsfast.ops.b", "bsfast/fuse/a.py imports bsfast.ops.b"),
    Plant(import_violations, "bsfast/hessian/a.py", "import bsfast.nn", "bsfast/hessian/a.py imports bsfast.nn"),
    Plant(import_violations, "bsfast/plotting/a.py", "def f():\n import torch", "bsfast/plotting/a.py imports torch"),
    Plant(import_violations, "bsfast/optim.py", "import experiments.toy", "bsfast/optim.py imports experiments.toy"),
    Plant(import_violations, "bsfast/optim.py", "import scipy.linalg", "bsfast/optim.py imports scipy.linalg"),
    Plant(import_violations, "setup.py", "import experiments", "setup.py imports experiments"),
    Plant(import_violations, "bsfast/ops/a.py", "import bsfast.triton", "imports bsfast.triton outside a function"),
    Plant(
        import_violations, "bsfast/__init__.py", "import torch", "bsfast/__init__.py imports torch outside a function"
    ),
    Plant(experiment_violations, "experiments/a/run.py", "import experiments.b.run", "imports experiments.b.run"),
    Plant(experiment_violations, "experiments/common/a.py", "from experiments import b", "imports experiments.b"),
    Plant(experiment_violations, "experiments/a/run.py", "from bsfast import _native", "imports bsfast._native"),
    Plant(namespace_violations, "bsfast/nn/a.py", "import torch\ntorch.ops.bsfast.b()", "bsfast/nn/a.py:2 names the"),
    Plant(namespace_violations, "experiments/a/b.py", "x = 'bsfast::conv2d_out'", "experiments/a/b.py:1 names the"),
    Plant(
        include_violations, "csrc/cpu/a.cpp", "#include <torch/csrc/stable/ops.h>", "includes torch/csrc/stable/ops.h"
    ),
    Plant(include_violations, "csrc/cpu/a.cpp", "  # include <omp.h>", "csrc/cpu/a.cpp includes omp.h"),
    Plant(include_violations, "csrc/cpu/a.h", '#include "check.h"', "csrc/cpu/a.h includes check.h"),
    Plant(length_violations, "csrc/cpu/a.cpp", "//\n" * 401, "csrc/cpu/a.cpp has 401 lines"),
    Plant(length_violations, "experiments/a/run.py", "#\n" * 500, "experiments/a/run.py has 500 lines"),
    Plant(name_violations, "bsfast/ops/_utils.py", "", "bsfast/ops/_utils.py has a vague name"),
    Plant(name_violations, "bsfast/common/a.py", "", "bsfast/common has a vague name"),
    Plant(version_violations, "bsfast/a.py", "__version__ = '1.2.3'", "bsfast/a.py repeats the version"),
    Plant(version_violations, "CITATION.cff", "cff-version: 1.2.3\nversion: 1.2.3", "CITATION.cff repeats the version"),
    Plant(command_violations, "README.md", "```\nmake test  # tests\nmake tset\n```", "README.md: make tset"),
    Plant(command_violations, "README.md", "Run `make -j2 A=1 test figs` to make sure.", "README.md: make figs"),
]
FINE = {
    "pyproject.toml": '[project]\nversion = "1.2.3"\n',
    "Makefile": "X := 1\ntest: x\n\ttouch $@\n",
    "CITATION.cff": "cff-version: 1.2.3\n",
    "README.md": "`make test` and `make`, to make sure; 1.2.31 and 11.2.3\n\n```\nmake test  # make it so\n```\n",
    "setup.py": "import setuptools",
    "bsfast/__init__.py": "import os\nif TYPE_CHECKING:\n    import torch\n\n\ndef f():\n    import torch\n",
    "bsfast/ops/b.py": "import os\nfrom . import a\nfrom bsfast.layout import x\ndef f():\n    import triton\n",
    "bsfast/ops/a.py": '"""Like torch.ops.bsfast."""\nimport torch\ntorch.ops.bsfast.conv("bsfast::conv")\n',
    "bsfast/fuse/b.py": "import bsfast.nn as bnn\nfrom bsfast.nn import Conv2d\nfrom torch import fx\n",
    "experiments/a/run.py": "import bsfast\nfrom experiments.a import model\nimport experiments.common.record\n",
    "bsfast/nn/b.py": "from bsfast import ops\n",
    "experiments/b/run.py": "import numpy\n",
    "experiments/__main__.py": "import experiments.a.run\n",
    "experiments/cli.py": "from experiments.a import run\n",
    "csrc/cpu/a.cpp": '#include "cpu/a.h"\n#include <cstring>\n#include <immintrin.h>\n#include "shape.h"\n'
    + "//\n" * 396,
    "csrc/cpu/conv_ops.cpp": "#include <torch/csrc/stable/ops.h>\n",
    "tests/test_a.py": "import experiments.a.run\nimport torch\ntorch.ops.bsfast.conv\n",
}


def plant(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        root.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        root.joinpath(name).write_text(text)


@pytest.mark.parametrize("case", PLANTS, ids=lambda case: f"{case.check.__name__}-{case.says.replace(' ', '_')}")
def test_house_sees_a_planted_violation(case, tmp_path):
    plant(tmp_path, FINE)
    assert case.check(tmp_path) == []
    plant(tmp_path, {case.path: case.text})
    assert len(violations := case.check(tmp_path)) == 1
    assert case.says in violations[0]
