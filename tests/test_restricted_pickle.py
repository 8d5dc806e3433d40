"""Pickles of arrays are read, and nothing that another pickle asks for is done."""

from __future__ import annotations

import builtins
import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from flax_trees import array, checkpoint, flat, name, networks, number, pickled, raw, sequence, text

from fastflow.errors import UserError
from fastflow.restricted_pickle import UnsafePickle, load_arrays

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    given = None

VALUES = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
    "big endian": np.arange(3, dtype=">f4"),
    "bool": np.array([True, False]),
    "half": np.float16([0.5]),
    "nothing": np.zeros((0, 4), np.float32),
    "number": np.array(3, np.int32),
    "scalar": np.float32(2.5),
    "plain": [1, -(2**40), 10**30, 0.5, True, None, "word", b"bytes", (1,), (1, 2), (), (1, 2, 3, 4), [], {}, {3: "x"}],
}


@pytest.fixture
def load(tmp_path):
    """Read bytes as a file."""

    def read(data):
        path = tmp_path / "params.pkl"
        path.write_bytes(data)
        return load_arrays(path)

    return read


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype.newbyteorder("=") and np.array_equal(found, expected)
        assert found.flags.writeable
    else:
        assert found == expected


# What is read


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_numpy_pickles_is_read(load, protocol):
    assert_same(load(pickle.dumps(VALUES, protocol)), VALUES)
    twice = load(pickle.dumps({"a": VALUES["float32"], "b": VALUES["float32"]}, protocol))
    assert np.array_equal(twice["a"], twice["b"])


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("jax", [True, False])
def test_the_names_of_old_and_new_packages_are_known(load, core, jax):
    tree = checkpoint(networks("floq"))
    found = load(pickled(tree, core=core, jax=jax))
    assert_same(found, tree)
    assert len(flat(found)) == len(flat(tree)) > 100


def test_flax_frozen_dicts_are_dicts(load):
    frozen = name("flax.core.frozen_dict", "FrozenDict") + sequence(b"}" + text("a") + array(np.ones(2)) + b"s") + b"R"
    assert_same(load(b"\x80\x04" + frozen + b"."), {"a": np.ones(2)})
    with pytest.raises(UnsafePickle, match=r"FrozenDict of type list, expected a dict"):
        load(b"\x80\x04" + name("flax.core.frozen_dict", "FrozenDict") + sequence(b"]") + b"R.")


