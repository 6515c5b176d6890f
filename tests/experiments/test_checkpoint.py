"""Checkpoints: whole or untouched, checked when read, and never executed."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from experiments.common import atomic
from experiments.common.checkpoint import load_checkpoint, save_checkpoint

IDENTITY = {"experiment": "classifier", "widths": [1, 2]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    save_checkpoint(path, {"net": {"w": torch.arange(1000.0)}, "steps": 3}, IDENTITY)
    return path


def test_checkpoint_reads_back(file):
    state = load_checkpoint(file, IDENTITY)
    assert state["steps"] == 3
    torch.testing.assert_close(state["net"]["w"], torch.arange(1000.0))
    assert [entry.name for entry in file.parent.iterdir()] == ["checkpoint.pt"]


def test_save_checkpoint_on_a_full_disk_keeps_the_one_before(file, monkeypatch):
    before = file.read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"could not be written .*No space left.*the one before it is untouched"):
        save_checkpoint(file, {"net": {}}, IDENTITY)
    with pytest.raises(RuntimeError, match="there is none before it"):
        save_checkpoint(file.with_name("other.pt"), {"net": {}}, IDENTITY)
    assert [(entry.name, entry.read_bytes()) for entry in file.parent.iterdir()] == [("checkpoint.pt", before)]


def test_load_checkpoint_refuses_every_damage(file):
    whole = file.read_bytes()
    for position in range(0, len(whole), 97):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        try:
            state = load_checkpoint(file, IDENTITY)
        except ValueError as error:
            assert str(file) in str(error)  # noqa: PT017 - most positions must fail, padding need not
        else:
            torch.testing.assert_close(state["net"]["w"], torch.arange(1000.0))
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"no zip"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="must be a whole checkpoint, but it is damaged"):
            load_checkpoint(file, IDENTITY)


def test_load_checkpoint_refuses_another_training(file):
    with pytest.raises(ValueError, match=r"belongs to another training: its widths is \[1, 2\], here it is \[1, 3\]"):
        load_checkpoint(file, IDENTITY | {"widths": [1, 3]})
    with pytest.raises(ValueError, match="its clamp is None, here it is 'hard'"):
        load_checkpoint(file, IDENTITY | {"clamp": "hard"})


def test_load_checkpoint_refuses_other_files(file):
    torch.save({"w": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="must be a 'bsfast checkpoint 1', got None"):
        load_checkpoint(file, IDENTITY)
    torch.save([1], file)
    with pytest.raises(ValueError, match="must be a 'bsfast checkpoint 1', got 'list'"):
        load_checkpoint(file, IDENTITY)
    with pytest.raises(FileNotFoundError, match=r"path must be a checkpoint, got .*nothing"):
        load_checkpoint(file.with_name("nothing"), IDENTITY)


class Trap:
    """Executes when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["BSFAST_TRAP"]),)


def test_load_checkpoint_executes_nothing(file, monkeypatch):
    trap = file.with_name("sprung")
    monkeypatch.setenv("BSFAST_TRAP", str(trap))
    torch.save({"format": "bsfast checkpoint 1", "identity": IDENTITY, "state": Trap()}, file, pickle_module=pickle)
    with pytest.raises(ValueError, match="must hold tensors and plain values only, and is refused"):
        load_checkpoint(file, IDENTITY)
    assert not trap.exists()
