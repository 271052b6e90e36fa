from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from qcompiler import data
from qcompiler.data import PRESETS, InputSpec, Preprocess, Source, as_source, open_source
from qcompiler.errors import UserError

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)
ONE = [InputSpec("x", F32, ("N", 3, 4, 4))]
TWO = [InputSpec("ids", I64, ("N", "T")), InputSpec("mask", I64, ("N", "T"))]


def numbered(count, start=0):
    """Samples whose every element is their number."""
    numbers = np.arange(start, start + count, dtype=np.float32)
    return np.broadcast_to(numbers[:, None, None, None], (count, 3, 4, 4)).copy()


def numbers(source):
    return [sample["x"][:, 0, 0, 0].tolist() for sample in source]


def error(action, *args, **options):
    with pytest.raises(UserError) as caught:
        action(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_folder_is_read_in_path_order_and_again(tmp_path):
    for name, start in (("b.npy", 2), ("a/z.npy", 0), ("B.NPY", 1), ("c/d/e.npy", 3)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            np.save(file, numbered(1, start))
    source = open_source(tmp_path, ONE)
    assert len(source) == 4
    assert numbers(source) == numbers(source) == [[1], [0], [2], [3]]


def test_junk_is_ignored(tmp_path):
    np.save(tmp_path / "a.npy", numbered(1))
    (tmp_path / ".hidden").mkdir()
    np.save(tmp_path / ".hidden" / "b.npy", numbered(1))
    for name in ("README.md", ".DS_Store", "._a.npy", "labels.txt", "output_0.pb", "model.pb", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert numbers(open_source(tmp_path, ONE)) == [[0]]


def test_stacked_and_single_files_mix(tmp_path):
    np.save(tmp_path / "a.npy", numbered(3))
    np.savez(tmp_path / "b.npz", x=numbered(2, 3), label=np.arange(2))
    np.save(tmp_path / "c.npy", numbered(1, 5)[0])
    source = open_source(tmp_path, ONE)
    assert numbers(source) == [[0], [1], [2], [3], [4], [5]]
    assert all(sample["x"].shape == (1, 3, 4, 4) for sample in source)


@pytest.mark.parametrize(
    ("limit", "taken"),
    [(None, range(10)), (99, range(10)), (10, range(10)), (3, (0, 3, 6)), (1, (0,)), (4, (0, 2, 5, 7))],
)
def test_the_limit_spreads_evenly_over_all_files(tmp_path, limit, taken):
    for start, count in ((0, 4), (4, 1), (5, 5)):
        np.save(tmp_path / f"{start}.npy", numbered(count, start))
    source = open_source(tmp_path, ONE, limit=limit)
    assert len(source) == len(taken) and numbers(source) == [[number] for number in taken]


def test_unselected_files_are_not_decoded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"damaged")
    assert len(list(open_source(tmp_path, ONE, limit=1))) == 1
    source = open_source(tmp_path, ONE)
    assert error(list, source).where == str(tmp_path / "b.png")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    assert "at least 1" in error(as_source, numbered(2), ONE, limit=limit).what


def test_a_fixed_batch_is_filled_across_files(tmp_path):
    inputs = [InputSpec("x", F32, (4, 3, 4, 4))]
    for start, count in ((0, 3), (3, 1), (4, 6)):
        np.save(tmp_path / f"{start}.npy", numbered(count, start))
    source = open_source(tmp_path, inputs)
    assert len(source) == 2 and numbers(source) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert numbers(open_source(tmp_path, inputs, limit=1)) == [[0, 1, 2, 3]]
    assert "3 sample(s) do not fill the model's batch of 4" in error(open_source, tmp_path / "0.npy", inputs).what


def test_images_are_grouped_into_a_fixed_batch(tmp_path):
    for value in range(5):
        Image.new("L", (6, 6), value).save(tmp_path / f"{value}.png")
    source = open_source(tmp_path, [InputSpec("x", F32, (2, 3, 4, 4))], PRESETS["raw"])
    assert numbers(source) == [[0, 1], [2, 3]]


def test_images_default_to_0_1_at_the_models_size(tmp_path):
    Image.new("RGB", (10, 6), (255, 0, 51)).save(tmp_path / "a.jpeg", quality=100)
    (sample,) = open_source(tmp_path / "a.jpeg", ONE)
    assert sample["x"].shape == (1, 3, 4, 4)
    np.testing.assert_allclose(sample["x"][0, :, 0, 0], [1, 0, 0.2], atol=0.01)


def test_images_need_a_model_with_one_input(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert "ids, mask: use .npz" in error(open_source, tmp_path, TWO).what
    assert "set the layout" in error(open_source, tmp_path, [InputSpec("x", F32, None)]).what
    (sample,) = open_source(tmp_path, [InputSpec("x", F32, None)], Preprocess(layout="NHWC"))
    assert sample["x"].shape == (1, 4, 4, 3)


def test_several_inputs_come_from_npz(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.arange(6, dtype=np.int32).reshape(2, 3), mask=np.ones((2, 3), np.int64))
    np.savez_compressed(tmp_path / "b.npz", ids=np.zeros((1, 5), np.int64), mask=np.ones((1, 5), np.int64))
    samples = list(open_source(tmp_path, TWO))
    assert [sample["ids"].tolist() for sample in samples] == [[[0, 1, 2]], [[3, 4, 5]], [[0] * 5]]
    assert all(list(sample) == ["ids", "mask"] and sample["ids"].dtype == I64 for sample in samples)
    np.save(tmp_path / "c.npy", np.zeros((1, 5), np.int64))
    assert error(open_source, tmp_path, TWO).where == str(tmp_path / "c.npy")


def write_pb(path, array, name=""):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def test_onnx_test_data_is_matched_by_name_or_number(tmp_path):
    ids, mask = np.full((1, 2), 5), np.full((1, 2), 6)
    write_pb(tmp_path / "test_data_set_0" / "input_0.pb", mask, "mask")
    write_pb(tmp_path / "test_data_set_0" / "input_1.pb", ids, "ids")
    write_pb(tmp_path / "test_data_set_1" / "input_0.pb", ids)
    write_pb(tmp_path / "test_data_set_1" / "input_1.pb", mask, "other")
    write_pb(tmp_path / "test_data_set_1" / "output_0.pb", mask)
    samples = list(open_source(tmp_path, TWO))
    assert len(samples) == 2
    assert all((s["ids"][0, 0], s["mask"][0, 0]) == (5, 6) for s in samples)
    write_pb(tmp_path / "test_data_set_1" / "input_2.pb", mask)
    assert "no input 'input_2'" in error(open_source, tmp_path, TWO).what
    write_pb(tmp_path / "test_data_set_1" / "input_2.pb", mask, "ids")
    assert "a second tensor for input 'ids'" in error(open_source, tmp_path, TWO).what


def test_one_onnx_tensor_file(tmp_path):
    write_pb(tmp_path / "input_0.pb", numbered(2))
    assert numbers(open_source(tmp_path / "input_0.pb", ONE)) == [[0], [1]]


@pytest.mark.parametrize("content", [b"", b"\xff" * 50])
def test_a_damaged_tensor_file_is_named(tmp_path, content):
    (tmp_path / "input_0.pb").write_bytes(content)
    assert error(open_source, tmp_path, ONE).where == str(tmp_path / "input_0.pb")


def test_external_tensor_data_is_refused(tmp_path):
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[1, 3, 4, 4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    assert "another file" in error(open_source, tmp_path, ONE).what


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "no usable file; accepted are images"),
        (["README.md", ".a.npy", "output_0.pb"], "no usable file"),
        (["a.png", "b.npy"], "arrays and images; give a folder with one kind"),
        (["a.npz", "input_0.pb"], "arrays and tensors"),
    ],
)
def test_a_folder_without_one_kind_of_data_is_refused(tmp_path, files, reason):
    for name in files:
        (tmp_path / name).touch()
    caught = error(open_source, tmp_path, ONE)
    assert reason in caught.what and caught.where == str(tmp_path)


def test_paths_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "link.npy").symlink_to(tmp_path / "nowhere")
    for name, reason in (
        ("missing", "no such file"),
        ("notes.txt", "not a kind of calibration data; accepted are"),
        ("pipe.npy", "not a readable file"),
        ("link.npy", "no such file"),
        ("x" * 300, "cannot read"),
    ):
        caught = error(open_source, tmp_path / name, ONE)
        assert reason in caught.what and caught.where == str(tmp_path / name)
    assert "not a readable file" in error(open_source, tmp_path, ONE).what


