"""Cubins on disk: made once, whole or made anew, at most so many bytes of them with the least recently used removed first, from several processes at once,
and not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmaml import __main__ as command
from fastmaml.executors.cuda import cubins, nvrtc
from fastmaml.executors.cuda import executor as cuda_executor


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(cubins, "_said", set())
    monkeypatch.delenv("FASTMAML_CUBIN_BYTES", raising=False)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A compiler that counts."""
    fake = SimpleNamespace(version="13.0", made=0)

    def compile(source: str, headers: dict, arch: str) -> bytes:
        fake.made += 1
        return f"{arch} {source}\n{len(headers)}".encode() * 100

    fake.compile = compile
    monkeypatch.setattr(nvrtc, "find", lambda: fake)
    return fake


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cubins").iterdir()}


def bytes_of(image: bytes) -> int:
    return len(cubins._wrapped(image))


# ---------------------------------------------------------------------------------------------------- whole, or made anew
def test_a_cubin_is_made_once_for_all_that_it_is_made_of(counting: SimpleNamespace, tmp_path: Path) -> None:
    first = nvrtc.cubin("a", {"h": "1"}, "sm_90", tmp_path)
    assert nvrtc.cubin("a", {"h": "1"}, "sm_90", tmp_path) == first and counting.made == 1
    for others in (("b", {"h": "1"}, "sm_90"), ("a", {"h": "2"}, "sm_90"), ("a", {"h": "1"}, "sm_80")):
        nvrtc.cubin(*others, tmp_path)
    counting.version = "13.1"
    nvrtc.cubin("a", {"h": "1"}, "sm_90", tmp_path)
    assert counting.made == 5 and len(files(tmp_path)) == 5


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"0", lambda b: b[:200] + b"?" + b[201:], lambda b: b"", lambda b: b"x" * 99])
def test_a_damaged_cubin_is_made_anew(damage: Callable[[bytes], bytes], counting: SimpleNamespace, tmp_path: Path) -> None:
    first = nvrtc.cubin("a", {}, "sm_90", tmp_path)
    (path,) = (tmp_path / "cubins").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=f"the cache {path} is damaged"):
        assert nvrtc.cubin("a", {}, "sm_90", tmp_path) == first
    assert counting.made == 2 and path.read_bytes() == whole


