"""The file that ``torch.export.save`` writes: a zip of JSON and of the bytes of tensors.

Nothing in it is unpickled or evaluated. ``torch.export.load`` does both: it unpickles sample
inputs, custom objects and tensors of classes of their own, evaluates formulas of sizes as source
text, and takes any function that it finds in PyTorch's modules for an operator. So it is not used.
Members that are not needed are not read, and what would have to be unpickled is refused.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from cotenant.domain.errors import ModelError
from cotenant.engines.exported.schema import (
    MAJOR,
    STRIDED,
    Payload,
    PayloadConfig,
    Program,
    Written,
)
from cotenant.engines.exported.shapes import fixed

HOW: Final = (
    "write it with torch.export.save(torch.export.export(model.eval(), inputs), 'model.pt2')"
)
FORMAT, VERSION = b"pt2", b"0"
MODEL: Final = "models/model.json"
CHUNK: Final = 4 << 20
"""Bytes that are read at a time."""
WEIGHTS, CONSTANTS = "data/weights/", "data/constants/"
DTYPES: Final = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
    29: torch.float8_e4m3fn,
    30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz,
    34: torch.uint32,
    35: torch.uint64,
}
"""PyTorch's types by their numbers in the schema."""


class Archive:
    """An open file. Raises ModelError for what is no exported program of today."""

    def __init__(self, path: Path) -> None:
        try:
            self._size = path.stat().st_size
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ModelError(f"it is no archive of an exported program; {HOW}") from error
        names = self._zip.namelist()
        self._root = names[0].partition("/")[0] if names else ""
        self._bytes: dict[str, torch.Tensor] = {}
        self._members = {name.partition("/")[2] for name in names}
        self._refuse_others({*names})
        self.program = self._program()
        self._weights = self._config(f"{WEIGHTS}model_weights_config.json")
        self._constants = self._config(f"{CONSTANTS}model_constants_config.json")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _refuse_others(self, names: set[str]) -> None:
        have = self._members
        if "serialized_exported_program.json" in names:
            raise ModelError(
                "it was written by PyTorch 2.7 or before, and holds pickles; export the model anew"
            )
        if any(name.startswith("data/aotinductor/") for name in have):
            raise ModelError(
                "it is an AOTInductor package, machine code for one kind of processor; "
                f"an exported program is wanted: {HOW}"
            )
        if "archive_format" not in have:
            pickled = any(name.endswith(".pkl") for name in have)
            what = "a pickle (torch.save, or TorchScript)" if pickled else "another kind of zip"
            raise ModelError(f"it is {what}, which is never loaded; {HOW}")
        found = (self._read("archive_format"), self._read("archive_version"))
        if found != (FORMAT, VERSION):
            said = b" ".join(found)[:40].decode(errors="replace")
            raise ModelError(f"it is an archive of the format {said}; pt2 0 is read: {HOW}")
        if "byteorder" in have and self._read("byteorder") != b"little":
            raise ModelError("it was written on a machine of the other byte order; export it here")
        if MODEL not in have:
            others = ", ".join(sorted(n for n in have if n.startswith("models/"))) or "none"
            raise ModelError(f"it holds no {MODEL}; the programs in it: {others}")
        for old in (f"{WEIGHTS}model.pt", f"{CONSTANTS}model.pt"):
            if old in have:
                raise ModelError(
                    f"it holds {old}, a pickle of an older PyTorch, which is never loaded; "
                    "export the model anew"
                )

    def _program(self) -> Program:
        data = self._read(MODEL)
        try:
            written = msgspec.json.decode(data, type=Written)
            version = written.schema_version
            if version.major != MAJOR:
                raise ModelError(
                    f"it was written by PyTorch {written.torch_version}, whose schema is "
                    f"{version.major}.{version.minor}; {MAJOR} is read: export it with PyTorch "
                    f"{torch.__version__}"
                )
            return msgspec.json.decode(data, type=Program)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ModelError(f"{MODEL}: {error}") from error

    def _config(self, name: str) -> dict[str, Payload]:
        try:
            return msgspec.json.decode(self._read(name), type=PayloadConfig).config
        except (msgspec.DecodeError, RecursionError) as error:
            raise ModelError(f"{name}: {error}") from error

    def weight(self, name: str) -> torch.Tensor:
        """A parameter or a persistent buffer; raises ModelError."""
        return self._tensor(name, self._weights, WEIGHTS)

    def constant(self, name: str) -> torch.Tensor:
        """Any other tensor that belongs to the program; raises ModelError."""
        return self._tensor(name, self._constants, CONSTANTS)

    def _tensor(self, name: str, config: dict[str, Payload], under: str) -> torch.Tensor:
        payload = config.get(name)
        if payload is None:
            raise ModelError(f"it does not hold the tensor {name!r}, which its program needs")
        meta = payload.tensor_meta
        if payload.use_pickle or meta is None:
            raise ModelError(
                f"{name!r} is a pickle (a tensor of a class of its own, or a custom object), which "
                "is never loaded; export a model of plain tensors"
            )
        if meta.layout != STRIDED or meta.dtype not in DTYPES:
            raise ModelError(f"{name!r} is sparse or of an unknown type; export a plain tensor")
        dtype = DTYPES[meta.dtype]
        sizes, strides = fixed(meta.sizes), fixed(meta.strides)
        (offset,) = fixed([meta.storage_offset])
        try:
            stored = self._stored(f"{under}{payload.path_name}").view(dtype)
            return torch.as_strided(stored, sizes, strides, offset)
        except RuntimeError as error:  # more than its bytes
            raise ModelError(f"{name!r} does not fit its bytes in the archive") from error

    def _stored(self, member: str) -> torch.Tensor:
        """The bytes of a tensor, which several may share."""
        if member not in self._bytes:
            info = self._info(member)
            held = torch.empty(info.file_size, dtype=torch.uint8)
            view = held.numpy().data
            try:
                with self._zip.open(info) as file:
                    while view and (count := file.readinto(view[:CHUNK])):  # type: ignore[attr-defined]
                        view = view[count:]
            except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
                raise ModelError(f"{member} cannot be read: {error}") from error
            self._bytes[member] = held
        return self._bytes[member]

    def _read(self, member: str) -> bytes:
        try:
            return self._zip.read(self._info(member))
        except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ModelError(f"{member} cannot be read: {error}") from error

    def _info(self, member: str) -> zipfile.ZipInfo:
        try:
            info = self._zip.getinfo(f"{self._root}/{member}")
        except KeyError:
            raise ModelError(f"it holds no {member}; {HOW}") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise ModelError(f"{member} is compressed, as torch.export.save writes nothing; {HOW}")
        if info.file_size != info.compress_size or info.file_size > self._size:
            raise ModelError(f"{member} is said to be larger than the archive; copy the file anew")
        return info


def dtype_of(number: Any) -> torch.dtype:
    """A type by its number; raises ModelError."""
    if number not in DTYPES:
        raise ModelError(f"the program has the type {number}, which is not known")
    return DTYPES[number]
