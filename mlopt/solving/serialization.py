"""Write and read a tree of plain values as two files: tensors in safetensors, everything else in JSON; no pickle."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import flush

__all__ = ["STATE", "TENSORS", "read", "write", "write_file"]

TENSORS, STATE = "tensors.safetensors", "state.json"

_VERSION = 1
_DEPTH = 100

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
#: Complex tensors are stored as pairs of real numbers.
_DTYPES = frozenset((*_FLOATING, *_WHOLE, torch.bool))

#: The tensors met so far, by the name under which they are stored; and that name by the `id` of the original value.
_Seen = tuple[dict[str, Tensor], dict[int, str]]


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state to `tensors.safetensors` and `state.json` in an existing folder, and flush both to the disk.

    A state may contain the following values, which `read` returns bit for bit:

    - None, bool, int, float (with the bits of NaN), str; numpy scalars and numeric arrays;
    - dense tensors and parameters with any strides, on any device. `read` returns them on the CPU, without `requires_grad`. A
      tensor that occurs twice is stored once and read as one tensor; tensors that share memory otherwise are read as copies;
    - list, tuple, set, frozenset, deque, dict, OrderedDict and Counter of these. Keys and elements of sets are None, bools,
      numbers, strings, and tuples or frozensets of these.

    Other types are refused, subclasses of these included, because they would be read as a different type.

    Args:
        folder: existing files of these names are overwritten.
        state: the tree.

    Raises:
        CheckpointError: a value has another type; the message names its place. Nothing is written.
        OSError: the files cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from mlopt.solving import serialization
        >>> serialization.write(Path(), {"step": 3, "weights": (torch.zeros(2),)})
        >>> serialization.read(Path())
        {'step': 3, 'weights': (tensor([0., 0.]),)}
    """
    tensors, names = {}, {}  # type: dict[str, Tensor], dict[int, str]
    tree = _encode(dict(state), (), (tensors, names))
    text = json.dumps({"version": _VERSION, "state": tree}, allow_nan=False, separators=(",", ":"))
    # safetensors refuses tensors that share memory.
    users = Counter(_memory(tensor) for tensor in tensors.values())
    separate = {name: tensor.clone() if users[_memory(tensor)] > 1 else tensor for name, tensor in tensors.items()}
    # save_file would create files that only their owner can read, and its errors are not OSErrors.
    write_file(folder / TENSORS, safetensors.torch.save(separate))
    write_file(folder / STATE, text.encode())


