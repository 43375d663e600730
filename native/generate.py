"""Write what the shim has for every function of the driver API, as C and assembly.

``python generate.py OUT``. A function that ``gated.txt`` does not name gets five instructions that
jump to the driver's own. One that it names gets a function in C that asks the gate.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SUFFIX = {"s": "_ptsz", "d": "_ptds"}


@dataclass(frozen=True)
class Form:
    """One exported function; ``since`` is 0 where nobody says which version brought it."""

    name: str
    base: str
    since: int
    per_thread: bool


@dataclass(frozen=True)
class Gated:
    """A line of gated.txt."""

    kind: str
    parameters: str
    stream: str
    key: str
    size: str

    @property
    def arguments(self) -> str:
        """The names of the parameters."""
        return ", ".join(
            part.split()[-1].lstrip("*") for part in self.parameters.split(",") if part.strip()
        )


def forms() -> list[Form]:
    """Every form of symbols.txt, the first form of each that has a later one, per-thread ones."""
    found: dict[str, Form] = {}
    for line in HERE.joinpath("symbols.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, base, since, *kind = line.split()
        suffix = SUFFIX[kind[0]] if kind else ""
        for plain, version in ((name, int(since)), (base, 0)):
            if plain not in found or version:
                found[plain] = Form(plain, base, version, False)
                if suffix:
                    found[plain + suffix] = Form(plain + suffix, base, version, True)
    return list(found.values())


def gated() -> dict[str, Gated]:
    """gated.txt by exported name, without the per-thread forms."""
    found = {}
    for line in HERE.joinpath("gated.txt").read_text().splitlines():
        if not line.startswith("#"):
            kind, name, *rest = (part.strip() for part in line.split("|"))
            found[name] = Gated(kind, *rest)
    return found


def trampoline(index: int, name: str) -> str:
    """Jump to the driver's function; the first call looks it up."""
    return (
        f".globl {name}\n.type {name},@function\n{name}:\n"
        f"    endbr64\n    movq driver_function+{8 * index}(%rip), %r11\n    testq %r11, %r11\n"
        f"    je 1f\n    jmp *%r11\n1:  movl ${index}, %r11d\n    jmp driver_lazy\n"
        f".size {name}, .-{name}\n"
    )


def function(index: int, form: Form, about: Gated) -> str:
    """A function in C around the driver's own."""
    per_thread = int(form.per_thread)
    head = (
        f"EXPORT int {form.name}({about.parameters})\n{{\n"
        f"    int (*real)({about.parameters}) = driver_of({index});\n"
    )
    call = f"real({about.arguments})"
    stream = f"stream_of({about.stream}, {per_thread})"
    if about.kind in ("launch", "copy"):
        if about.kind == "launch":
            begin = f"gate_begin(&call, {stream}, (uintptr_t)({about.key}), 0)"
        else:
            begin = f"gate_begin(&call, {stream}, copy_key({index}, size), 1)"
            head += (
                f"    size_t size = {about.size};\n    int pass = gate_passes(size);\n"
                f"    if (pass)\n        return gate_passed(pass, {call});\n"
            )
        return head + (
            f"    struct call call;\n    {begin};\n    return gate_end(&call, {call});\n}}\n"
        )
    if about.kind in ("begin", "end"):
        return head + (
            f"    int before = capture_{about.kind}({stream});\n"
            f"    return capture_{about.kind}_done({stream}, before, {call});\n}}\n"
        )
    if about.kind == "stream":
        return head + f"    stream_ends({stream});\n    return {call};\n}}\n"
    if about.kind in ("touch", "pin"):
        pin = f"    memory_pin({about.size}, {about.key});\n" if about.kind == "pin" else ""
        return head + (
            f"    gate_attach();\n    int entered = memory_enter();\n{pin}"
            f"    int result = {call};\n    memory_leave(entered);\n    return result;\n}}\n"
        )
    return head + (
        f"    int begun = ends_begin();\n"
        f"    return {about.kind}_ended(begun, {about.stream}, {call});\n}}\n"
    )


def main(out: Path) -> None:
    """Write the three files into the directory."""
    every, looked_at = forms(), gated()
    names = {form.name for form in every}
    if unknown := sorted(set(looked_at) - names):
        raise SystemExit(f"gated.txt names what symbols.txt does not: {', '.join(unknown)}")

    def about(form: Form) -> Gated | None:
        plain = form.name.removesuffix("_ptsz").removesuffix("_ptds")
        return looked_at.get(plain if form.per_thread else form.name)

    stubs, functions, rows = [], [], []
    bases = {form.base for form in every if about(form)}
    for index, form in enumerate(every):
        found = about(form)
        if found is None:
            stubs.append(trampoline(index, form.name))
        elif found.kind != "own":
            functions.append(function(index, form, found))
        if form.base in bases:
            ours = f"(void *){form.name}" if found else "0"
            rows.append(
                f'    {{"{form.base}", {form.since}, {int(form.per_thread)}, {index}, {ours}}},'
            )
    out.mkdir(parents=True, exist_ok=True)
    out.joinpath("trampolines.S").write_text(
        ".text\n" + "".join(stubs) + '.section .note.GNU-stack,"",@progbits\n'
    )
    declared = [f"int {form.name}();" for form in every if about(form)]
    out.joinpath("table.h").write_text(
        f"#define FUNCTIONS {len(every)}\n"
        + "\n".join(f"#define AT_{form.name} {i}" for i, form in enumerate(every))
        + "\n"
    )
    out.joinpath("names.c").write_text(
        '#include "shim.h"\n#pragma GCC diagnostic ignored "-Wstrict-prototypes"\n'
        "const char *const driver_name[FUNCTIONS] = {\n"
        + "\n".join(f'    "{form.name}",' for form in every)
        + "\n};\n"
        + "\n".join(declared)
        + "\nconst struct form gated_form[] = {\n"
        + "\n".join(rows)
        + "\n    {0, 0, 0, 0, 0},\n};\n"
    )
    out.joinpath("gated.c").write_text('#include "shim.h"\n' + "\n".join(functions))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
