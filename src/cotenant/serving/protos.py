"""The messages of the gRPC services spoken here, built at import from tables: inference, health
(``grpc.health.v1``) and reflection (``grpc.reflection.v1`` and ``v1alpha``, which are alike).

Field names and numbers are the wire format that public clients speak. The messages live in a
descriptor pool of their own, so a client library's generated ones can be loaded beside them.
Only what this server speaks is listed: unknown fields of a newer client are skipped, as
protobuf does.

A line of a table is ``number name type``; ``type`` is a scalar, an enum or message of the table,
or either of these after ``repeated`` or ``map`` (whose keys are strings). ``oneof`` before it
puts the field into the message's single choice. ``Name = A B C`` is an enum from 0.

A service's table has its methods: ``name request answer``, either after ``stream``; with the name
alone, the messages are ``{name}Request`` and ``{name}Response``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = "inference.GRPCInferenceService"

_TABLE = """
ServerLiveRequest
ServerLiveResponse
    1 live bool
ServerReadyRequest
ServerReadyResponse
    1 ready bool
ModelReadyRequest
    1 name string
    2 version string
ModelReadyResponse
    1 ready bool
ServerMetadataRequest
ServerMetadataResponse
    1 name string
    2 version string
    3 extensions repeated string
ModelMetadataRequest
    1 name string
    2 version string
ModelMetadataResponse
    1 name string
    2 versions repeated string
    3 platform string
    4 inputs repeated ModelMetadataResponse.TensorMetadata
    5 outputs repeated ModelMetadataResponse.TensorMetadata
ModelMetadataResponse.TensorMetadata
    1 name string
    2 datatype string
    3 shape repeated int64
InferParameter
    1 bool_param oneof bool
    2 int64_param oneof int64
    3 string_param oneof string
    4 double_param oneof double
    5 uint64_param oneof uint64
InferTensorContents
    1 bool_contents repeated bool
    2 int_contents repeated int32
    3 int64_contents repeated int64
    4 uint_contents repeated uint32
    5 uint64_contents repeated uint64
    6 fp32_contents repeated float
    7 fp64_contents repeated double
    8 bytes_contents repeated bytes
ModelInferRequest
    1 model_name string
    2 model_version string
    3 id string
    4 parameters map InferParameter
    5 inputs repeated ModelInferRequest.InferInputTensor
    6 outputs repeated ModelInferRequest.InferRequestedOutputTensor
    7 raw_input_contents repeated bytes
ModelInferRequest.InferInputTensor
    1 name string
    2 datatype string
    3 shape repeated int64
    4 parameters map InferParameter
    5 contents InferTensorContents
ModelInferRequest.InferRequestedOutputTensor
    1 name string
    2 parameters map InferParameter
ModelInferResponse
    1 model_name string
    2 model_version string
    3 id string
    4 parameters map InferParameter
    5 outputs repeated ModelInferResponse.InferOutputTensor
    6 raw_output_contents repeated bytes
ModelInferResponse.InferOutputTensor
    1 name string
    2 datatype string
    3 shape repeated int64
    4 parameters map InferParameter
    5 contents InferTensorContents
ModelStreamInferResponse
    1 error_message string
    2 infer_response ModelInferResponse
ModelConfigRequest
    1 name string
    2 version string
ModelConfigResponse
    1 config ModelConfig
ModelConfig
    1 name string
    2 platform string
    4 max_batch_size int32
    5 input repeated ModelInput
    6 output repeated ModelOutput
    19 model_transaction_policy ModelTransactionPolicy
ModelTransactionPolicy
    1 decoupled bool
ModelInput
    1 name string
    2 data_type DataType
    4 dims repeated int64
    8 optional bool
ModelOutput
    1 name string
    2 data_type DataType
    3 dims repeated int64
ModelStatisticsRequest
    1 name string
    2 version string
StatisticDuration
    1 count uint64
    2 ns uint64