def npy_header(shape, dtype="<f4", body=64):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x93NUMPY" + b"\xff" * 200,
        npy_header("(1, 3, 4, 4)"),
        npy_header("(1, 3, 60000, 60000)"),
        npy_header("(-1, 3, 4, 4)", body=200),
        npy_header("(1, 3, 4, 4)", "no type", body=200),
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_damaged_array_file_is_named(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    caught = error(open_source, tmp_path, ONE)
    assert "not a readable array file" in caught.what and caught.where == str(path)


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print, len], object), allow_pickle=True)
    assert "never loaded" in error(open_source, tmp_path, ONE).what
    (tmp_path / "a.npy").write_bytes(pickle.dumps(print))
    assert "not a readable array file" in error(open_source, tmp_path, ONE).what
    (tmp_path / "a.npy").unlink()
    np.savez(tmp_path / "a.npz", allow_pickle=True, x=np.array([print], object))
    assert "never loaded" in error(open_source, tmp_path, ONE).what


def test_an_archive_that_unpacks_to_far_too_much_is_refused_unread(tmp_path):
    path = tmp_path / "a.npz"
    block = b"\0" * (1 << 24)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        member.write(npy_header("(1, 3, 10000, 10000)", body=0))
        for _ in range(20):
            member.write(block)
    inputs = [InputSpec("x", F32, ("N", 3, "H", "W"))]
    tracemalloc.start()
    assert "would unpack to" in error(open_source, path, inputs).what
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_damaged_member_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=numbered(1))
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY") + 140] ^= 1
    path.write_bytes(content)
    assert "not a readable array file" in error(open_source, path, ONE).what


