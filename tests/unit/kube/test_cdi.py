"""What is described to container runtimes."""

from __future__ import annotations

import re

import pytest

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.reservation import Reservation, ReservationStatus
from cotenant.kube import cdi
from cotenant.kube.checkpoint import Edits

HOOK = ("/usr/bin/python3", "/hook.py", "/control.sock")


def status(id: str, **more: object) -> ReservationStatus:
    return ReservationStatus(Reservation(id, "gpu0", units=1), "job", "ready", **more)  # type: ignore[arg-type]


def edits_of(edits: Edits) -> dict[str, object]:
    (device,) = cdi.spec("uid", {"work": edits}, HOOK)["devices"]
    return device["containerEdits"]


def test_the_hook_is_told_which_reservations_to_have_adopted() -> None:
    (hook,) = edits_of(Edits(("k8s:a", "k8s:b")))["hooks"]
    assert hook["hookName"] == "createRuntime"
    assert hook["path"] == HOOK[0]
    assert hook["args"] == [*HOOK, "k8s:a", "k8s:b"]
    assert hook["timeout"] > 0
    assert any(each.startswith("PATH=") for each in hook["env"])


def test_what_is_not_needed_is_left_out() -> None:
    assert set(edits_of(Edits(("k8s:a",)))) == {"hooks"}


def test_libraries_are_read_only_and_pages_are_not() -> None:
    library = "/opt/lib/shim.so"
    made = edits_of(
        Edits(("a",), {"PAGE": "/p/1"}, {"LD_PRELOAD": library}, ("/p", "/opt/lib", library))
    )
    assert made["env"] == ["PAGE=/p/1", f"LD_PRELOAD={library}"]
    found = {m["containerPath"]: m["options"] for m in made["mounts"]}
    assert all(m["hostPath"] == m["containerPath"] for m in made["mounts"])
    assert "rw" in found["/p"] and "ro" in found["/opt/lib"] and "ro" in found[library]
    assert all("rbind" in options for options in found.values())


def test_a_device_node_is_described_as_one() -> None:
    made = edits_of(Edits(("a",), mounts=("/dev/null",)))
    assert made["deviceNodes"] == [{"path": "/dev/null"}]
    assert "mounts" not in made


def test_reservations_of_a_request_are_merged() -> None:
    found = cdi.merged(
        "work",
        [
            status("a", env={"X": "1"}, prepend={"P": "/a:/b"}, mounts=("/m",)),
            status("b", env={"X": "1", "Y": "2"}, prepend={"P": "/b:/c"}, mounts=("/m", "/n")),
        ],
    )
    assert found == Edits(("a", "b"), {"X": "1", "Y": "2"}, {"P": "/a:/b:/c"}, ("/m", "/n"))


def test_a_container_can_report_to_its_node_and_reaches_no_more_of_it() -> None:
    found = cdi.merged("work", [status("a", reports="/state/reports/1"), status("b", reports="/x")])
    assert found.env == {"COTENANT_REPORT_SOCKET": "/state/reports/1/sock"}
    (mount,) = edits_of(found)["mounts"]
    assert mount["hostPath"] == mount["containerPath"] == "/state/reports/1"
    assert "rw" in mount["options"], "a socket that cannot be written to takes no reports"


def test_what_one_process_cannot_have_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        cdi.merged("work", [status("a", env={"X": "1"}), status("b", env={"X": "2"})])


def test_names_are_those_that_cdi_allows() -> None:
    kind, _, name = cdi.device_id("0e1c2b7a-5b6f-4a11-9c3e-aa0000000001", "my-request").partition(
        "="
    )
    assert re.fullmatch(r"[a-z.]+/[a-z]+", kind)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*[A-Za-z0-9]", name)
