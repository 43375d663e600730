"""Adds the launch gate's shim (native/) to wheels that are built where a C compiler is.

Without one, and in an editable install, the package is complete but for the shim; ``make native``
puts it into the source tree.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).parent
SHIM = "cotenant/devices/nvidia/shim"


def builder():
    """native/build.py as a module; None where the sources do not come with it."""
    path = HERE / "native" / "build.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("cotenant_native_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithShim(build_py):
    """Python files, then the shim."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        native = builder()
        reason = native.why_not() if native else "native/ is not in this source tree"
        if not reason:
            try:
                native.build(Path(self.build_lib) / SHIM)
            except subprocess.CalledProcessError as error:
                reason = f"its build failed: {error}"
        if reason:
            self.warn(f"the launch gate's shim is left out: {reason}. Nothing else needs it.")


class MaybeBinary(Distribution):
    """A wheel with the shim in it is one for this platform."""

    def has_ext_modules(self) -> bool:
        native = builder()
        return native is not None and not native.why_not()


setup(cmdclass={"build_py": BuildWithShim}, distclass=MaybeBinary)
