"""MLServer custom runtime: ONNX Runtime on the decoded input.

``parameters.extra.threads``: model calls at a time in a thread pool; 0 calls the model on the
event loop.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput

from onnx_session import open_session

IMAGE_SHAPE = (-1, 3, 224, 224)


class OnnxModel(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        parameters = self._settings.parameters
        self._session = open_session(parameters.uri)
        self._threads = int(parameters.extra["threads"])
        self._pool = ThreadPoolExecutor(max(1, self._threads))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = _decode(payload.inputs[0])
        if self._threads:
            y = await asyncio.get_running_loop().run_in_executor(self._pool, self._run, x)
        else:
            y = self._run(x)
        output = NumpyCodec.encode_output("y", y)
        return InferenceResponse(model_name=self.name, outputs=[output])

    def _run(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        answer: npt.NDArray[np.float32] = self._session.run(None, {"x": x})[0]
        return answer


def _decode(tensor: RequestInput) -> npt.NDArray[np.float32]:
    if tensor.datatype == "BYTES":
        raw = Base64Codec.decode_input(tensor)[0]
        return np.frombuffer(raw, dtype=np.float32).reshape(IMAGE_SHAPE)
    x: npt.NDArray[np.float32] = NumpyCodec.decode_input(tensor)
    return x
