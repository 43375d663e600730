"""All recipes, one after another; what comes of them is compared, timed, chosen and written."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from cotenant.devices import processor
from cotenant.domain.config import ModelSettings
from cotenant.domain.device import CPU
from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, ModelError
from cotenant.domain.variant import Compared, Timing, VariantRecord, VariantState
from cotenant.domain.workload import ORIGINAL, BatchSpec
from cotenant.engines.base import FAILURES, Array, first_line
from cotenant.optimize import writing
from cotenant.optimize.choosing import Marks, dominated, inaccurate, slow
from cotenant.optimize.comparing import check_tensors, compare, look
from cotenant.optimize.parent import (
    ENGINES,
    Asked,
    Parent,
    Told,
    open_all,
    open_variant,
    usable_engines,
)
from cotenant.optimize.recipes.base import Made, Recipe
from cotenant.optimize.recipes.known import check_asked, chosen, known_name, lacking
from cotenant.optimize.rows import picked, read_rows
from cotenant.optimize.timing import Raced, race
from cotenant.runtime.profiling import versions
from cotenant.runtime.repository import CHECK_FILE, ModelFiles, Repository, digest

SKIPPED: Final = "skipped"
RACE_S: Final = 3.0
"""Seconds for measuring a candidate beside the original."""
MOST_MAKING: Final = 2000
"""Rows for making on which a candidate is tried while it is made."""
LIBRARIES: Final = (
    "cotenant",
    "nncf",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "torch",
    "torch-pruning",
)
"""Distributions whose versions a record names, as far as they are installed."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the table. ``state``: of ``VariantState``, or ``skipped`` where a recipe made
    nothing. ``ratio``: of its time to the original's best, 0 if not measured; ``size``: bytes."""

    name: str
    state: str
    recipe: str = ""
    why: str = ""
    engine: str = ""
    accuracy: Compared | None = None
    ratio: float = 0.0
    profile: tuple[Timing, ...] = ()
    size: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found, as ``.optimize/result.json`` holds it. ``rows`` begin with the original;
    ``making`` and ``judging`` are numbers of rows of data."""

    model: str
    version: str
    date: str
    parent: str
    processor: str
    libraries: dict[str, str]
    max_drop: float
    floor: float
    making: int
    judging: int
    rows: tuple[Row, ...]


class _Tried(msgspec.Struct):
    """A candidate by one engine, as far as it came. ``why``: what it is refused for."""

    name: str
    made: Made
    engine: str
    compared: Compared | None = None
    raced: Raced | None = None
    why: str = ""


def optimize(repository: Repository, files: ModelFiles, asked: Asked, told: Told) -> Result:
    """Make variants of a version, and write them. Raises a CotenantError where that cannot begin,
    or the version changes meanwhile; then no variant was changed."""
    recipes = chosen(asked.recipes)
    if asked.recipes:
        check_asked(recipes)
    engines = _engines(asked)
    settings = repository.settings(files.name)
    with writing.workplace(files.path.parent) as work:
        began = digest(files)
        parent = _parent(files, settings, asked, engines, work)
        tried: list[_Tried] = []
        skipped: list[Row] = []
        trainers = sum(recipe.trains for recipe in recipes)
        for recipe in recipes:
            told(f"recipe {recipe.name}")
            seconds = asked.seconds / max(1, trainers)
            skipped += _by_recipe(parent, recipe, engines, seconds, told, tried)
        _refuse(tried, parent)
        if digest(repository.files(files.name, files.version)) != began:
            raise ModelError(
                f"{files.path.parent} changed meanwhile; nothing was written. Run it again"
            )
        rows = tuple(_written(parent, one, began, repository) for one in tried)
        result = _result(parent, began, tried, (*rows, *skipped))
        data = msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"
        writing.write_whole(files.path.parent / writing.FOLDER / "result.json", data)
    return result


def failed(result: Result, asked: Asked) -> list[Row]:
    """Recipes that were asked for by name and made nothing."""
    return [row for row in result.rows if row.state == SKIPPED and row.name in asked.recipes]


def _engines(asked: Asked) -> tuple[str, ...]:
    for name in asked.engines:
        known_name(name, ENGINES, "engine that variants are made for")
    usable = usable_engines(asked.engines or ENGINES)
    for name in asked.engines:
        if name not in usable:
            raise EnvironmentProblem(
                f"the engine {name} cannot be used here: pip install 'cotenant[optimize]'"
            )
    return usable


def _parent(
    files: ModelFiles, settings: ModelSettings, asked: Asked, engines: Sequence[str], work: Path
) -> Parent:
    """The version, opened, and what it says to the rows."""
    opened = open_all(files, settings, asked.units, engines)
    engine = next(iter(opened.values()))
    rows = read_rows(files.check, asked.data, engine.meta.inputs, settings.check)
    units = max(asked.units)
    seen = look(engine, units, rows.judging, rows.labelled)
    few = picked(rows.making, np.arange(min(rows.making.samples, MOST_MAKING)))
    return Parent(
        files=files,
        settings=settings,
        engines=opened,
        rows=rows,
        seen=seen,
        making=look(engine, units, few, labelled=False),
        work=work,
        asked=asked,
    )


def _by_recipe(
    parent: Parent,
    recipe: Recipe,
    engines: Sequence[str],
    seconds: float,
    told: Told,
    tried: list[_Tried],
) -> list[Row]:
    """Try what a recipe makes; returns a row that says so if it makes nothing."""
    if why := lacking(recipe):
        return [Row(name=recipe.name, state=SKIPPED, why=why)]
    work = parent.work / recipe.name
    work.mkdir()
    count = len(tried)
    try:
        for made in recipe.make(parent, work, seconds, told):
            for name, engine in _by_engine(made, engines):
                told(f"measuring {name}")
                one = _Tried(name, made, engine)
                tried.append(one)
                _measure(parent, one)
    except (*FAILURES, ImportError, RuntimeError) as error:
        why = str(error) if isinstance(error, ModelError) else first_line(error)
        return [Row(name=recipe.name, state=SKIPPED, why=why)]
    if len(tried) == count:
        return [Row(name=recipe.name, state=SKIPPED, why="it made nothing for these engines")]
    return []


def _by_engine(made: Made, engines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of candidates and the engines that they are for."""
    if made.path.suffix == ".xml":
        if "openvino" in engines:
            yield made.name, "openvino"
        return
    for engine in engines:
        yield (made.name if engine == ENGINES[0] else f"{made.name}-{engine}"), engine


