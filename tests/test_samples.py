from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.errors import UserError
from qcompiler.samples import Batch, Header, InputSpec, batch_of, convert, cut, join

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)


def spec(*shape, name="x", dtype=F32):
    return InputSpec(name, np.dtype(dtype), shape)


def header(*shape, dtype=F32):
    return Header(shape, np.dtype(dtype))


def count(inputs, arrays, **options):
    return cut(arrays, inputs, batch_of(inputs), "file", **options).count


@pytest.mark.parametrize(
    ("shapes", "size", "batched"),
    [
        ([(1, 3, 8, 8)], 1, {"a"}),
        ([("N", 3, 8, 8)], 1, {"a"}),
        ([(None, 3, 8, 8)], 1, {"a"}),
        ([(-1, 3, 8, 8)], 1, {"a"}),
        ([(4, 3, 8, 8)], 4, {"a"}),
        ([("T",)], 1, set()),
        ([(16000,)], 1, set()),
        ([()], 1, set()),
        ([None], 1, set()),
        ([("N", 512), (2, "N", 128), ()], 1, {"a"}),
        ([(2, 1, 128), (1, 512), ()], 1, {"b"}),
        ([("N", 8), ("N",), ("T",)], 1, {"a", "b"}),
        ([(4, 8), (4,), (3, 3)], 4, {"a", "b"}),
        ([("unk__1", 8), ("unk__2", 8), (1, 1)], 1, {"a", "b"}),
    ],
)
def test_the_batch_axis_is_found(shapes, size, batched):
    inputs = [InputSpec(name, F32, shape) for name, shape in zip("abc", shapes, strict=False)]
    assert batch_of(inputs) == Batch(size, frozenset(batched))


@pytest.mark.parametrize(
    ("want", "have", "items"),
    [
        ((1, 3, 8, 8), (3, 8, 8), 1),
        (("N", 3, 8, 8), (3, 8, 8), 1),
        ((1, 3, 8, 8), (1, 3, 8, 8), 1),
        ((1, 3, 8, 8), (100, 3, 8, 8), 100),
        (("N", 3, 8, 8), (100, 3, 8, 8), 100),
        (("N", 3, None, "W"), (7, 3, 5, 6), 7),
        ((-1, 3, -1, 8), (7, 3, 5, 8), 7),
        ((1, 3, 8, 8), (100, 1, 3, 8, 8), 100),
        (("N", 3, 8, 8), (10, 2, 3, 8, 8), 20),
        ((4, 3, 8, 8), (10, 3, 8, 8), 10),
        ((4, 3, 8, 8), (5, 4, 3, 8, 8), 20),
        (("T",), (16000,), 1),
        (("T",), (9, 16000), 9),
        ((16000,), (9, 16000), 9),
        ((), (), 1),
        ((), (5,), 5),
    ],
)
def test_one_array_is_cut_into_items(want, have, items):
    assert count([spec(*want)], {"x": header(*have)}) == items


@pytest.mark.parametrize(
    ("want", "have"),
    [
        ((1, 3, 8, 8), (8, 8)),
        ((1, 3, 8, 8), (1, 5, 8, 8)),
        ((1, 3, 8, 8), (5, 3, 9, 8)),
        ((1, 3, 8, 8), (2, 2, 1, 3, 8, 8)),
        ((1, 3, 8, 8), (10, 2, 3, 8, 8)),
        ((4, 3, 8, 8), (5, 3, 3, 8, 8)),
        ((16000,), (8000,)),
        ((), (2, 2)),
    ],
)
def test_a_wrong_shape_is_refused_with_both_shapes(want, have):
    with pytest.raises(UserError) as caught:
        count([spec(*want)], {"x": header(*have)})
    assert str(list(have)) in caught.value.what and caught.value.where == "file"


