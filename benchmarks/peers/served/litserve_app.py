"""LitServe application: ONNX Runtime in its worker processes.

LitServe's protocol is the user's, so the JSON body is the one every server gets; an image comes
as a file upload, or as base64 in JSON.
"""

import argparse
import base64

import litserve
import numpy as np
import numpy.typing as npt

from onnx_session import open_session

IMAGE_SHAPE = (-1, 3, 224, 224)
Floats = npt.NDArray[np.float32]


class OnnxModel(litserve.LitAPI):  # type: ignore[misc]
    """Requests are Open Inference Protocol v2 in JSON, or a form with the image as file ``x``."""

    def __init__(self, path: str, batch: int, wait_s: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=wait_s)
        self._path = path

    def setup(self, device: str) -> None:
        self._session = open_session(self._path)

    # Unannotated on purpose: LitServe hands over parsed JSON only where it finds no type.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        if "x" in request:  # a form
            return np.frombuffer(request["x"].file.read(), dtype=np.float32).reshape(IMAGE_SHAPE)
        tensor = request["inputs"][0]
        if tensor["datatype"] == "BYTES":
            raw = base64.b64decode(tensor["data"][0])
            return np.frombuffer(raw, dtype=np.float32).reshape(IMAGE_SHAPE)
        return np.asarray(tensor["data"], dtype=np.float32).reshape(tensor["shape"])

    def batch(self, inputs: list[Floats]) -> Floats:
        return np.concatenate(inputs)

    def predict(self, x: Floats) -> Floats:
        answer: Floats = self._session.run(None, {"x": x})[0]
        return answer

    def unbatch(self, output: Floats) -> list[Floats]:
        return [output[index : index + 1] for index in range(len(output))]

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        tensor = {"name": "y", "datatype": "FP32", "shape": output.shape}
        return {"outputs": [tensor | {"data": output.ravel().tolist()}]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--wait-ms", type=float, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--api-servers", type=int, default=1)
    parser.add_argument("--fast-queue", action="store_true")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    api = OnnxModel(args.model, args.batch, args.wait_ms / 1000)
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=args.workers,
        fast_queue=args.fast_queue,
        disable_openapi_url=True,
    )
    server.run(
        host="127.0.0.1",
        port=args.port,
        num_api_servers=args.api_servers,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