InferStatistics
    1 success StatisticDuration
    2 fail StatisticDuration
    3 queue StatisticDuration
    4 compute_input StatisticDuration
    5 compute_infer StatisticDuration
    6 compute_output StatisticDuration
ModelStatistics
    1 name string
    2 version string
    3 last_inference uint64
    4 inference_count uint64
    5 execution_count uint64
    6 inference_stats InferStatistics
ModelStatisticsResponse
    1 model_stats repeated ModelStatistics
ModelRepositoryParameter
    1 bool_param oneof bool
    2 int64_param oneof int64
    3 string_param oneof string
    4 bytes_param oneof bytes
RepositoryIndexRequest
    1 repository_name string
    2 ready bool
RepositoryIndexResponse
    1 models repeated RepositoryIndexResponse.ModelIndex
RepositoryIndexResponse.ModelIndex
    1 name string
    2 version string
    3 state string
    4 reason string
RepositoryModelLoadRequest
    1 repository_name string
    2 model_name string
    3 parameters map ModelRepositoryParameter
RepositoryModelLoadResponse
RepositoryModelUnloadRequest
    1 repository_name string
    2 model_name string
    3 parameters map ModelRepositoryParameter
RepositoryModelUnloadResponse
SystemSharedMemoryStatusRequest
    1 name string
SystemSharedMemoryStatusResponse
    1 regions map SystemSharedMemoryStatusResponse.RegionStatus
SystemSharedMemoryStatusResponse.RegionStatus
    1 name string
    2 key string
    3 offset uint64
    4 byte_size uint64
SystemSharedMemoryRegisterRequest
    1 name string
    2 key string
    3 offset uint64
    4 byte_size uint64
SystemSharedMemoryRegisterResponse
SystemSharedMemoryUnregisterRequest
    1 name string
SystemSharedMemoryUnregisterResponse
"""

_METHODS = """
ServerLive
ServerReady
ModelReady
ServerMetadata
ModelMetadata
ModelInfer
ModelStreamInfer stream ModelInferRequest stream ModelStreamInferResponse
ModelConfig
ModelStatistics
RepositoryIndex
RepositoryModelLoad
RepositoryModelUnload
SystemSharedMemoryStatus
SystemSharedMemoryRegister
SystemSharedMemoryUnregister
"""

_HEALTH_TABLE = """
HealthCheckRequest
    1 service string
HealthCheckResponse
    1 status HealthCheckResponse.ServingStatus
HealthCheckResponse.ServingStatus = UNKNOWN SERVING NOT_SERVING SERVICE_UNKNOWN
"""

_HEALTH_METHODS = """
Check HealthCheckRequest HealthCheckResponse
Watch HealthCheckRequest stream HealthCheckResponse
"""

_REFLECTION_TABLE = """
ServerReflectionRequest
    1 host string
    3 file_by_filename oneof string
    4 file_containing_symbol oneof string
    5 file_containing_extension oneof ExtensionRequest
    6 all_extension_numbers_of_type oneof string
    7 list_services oneof string
ExtensionRequest
    1 containing_type string
    2 extension_number int32
ServerReflectionResponse
    1 valid_host string
    2 original_request ServerReflectionRequest
    4 file_descriptor_response oneof FileDescriptorResponse
    5 all_extension_numbers_response oneof ExtensionNumberResponse
    6 list_services_response oneof ListServiceResponse
    7 error_response oneof ErrorResponse
FileDescriptorResponse
    1 file_descriptor_proto repeated bytes
ExtensionNumberResponse
    1 base_type_name string
    2 extension_number repeated int32
ListServiceResponse
    1 service repeated ServiceResponse
ServiceResponse
    1 name string
ErrorResponse
    1 error_code int32
    2 error_message string
