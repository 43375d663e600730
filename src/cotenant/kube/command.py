"""The ``cotenant-dra`` command: the driver of one node, until it is told to end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cotenant.domain.errors import ConfigError, CotenantError
from cotenant.kube.binding import Binding
from cotenant.kube.claimwatch import ClaimWatch
from cotenant.kube.names import DRIVER
from cotenant.kube.paths import Paths
from cotenant.kube.ports import Cluster, NodeClient
from cotenant.kube.publisher import Publisher
from cotenant.serving.control_client import ControlClient

log = logging.getLogger(__name__)


class Started(Protocol):
    """Something that works in threads of its own between the two."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Kubelet(Started, Protocol):
    """The half that serves the kubelet; ``cotenant.kube.plugin.Plugin`` is one."""

    def kept(self) -> frozenset[str]: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the driver; returns the exit code (0 done, 1 failed with one line on stderr, 2 usage)."""
    args = _parser().parse_args(argv)
    log_from(args.log)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        _serve(args, stop)
    except CotenantError as error:
        print(f"cotenant-dra: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cotenant-dra",
        description="Offer a Cotenant node's devices to a Kubernetes cluster (1.36 or newer).",
    )
    node = parser.add_mutually_exclusive_group(required=True)
    node.add_argument("--state-dir", type=Path, help="the state directory of the node")
    node.add_argument("--socket", type=Path, help="its control socket, where that is elsewhere")
    parser.add_argument(
        "--node-name",
        default=os.environ.get("NODE_NAME", ""),
        help="what the cluster calls this machine (default: NODE_NAME)",
    )
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        help="how to reach the cluster (default: KUBECONFIG, or as the pod's service account)",
    )
    parser.add_argument(
        "--kubelet-dir", type=Path, default=Path("/var/lib/kubelet"), help="the kubelet's folder"
    )
    parser.add_argument(
        "--cdi-dir", type=Path, default=Path("/var/run/cdi"), help="where CDI specs are written"
    )
    parser.add_argument(
        "--host-python",
        type=Path,
        default=Path(sys.executable),
        help="the interpreter that container runtimes start the hook with",
    )
    parser.add_argument(
        "--log", default="info", choices=["debug", "info", "warning", "error"], help="log from here"
    )
    return parser


def _serve(args: argparse.Namespace, stop: threading.Event) -> None:
    if not args.node_name:
        raise ConfigError("say what the cluster calls this machine, with --node-name or NODE_NAME")
    try:
        from cotenant.kube.cluster import HttpCluster
    except ImportError as error:
        raise missing(error) from None

    socket = args.socket or args.state_dir / "control.sock"
    node = ControlClient(socket)
    with ExitStack() as stack:
        cluster = HttpCluster.connect(args.kubeconfig)
        stack.callback(cluster.close)
        plugin = _plugin(args, socket, node, cluster)
        # First: what is kept is known once it has started.
        stack.enter_context(running([plugin]))
        stack.enter_context(running(controllers(node, cluster, args.node_name, plugin.kept)))
        log.info("started", extra={"node": args.node_name})
        stop.wait()


def missing(error: ImportError) -> ConfigError:
    """What to do about a library that is not there."""
    return ConfigError(
        f"{error.name} is not installed; install it with: pip install 'cotenant[kubernetes]'"
    )


def controllers(
    node: NodeClient,
    cluster: Cluster,
    name: str,
    kept: Callable[[], frozenset[str]] = frozenset,
) -> list[Started]:
    """What keeps node and API server in step, in the order in which it is started. ``kept`` are ids
    of reservations that are not to be released."""
    watch = ClaimWatch(cluster, name)
    publisher = Publisher(node, cluster, name, watch.allocated)
    binding = Binding(node, cluster, name, watch)
    binding.kept = kept
    return [binding, publisher, watch]


@contextmanager
def running(parts: Sequence[Started]) -> Iterator[None]:
    """Started in order, stopped in reverse, also if one cannot be started."""
    with ExitStack() as stack:
        for part in parts:
            part.start()
            stack.callback(part.stop)
        yield


def _plugin(args: argparse.Namespace, socket: Path, node: NodeClient, cluster: Cluster) -> Kubelet:
    """The kubelet's half."""
    try:
        from cotenant.kube.plugin import Plugin
    except ImportError as error:
        raise missing(error) from None

    paths = Paths(
        control=socket.absolute(),
        registry=args.kubelet_dir / "plugins_registry",
        plugin=args.kubelet_dir / "plugins" / DRIVER,
        cdi=args.cdi_dir,
        python=args.host_python,
    )
    return Plugin(node, cluster, paths, args.node_name)


class _JsonLines(logging.Formatter):
    """A line a record: when, how bad, what, and what was said of it."""

    _known = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"at": self.formatTime(record), "level": record.levelname.lower()}
        line |= {"event": record.getMessage()}
        line |= {name: said for name, said in vars(record).items() if name not in self._known}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def log_from(level: str) -> None:
    """Log this driver's doings, and of libraries what went wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("cotenant").setLevel(level.upper())


if __name__ == "__main__":
    sys.exit(main())
