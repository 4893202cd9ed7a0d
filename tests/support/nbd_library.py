"""Debian's libnbd binding inside the project's virtual environment.

The binding is a compiled module of Debian's Python 3.11, whose ABI any Python 3.11 shares. Only it
is taken from Debian's packages: nothing else of that directory may shadow what the environment has.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DEBIAN_PACKAGES_DIR = Path("/usr/lib/python3/dist-packages")


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_nbd() -> Any:
    """The module ``nbd``. Raises ImportError that names the Debian package."""
    if "nbd" not in sys.modules:
        compiled = next(DEBIAN_PACKAGES_DIR.glob("libnbdmod.cpython-311-*.so"), None)
        if compiled is None:
            raise ImportError("libnbd's Python 3.11 binding is missing: install Debian's python3-libnbd")
        _load("libnbdmod", compiled)
        _load("nbd", DEBIAN_PACKAGES_DIR / "nbd.py")
    return sys.modules["nbd"]


nbd: Any = load_nbd()
