"""The messages and services that the kubelet speaks, built at import from tables.

``pluginregistration`` v1, ``dra`` v1 and ``dra-health`` v1alpha1 with its like v1, as in
kubernetes/kubelet ``pkg/apis``. Kubernetes 1.36 has v1alpha1 of the health service, 1.37 both, and
1.40 is to have v1 alone (kubernetes/kubernetes#139477). Field names and numbers are the wire
format. The messages live in a descriptor pool of their own.

A line of a table is ``number name type``; ``type`` is a scalar or a message or enum of the table,
``repeated``, ``optional`` or ``map`` (whose keys are strings) before it. ``Name = A B`` is an enum
from 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

REGISTRATION: Final = "pluginregistration.Registration"
PLUGIN: Final = "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin"
HEALTH: Final = ("v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth")
SERVICES: Final = ("v1.DRAPlugin", *HEALTH)
"""What the plugin says it speaks. The kubelet takes the first that it knows, of each kind."""

UNKNOWN, HEALTHY, UNHEALTHY = range(3)
"""The numbers of HealthStatus."""

_REGISTRATION = """
PluginInfo
    1 type string
    2 name string
    3 endpoint string
    4 supported_versions repeated string
RegistrationStatus
    1 plugin_registered bool
    2 error string
RegistrationStatusResponse
InfoRequest
"""

_PLUGIN = """
Claim
    1 namespace string
    2 uid string
    3 name string
Device
    1 request_names repeated string
    2 pool_name string
    3 device_name string
    4 cdi_device_ids repeated string
    5 share_id optional string
NodePrepareResourcesRequest
    1 claims repeated Claim
NodePrepareResourceResponse
    1 devices repeated Device
    2 error string
NodePrepareResourcesResponse
    1 claims map NodePrepareResourceResponse
NodeUnprepareResourcesRequest
    1 claims repeated Claim
NodeUnprepareResourceResponse
    1 error string
NodeUnprepareResourcesResponse
    1 claims map NodeUnprepareResourceResponse
"""

_HEALTH = """
HealthStatus = UNKNOWN HEALTHY UNHEALTHY
NodeWatchResourcesRequest
DeviceIdentifier
    1 pool_name string
    2 device_name string
DeviceHealth
    1 device DeviceIdentifier
    2 health HealthStatus
    3 last_updated_time int64
    4 health_check_timeout_seconds int64
    5 message string
NodeWatchResourcesResponse
    1 devices repeated DeviceHealth
"""

_TABLES = {
    "pluginregistration": _REGISTRATION,
    "k8s.io.kubelet.pkg.apis.dra.v1": _PLUGIN,
    "v1": _HEALTH,
    "v1alpha1": _HEALTH,
}
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
}


def _file(package: str, table: str) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"cotenant/kube/{package}.proto", package=package, syntax="proto3"
    )
    enums: set[str] = set()
    message: Any = None
    for line in table.strip().splitlines():
        if line[0] == " ":
            _add_field(message, line.split(), package, enums)
        elif " = " in line:
            name, _, *values = line.split()
            enum = file.enum_type.add(name=name)
            for number, value in enumerate(values):
                enum.value.add(name=value, number=number)
            enums.add(name)
        else:
            message = file.message_type.add(name=line)
    return file


def _add_field(message: Any, words: list[str], package: str, enums: set[str]) -> None:
    number, name, *modifiers, kind = words
    label = _Field.LABEL_OPTIONAL
    type_name = f".{package}.{kind}"
    if "map" in modifiers:
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, ["1", "key", "string"], package, enums)
        _add_field(entry, ["2", "value", kind], package, enums)
        type_name = f".{package}.{message.name}.{entry.name}"
    if modifiers in (["map"], ["repeated"]):
        label = _Field.LABEL_REPEATED
    field = message.field.add(name=name, number=int(number), label=label)
    if modifiers == ["optional"]:
        field.proto3_optional = True
        field.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind in enums else _Field.TYPE_MESSAGE
        field.type_name = type_name


_pool = descriptor_pool.DescriptorPool()
for _package, _table in _TABLES.items():
    _pool.Add(_file(_package, _table))


@cache
def message_class(service: str, name: str) -> Any:
    """The class of a message of a service's package."""
    package = service.rpartition(".")[0]
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{package}.{name}"))
