"""The messages of ``inference.GRPCInferenceService``, built at import from a table.

Field names and numbers are the wire format that public clients speak. The messages live in a
descriptor pool of their own, so a client library's generated ones can be loaded beside them.
Only what this server speaks is listed: unknown fields of a newer client are skipped, as
protobuf does.

A line of the table is ``number name type``; ``type`` is a scalar, a message of the table, or
either of these after ``repeated`` or ``map`` (whose keys are strings). ``oneof`` before it
puts the field into the message's single choice.
"""

from __future__ import annotations

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
ModelInput
    1 name string
    2 data_type DataType
    4 dims repeated int64
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


def build_file() -> descriptor_pb2.FileDescriptorProto:
    """The table as a file descriptor (proto3, package ``inference``)."""
    file = descriptor_pb2.FileDescriptorProto(
        name="cotenant/inference.proto", package=PACKAGE, syntax="proto3"
    )
    data_type = file.enum_type.add(name="DataType")
    for number, name in enumerate(DATA_TYPES):
        data_type.value.add(name=name, number=number)
    messages: dict[str, descriptor_pb2.DescriptorProto] = {}
    message = descriptor_pb2.DescriptorProto()
    for line in _TABLE.strip().splitlines():
        if line[0] != " ":
            outer, _, inner = line.rpartition(".")
            message = messages[outer].nested_type.add() if outer else file.message_type.add()
            message.name = inner
            messages[line] = message
        else:
            _add_field(message, line.split(), _path(messages, message))
    return file


def _path(messages: dict[str, Any], message: Any) -> str:
    return next(name for name, known in messages.items() if known is message)


def _add_field(message: descriptor_pb2.DescriptorProto, words: list[str], path: str) -> None:
    number, name, *modifiers, kind = words
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if "oneof" in modifiers:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if "repeated" in modifiers or "map" in modifiers:
        field.label = _Field.LABEL_REPEATED
    if "map" in modifiers:
        entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        _add_field(entry, ["1", "key", "string"], "")
        _add_field(entry, ["2", "value", kind], "")
        kind = f"{path}.{entry.name}"
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


_pool = descriptor_pool.DescriptorPool()
_pool.Add(build_file())


def message_class(name: str) -> Any:
    """The message class of that name, such as ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


ModelInferRequest = message_class("ModelInferRequest")
ModelInferResponse = message_class("ModelInferResponse")
ModelStreamInferResponse = message_class("ModelStreamInferResponse")