def test_an_unknown_rank_takes_the_array_whole():
    inputs = [InputSpec("x", F32, None)]
    cuts = cut({"x": header(100, 3)}, inputs, batch_of(inputs), "file")
    assert cuts.of == {"x": ("x", (1, 100, 3))}


@pytest.mark.parametrize("have", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_an_empty_array_is_refused(have):
    with pytest.raises(UserError, match="empty"):
        count([spec("N", 3, "H", 8)], {"x": header(*have)})


def test_an_empty_cache_beside_real_input_is_fed():
    inputs = [spec("N", 8), spec("N", 2, "past", 4, name="past")]
    assert count(inputs, {"x": header(1, 8), "past": header(1, 2, 0, 4)}) == 1


ids = [spec("N", "T", name="ids", dtype=I64), spec("N", "T", name="mask", dtype=I64)]


def test_several_inputs_are_cut_together():
    cuts = cut({"ids": header(6, 9, dtype=I64), "mask": header(6, 9, dtype=I64)}, ids, batch_of(ids), "file")
    assert (cuts.count, cuts.of["mask"]) == (6, ("mask", (6, 1, 9)))


def test_a_single_item_is_repeated():
    inputs = [spec("N", 512), spec(2, "N", 128, name="state"), spec(name="rate", dtype=I64)]
    arrays = {
        "x": np.arange(3 * 512, dtype=np.float32).reshape(3, 512),
        "state": np.ones((2, 1, 128), np.float32),
        "rate": np.asarray(16000),
    }
    cuts = cut(arrays, inputs, batch_of(inputs), "file")
    assert cuts.count == 3
    assert cuts.item(arrays, "x", 2).tolist() == arrays["x"][2:3].tolist()
    assert cuts.item(arrays, "state", 2).shape == (2, 1, 128)
    assert cuts.item(arrays, "rate", 2).shape == () and cuts.item(arrays, "rate", 2) == 16000


def test_a_batch_that_an_inner_axis_shares_is_not_cut():
    inputs = [spec("N", 512), spec(2, "N", 128, name="state")]
    cuts = cut({"x": header(3, 512), "state": header(2, 3, 128)}, inputs, batch_of(inputs), "file")
    assert cuts.count == 1 and cuts.of["x"] == ("x", (1, 3, 512))


def test_different_batch_symbols_with_different_sizes_are_one_sample():
    inputs = [spec("N", 3, 8, 8), spec("boxes", 4, name="roi")]
    assert count(inputs, {"x": header(2, 3, 8, 8), "roi": header(7, 4)}) == 1


def test_different_sizes_of_one_batch_are_refused():
    with pytest.raises(UserError, match="different numbers of samples: 'ids' 6, 'mask' 5"):
        count(ids, {"ids": header(6, 9, dtype=I64), "mask": header(5, 9, dtype=I64)})
    fixed = [spec(4, 8), spec(4, 8, name="y"), spec("T", name="z")]
    with pytest.raises(UserError, match="different numbers of samples: 'x' 4, 'y' 8"):
        count(fixed, {"x": header(4, 8), "y": header(8, 8), "z": header(3)})


def test_keys_of_one_input():
    x = header(5, 3)
    label = header(5, dtype=I64)
    inputs = [spec("N", 3)]
    for arrays in ({"x": x}, {"arr_0": x}, {"x": x, "z": x}, {"x": x, "y": label}):
        assert count(inputs, arrays) == 5
    for arrays in ({"a": x, "b": x}, {"a": label, "b": label}, {}):
        with pytest.raises(UserError, match="no array for input 'x'"):
            count(inputs, arrays)
    with pytest.raises(UserError, match=r"the file holds data float32 \[5, 3\], y int64 \[5\]"):
        count(inputs, {"data": x, "y": label})


def test_keys_of_several_inputs():
    arrays = {"ids": header(2, 9, dtype=I64), "mask": header(2, 9, dtype=I64), "label": header(2, dtype=I64)}
    assert count(ids, arrays) == 2
    with pytest.raises(UserError, match="the model has no input 'label'"):
        count(ids, arrays, exact=True)
    with pytest.raises(UserError, match=r"'mask'.*the file holds ids int64"):
        count(ids, {"ids": arrays["ids"]})
    with pytest.raises(UserError, match="no array for the input 'mask'"):
        count(ids, {"ids": arrays["ids"]}, exact=True)


@pytest.mark.parametrize(
    ("have", "want", "reason"),
    [
        ("uint8", "float32", r"preprocessing is missing.*/ 255"),
        ("int64", "float32", "preprocessing"),
        ("float32", "int64", "holds float32"),
        ("float32", "uint8", "holds float32"),
        ("bool", "float32", "holds bool"),
        ("int64", "bool", "holds int64"),
        ("complex64", "float32", "complex64"),
        ("<U3", "float32", "<U3"),
        ("object", "float32", "pickled"),
    ],
)
def test_a_wrong_dtype_is_refused(have, want, reason):
    with pytest.raises(UserError, match=reason):
        count([spec(1, 3, dtype=want)], {"x": header(1, 3, dtype=have)})


@pytest.mark.parametrize(
    ("have", "want"),
    [
        ("float64", "float32"),
        ("float16", "float32"),
        (">f4", "float32"),
        ("int32", "int64"),
        ("int64", "int32"),
        ("bool", "bool"),
    ],
)
def test_lossless_dtypes_are_converted(have, want):
    values = np.array([[1, 0, 1]], have)
    assert count([spec(1, 3, dtype=want)], {"x": values}) == 1
    fed = convert(values, spec(1, 3, dtype=want), "file")
    assert fed.dtype == np.dtype(want) and fed.dtype.isnative and fed.tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(
    ("values", "want", "reason"),
    [
        (np.float32([1, np.nan]), "float32", "NaN"),
        (np.float64([1, -np.inf]), "float32", "infinity"),
        (np.float64([1e300]), "float32", "too large"),
        (np.int64([2**40]), "int32", "do not fit"),
        (np.int64([-1]), "uint8", "do not fit"),
    ],
)
def test_bad_values_are_refused(values, want, reason):
    with pytest.raises(UserError, match=reason):
        convert(values, spec(len(values), dtype=want), "file")


def test_convert_copies_into_c_order():
    array = np.asfortranarray(np.ones((3, 4), np.float32))
    fed = convert(array, spec(3, 4), "file")
    assert fed.flags.c_contiguous and not np.shares_memory(fed, array)


def test_join_stacks_what_has_a_batch_axis():
    batch = Batch(2, frozenset("x"))
    items = [{"x": np.full((1, 3), i), "scale": np.asarray(2)} for i in range(2)]
    sample = join(items, batch, "file")
    assert sample["x"].tolist() == [[0, 0, 0], [1, 1, 1]] and sample["scale"] == 2
    with pytest.raises(UserError, match="'scale' has no batch axis"):
        join([items[0], {**items[1], "scale": np.asarray(3)}], batch, "file")
    with pytest.raises(UserError, match="differ in shape"):
        join([items[0], {**items[1], "x": np.zeros((1, 4))}], batch, "file")


@given(
    tail=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    lead=st.lists(st.integers(1, 4), max_size=2),
    data=st.data(),
)
def test_items_are_the_rows_in_order(tail, lead, data):
    """However a batch axis is missing, present or doubled, items laid end to end are the array."""
    dims = [data.draw(st.sampled_from([dim, "d", None])) for dim in tail]
    inputs = [spec("N", *dims)]
    array = np.arange(math.prod([*lead, *tail]), dtype=np.float32).reshape(*lead, *tail)
    cuts = cut({"x": array}, inputs, batch_of(inputs), "file")
    items = [cuts.item({"x": array}, "x", i) for i in range(cuts.count)]
    assert all(item.shape == (1, *tail) for item in items)
    assert np.concatenate(items).ravel().tolist() == array.ravel().tolist()
