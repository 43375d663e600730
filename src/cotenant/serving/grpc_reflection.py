"""gRPC server reflection: clients such as grpcurl ask which services and messages there are."""

from __future__ import annotations

from typing import Any

from cotenant.serving import protos
from cotenant.serving.grpc_calls import Route, StreamCall
from cotenant.serving.grpc_wire import Code
from cotenant.serving.grpc_work import Asking, Method


class Reflection:
    """``ServerReflectionInfo``, in both its packages."""

    def __init__(self) -> None:
        files = protos.files()
        self._services = sorted(f"{f.package}.{s.name}" for f in files for s in f.service)
        self._files = {file.name: file.SerializeToString() for file in files}
        self._symbols = {
            f"{file.package}.{name}": self._files[file.name]
            for file in files
            for name in _names(file)
        }

    def routes(self, limit: int) -> dict[str, Route]:
        """Path → how it is served."""
        found = {}
        for service in protos.REFLECTION:
            package = service.rpartition(".")[0]
            request = protos.message_class("ServerReflectionRequest", package)
            method = "ServerReflectionInfo"
            found[f"/{service}/{method}"] = Route(
                method, StreamCall, Asking, request, self._method(package), limit
            )
        return found

    def _method(self, package: str) -> Method:
        answer_class = protos.message_class("ServerReflectionResponse", package)

        def answer(request: Any) -> bytes:
            said = answer_class(valid_host=request.host, original_request=request)
            self._answer(request, said)
            data: bytes = said.SerializeToString()
            return data

        return answer

    def _answer(self, request: Any, said: Any) -> None:
        asked = request.WhichOneof("message_request")
        file = None
        if asked == "list_services":
            for name in self._services:
                said.list_services_response.service.add(name=name)
            return
        if asked == "file_by_filename":
            file = self._files.get(request.file_by_filename)
        elif asked == "file_containing_symbol":
            file = self._symbols.get(request.file_containing_symbol)
        if file is not None:
            said.file_descriptor_response.file_descriptor_proto.append(file)
            return
        error = said.error_response
        if asked is None:
            error.error_code, error.error_message = Code.INVALID_ARGUMENT, "nothing is asked"
        else:
            error.error_code, error.error_message = Code.NOT_FOUND, "there is no such thing here"


def _names(file: Any) -> list[str]:
    """Messages, enums, services and methods of a file, without its package."""
    found = [enum.name for enum in file.enum_type]
    for service in file.service:
        found += [service.name, *(f"{service.name}.{method.name}" for method in service.method)]
    inside = [(message.name, message) for message in file.message_type]
    while inside:
        path, message = inside.pop()
        found += [path, *(f"{path}.{enum.name}" for enum in message.enum_type)]
        inside += [(f"{path}.{nested.name}", nested) for nested in message.nested_type]
    return found
