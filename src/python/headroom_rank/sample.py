"""Samples taken apart into bytes, and put together again.

A sample is a tensor, an array or a number, or a tuple, list or dict of such. Its layout is a structure (JSON: `["l", leaf]`,
`["t", [...]]`, `["d", [[key, ...], ...]]`) and one `[name, kind, dtype, shape]` per leaf.
"""

import ctypes

DTYPES = ("bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "int64", "float64")


class Unusable(ValueError):
    """A sample that cannot be kept as bytes of one size."""


def loaded(name):
    """A module that the program has imported; it is never imported here."""
    import sys

    return sys.modules.get(name)


def take_apart(sample):
    """Structure and leaves of a sample: `(structure, [(name, value), ...])`."""
    leaves = []

    def walk(value, name):
        if isinstance(value, dict):
            return ["d", [[key, walk(part, f"{name}.{key}" if name else str(key))] for key, part in value.items()]]
        if isinstance(value, (tuple, list)):
            return ["t", [walk(part, f"{name}.{place}" if name else str(place)) for place, part in enumerate(value)]]
        leaves.append((name or "0", value))
        return ["l", len(leaves) - 1]

    return walk(sample, ""), leaves


def raw_bytes(tensor):
    """The bytes of a tensor of bytes on the host."""
    tensor = tensor.contiguous()
    return bytearray(ctypes.string_at(tensor.data_ptr(), tensor.numel()) if tensor.numel() else b"")


def put_together(structure, values):
    """The sample of this structure with these leaves."""
    kind, inner = structure
    if kind == "l":
        return values[inner]
    if kind == "t":
        return tuple(put_together(part, values) for part in inner)
    return {key: put_together(part, values) for key, part in inner}


def leaf(name, value):
    """`(kind, dtype, shape, bytes)` of one leaf; what the bytes lie in is kept with them."""
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        return _tensor(name, "t", tensor)
    if isinstance(value, bool):
        return "b", "bool", [], bytes([value])
    if isinstance(value, int):
        return "i", "int64", [], value.to_bytes(8, "little", signed=True)
    if isinstance(value, float):
        return "f", "float64", [], bytes(ctypes.c_double(value))
    if hasattr(value, "__array__"):
        import numpy

        array = numpy.ascontiguousarray(value)
        shape = list(numpy.shape(value))
        if str(array.dtype) not in DTYPES:
            raise Unusable(f"{name} is an array of {array.dtype}: expected one of {', '.join(DTYPES)}")
        return "a", str(array.dtype), shape, array.tobytes()
    raise Unusable(f"{name} is a {type(value).__name__}: expected a tensor, an array or a number")


def _tensor(name, kind, tensor):
    dtype = str(tensor.dtype)[len("torch."):]
    if dtype not in DTYPES:
        raise Unusable(f"{name} is a tensor of {dtype}: expected one of {', '.join(DTYPES)}")
    size = tensor.numel() * tensor.element_size()
    data = ctypes.string_at(tensor.data_ptr(), size) if size else b""
    return kind, dtype, list(tensor.shape), data


def encode(sample):
    """`(layout, [bytes, ...])` of a sample."""
    structure, leaves = take_apart(sample)
    fields, parts = [], []
    for name, value in leaves:
        kind, dtype, shape, data = leaf(name, value)
        fields.append([name, kind, dtype, shape])
        parts.append(data)
    if not fields:
        raise Unusable("the sample is empty: expected at least one tensor, array or number")
    return {"structure": structure, "fields": fields}, parts


def decode(layout, data):
    """The sample of this layout in `data`, a bytearray that it may keep."""
    import torch

    values, at = [], 0
    for _, kind, dtype, shape in layout["fields"]:
        kind_of = getattr(torch, dtype)
        count = 1
        for side in shape:
            count *= side
        size = count * kind_of.itemsize
        part = bytearray(data[at:at + size])
        at += size
        if count:
            value = torch.frombuffer(part, dtype=kind_of).reshape(shape)
        else:
            value = torch.empty(shape, dtype=kind_of)
        if kind == "a":
            value = value.numpy()
            value = value[()] if not shape else value
        elif kind in "bif":
            value = value.item()
        values.append(value)
    return put_together(layout["structure"], values)


def compare(expected, found, where):
    """Raises [`Unusable`] where a sample is not laid out as sample 0 is."""
    if expected == found:
        return
    if expected["structure"] != found["structure"] or len(expected["fields"]) != len(found["fields"]):
        raise Unusable(f"{where} has the structure {found['structure']}, that of sample 0 is {expected['structure']}")
    for (name, kind, dtype, shape), (_, other, other_dtype, other_shape) in zip(expected["fields"], found["fields"]):
        if (dtype, shape) != (other_dtype, other_shape):
            raise Unusable(
                f"{where}: {name} is {other_dtype} {other_shape}, that of sample 0 is {dtype} {shape}: all samples of a data "
                "set must have one size and type; pad or crop in dataset[i]"
            )
        if kind != other:
            raise Unusable(f"{where}: {name} is of another Python type than that of sample 0")


# Samples of different sizes: each is bytes that tell their own layout.

_MAGIC = b"hr-sample"
_ALIGN = 16


def pack(sample):
    """A sample as bytes with its layout."""
    import json

    layout, parts = encode(sample)
    head = json.dumps(layout).encode()
    return [_MAGIC + len(head).to_bytes(7, "little") + head + bytes(-len(head) % _ALIGN)] + parts


def unpack(data):
    """The sample in such bytes; None: there is none in them."""
    import json

    first = len(_MAGIC) + 7
    if bytes(data[:len(_MAGIC)]) != _MAGIC:
        return None
    size = int.from_bytes(data[len(_MAGIC):first], "little")
    head = json.loads(bytes(data[first:first + size]))
    return decode(head, data[first + size + -size % _ALIGN:])
