"""python -m fastflow.hub OUTPUT: the operators as a kernel of the Hugging Face Hub, written to a new folder.

The folder is what a Hub repository of kind "kernel" holds, and what the `kernels` client loads from a local path:

    README.md, LICENSE
    build/torch-cpu/      the package where torch has no GPU: metadata.json, __init__.py, modules, kernels/
    build/torch-cuda/     the same files for CUDA, with an id of their own

It is the folder kernels/ with the modules of fastflow that make operators of it. They need torch, and triton on CUDA,
and nothing of fastflow: the client loads them by path under `metadata.json`'s id, which is made from their content, so
imports are relative, and the operators' namespace is that id. A process may hold several versions beside fastflow.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import fastflow
from fastflow.errors import UserError

__all__ = ["assemble"]

BACKENDS = ("cpu", "cuda")
# What the operators and the modules around them consist of. No agents, no training, no command line.
MODULES = (
    "cpu",
    "dense",
    "fields",
    "from_modules",
    "frozen",
    "fused",
    "fused_dense",
    "modules",
    "operators",
    "ops",
    "philox",
    "reference",
)
# A command for developers that compiles every kernel without a GPU.
LEFT_OUT = "aot.py"

INIT = '''"""The K-step walk of a flow-matching network and its loss, each one operator: fastflow {version}.

`integrate`, `flow_matching_loss` and `velocity_matching_loss` take a `VelocityField`; `FlowCritic` and `FlowPolicy`
hold one. Triton kernels on CUDA, native code on the CPU, PyTorch elsewhere.
"""

{imports}

__all__ = {names}
__version__ = "{version}"
'''

CARD = """---
license: mit
library_name: kernels
tags:
- kernels
---

# fastflow

The K-step integration of a flow-matching velocity network and its training loss, each one fused operator: Triton
kernels on CUDA, native C++ on the CPU (compiled at first use), PyTorch elsewhere. Version {version}.

```python
import torch
from kernels import get_local_kernel  # or get_kernel, with a repository's name and version

fastflow = get_local_kernel("path/to/this/folder")
field = fastflow.VelocityField(fastflow.FieldSpec(state_dim=2, cond_dim=3, hidden=(64, 64)))
x_1 = fastflow.integrate(field, torch.randn(16, 2), torch.randn(16, 3), num_steps=8)
```

It offers {names}.
"""


def assemble(output: str | os.PathLike[str]) -> Path:
    """Write the kernel to `output`, whole or not at all. Needs no network and not the `kernels` client.

    Args:
        output: a folder that does not exist yet; the folder that holds it must.

    Returns:
        The folder.

    Raises:
        UserError: `output` exists or cannot be written.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already; name a folder that does not")
    files = _files()
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for backend in BACKENDS:
            root = temporary / "build" / f"torch-{backend}"
            for name, content in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            # The words of the client: it imports the package as a module of this id.
            metadata = {
                "name": "fastflow",
                "id": f"_fastflow_{backend}_{digest.hexdigest()[:10]}",
                "version": 1,
                "license": "MIT",
                "python-depends": [],
                "backend": {"type": backend},
            }
            (root / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        names = ", ".join(f"`{name}`" for name in _names())
        card = CARD.format(version=fastflow.__version__, names=names)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / "LICENSE").write_text(_license(), encoding="utf-8")
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"{output}: cannot write ({error.strerror}); nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _files() -> dict[str, bytes]:
    """The package's files by their paths in it."""
    here = Path(fastflow.__file__).parent
    files = {f"{name}.py": _relative((here / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES}
    root = Path(importlib.import_module("fastflow.kernels").__path__[0])
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h") and path.name != LEFT_OUT:
            files[f"kernels/{path.relative_to(root).as_posix()}"] = path.read_text(encoding="utf-8")
    imports = [
        f"from .{module} import {', '.join(names)}" for module, names in fastflow._MODULES.items() if module in MODULES
    ]
    names = json.dumps(_names())
    files["__init__.py"] = INIT.format(version=fastflow.__version__, imports="\n".join(imports), names=names)
    return {name: text.encode() for name, text in files.items()}


def _relative(source: str) -> str:
    """A module's source with its imports of fastflow relative to the package: all modules lie side by side in it."""
    return re.sub(r"^(\s*)from fastflow(?:\.([\w.]+))? import ", r"\1from .\2 import ", source, flags=re.MULTILINE)


def _names() -> list[str]:
    """What the package offers."""
    return sorted(name for module, names in fastflow._MODULES.items() if module in MODULES for name in names)


def _license() -> str:
    """The text of the licence: beside the checkout's packages, or with the installed ones' metadata."""
    beside = Path(fastflow.__file__).parents[1] / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    installed = importlib.metadata.distribution("fastflow")
    text = installed.read_text("licenses/LICENSE") or installed.read_text("LICENSE")
    if text is None:
        raise UserError("fastflow.hub: the installed fastflow lacks its LICENSE; install it again")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastflow.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to make")
    try:
        print(assemble(parser.parse_args(arguments).output))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
