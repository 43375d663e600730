"""Makes a package of Debian's: Cotenant with what it needs, in an environment at /usr/lib/cotenant.

    /usr/bin/python3 deploy/debian/build.py [--wheel FILE] [--extras nvidia,llm] [--out DIR]

It is for the release whose Python builds it, since compiled modules fit one minor version. The same
wheels, with the same SOURCE_DATE_EPOCH (else the time of the last commit), give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import papers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

LAUNCHERS = {"cotenant": "cotenant", "cotenant-dra": "cotenant.kube.command"}
SCRIPTS = ("postinst", "prerm", "postrm")
FILES = {
    "systemd/cotenant.service": "usr/lib/systemd/system/cotenant.service",
    "systemd/sysusers.conf": "usr/lib/sysusers.d/cotenant.conf",
    "systemd/cotenant.yaml": "etc/cotenant/cotenant.yaml",
}
"""Of ``deploy``, and where they go. What is in /etc is a conffile."""
COMPRESSION = ("-Zxz", "-z2")


def main() -> None:
    """Build as the command line says; prints the package's path."""
    args = arguments()
    python = Path(args.python).resolve() if args.python else distribution_python()
    os.environ.pop("PYTHONPATH", None)  # what lies there would pass for installed
    os.environ.setdefault("SOURCE_DATE_EPOCH", papers.last_commit(ROOT))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with tempfile.TemporaryDirectory(prefix="cotenant-deb-") as made:
        tree, wheel = Path(made, "tree"), args.wheel or build_wheel(Path(made), python)
        site = environment(tree / "usr/lib/cotenant", python)
        install(wheel, args, site.parents[2] / "bin/python3")
        tidy(site)
        compile_all(site, tree, python)
        place(tree)
        paper = papers.Papers(f"{version}-{args.revision}", args.maintainer, minor(python))
        paper.write(tree, ROOT, site)
        modes(tree)
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"cotenant_{paper.version}_{paper.architecture}.deb"
        run("dpkg-deb", "--root-owner-group", *COMPRESSION, "--build", tree, args.out / name)
        print(args.out / name)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Makes a Debian package of Cotenant.")
    parser.add_argument("--wheel", type=Path, help="Cotenant's (default: one is built)")
    parser.add_argument("--extras", default="", help="extras to bring along, such as nvidia,llm")
    parser.add_argument("--constraints", type=Path, help="pip's file of versions to take")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="directory (dist)")
    parser.add_argument("--revision", default="1", help="of the package (1)")
    parser.add_argument("--maintainer", default=papers.maintainer(), help="Name <address>")
    test = parser.add_argument_group("for tests, which give no package to hand out")
    test.add_argument("--python", help="another interpreter than the distribution's")
    test.add_argument("--no-deps", action="store_true", help="leave out what Cotenant needs")
    return parser.parse_args()


def distribution_python() -> Path:
    """The interpreter that the package will depend on: this one, if a package of Debian has it."""
    python = Path(sys.executable).resolve()
    owned = subprocess.run(["dpkg", "-S", python], capture_output=True, check=False)
    if owned.returncode or sys.prefix != sys.base_prefix:
        sys.exit(
            f"{sys.executable} is not of a Debian package, and the package would not find it "
            f"elsewhere; run: /usr/bin/python3 {' '.join(sys.argv)}"
        )
    return python


def minor(python: Path) -> str:
    """``3.11`` of an interpreter."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return run(python, "-c", code, quiet=True).strip()


def build_wheel(work: Path, python: Path) -> Path:
    """A wheel of what git knows of this tree, made elsewhere so that nothing is left in it."""
    source = work / "source"
    for name in run("git", "-C", ROOT, "ls-files", "-z", quiet=True).split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work, source)
    return next(work.glob("cotenant-*.whl"))


def environment(home: Path, python: Path) -> Path:
    """A virtual environment without pip, that does not say where it was made; its packages'
    directory."""
    version = minor(python)
    (home / "bin").mkdir(parents=True)
    (home / "bin/python3").symlink_to(python)
    (home / "pyvenv.cfg").write_text(
        f"home = {python.parent}\ninclude-system-site-packages = false\nversion = {version}\n"
    )
    site = home / "lib" / f"python{version}" / "site-packages"
    site.mkdir(parents=True)
    return site


def install(wheel: Path, args: argparse.Namespace, python: Path) -> None:
    """Cotenant and, as wheels alone, what it needs."""
    extras = f"[{args.extras}]" if args.extras else ""
    more: list[str | Path] = ["--no-deps"] if args.no_deps else ["--only-binary=:all:"]
    if args.constraints:
        more += ["--constraint", args.constraints]
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-compile", *more, f"{wheel.resolve()}{extras}")


def tidy(site: Path) -> None:
    """Remove what names the directory that this was built in, also from the lists of files."""
    for script in (site.parents[2] / "bin").iterdir():
        if script.name != "python3":
            script.unlink()
    for told in site.glob("*.dist-info/direct_url.json"):
        told.unlink()
    for record in site.glob("*.dist-info/RECORD"):
        lines = record.read_text().splitlines(keepends=True)
        names = (next(csv.reader([line]))[0] for line in lines)
        there = [line for line, name in zip(lines, names, strict=True) if (site / name).exists()]
        record.write_text("".join(there))


def compile_all(site: Path, tree: Path, python: Path) -> None:
    """Byte code that fits whatever the files' times are, under the names they will have. Some
    packages bring files that are no Python: these are left as they are."""
    command = [python, "-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", tree, "-p", "/", site]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False)


def place(tree: Path) -> None:
    """The files of ``deploy``, the commands, and what dpkg is to run."""
    for name, where in FILES.items():
        (tree / where).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE.parent / name, tree / where)
    (tree / "usr/bin").mkdir()
    for name, module in LAUNCHERS.items():
        text = (HERE / "launcher").read_text().replace("@MODULE@", module)
        (tree / "usr/bin" / name).write_text(text)
    (tree / "DEBIAN").mkdir()
    for name in SCRIPTS:
        shutil.copy(HERE / name, tree / "DEBIAN" / name)


def modes(tree: Path) -> None:
    """Read by all, written by root; programs can be run, whatever the builder's umask."""
    programs = {tree / "usr/bin" / name for name in LAUNCHERS}
    programs |= {tree / "DEBIAN" / name for name in SCRIPTS}
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path in programs else 0o644)


def run(*command: str | Path, quiet: bool = False) -> str:
    """What it prints; where it fails, so does this."""
    out = subprocess.PIPE if quiet else sys.stderr
    done = subprocess.run(list(map(str, command)), stdout=out, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {' '.join(map(str, command))}")
    return done.stdout or ""


if __name__ == "__main__":
    main()