def test_what_jax_pickles_is_read_without_jax(tmp_path, plain_environment):
    jax = pytest.importorskip("jax")
    tree = {"kernel": jax.numpy.arange(6.0).reshape(2, 3), "rng": jax.random.PRNGKey(3), "count": jax.numpy.int32(4)}
    path = tmp_path / "params.pkl"
    path.write_bytes(pickle.dumps(tree))
    code = (
        "import sys\nfor name in ('jax', 'jaxlib', 'flax'): sys.modules[name] = None\n"
        "from fastflow.restricted_pickle import load_arrays\n"
        "tree = load_arrays(sys.argv[1])\n"
        "print(tree['kernel'].tolist(), tree['kernel'].dtype, tree['rng'].dtype, int(tree['count']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=plain_environment, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] float32 uint32 4"


# What is refused


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Loud:
    """Touches a file when it is given a state."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        open(state["path"], "w").close()


class Made:
    """Touches a file when it is made anew."""

    path = None

    def __new__(cls, path=None):
        if path:
            open(path, "w").close()
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"path": self.path}

    @classmethod
    def quietly(cls, path):
        made = cls()
        made.path = path
        return made


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return value if isinstance(value, str) and value.startswith("touch") else None


def objects(*items):
    made = np.empty(len(items), object)
    made[:] = items
    return made


def by_persistent_id(path):
    buffer = io.BytesIO()
    Persistent(buffer).dump({"agent": f"touch {path}"})
    return buffer.getvalue()


def old(text):
    return lambda path: text.replace("PATH", str(path)).encode()


# How, what makes the file given a path to touch, whether Python's own unpickler would touch it, what the error names.
PAYLOADS = [
    ("os.system", lambda p: pickle.dumps(Call(os.system, f"touch {p}")), True, r"the name (posix|nt)\.system"),
    ("subprocess", lambda p: pickle.dumps(Call(subprocess.call, ["touch", str(p)])), True, r"subprocess\.call"),
    ("eval", lambda p: pickle.dumps(Call(eval, f"open({str(p)!r}, 'w').close()")), True, r"builtins\.eval"),
    ("exec", lambda p: pickle.dumps(Call(exec, f"open({str(p)!r}, 'w').close()")), True, r"builtins\.exec"),
    ("mkdir", lambda p: pickle.dumps(Call(os.mkdir, str(p))), True, r"the name (posix|nt)\.mkdir"),
    ("getattr", lambda p: pickle.dumps(Call(getattr, "x", "upper")), False, r"builtins\.getattr"),
    ("import", lambda p: pickle.dumps(Call(__import__, "os")), False, r"builtins\.__import__"),
    ("nested pickle", lambda p: pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {p}")))), True,
     r"_pickle\.loads"),
    ("inside a tree", lambda p: pickle.dumps({"agent": {"network": Call(os.system, f"touch {p}")}}), True, r"system"),
    ("object array", lambda p: pickle.dumps(objects(Call(os.system, f"touch {p}"))), True, r"dtype 'O8'"),
    ("object array, by hand", lambda p: b"\x80\x04" + name("numpy", "dtype") + sequence(text("O")) + b"R.", False,
     r"dtype 'O', expected"),
    ("numpy.load", lambda p: pickle.dumps(Call(np.load, str(p), None, True)), False, r"numpy\.load"),
    ("numpy's class argument", lambda p: b"\x80\x04" + name("numpy._core.multiarray", "_reconstruct") + sequence(
        text("ndarray"), sequence(number(0)), raw(b"b")) + b"R.", False, r"an array of class 'ndarray'"),
    ("structured dtype", lambda p: pickle.dumps(np.zeros(2, [("a", "f4")])), False, r"dtype 'V4'"),
    ("JAX array of another function", lambda p: b"\x80\x04" + name("jax._src.array", "_reconstruct_array") + sequence(
        name("numpy", "dtype"), sequence(text("f4")), b"N", b"N") + b"R.", False, r"made by 'numpy\.dtype'"),
    ("state", lambda p: pickle.dumps(Loud(str(p))), True, r"test_restricted_pickle\.Loud"),
    ("state of a dict", lambda p: b"\x80\x04}}b.", False, r"a state for type dict"),
    ("state of a name", lambda p: b"\x80\x04" + name("numpy", "dtype") + b"}b.", False, r"a state for 'numpy\.dtype'"),
    ("new", lambda p: pickle.dumps(Made.quietly(str(p))), True, r"test_restricted_pickle\.Made"),
    ("new object of a known name", lambda p: b"\x80\x04" + name("numpy", "ndarray") + sequence(sequence(number(2)))
     + b"\x81.", False, r"NEWOBJ"),
    ("persistent id", by_persistent_id, False, r"the instruction BINPERSID"),
    ("persistent id, text", old("Ptouch PATH\n."), False, r"the instruction PERSID"),
    ("protocol 0", old("cos\nsystem\n(S'touch PATH'\ntR."), True, r"the name os\.system"),
    ("INST", old("(S'touch PATH'\nios\nsystem\n."), True, r"the instruction STRING"),
    ("INST, first", old("(ios\nsystem\n."), False, r"the instruction INST"),
    ("OBJ", old("(cos\nsystem\nS'touch PATH'\no."), True, r"the name os\.system"),
    ("OBJ of a known name", old("(cnumpy\ndtype\no."), False, r"the instruction OBJ"),
    ("dotted attribute", lambda p: b"\x80\x04" + name("numpy", "dtype.__init__.__globals__") + b".", False,
     r"numpy\.dtype\.__init__"),
    ("name as the value", lambda p: b"\x80\x04" + name("numpy", "ndarray") + b".", False, r"got 'numpy\.ndarray'"),
    ("call of ndarray", lambda p: b"\x80\x04" + name("numpy", "ndarray") + sequence(sequence(number(9))) + b"R.", False,
     r"a call of 'numpy\.ndarray'"),
    ("out of band", lambda p: b"\x80\x05\x97.", False, r"the instruction NEXT_BUFFER"),
    ("set", lambda p: pickle.dumps({1, 2}), False, r"the instruction EMPTY_SET"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "live", "says"), [p[1:] for p in PAYLOADS], ids=[p[0] for p in PAYLOADS])
def test_payloads_are_refused_and_nothing_is_executed(load, tmp_path, make, live, says):
    marker = tmp_path / "touched"
    data = make(marker)
    with pytest.raises(UnsafePickle, match=says):
        load(data)
    assert not marker.exists()
    if live:
        # That the file was no dud: its own payload, which only touches the marker.
        pickle.loads(data)
        assert marker.exists()


def test_extension_codes_are_refused_where_python_knows_them(load, tmp_path):
    marker = tmp_path / "touched"
    copyreg.add_extension(os.system.__module__, "system", 241)
    try:
        data = pickle.dumps(Call(os.system, f"touch {marker}"), 4)
        # An unpickler looks a code up that it met before without asking what names are allowed.
        pickle.loads(pickle.dumps(os.system))
        with pytest.raises(UnsafePickle, match="the instruction EXT1"):
            load(data)
        assert not marker.exists()
        pickle.loads(data)
        assert marker.exists()
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 241)


def test_nothing_is_imported(load, monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError(f"import of {arguments[0]}")

    data = pickled({"a": np.ones(2)})
    evil = pickle.dumps(Call(os.system, "true"))
    monkeypatch.setattr(builtins, "__import__", refuse)
    found = load(data)
    with pytest.raises(UnsafePickle):
        load(evil)
    monkeypatch.undo()
    assert_same(found, {"a": np.ones(2)})


# What is damaged


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pkl: cannot read \(No such file"):
        load_arrays(tmp_path / "nothing.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"PK\x03\x04",
        b"\x80\x04}",
        b"\x80\x04R.",
        b"\x80\x04]u.",
        b"\x80\x04h\x05.",
        b"\x80\x04}(K\x01u.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x",
        b"\x80\x04r\xff\xff\xff\xff.",
        b"\x80\x04N" + b"\x85" * 100_000 + b".",
        b"\x80\x04}N" + b"\x85" * 100_000 + b"Ns.",
        b"\x80\x04]\x94h\x00a.",
        b"\x80\x04]" + b"".join(b"\x94h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b".",
        b"\x80\x04" + array(np.ones(4, np.float32)).replace(number(4), number(5)) + b".",
        b"\x80\x04" + array(np.ones(4, np.float32)).replace(number(4), number(-4)) + b".",
    ],
)
def test_damaged_files_are_refused(load, data):
    with pytest.raises(UnsafePickle, match=r"params\.pkl: "):
        load(data)


def test_truncated_files_are_refused(load):
    data = pickle.dumps(VALUES)
    for end in range(0, len(data), 7):
        with pytest.raises(UnsafePickle):
            load(data[:end])


if given is not None:
    WHOLE = pickle.dumps({"a": {"kernel": np.ones((2, 3), np.float32), "step": 3}, "b": np.arange(2)})

    @settings(max_examples=300)
    @given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4))
    def test_changed_bytes_give_a_value_or_an_error(tmp_path_factory, changes):
        data = bytearray(WHOLE)
        for place, byte in changes:
            data[place] = byte
        path = tmp_path_factory.getbasetemp() / "changed.pkl"
        path.write_bytes(data)
        try:
            found = load_arrays(path)
        except UnsafePickle as error:
            assert "changed.pkl" in str(error)
        else:
            assert isinstance(found, (dict, list, tuple, str, bytes, int, float, np.ndarray, np.generic, type(None)))
