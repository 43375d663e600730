"""Where in a recording somebody speaks: ``python speech.py --wav FILE``

The model (silero-vad) hears 32 ms at a time and remembers by a state, which it gives with each
answer and takes with the next chunk. So the stream is the client's: the node keeps nothing of it,
any instance may answer any chunk, and chunks of several streams share batches.
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

import numpy as np
from asking import Array, Server

RATE = 16_000
CHUNK = 512
BEFORE = 64
"""Samples of the chunk before that the model hears again."""
SPEECH = 0.5


class Stream:
    """One recording on its way through the model ``speech``."""

    def __init__(self, server: Server, model: str = "speech") -> None:
        self._server = server
        self._model = model
        self._before = np.zeros((1, BEFORE), np.float32)
        self._memory = np.zeros((1, 2, 128), np.float32)

    def hear(self, chunk: Array) -> float:
        """How likely the next 512 samples (FP32, -1 to 1) are speech."""
        heard = np.concatenate([self._before, chunk.reshape(1, CHUNK)], axis=1)
        answer = self._server.ask(self._model, input=heard, memory=self._memory)
        self._before, self._memory = heard[:, -BEFORE:], answer["memoryN"]
        return float(answer["output"][0, 0])


def chunks(sound: Array) -> list[Array]:
    """Chunks of 512 samples, the last one filled up with silence."""
    whole = np.zeros(-(-len(sound) // CHUNK) * CHUNK, np.float32)
    whole[: len(sound)] = sound
    return list(whole.reshape(-1, CHUNK))


def read(path: Path) -> Array:
    """Samples (FP32, -1 to 1) of a WAV file of 16 bits and 16 kHz; channels are averaged.

    Raises SystemExit for other files.
    """
    with wave.open(str(path)) as file:
        if (file.getsampwidth(), file.getframerate()) != (2, RATE):
            raise SystemExit(f"{path}: a WAV file of 16 bits and {RATE} Hz is needed")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels()).mean(axis=1).astype(np.float32) / 32768


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wav", type=Path, required=True, help="16 bits, 16 kHz")
    parser.add_argument("--server", default="127.0.0.1:8000", metavar="HOST:PORT")
    args = parser.parse_args()
    server = Server(args.server)
    stream, since = Stream(server), None
    for number, chunk in enumerate([*chunks(read(args.wav)), np.zeros(CHUNK, np.float32)]):
        at = number * CHUNK / RATE
        if stream.hear(chunk) >= SPEECH:
            since = at if since is None else since
        elif since is not None:
            print(f"{since:7.2f} s to {at:7.2f} s")
            since = None
    server.close()


if __name__ == "__main__":
    main()