def test_a_source_is_compiled_for_its_device_and_loaded_once(counting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = []
    module = SimpleNamespace(can_load=True, headers=dict, device=lambda index: {"capability": (9, index)}, load=lambda *a: loaded.append(a) or 7 + a[1])
    for index in (0, 1, 0):
        assert nvrtc.kernel("a source", module, torch.device("cuda", index)) == 7 + index
    assert [(image[:5], index) for image, index in loaded] == [(b"sm_90", 0), (b"sm_91", 1)] and counting.made == 2
    module.can_load = False
    with pytest.raises(nvrtc.Absent, match="built by an nvcc before 12.8"):
        nvrtc.kernel("a source", module, torch.device("cuda", 0))


# ---------------------------------------------------------------------------------------------------------- the limit
def used(folder: Path, names: str) -> None:
    """As if these had been used last, in this order, long ago."""
    for n, name in enumerate(names):
        os.utime(folder / f"cubins/{name}.cubin", ns=(0, 10**9 * (n + 1)))


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = b"x" * 1000
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", str(3 * bytes_of(image)))
    for name in "abc":
        cubins.keep(name, image, tmp_path)
    used(tmp_path, "bca")
    assert cubins.load("b", tmp_path) == image  # of all the last one now
    cubins.keep("d", image, tmp_path)
    assert files(tmp_path) == {"a.cubin", "b.cubin", "d.cubin"}
    used(tmp_path, "dba")
    cubins.keep("e", b"y" * 2000, tmp_path)  # takes the place of two, and leaves one
    assert files(tmp_path) == {"a.cubin", "e.cubin"}


def test_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = b"x" * 1000
    for name in "abc":
        cubins.keep(name, image, tmp_path)
    used(tmp_path, "abc")
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", str(4 * bytes_of(image)))
    cubins.keep("d", image, tmp_path)
    assert len(files(tmp_path)) == 4
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", str(4 * bytes_of(image) - 1))
    cubins.keep("d", image, tmp_path)  # again: it counts once
    assert files(tmp_path) == {"b.cubin", "c.cubin", "d.cubin"}


def test_what_alone_is_beyond_the_limit_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.keep("a", b"x" * 100, tmp_path)
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", "1000")
    cubins.keep("b", b"x" * 1000, tmp_path)
    assert files(tmp_path) == {"a.cubin"}


def test_none_are_kept(tmp_path: Path, counting: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", "0")
    assert nvrtc.cubin("a", {}, "sm_90", tmp_path) == nvrtc.cubin("a", {}, "sm_90", tmp_path)
    assert counting.made == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["-1", "1e6", "256 MB", "²"])
def test_a_limit_that_is_no_number_is_named(value: str, tmp_path: Path, counting: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", value)
    with pytest.raises(RuntimeError, match=f"FASTMAML_CUBIN_BYTES={value}: must be a number of bytes"):
        nvrtc.cubin("a", {}, "sm_90", tmp_path)
    assert counting.made == 0


def test_only_cubins_and_abandoned_parts_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cubins").mkdir()
    for name in ("notes.txt", "old.cubin.1234.part", "new.cubin.5678.part"):
        (tmp_path / "cubins" / name).write_bytes(b"z" * 5000)
    for name in ("notes.txt", "old.cubin.1234.part"):
        os.utime(tmp_path / "cubins" / name, ns=(0, 0))
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", "2000")
    cubins.keep("a", b"x" * 1000, tmp_path)
    assert files(tmp_path) == {"a.cubin", "notes.txt", "new.cubin.5678.part"}


# ------------------------------------------------------------------------------------------------------ several processes
WORKER = """
import random, sys
from fastmaml.executors.cuda import cubins
folder, rng = sys.argv[1], random.Random(int(sys.argv[2]))
sys.stdin.read(1)  # all begin at once
for _ in range(400):
    key = str(rng.randrange(12))
    image, found = key.encode() * 3000, cubins.load(key, folder)
    assert found in (None, image), key
    if found is None:
        cubins.keep(key, image, folder)
"""


def test_several_processes(tmp_path: Path) -> None:
    """Whole files or none, nothing left beside them, and in the end not more than the limit, whoever was the last."""
    most = 5 * bytes_of(b"7" * 3000)
    environment = {**os.environ, "FASTMAML_CUBIN_BYTES": str(most)}
    command = [sys.executable, "-W", "error", "-c", WORKER, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(n)], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for n in range(3)]
    for worker in workers:
        worker.stdin.write(b"!")
        worker.stdin.flush()
    for worker in workers:
        said = worker.communicate()[1].decode()
        assert worker.returncode == 0, said
    assert all(name.endswith(".cubin") for name in files(tmp_path))
    count, size = cubins.usage(tmp_path / "cubins")
    assert 1 <= count <= 5 and size <= most


def test_what_another_process_removes_first_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the list of the files and their removal, and between the list and their sizes."""
    for name in "abc":
        cubins.keep(name, b"x" * 1000, tmp_path)
    used(tmp_path, "abc")
    listed = cubins._files

    def late(at: Path) -> list:
        found = listed(at)
        (at / "a.cubin").unlink()
        return found

    monkeypatch.setattr(cubins, "_files", late)
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", str(3 * bytes_of(b"x" * 1000)))
    cubins.keep("d", b"x" * 1000, tmp_path)
    assert files(tmp_path) == {"b.cubin", "c.cubin", "d.cubin"}  # the one that was gone counts as removed


# ----------------------------------------------------------------------------------------------- a folder that is of no use
def test_a_folder_that_cannot_be_used_is_named_once_and_costs_no_more(counting: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=f"cannot be kept in {tmp_path}/file/cubins, every process compiles its own: .*Not a directory") as warned:
        first = nvrtc.cubin("a", {}, "sm_90", tmp_path / "file")
        assert nvrtc.cubin("a", {}, "sm_90", tmp_path / "file") == first and counting.made == 2
    assert len(warned) == 1


@pytest.mark.parametrize("refused", ["read", "write", "list", "remove"])
def test_what_is_not_permitted(refused: str, counting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be permitted everything: the calls refuse."""
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", "1000")
    cubins.keep("old", b"x" * 800, tmp_path)

    def refuse(*_, **__) -> None:
        raise PermissionError(13, "Permission denied")

    at, name = {"read": (Path, "read_bytes"), "write": (cubins, "whole_file"), "list": (os, "scandir"), "remove": (Path, "unlink")}[refused]
    monkeypatch.setattr(at, name, refuse)
    with pytest.warns(UserWarning, match="every process compiles its own: .*Permission denied") as warned:
        for _ in range(3):
            assert nvrtc.cubin("a", {}, "sm_90", tmp_path).startswith(b"sm_90 a")
    assert len(warned) == 1


def test_a_folder_that_is_only_read(counting: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives what it has, without a word."""

    def refuse(*_, **__) -> None:
        raise PermissionError(13, "Permission denied")

    first = nvrtc.cubin("a", {}, "sm_90", tmp_path)
    monkeypatch.setattr(os, "utime", refuse)
    assert nvrtc.cubin("a", {}, "sm_90", tmp_path) == first and counting.made == 1


# ------------------------------------------------------------------------------------------------------ python -m fastmaml
def test_the_report_says_where_they_lie_and_how_many(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(devices=lambda: (0, "no driver"))
    monkeypatch.setattr(cuda_executor, "_cuda", module)
    monkeypatch.setattr(command, "_peak", lambda: "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def row() -> str:
        assert command.main([]) == 0
        return next(line[13:] for line in capsys.readouterr().out.splitlines() if line.startswith("cubins "))

    at = tmp_path / "fastmaml/cubins"
    assert row() == f"{at}: 0 compiled kernels, 0.0 MB of at most 256.0 MB (FASTMAML_CUBIN_BYTES)"
    cubins.keep("a", b"x" * (3 << 19))
    monkeypatch.setenv("FASTMAML_CUBIN_BYTES", str(5 << 20))
    assert row() == f"{at}: 1 compiled kernels, 1.5 MB of at most 5.0 MB (FASTMAML_CUBIN_BYTES)"
    for value, said in (("0", "not kept: FASTMAML_CUBIN_BYTES=0"), ("much", "not kept: FASTMAML_CUBIN_BYTES=much: must be a number of bytes")):
        monkeypatch.setenv("FASTMAML_CUBIN_BYTES", value)
        assert row().startswith(said)
    monkeypatch.delenv("FASTMAML_CUBIN_BYTES")
    (at / "a.cubin").unlink()
    at.rmdir()
    at.write_text("")
    assert row().startswith("not kept: ") and "Not a directory" in row()
    monkeypatch.setattr(cuda_executor, "_cuda", None)
    assert command.main([]) == 0 and "cubins" not in capsys.readouterr().out
