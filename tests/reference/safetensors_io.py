"""Reads and writes safetensors files with NumPy alone.

File layout: 8 bytes little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}, then the data.
NumPy has no bfloat16: BF16 tensors are read as float32 (exact) and written from float32 values
that must be representable in bfloat16 (round them first with `to_bfloat16`).
"""

import json
import os
import struct

import numpy as np

_NUMPY_OF = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I32": np.dtype("<i4"),
             "I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_NAME_OF = {dtype: name for name, dtype in _NUMPY_OF.items()}
_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


def to_bfloat16(values):
    """Rounds float32 to the nearest bfloat16, ties to even; the result is float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    result = rounded.view(np.float32)
    # The addition above could carry a NaN's payload into infinity: NaN stays as it was.
    return np.where(np.isnan(values), np.float32(np.nan), result).reshape(np.shape(values))


def _encode(array, dtype):
    """The bytes of one tensor, in `dtype` ("BF16" or a name that NumPy has a type for)."""
    if dtype == "BF16":
        values = np.ascontiguousarray(array, dtype=np.float32)
        if not np.array_equal(to_bfloat16(values), values):
            raise ValueError("a tensor to be written as BF16 holds values that BF16 cannot")
        return (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    return np.ascontiguousarray(array, dtype=_NUMPY_OF[dtype]).tobytes()


def _decode(raw, dtype, shape):
    if dtype == "BF16":
        bits = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).reshape(shape)
    if dtype not in _NUMPY_OF:
        raise ValueError(f"dtype {dtype} is not supported; allowed: BF16, {', '.join(_NUMPY_OF)}")
    return np.frombuffer(raw, dtype=_NUMPY_OF[dtype]).reshape(shape).copy()


def write(path, tensors, dtypes=None, metadata=None):
    """Writes {name: array}; `dtypes` {name: "BF16"} overrides the array's own type."""
    dtypes = dtypes or {}
    header = {"__metadata__": metadata or {"format": "pt"}}
    blobs = []
    offset = 0
    for name, array in tensors.items():
        array = np.asarray(array)
        dtype = dtypes.get(name) or _NAME_OF[array.dtype.newbyteorder("<")]
        blob = _encode(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            file.write(blob)


def read_header(path):
    """The JSON header of one file, without "__metadata__"."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def read(path):
    """Reads one file: ({name: array}, {name: dtype name})."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    header.pop("__metadata__", None)
    tensors = {}
    dtypes = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = _decode(data[begin:end], entry["dtype"], entry["shape"])
        dtypes[name] = entry["dtype"]
    return tensors, dtypes


def read_checkpoint(directory):
    """Reads all tensors of a Hugging Face checkpoint folder, sharded or not."""
    index_path = os.path.join(directory, _INDEX_NAME)
    if not os.path.exists(index_path):
        return read(os.path.join(directory, _SINGLE_NAME))
    with open(index_path, encoding="utf-8") as file:
        weight_map = json.load(file)["weight_map"]
    tensors = {}
    dtypes = {}
    for shard in sorted(set(weight_map.values())):
        shard_tensors, shard_dtypes = read(os.path.join(directory, shard))
        for name, array in shard_tensors.items():
            if weight_map.get(name) != shard:
                raise ValueError(f"{shard} holds {name}, which the index places elsewhere")
            tensors[name] = array
            dtypes[name] = shard_dtypes[name]
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ValueError(f"the index names tensors that no shard holds: {missing}")
    return tensors, dtypes


def write_sharded(directory, tensors, dtypes, shards):
    """Writes a checkpoint as `shards` files plus the index, split in the order of `tensors`."""
    names = list(tensors)
    per_shard = -(-len(names) // shards)
    weight_map = {}
    total = 0
    for i in range(shards):
        file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i * per_shard:(i + 1) * per_shard]}
        write(os.path.join(directory, file_name), part, dtypes)
        for name, array in part.items():
            weight_map[name] = file_name
            total += array.size * (2 if dtypes.get(name) == "BF16" else array.itemsize)
    with open(os.path.join(directory, _INDEX_NAME), "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2,
                  sort_keys=True)
        file.write("\n")