def read(folder: Path) -> dict[str, Any]:
    """Read a state that `write` wrote.

    Raises:
        CheckpointError: a file is damaged, or was written by a later version.
        OSError: a file cannot be read.
    """
    with open(folder / STATE, "rb") as file:
        text = file.read()
    try:
        document = json.loads(text)
        version, tree = document["version"], document["state"]
        if version != _VERSION:
            raise ValueError(f"version {version!r}, and this mlopt reads version {_VERSION}")
        with safetensors.safe_open(folder / TENSORS, framework="pt") as file:
            # Copies, because the tensors are views of the file and would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state = _decode(tree, tensors)
        if not isinstance(state, dict):
            raise ValueError(f"the state is a {type(state).__name__}, not a mapping")
    except (ValueError, TypeError, LookupError, RuntimeError, struct.error, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{STATE} and {TENSORS} cannot be read as a state: {error!r}") from error
    return state


def write_file(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
    flush(path)


def _encode(value: Any, place: tuple[str, ...], seen: _Seen) -> Any:
    """Return the value as JSON; a value that JSON lacks becomes an object with one key that begins with `$`."""
    if len(place) > _DEPTH:
        raise CheckpointError(f"{_dotted(place[:3])}... is nested deeper than {_DEPTH} levels, or contains itself")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        # Beyond 64 bits other readers round, and Python refuses more than 4300 digits.
        return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if kind is str:
        return value if _is_text(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if kind in (Tensor, nn.Parameter):
        return _encode_tensor(value, place, seen)
    if kind is np.ndarray and value.dtype.kind in "biufc":
        empty = torch.empty(0, device="cpu")
        content = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else empty
        return {"$array": [_name(value, content, place, seen), value.dtype.str, list(value.shape)]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"$scalar": [value.tobytes().hex(), value.dtype.str]}
    if kind in (dict, OrderedDict, Counter):
        return _encode_mapping(value, place, seen)
    if kind in (list, tuple, deque):
        items = [_encode(item, (*place, str(k)), seen) for k, item in enumerate(value)]
        return items if kind is list else {f"${kind.__name__}": [value.maxlen, *items] if kind is deque else items}
    if kind in (set, frozenset):
        return {f"${kind.__name__}": [_encode_key(item, place, seen) for item in value]}
    raise CheckpointError(
        f"{_dotted(place)} is a {_type_name(kind)}; a checkpoint holds tensors, arrays, numbers, strings, None, and lists, "
        "tuples, sets and mappings of these: replace it by such values, such as its state_dict()"
    )


def _encode_tensor(value: Tensor, place: tuple[str, ...], seen: _Seen) -> dict[str, str]:
    layout, dtype = value.layout, value.dtype
    if layout != torch.strided or value.is_meta or value.is_nested or not (value.is_complex() or dtype in _DTYPES):
        raise CheckpointError(
            f"{_dotted(place)} is a tensor of {dtype} and {layout} on {value.device}; a checkpoint holds dense tensors of "
            "floating-point, complex, integer or boolean numbers: convert it"
        )
    content = value.detach().to("cpu").resolve_conj().resolve_neg()
    parts = torch.view_as_real(content) if value.is_complex() else content
    return {"$complex" if value.is_complex() else "$tensor": _name(value, parts.contiguous(), place, seen)}


def _encode_mapping(value: Mapping[Any, Any], place: tuple[str, ...], seen: _Seen) -> dict[str, Any]:
    encoded = {key: _encode(item, (*place, str(key)), seen) for key, item in value.items()}
    if type(value) is dict and all(type(key) is str and _is_text(key) and not key.startswith("$") for key in value):
        return encoded
    return {f"${type(value).__name__}": [[_encode_key(key, place, seen), item] for key, item in encoded.items()]}


def _encode_key(key: Any, place: tuple[str, ...], seen: _Seen) -> Any:
    if not _is_key(key):
        raise CheckpointError(
            f"{_dotted(place)} has a {_type_name(type(key))} as a key or in a set; a checkpoint allows None, numbers, strings "
            "and tuples of these there, because other keys could not be looked up after loading: use a name or an index"
        )
    return _encode(key, place, seen)


def _is_key(key: Any) -> bool:
    if type(key) in (tuple, frozenset):
        return all(map(_is_key, key))
    return key is None or type(key) in (bool, int, float, str)


def _is_text(value: str) -> bool:
    """Return whether JSON preserves a string: it would join two lone surrogates into one character."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _name(value: object, content: Tensor, place: tuple[str, ...], seen: _Seen) -> str:
    """Return the name under which the content of a value is stored: the place where the value occurs first."""
    tensors, names = seen
    if id(value) not in names:
        name = _dotted(place)
        while name in tensors or name == "__metadata__":
            name += "'"
        tensors[name], names[id(value)] = content, name
    return names[id(value)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _dotted(place: tuple[str, ...]) -> str:
    return ".".join(place).encode("utf-8", "backslashreplace").decode() or "the state"


def _type_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: _decode(item, tensors) for key, item in value.items()}
    (tag,) = tags
    content = value[tag]
    if tag == "$tensor":
        return tensors[content]
    if tag == "$complex":
        return torch.view_as_complex(tensors[content])
    if tag == "$array":
        name, dtype, shape = content
        return np.frombuffer(tensors[name].numpy().tobytes(), dtype).reshape(shape).copy()
    return _DECODERS[tag](_decode(content, tensors))


#: Functions that build a value from the content of its tag.
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$int": lambda digits: int(digits, 16),
    "$float": lambda bits: struct.unpack(">d", bytes.fromhex(bits))[0],
    "$str": lambda code: bytes.fromhex(code).decode("utf-8", "surrogatepass"),
    "$scalar": lambda pair: np.frombuffer(bytes.fromhex(pair[0]), pair[1])[0],
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$deque": lambda items: deque(items[1:], maxlen=items[0]),
    "$dict": dict,
    "$OrderedDict": OrderedDict,
    "$Counter": lambda pairs: Counter(dict(pairs)),
}
