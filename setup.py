"""Compiles the policy with mypyc and the launch gate's shim (native/) into wheels that are built
where a C compiler is.

Without one the wheel is pure: complete, slower, without the shim. ``COTENANT_PURE=1`` asks for
that. An editable install is of the sources as they are; ``make native`` puts the shim beside them.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).parent
PACKAGE = Path("src/cotenant")
SHIM = "cotenant/devices/nvidia/shim"

# Compiled are all of the policy and those of the simulator and of what is measured that are on the
# path of an event. These are not: msgspec's classes with options cannot be, and the planner's
# integer program is HiGHS's and numpy's time.
INTERPRETED = {"__init__.py", "assigning.py", "invariants.py", "planstate.py", "views.py"}
COMPILED_BESIDE = (
    *(PACKAGE / "sim" / name for name in ("world.py", "physics.py", "outcome.py", "reactive.py")),
    *(PACKAGE / "telemetry" / name for name in ("meters.py", "monitor.py")),
)


def native():
    """native/build.py as a module."""
    spec = importlib.util.spec_from_file_location("cotenant_native", HERE / "native" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_pure() -> str:
    """Why nothing can be compiled here; empty if it can."""
    if os.environ.get("COTENANT_PURE", "0") not in ("", "0"):
        return "COTENANT_PURE asks for that"
    if not native().has_compiler():
        return f"there is no C compiler ({native().compiler()[0]})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python are missing (python3-dev)"
    return ""


def compiled_modules() -> list[str]:
    """Paths of what mypyc compiles."""
    policy = [p for p in (PACKAGE / "policy").rglob("*.py") if p.name not in INTERPRETED]
    return sorted(map(str, (*policy, *COMPILED_BESIDE)))


class BuildPy(build_py):
    """Python files, then the shim."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        if reason := why_pure():
            self.warn(f"the wheel is pure: {reason}. It does the same, more slowly.")
        elif reason := native().why_not():
            self.warn(f"the launch gate's shim is left out: {reason}. Nothing else needs it.")
        else:
            native().build(Path(self.build_lib) / SHIM)


class BuildExt(build_ext):
    """What mypyc makes of the modules: only when it is wanted, for it takes its time."""

    def run(self) -> None:
        if self.editable_mode:
            return
        from mypyc.build import mypycify

        modules = mypycify(compiled_modules(), group_name="cotenant", multi_file=True)
        self.distribution.ext_modules = modules
        self.distribution.reinitialize_command(self)
        self.ensure_finalized()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile its files side by side, which setuptools does one by one, then link them."""

        def compiled(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                depends=ext.depends,
                extra_postargs=ext.extra_compile_args,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += chain.from_iterable(pool.map(compiled, ext.sources))
        ext.sources = []
        super().build_extension(ext)


class MaybeBinary(Distribution):
    """A wheel with compiled modules in it is one for this platform."""

    def has_ext_modules(self) -> bool:
        return not why_pure()


if __name__ == "__main__":
    setup(cmdclass={"build_ext": BuildExt, "build_py": BuildPy}, distclass=MaybeBinary)