def _measure(parent: Parent, one: _Tried) -> None:
    """Compare and time a candidate; what is wrong with it becomes the reason."""
    try:
        engine = open_variant(one.made.path, one.engine, parent.asked.units)
        check_tensors(parent.meta, engine.meta)
        one.compared = compare(parent.seen, engine, parent.units)
        one.raced = race(
            (one.engine, engine), parent.engines, _inputs(parent), parent.asked.units, RACE_S
        )
    except FAILURES as error:
        one.why = f"it cannot be used: {error}"


def _inputs(parent: Parent) -> dict[int, dict[str, Array]]:
    """By rows, what is executed when times are measured: one row, and a batch as it is served."""
    data, inputs = parent.rows.judging, parent.meta.inputs
    sizes = [1]
    if parent.meta.batchable and not data.whole(inputs):
        most = (parent.settings.batch or BatchSpec()).max
        sizes += [most] if 1 < most <= data.samples else []
    return {rows: data.part(inputs, 0, rows) for rows in sizes}


def _refuse(tried: list[_Tried], parent: Parent) -> None:
    """Say of each that is not kept why."""
    for one in tried:
        if not one.why and one.compared and one.raced:
            floor = parent.settings.accuracy_floor
            reasons = (
                inaccurate(one.compared, parent.asked.max_drop, floor),
                slow(one.raced.ratio, one.raced.surely),
            )
            one.why = "; ".join(filter(None, reasons))
            if one.why and one.made.note:
                one.why += f" ({one.made.note})"
    marks = [
        Marks(one.name, one.compared.drop, one.raced.ratio, one.made.size)
        for one in tried
        if not one.why and one.compared and one.raced
    ]
    beaten = dominated(marks)
    for one in tried:
        if one.name in beaten:
            one.why = f"{beaten[one.name]} is no worse in accuracy, time and size"