"""

_REFLECTION_METHODS = """
ServerReflectionInfo stream ServerReflectionRequest stream ServerReflectionResponse
"""

DATA_TYPES = (
    "TYPE_INVALID",
    "TYPE_BOOL",
    "TYPE_UINT8",
    "TYPE_UINT16",
    "TYPE_UINT32",
    "TYPE_UINT64",
    "TYPE_INT8",
    "TYPE_INT16",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_FP16",
    "TYPE_FP32",
    "TYPE_FP64",
    "TYPE_STRING",
    "TYPE_BF16",
)
"""Names of the enum DataType, in the order of their numbers from 0."""


_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}


HEALTH = "grpc.health.v1.Health"
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_FILES = (
    (SERVICE, f"{_TABLE}DataType = {' '.join(DATA_TYPES)}\n", _METHODS),
    (HEALTH, _HEALTH_TABLE, _HEALTH_METHODS),
    *((service, _REFLECTION_TABLE, _REFLECTION_METHODS) for service in REFLECTION),
)
_CHOICES = {"ServerReflectionRequest": "message_request"} | {
    "ServerReflectionResponse": "message_response"
}


class _File:
    """Makes a file descriptor (proto3) of a service's tables."""

    def __init__(self, service: str, messages: str, methods: str) -> None:
        self.package, _, name = service.rpartition(".")
        self.file = descriptor_pb2.FileDescriptorProto(
            name=f"cotenant/{self.package}.proto", package=self.package, syntax="proto3"
        )
        self._made: dict[str, Any] = {"": self.file}
        lines = messages.strip().splitlines()
        self._enums = {line.split()[0] for line in lines if " = " in line}
        path = ""
        for line in lines:
            if line[0] == " ":
                self._add_field(path, line.split())
            elif " = " in line:
                self._add_enum(line)
            else:
                path = line
                outer, _, inner = path.rpartition(".")
                parent = self._made[outer]
                group = parent.nested_type if outer else parent.message_type
                self._made[path] = group.add(name=inner)
        described = self.file.service.add(name=name)
        for line in methods.strip().splitlines():
            self._add_method(described, line.split())

    def _add_enum(self, line: str) -> None:
        path, _, *names = line.split()
        outer, _, inner = path.rpartition(".")
        enum = self._made[outer].enum_type.add(name=inner)
        for number, name in enumerate(names):
            enum.value.add(name=name, number=number)

    def _add_field(self, path: str, words: list[str]) -> None:
        number, name, *modifiers, kind = words
        message = self._made[path]
        field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
        if "oneof" in modifiers:
            if not message.oneof_decl:
                message.oneof_decl.add(name=_CHOICES.get(path, "parameter_choice"))
            field.oneof_index = 0
        if "repeated" in modifiers or "map" in modifiers:
            field.label = _Field.LABEL_REPEATED
        if "map" in modifiers:
            entry = f"{path}.{name.title().replace('_', '')}Entry"
            self._made[entry] = message.nested_type.add(name=entry.rpartition(".")[2])
            self._made[entry].options.map_entry = True
            self._add_field(entry, ["1", "key", "string"])
            self._add_field(entry, ["2", "value", kind])
            kind = entry
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
        else:
            field.type = _Field.TYPE_ENUM if kind in self._enums else _Field.TYPE_MESSAGE
            field.type_name = f".{self.package}.{kind}"

    def _add_method(self, service: Any, words: list[str]) -> None:
        name, *rest = words
        types = [word for word in rest if word != "stream"] or [f"{name}Request", f"{name}Response"]
        service.method.add(
            name=name,
            input_type=f".{self.package}.{types[0]}",
            output_type=f".{self.package}.{types[1]}",
            client_streaming=rest[:1] == ["stream"],
            server_streaming="stream" in rest[1:],
        )


def files() -> list[descriptor_pb2.FileDescriptorProto]:
    """Every service's file."""
    return [_File(*tables).file for tables in _FILES]


_pool = descriptor_pool.DescriptorPool()
for _each in files():
    _pool.Add(_each)


@cache
def message_class(name: str, package: str = PACKAGE) -> Any:
    """The message class of that name, such as ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{package}.{name}"))


ModelInferRequest = message_class("ModelInferRequest")
ModelInferResponse = message_class("ModelInferResponse")
ModelStreamInferResponse = message_class("ModelStreamInferResponse")
