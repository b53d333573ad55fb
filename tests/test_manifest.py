"""Checksums: whatever is damaged, missing or taken from elsewhere in what tipl wrote is refused by name."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tipl.files.manifest import check_folder, problems_in, read_listed, write_manifest
from tipl.files.sealed import (
    UncheckedWarning,
    load_arrays,
    load_json,
    parse_safetensors,
    save_arrays,
    save_json,
    sorted_metadata,
)
from tipl.verification import verify

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([2**40]), "empty": np.empty((0, 3))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"seed": 0}')
    (folder / "README.md").write_text("mine")
    save_arrays(folder / "model.safetensors", ARRAYS)
    write_manifest(folder)
    return folder


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_whole_folder_is_read(folder: Path) -> None:
    assert check_folder(folder)
    assert problems_in(folder) == []
    assert read_listed(folder / "config.json") == b'{"seed": 0}'
    (folder / "README.md").write_text("changed: it is the user's")
    (folder / "plot.png").write_text("of the user's too")
    assert check_folder(folder)


def test_every_flip_of_every_file_is_found(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "manifest.json"):
        path = folder / name
        data = path.read_bytes()
        for bit in range(0, 8 * len(data), 7):
            path.write_bytes(flipped(data, bit))
            assert problems_in(folder), f"{name}, bit {bit}"
        path.write_bytes(data)
    assert problems_in(folder) == []


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "config.json").write_text('{"seed": 1}')
    write_manifest(other)
    shutil.copy(other / "config.json", folder)
    with pytest.raises(RuntimeError, match=r"config.json is damaged or of another folder: its SHA-256 is \w{12}"):
        check_folder(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"config.json .*: it has 2 bytes instead of 11, as manifest.json says"):
        read_listed(folder / "config.json")
    (folder / "config.json").unlink()
    with pytest.raises(RuntimeError, match=r"config.json is missing: manifest.json lists it"):
        check_folder(folder)
    shutil.copy(other / "config.json", other / "strides.json")
    with pytest.raises(RuntimeError, match=r"strides.json does not belong to its folder: manifest.json does not list"):
        check_folder(other)


def test_a_file_that_no_memory_holds_is_named(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "config.json", 2**40)  # sparse
    with pytest.raises(RuntimeError, match=r"config.json is damaged or of another folder: it has 1099511627776 bytes"):
        read_listed(folder / "config.json")
    with pytest.raises(OSError, match=r"config.json must have at most [\d,]+ bytes, got 1,099,511,627,776"):
        write_manifest(folder)


def test_a_manifest_is_read_only_as_it_was_written(folder: Path) -> None:
    with open(folder / "manifest.json", "a") as file:
        file.write("\n")
    with pytest.raises(RuntimeError, match=r"manifest.json is damaged: it is not as it was written"):
        read_listed(folder / "config.json")


def test_a_folder_of_an_older_tipl_is_read_with_one_warning(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.warns(UncheckedWarning, match=r"model has no checksum \(an older tipl wrote it\)"):
        assert not check_folder(folder)


def test_sealed_arrays_come_back(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_arrays(path, ARRAYS, {"trial": 3})
    arrays, record = load_arrays(path, "test")
    assert record == {"trial": 3}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(arrays[name], array)


def test_equal_contents_are_equal_bytes() -> None:
    import safetensors.numpy

    metadata = {f"key{i}": str(i) for i in range(9)}
    files = {sorted_metadata(safetensors.numpy.save(ARRAYS, metadata)) for _ in range(5)}
    assert len(files) == 1
    arrays, found = parse_safetensors(files.pop())
    assert found == metadata
    np.testing.assert_array_equal(arrays["b"], ARRAYS["b"])


def test_every_flip_of_a_sealed_file_is_found_or_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_arrays(path, {"weights": np.ones((2, 3), np.float32)}, {"trial": 3})
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        with pytest.raises((RuntimeError, UncheckedWarning)):
            load_arrays(path, "test")
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(RuntimeError, match=r"f\.safetensors is damaged"):
            load_arrays(path, "test")


def test_every_flip_of_a_sealed_document_is_found_or_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    save_json(path, {"collect": 3.5, "name": "ä"})
    assert load_json(path, "test") == {"collect": 3.5, "name": "ä"}
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(flipped(data, bit))
        try:
            assert load_json(path, "test") == {"collect": 3.5, "name": "ä"}  # of white space
        except (RuntimeError, UncheckedWarning):
            continue
    path.write_text(json.dumps({"collect": 1}))
    with pytest.warns(UncheckedWarning):
        assert load_json(path, "test") == {"collect": 1}


def test_verify_looks_into_folders_of_folders(folder: Path, tmp_path: Path) -> None:
    save_json(tmp_path / "seconds.json", {"collect": 3.5})
    found = verify(tmp_path)
    assert (found.problems, len(found.whole)) == ([], 2)
    assert verify(folder / "model.safetensors").problems == []
    (folder / "config.json").write_text("{}")
    (tmp_path / "seconds.json").write_text("{}")
    problems = verify(tmp_path).problems
    assert len(problems) == 2
    assert "config.json" in problems[0]
    assert "seconds.json has no checksum" in problems[1]
    with pytest.raises(FileNotFoundError, match="verify: there is no"):
        verify(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"verify: there is nothing in .*empty"):
        verify(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"README.md is no file that tipl writes"):
        verify(folder / "README.md")
