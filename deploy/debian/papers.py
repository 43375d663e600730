"""What a Debian package says of itself: control, checksums, changelog, copyright, documents."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

CONTROL = """\
Package: cotenant
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: python{python}, libc6, libgcc-s1, libstdc++6, default-systemd-sysusers | systemd-sysusers
Section: science
Priority: optional
Description: serve models under a latency objective, train on what is left
 One box serves models over the Open Inference Protocol and OpenAI's API under
 a latency objective, and lends what is left of its accelerators to training
 jobs. A lent unit is taken back within a request.
 .
 Brings what it needs in an environment of its own, /usr/lib/cotenant.
"""
COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: cotenant

Files: *
Copyright: 2026 the authors of Cotenant
License: Apache-2.0
 The text is in /usr/share/common-licenses/Apache-2.0.
Comment:
 These come along under licences of their own, whose texts are in NAME.dist-info
 of {site}:
"""


def maintainer() -> str:
    """As Debian's own tools have it."""
    name = os.environ.get("DEBFULLNAME", "Cotenant")
    return f"{name} <{os.environ.get('DEBEMAIL', 'cotenant@localhost')}>"


def last_commit(root: Path) -> str:
    """Its time in seconds since 1970; now, where there is no git."""
    command = ["git", "-C", root, "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or str(int(time.time()))


@dataclass(frozen=True)
class Papers:
    """``version``: the package's; ``python``: the minor version that it needs."""

    version: str
    maintainer: str
    python: str

    @property
    def architecture(self) -> str:
        """As dpkg calls this machine's."""
        command = ["dpkg", "--print-architecture"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def write(self, tree: Path, root: Path, site: Path) -> None:
        """All papers of the package in ``tree``, made of the repository at ``root``; ``site`` has
        the Python packages that come along. To be called last."""
        documents = tree / "usr/share/doc/cotenant"
        (documents / "docs").mkdir(parents=True)
        shutil.copy(root / "README.md", documents)
        for page in (root / "docs").glob("*.md"):
            shutil.copy(page, documents / "docs")
        found = sorted(
            importlib.metadata.distributions(path=[str(site)]), key=lambda d: d.name.lower()
        )
        pins = "".join(f"{d.name}=={d.version}\n" for d in found if d.name != "cotenant")
        (documents / "constraints.txt").write_text(pins)
        lines = (f"  {d.name} {d.version}: {licence(d)}\n" for d in found if d.name != "cotenant")
        head = COPYRIGHT.format(site=f"/{site.relative_to(tree)}")
        (documents / "copyright").write_text(head + "".join(lines))
        zipped(documents / "changelog.gz", (root / "CHANGELOG.md").read_bytes())
        zipped(documents / "changelog.Debian.gz", self._changelog().encode())
        self._control(tree)

    def _changelog(self) -> str:
        date = formatdate(int(os.environ["SOURCE_DATE_EPOCH"]))
        return (
            f"cotenant ({self.version}) stable; urgency=medium\n\n  * See changelog.gz.\n\n"
            f" -- {self.maintainer}  {date}\n"
        )

    def _control(self, tree: Path) -> None:
        files = sorted(p for p in tree.rglob("*") if p.is_file() and not p.is_symlink())
        files = [p for p in files if "DEBIAN" not in p.relative_to(tree).parts[:1]]
        names = {p: str(p.relative_to(tree)) for p in files}
        size = sum(-(-p.stat().st_size // 1024) for p in files)
        control = tree / "DEBIAN"
        (control / "control").write_text(
            CONTROL.format(
                version=self.version,
                architecture=self.architecture,
                maintainer=self.maintainer,
                size=size,
                python=self.python,
            )
        )
        kept = [f"/{name}\n" for name in names.values() if name.startswith("etc/")]
        (control / "conffiles").write_text("".join(kept))
        sums = (
            f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {name}\n"
            for path, name in names.items()
            if not name.startswith("etc/")
        )
        (control / "md5sums").write_text("".join(sums))


def licence(found: importlib.metadata.Distribution) -> str:
    """What a package says of its licence, in a line."""
    said = found.metadata
    for text in (said.get("License-Expression"), said.get("License")):
        if text and len(text) < 100 and "\n" not in text:
            return text
    kinds = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or () if "License" in c]
    return ", ".join(kinds) or "see its files"


def zipped(path: Path, data: bytes) -> None:
    """Compressed, without a name or a time in it."""
    path.write_bytes(gzip.compress(data, mtime=0))
