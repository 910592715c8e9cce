"""A state is restored from its two files bit for bit; a value that cannot be is refused, with its place."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saving_cases import through
from states import assert_same_state
from torch import nn

from mlopt import MloptError
from mlopt.errors import CheckpointError
from mlopt.solving import serialization

REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
DTYPES = [*REAL, *WHOLE, torch.bool, torch.complex64, torch.complex128]


@st.composite
def tensors(draw):
    """Draw the bits of a tensor, then its shape and strides."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = int(np.prod(shape)) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(byte & 1 for byte in content)
    tensor = torch.frombuffer(bytearray(content), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return tensor.reshape(shape).transpose(0, -1) if shape and draw(st.booleans()) else tensor.reshape(shape)


@st.composite
def arrays(draw):
    kind = np.dtype(draw(st.sampled_from(["?", "i1", "<u4", ">i8", "<f4", ">f8", "<f2", "<c16"])))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    size = int(np.prod(shape)) * kind.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    return np.ndarray(shape, kind, buffer=bytearray(content) or None)


names = st.text(max_size=4) | st.sampled_from(
    ["$tensor", "$dict", "$", "$tuple", "__metadata__", "state", "a.b", "\ud83d\ude00"]
)
plain = st.none() | st.booleans() | st.integers() | st.integers(-(2**80), 2**80) | names
nans = st.builds(
    lambda sign, payload: struct.unpack(">d", bytes([sign, 0xF8]) + payload)[0],
    st.sampled_from([0x7F, 0xFF]),
    st.binary(min_size=6, max_size=6),
)
reals = st.floats() | nans | st.binary(min_size=8, max_size=8).map(lambda bits: struct.unpack("d", bits)[0])
keys = st.recursive(
    plain | st.floats(allow_nan=False), lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=3
)
scalars = st.sampled_from(
    [np.float64(-0.0), np.float32("nan"), np.int64(3), np.bool_(True), np.uint8(7), np.complex64(1j)]
)
leaves = plain | reals | tensors() | arrays() | scalars


def containers(inner):
    lists = st.lists(inner, max_size=3)
    mappings = st.dictionaries(keys, inner, max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        st.builds(deque, lists, st.none() | st.integers(3, 5)),
        st.dictionaries(names, inner, max_size=3),
        mappings,
        mappings.map(OrderedDict),
        st.dictionaries(keys, st.integers(), max_size=3).map(Counter),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
    )


states = st.dictionaries(names, st.recursive(leaves, containers, max_leaves=12), max_size=4)


@settings(max_examples=150, deadline=None)
@given(states)
def test_a_state_is_restored_bit_for_bit(state):
    assert_same_state(through(state), state)


def test_the_comparison_of_states_compares_types_order_shapes_and_bits():
    nan = struct.unpack("d", b"\1\0\0\0\0\0\xf8\x7f")[0]
    different = [(0.0, -0.0), (float("nan"), nan), (1, True), (1, 1.0), ((), []), (torch.zeros(1), -torch.zeros(1))]
    different += [
        (torch.zeros(1), torch.zeros(())),
        (np.float64(1), 1.0),
        ({1: 2, 3: 4}, {3: 4, 1: 2}),
        ({1: 2}, {"1": 2}),
    ]
    different += [(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.5], dtype=torch.bfloat16))]
    for pair in different:
        with pytest.raises(AssertionError):
            assert_same_state(*pair)