def test_headers_are_checked_on_opening_and_values_on_reading(tmp_path):
    np.save(tmp_path / "0.npy", numbered(1))
    np.save(tmp_path / "1.npy", np.full((1, 3, 4, 4), np.nan, np.float32))
    source = open_source(tmp_path, ONE)
    caught = error(list, source)
    assert "NaN" in caught.what and caught.where == str(tmp_path / "1.npy")
    assert "NaN" in error(open_source, tmp_path / "1.npy", ONE).what
    np.save(tmp_path / "2.npy", np.zeros((1, 3, 5, 4), np.float32))
    assert error(open_source, tmp_path, ONE).where == str(tmp_path / "2.npy")


def test_data_that_changes_between_readings_is_noticed(tmp_path):
    np.save(tmp_path / "a.npy", numbered(3))
    source = open_source(tmp_path, ONE)
    np.save(tmp_path / "a.npy", numbered(2))
    assert "changed" in error(list, source).what


def test_the_first_samples_are_kept(monkeypatch):
    monkeypatch.setattr(data, "KEPT_BYTES", 2 * 3 * 4 * 4 * 4)
    source = as_source(numbered(5), ONE)
    first, second, third, *_ = once = list(source)
    again = list(source)
    assert [s["x"].tolist() for s in again] == [s["x"].tolist() for s in once]
    assert again[0] is first and again[1] is second and again[2] is not third


def test_the_digest_does_not_depend_on_what_was_read_before(monkeypatch):
    monkeypatch.setattr(data, "KEPT_BYTES", 2 * 3 * 4 * 4 * 4)
    once, begun = as_source(numbered(5), ONE), as_source(numbered(5), ONE)
    assert [next(iter(begun)) for _ in range(2)]
    assert begun.digest() == once.digest()


def test_what_is_kept_is_not_read_again(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((1, 3, 4, 4), i, np.float32))
    source = open_source(tmp_path, ONE)
    wanted = [sample["x"].tolist() for sample in source]
    for path in tmp_path.iterdir():
        path.unlink()
    assert [sample["x"].tolist() for sample in source] == wanted and len(source.digest()) == 64