def _written(parent: Parent, one: _Tried, digested: str, repository: Repository) -> Row:
    """Write a candidate's directory; returns its row."""
    state = VariantState.REFUSED if one.why else VariantState.CANDIDATE
    if not one.why and parent.asked.promote:
        state = VariantState.PROMOTED
    name = _free_name(one.name, parent.files, repository)
    record = VariantRecord(
        recipe=one.made.recipe,
        parent=digested,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        state=state,
        why=one.why,
        engine=one.engine,
        kinds=(CPU,),
        libraries=versions(LIBRARIES),
        accuracy=one.compared,
        size=one.made.size,
        profile=one.raced.profile if one.raced else (),
    )
    files = () if one.why else one.made.files
    writing.put(parent.files.path.parent, name, record, files)
    return Row(
        name=name,
        state=state.value,
        recipe=record.recipe,
        why=one.why,
        engine=one.engine,
        accuracy=one.compared,
        ratio=one.raced.ratio if one.raced else 0.0,
        profile=record.profile,
        size=record.size,
    )


def _free_name(name: str, files: ModelFiles, repository: Repository) -> str:
    """The name, or with a number where a variant serves that is called so."""
    serving = {
        found.name
        for found in repository.variants(files)
        if found.record is not None and found.record.state is VariantState.PROMOTED
    }
    number = 2
    free = name
    while free in serving:
        free, number = f"{name}-{number}", number + 1
    return free


def _result(
    parent: Parent, digested: str, tried: Sequence[_Tried], rows: tuple[Row, ...]
) -> Result:
    files, seen = parent.files, parent.seen
    raced = next((one.raced for one in tried if one.raced), None)
    compared = next((one.compared for one in tried if one.compared), None)
    original = Row(
        name=ORIGINAL,
        state=ORIGINAL,
        engine=next(iter(parent.engines)),
        accuracy=of_original(compared),
        ratio=1.0 if raced else 0.0,
        profile=raced.originals if raced else (),
        size=original_size(files),
    )
    return Result(
        model=files.name,
        version=files.version,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        parent=digested,
        processor=processor.look().name,
        libraries=versions(LIBRARIES),
        max_drop=parent.asked.max_drop,
        floor=parent.settings.accuracy_floor,
        making=parent.rows.making.samples,
        judging=seen.data.samples,
        rows=(original, *rows),
    )


def of_original(compared: Compared | None) -> Compared | None:
    """The original beside itself, on the rows on which a variant was compared with it."""
    if compared is None:
        return None
    return Compared(
        measure=compared.measure,
        rows=compared.rows,
        original=compared.original,
        value=compared.original,
        lost=0,
        won=0,
        drop=0.0,
        bound=0.0,
    )


def ratio_of(profile: Sequence[Timing]) -> float:
    """A variant's time over its original's, the geometric mean over settings; 0 if not measured."""
    known = [t.ns / t.original_ns for t in profile if t.original_ns]
    return statistics.geometric_mean(known) if known else 0.0


def original_size(files: ModelFiles) -> int:
    """Bytes of what a version computes with."""
    return sum(size for name, size, *_ in files.stamp.files if name != CHECK_FILE)


def the_version(repository: Repository, name: str, version: str) -> ModelFiles:
    """The version of a model that is named, the newest where none is; raises a CotenantError."""
    if version and not (version.isascii() and version.isdigit()):
        raise InvalidRequest(f"--version {version}: versions are whole numbers")
    return repository.files(name, version) if version else repository.newest(name)