def test_integers_of_any_length_and_generators_are_restored():
    state = {
        "long": -(7**9000),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "bits": np.random.default_rng(3).bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    loaded = through(state)
    assert_same_state(loaded, state)
    draws = random.random(), np.random.rand(), torch.rand(3)
    random.setstate(loaded["python"])
    np.random.set_state(loaded["numpy"])
    torch.set_rng_state(loaded["torch"])
    assert_same_state((random.random(), np.random.rand(), torch.rand(3)), draws)


def test_a_tensor_in_two_places_is_restored_as_one_and_views_separately(tmp_path):
    tensor = torch.arange(6.0, dtype=torch.float64)
    state = {"one": tensor, "other": [tensor], "view": tensor.view(2, 3).T, "parameter": nn.Parameter(tensor)}
    serialization.write(tmp_path, state)
    loaded = serialization.read(tmp_path)
    assert loaded["one"] is loaded["other"][0]
    assert len(safetensors.torch.load_file(tmp_path / serialization.TENSORS)) == 3
    loaded["view"].zero_()
    assert_same_state(loaded["parameter"], tensor)


def test_tensors_with_ambiguous_names_are_not_confused():
    values = iter(torch.arange(7.0).split(1))
    state = {"a.b": next(values), "a": {"b": next(values)}, "__metadata__": next(values), "": next(values)}
    state["\ud83d"], state["x"] = next(values), {1: next(values), "1": next(values)}
    assert_same_state(through(state), state)


def test_lazily_conjugated_tensors_are_written_resolved():
    tensor = torch.complex(torch.arange(3.0), torch.ones(3))
    loaded = through({"conjugate": tensor.conj(), "imaginary": tensor.conj().imag})
    assert torch.equal(loaded["conjugate"], tensor.conj())
    assert torch.equal(loaded["imaginary"], tensor.conj().imag)


def test_tensors_are_named_by_their_place_and_files_follow_the_umask(tmp_path):
    serialization.write(tmp_path, {"modules": {"classifier": {"0.weight": torch.ones(2)}}, "step": 3})
    assert list(safetensors.torch.load_file(tmp_path / serialization.TENSORS)) == ["modules.classifier.0.weight"]
    assert json.loads((tmp_path / serialization.STATE).read_text())["state"]["step"] == 3
    (tmp_path / "plain").write_bytes(b"")
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_a_restored_state_does_not_change_with_the_file(tmp_path):
    serialization.write(tmp_path, {"weights": torch.ones(10_000)})
    loaded = serialization.read(tmp_path)
    with open(tmp_path / serialization.TENSORS, "r+b") as file:
        file.write(bytes(40_000))
    assert torch.equal(loaded["weights"], torch.ones(10_000))


class Foo:
    pass


class Named(dict):
    pass


cyclic: list = []
cyclic.append(cyclic)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (Foo(), "state.3.foo is a test_serialization.Foo; a checkpoint holds"),
        (Named(), "state.3.foo is a test_serialization.Named"),
        ([0, (1, {"x": 1j})], "state.3.foo.1.1.x is a complex"),
        (b"bytes", "state.3.foo is a bytes"),
        (torch.float32, "state.3.foo is a torch.dtype"),
        (torch.Size([2]), "state.3.foo is a torch.Size"),
        (np.array(["text"]), "state.3.foo is a numpy.ndarray"),
        (np.array([None]), "state.3.foo is a numpy.ndarray"),
        (np.datetime64("2020-01-01"), "state.3.foo is a numpy.datetime64"),
        (torch.eye(2).to_sparse(), "state.3.foo is a tensor of torch.float32 and torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
        ({torch.ones(2): 1}, "state.3.foo has a torch.Tensor as a key"),
        ({("a", Foo()): 1}, "state.3.foo has a tuple as a key"),
        ({np.int64(3)}, "state.3.foo has a numpy.int64 as a key or in a set"),
        (cyclic, "state.3.foo... is nested deeper than 100 levels, or contains itself"),
    ],
)
def test_a_value_that_cannot_be_restored_is_refused_by_its_place(tmp_path, value, sentence):
    with pytest.raises(CheckpointError) as caught:
        serialization.write(tmp_path, {"fine": torch.ones(3), "state": {3: {"foo": value}}})
    assert isinstance(caught.value, MloptError)
    assert sentence in str(caught.value).replace(f"{__name__}.", "test_serialization.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "state": {}}',
        '{"version": 1, "state": []}',
        '{"version": 1, "state": {"a": {"$tensor": "b"}}}',
        '{"version": 1, "state": {"a": {"$complex": "a"}}}',
        '{"version": 1, "state": {"a": {"$unknown": 1}}}',
        '{"version": 1, "state": {"a": {"$float": "00"}}}',
        '{"version": 1, "state": ' + "[" * 100_000,
    ],
)
def test_files_of_another_format_are_refused(tmp_path, text):
    serialization.write(tmp_path, {"a": torch.ones(3)})
    (tmp_path / serialization.STATE).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read as a state"):
        serialization.read(tmp_path)
