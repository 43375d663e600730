"""gRPC methods other than inference: health, metadata, statistics, repository, shared memory."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from cotenant.domain.port import NodePort
from cotenant.serving.admin import (
    EXTENSIONS,
    MODEL_DATA_TYPES,
    NO_CUDA_MEMORY,
    SERVER_NAME,
    check_load_parameters,
    server_version,
    statistics,
)
from cotenant.serving.grpc_wire import Code, Damaged
from cotenant.serving.grpc_work import Method
from cotenant.serving.protos import message_class
from cotenant.serving.regions import Regions

CHANGES = 8
"""Loads and unloads asked for at one time."""


class Admin:
    """The methods, each from a parsed request to a serialised answer."""

    def __init__(self, node: NodePort, regions: Regions) -> None:
        self._node = node
        self._regions = regions
        self._changes = 0

    def methods(self) -> dict[str, Method]:
        """Method name → what answers it; its request message is ``{name}Request``."""
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": self._region_status,
            "SystemSharedMemoryRegister": self._region_register,
            "SystemSharedMemoryUnregister": self._region_unregister,
        }

    def unsupported(self) -> dict[str, str]:
        """Methods of the service that are refused, and why."""
        return {
            "CudaSharedMemoryStatus": NO_CUDA_MEMORY,
            "CudaSharedMemoryRegister": NO_CUDA_MEMORY,
            "CudaSharedMemoryUnregister": NO_CUDA_MEMORY,
            "TraceSetting": "trace settings are not supported; see the node's journal",
            "LogSettings": "log settings cannot be changed over the network",
        }

    def _server_live(self, _: Any) -> bytes:
        return _answer("ServerLive", live=True)

    def _server_ready(self, _: Any) -> bytes:
        return _answer("ServerReady", ready=self._node.is_ready())

    def _model_ready(self, request: Any) -> bytes:
        return _answer("ModelReady", ready=self._node.model_ready(request.name, request.version))

    def _server_metadata(self, _: Any) -> bytes:
        return _answer(
            "ServerMetadata", name=SERVER_NAME, version=server_version(), extensions=EXTENSIONS
        )

    def _model_metadata(self, request: Any) -> bytes:
        meta = self._node.metadata(request.name, request.version)
        return _answer(
            "ModelMetadata",
            name=meta.name,
            versions=meta.versions,
            platform=meta.platform,
            inputs=[
                {"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in meta.inputs
            ],
            outputs=[
                {"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in meta.outputs
            ],
        )

    def _model_config(self, request: Any) -> bytes:
        meta = self._node.metadata(request.name, request.version)
        tensors = {
            side: [
                {"name": t.name, "data_type": MODEL_DATA_TYPES[t.datatype][1], "dims": t.shape}
                | ({"optional": True} if t.optional else {})
                for t in group
            ]
            for side, group in (("input", meta.inputs), ("output", meta.outputs))
        }
        # See cotenant.serving.admin.model_config for what this means.
        config = {
            "name": meta.name,
            "platform": meta.platform,
            "max_batch_size": 0,
            "model_transaction_policy": {"decoupled": meta.pieces},
            **tensors,
        }
        return _answer("ModelConfig", config=config)

    def _model_statistics(self, request: Any) -> bytes:
        found = [
            {
                "name": s.name,
                "version": s.version,
                "last_inference": s.last_inference_ms,
                "inference_count": s.inference_count,
                "execution_count": s.execution_count,
                "inference_stats": {
                    key: {"count": count, "ns": ns} for key, (count, ns) in s.durations.items()
                },
            }
            for s in statistics(self._node, request.name, request.version)
        ]
        return _answer("ModelStatistics", model_stats=found)

    def _index(self, request: Any) -> bytes:
        models = [
            {"name": e.name, "version": e.version, "state": e.state, "reason": e.reason}
            for e in self._node.index()
            if e.state == "READY" or not request.ready
        ]
        return _answer("RepositoryIndex", models=models)

    async def _load(self, request: Any) -> bytes:
        check_load_parameters(list(request.parameters))
        await self._change(self._node.load(request.model_name))
        return _answer("RepositoryModelLoad")

    async def _unload(self, request: Any) -> bytes:
        await self._change(self._node.unload(request.model_name))
        return _answer("RepositoryModelUnload")

    async def _change(self, change: Coroutine[Any, Any, None]) -> None:
        if self._changes >= CHANGES:
            change.close()
            problem = f"{CHANGES} loads and unloads are under way; try again when one is done"
            raise Damaged(Code.RESOURCE_EXHAUSTED, problem)
        self._changes += 1
        try:
            await change
        finally:
            self._changes -= 1

    def _region_status(self, request: Any) -> bytes:
        answer = message_class("SystemSharedMemoryStatusResponse")()
        for info in self._regions.status(request.name):
            entry = answer.regions[info.name]
            entry.name, entry.key = info.name, info.key
            entry.offset, entry.byte_size = info.offset, info.byte_size
        data: bytes = answer.SerializeToString()
        return data

    def _region_register(self, request: Any) -> bytes:
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return _answer("SystemSharedMemoryRegister")

    def _region_unregister(self, request: Any) -> bytes:
        self._regions.unregister(request.name)
        return _answer("SystemSharedMemoryUnregister")


def _answer(method: str, **fields: Any) -> bytes:
    data: bytes = message_class(f"{method}Response")(**fields).SerializeToString()
    return data
