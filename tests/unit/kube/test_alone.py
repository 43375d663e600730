"""What can be used without the libraries of the extra."""

from __future__ import annotations

import subprocess
import sys


def test_what_needs_no_cluster_and_no_kubelet_loads_neither_library() -> None:
    code = (
        "import sys, cotenant, cotenant.kube.binding, cotenant.kube.command, cotenant.kube.slices;"
        "sys.exit(any(name in sys.modules for name in ('grpc', 'httpx2', 'lightkube')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_library_is_said_in_one_line() -> None:
    code = (
        "import sys; sys.modules['lightkube'] = None\n"
        "from cotenant.kube.command import main\n"
        "sys.exit(main(['--state-dir', '/nowhere', '--node-name', 'n']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "cotenant[kubernetes]" in done.stderr
