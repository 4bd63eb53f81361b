"""forms.py: what was measured once is taken by all later starts, and what cannot be kept is said."""

import json
import os

import jax
import pytest

from smoljax import forms, runtime

WHAT = {"dtype": "float32", "rows": 1}
A, B = {"q": {"rows": 1.0, "left": 2.0}}, {"q": {"rows": 2.0, "left": 1.0}}


def never():
    raise AssertionError("measured again")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(place):
    return [file for file in place.rglob("*") if file.is_file()]


def test_the_first_measurement_holds_until_it_is_forgotten(place):
    assert forms.kept(WHAT, lambda: A) == A
    assert forms.kept(WHAT, never) == A
    assert len(files(place)) == 1  # and nothing half written
    forms.forget()
    assert forms.kept(WHAT, lambda: B) == forms.kept(WHAT, never) == B


def test_of_two_at_once_the_first_one_to_write_is_followed(place):
    def slowly():
        assert forms.kept(WHAT, lambda: A) == A  # another start, from beginning to end, while this one measures
        return B

    assert forms.kept(WHAT, slowly) == A
    assert forms.kept(WHAT, never) == A


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False),
        lambda patch: patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_multi_thread_eigen=false"),
        lambda patch: patch.setenv("NPROC", "1"),
        lambda patch: patch.setattr(runtime, "processor", lambda: "another"),
        lambda patch: patch.setattr(jax, "local_device_count", lambda: 3),
        lambda patch: patch.setattr(forms, "version", lambda _: "0.0.1"),
        lambda patch: patch.setitem(WHAT, "rows", 8),
        lambda patch: patch.setitem(WHAT, "dtype", "bfloat16"),
    ],
    ids=["cores", "XLA_FLAGS", "NPROC", "processor", "devices", "jaxlib", "rows", "dtype"],
)
def test_other_surroundings_are_measured_by_themselves(place, monkeypatch, change):
    forms.kept(WHAT, lambda: A)
    with monkeypatch.context() as patch:
        change(patch)
        assert forms.kept(WHAT, lambda: B) == forms.kept(WHAT, never) == B
    assert forms.kept(WHAT, never) == A


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"measured": 3}', b'{"measured": [1]}', b"\xff\xfe\0"])
def test_a_damaged_file_is_said_and_measured_anew(place, caplog, damage):
    forms.kept(WHAT, lambda: A)
    (file,) = files(place)
    file.write_bytes(damage)
    assert forms.kept(WHAT, lambda: B) == B
    (said,) = caplog.messages
    assert said.startswith(f"{file} ") and "anew" in said
    assert forms.kept(WHAT, never) == B  # it is whole again
    assert json.loads(file.read_text())["measured"] == B


def test_without_a_folder_it_is_said_and_measured_each_time(tmp_path, monkeypatch, caplog):
    """A file in the folder's place: to root a folder without permissions is as any."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert forms.kept(WHAT, lambda: A) == A
    assert forms.kept(WHAT, lambda: B) == B
    assert str(tmp_path / "file") in caplog.messages[0] and "cannot be written" in caplog.messages[-1]
    forms.forget()


def test_turned_off_it_is_said_and_measured_each_time(monkeypatch, caplog):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert forms.kept(WHAT, lambda: A) == A
    assert forms.kept(WHAT, lambda: B) == B
    assert "JAX_COMPILATION_CACHE_DIR" in caplog.messages[0]
    forms.forget()