def test_reading_holds_one_sample_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "KEPT_BYTES", 0)
    inputs = [InputSpec("x", F32, (1, 3, 128, 128))]
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", np.zeros((20, 3, 128, 128), np.float32))
    tracemalloc.start()
    assert sum(1 for _ in open_source(tmp_path, inputs)) == 60
    assert tracemalloc.get_traced_memory()[1] < 5 * 3 * 128 * 128 * 4
    tracemalloc.stop()


def test_the_digest_is_of_what_is_fed(tmp_path):
    np.save(tmp_path / "a.npy", numbered(3))
    np.save(tmp_path / "b.npy", numbered(3).astype(np.float64))
    first = open_source(tmp_path / "a.npy", ONE)
    digest = first.digest()
    assert len(digest) == 64 and digest == first.digest()
    second = open_source(tmp_path / "b.npy", ONE)
    assert len(list(second)) == 3 and second.digest() == digest
    assert open_source(tmp_path / "a.npy", ONE, limit=2).digest() != digest
    assert as_source(numbered(3), ONE).digest() == digest
    assert as_source(numbered(3, 1), ONE).digest() != digest
    renamed = [InputSpec("z", F32, ("N", 3, 4, 4))]
    assert as_source(numbered(3), renamed).digest() != digest


def test_an_abandoned_iteration_does_not_spoil_the_digest():
    source, other = as_source(numbered(3), ONE), as_source(numbered(3), ONE)
    next(iter(source))
    assert source.digest() == other.digest()


@pytest.mark.parametrize(
    "obj",
    [
        numbered(3),
        {"x": numbered(3)},
        [{"x": sample} for sample in numbered(3)],
        list(numbered(3)),
        tuple(numbered(3).astype(np.float64)),
        [numbered(2), {"x": numbered(1, 2)}],
        lambda: ({"x": sample} for sample in numbered(3)),
        lambda: iter(numbered(3)),
    ],
)
def test_python_objects(obj):
    source = as_source(obj, ONE)
    assert len(source) == 3
    assert numbers(source) == numbers(source) == [[0], [1], [2]]
    assert numbers(as_source(obj, ONE, limit=2)) == [[0], [1]]


def test_a_path_or_a_source_is_taken_as_it_is(tmp_path):
    np.save(tmp_path / "a.npy", numbered(2))
    source = as_source(str(tmp_path), ONE)
    assert isinstance(source, Source) and numbers(source) == [[0], [1]]
    assert as_source(source, ONE) is source


def test_samples_do_not_share_memory_with_the_callers_arrays():
    array = numbered(2)
    for sample in as_source(array, ONE):
        sample["x"][:] = 9
    assert array.max() == 1


@pytest.mark.parametrize(
    ("obj", "reason"),
    [
        ((sample for sample in numbered(3)), "a generator can be read only once"),
        (iter([numbered(1)]), "a generator can be read only once"),
        ([], "no samples"),
        (3, "a int is not calibration data"),
        ([3], "not a int"),
        ([(numbered(1), 5)], "not a tuple"),
        ([{"y": numbered(1)}], "no array for the input 'x'"),
        ([{"x": numbered(1), "y": 1}], "the model has no input 'y'"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "not an array of numbers"),
        ([numbered(1), np.zeros((3, 3), np.float32)], "cannot take an array of shape [3, 3]"),
        ([np.zeros((1, 3, 4, 4), np.uint8)], "preprocessing is missing"),
    ],
)
def test_wrong_python_objects_are_refused(obj, reason):
    assert reason in error(as_source, obj, ONE).what


def test_an_array_without_a_name_needs_one_input():
    assert "the model has the inputs ids, mask" in error(as_source, np.zeros((1, 4), np.int64), TWO).what


def test_a_function_must_return_a_new_iterator_on_every_call():
    once = iter(numbered(3))
    assert "a new iterator on every call" in error(as_source, lambda: once, ONE).what


def test_a_model_without_inputs_cannot_be_fed(tmp_path):
    for given in (tmp_path, []):
        assert "no inputs" in error(as_source, given, []).what
