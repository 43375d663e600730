"""ONNX Runtime with an execution provider that comes as a library of its own (a plug-in), such as
that for Qualcomm's NPUs. UNTESTED with any: none was at hand, only ONNX Runtime's own way to them.

Whoever runs the node names the libraries in its environment, since a library is code::

    COTENANT_ORT_PLUGINS=QNNExecutionProvider=/opt/qnn/libonnxruntime_providers_qnn.so

several with ``:`` between them, and the owner of a model says ``engine: onnxruntime-plugin`` in
``model.yaml``. What the provider does not take ONNX Runtime executes on the CPU; notes say what.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cotenant.domain.config import Plugin
from cotenant.domain.errors import ModelError
from cotenant.engines.base import Engine, EngineKind, Opening, first_line
from cotenant.engines.onnx import CPU_PROVIDER, OnnxEngine, session_options

if TYPE_CHECKING:
    import onnxruntime as ort

VARIABLE: Final = "COTENANT_ORT_PLUGINS"


def libraries() -> dict[str, Path]:
    """The libraries that the environment names, by their provider; raises ModelError."""
    found = {}
    for entry in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise ModelError(f"{VARIABLE}: {entry!r} is not NAME=/path/to/library.so")
        found[name] = Path(path)
    return found


class PluginEngine(OnnxEngine):
    """See the module's text."""

    def __init__(self, path: Path, units: Sequence[int], plugin: Plugin) -> None:
        _register()
        self._provider = _provider(plugin)
        super().__init__(path, units, partial(_session, self._provider, plugin.options))

    @property
    def notes(self) -> Sequence[str]:
        """What the provider left to the CPU."""
        left = [e.kind for e in self.executed() if e.where == CPU_PROVIDER]
        if not left or self._provider == CPU_PROVIDER:
            return ()
        return (f"operators that {self._provider} does not take: {', '.join(left)}",)


def _register() -> None:
    """Load what is not loaded yet."""
    import onnxruntime as ort

    there = {device.ep_name for device in ort.get_ep_devices()}
    for name, path in libraries().items():
        if name in there:
            continue
        if not path.is_file():
            raise ModelError(f"{VARIABLE}: there is no library {path}")
        try:
            ort.register_execution_provider_library(name, str(path))
        except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
            raise ModelError(f"{path.name} is no plug-in: {first_line(error)}") from error


def _provider(plugin: Plugin) -> str:
    """The provider that is asked for, or the only one that the environment names."""
    known = list(libraries())
    if plugin.provider:
        return plugin.provider
    if len(known) == 1:
        return known[0]
    named = ", ".join(known) or "none"
    raise ModelError(f"say plugin.provider in model.yaml; {VARIABLE} names {named}")


def _session(
    provider: str, options: dict[str, str], path: Path, threads: int
) -> ort.InferenceSession:
    import onnxruntime as ort

    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    if not devices:
        there = ", ".join(sorted({device.ep_name for device in ort.get_ep_devices()}))
        raise ModelError(f"no device for {provider} is here; there are devices for {there}")
    made = session_options(threads)
    made.add_provider_for_devices(devices, options)
    return ort.InferenceSession(str(path), made)


class OnnxRuntimePlugin:
    """See the module's text."""

    name = "onnxruntime-plugin"
    suffixes = (".onnx",)
    rank = 90
    drafts = False

    def refuses(self, opening: Opening) -> str:
        if opening.settings.engine != self.name:
            return "it is taken where model.yaml names it"
        if not opening.target.on_cpu:
            return "it is for services on the CPU's cores"
        try:
            _provider(opening.settings.plugin)
        except ModelError as error:
            return str(error)
        return ""

    def open(self, opening: Opening) -> Engine:
        return PluginEngine(opening.path, opening.units, opening.settings.plugin)


KIND: Final[EngineKind] = OnnxRuntimePlugin()
