"""A folder of checkpoints always has a complete one to resume from, even if a save is interrupted or a file damaged."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saving_cases import FILES, delete, flip, is_of, names, newest, saved, state_of

from mlopt.errors import CheckpointError, CheckpointWarning
from mlopt.solving import serialization
from mlopt.solving.checkpoints import Checkpoints


def test_a_checkpoint_is_a_manifest_with_hashes_and_two_files(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "run", best="a/loss")
    checkpoints.prepare(resume=False)
    assert checkpoints.newest() is None
    folder = checkpoints.save(42, state_of(42), 0.25)
    assert folder == tmp_path / "new" / "run" / "step-00000042"
    assert tuple(names(folder)) == FILES
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["score"], manifest["best"]) == (1, 42, 0.25, "a/loss")
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert set(manifest["files"]) == set(FILES[1:])
    assert newest(checkpoints) == (42, [])


def test_without_a_folder_there_is_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").newest() is None


def test_due_counts_outer_steps(tmp_path):
    assert [step for step in range(1, 10) if Checkpoints(tmp_path, every=3).due(step)] == [3, 6, 9]


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"keep": 0}, {"keep": True}, {"best": 3}])
def test_an_argument_of_the_wrong_kind_is_named(tmp_path, options):
    with pytest.raises(ValueError, match=f"Checkpoints: {next(iter(options))}="):
        Checkpoints(tmp_path, **options)


# Retention


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, float("nan"), None]), min_size=1, max_size=6),
    st.integers(1, 3),
    st.booleans(),
)
def test_the_newest_and_the_best_are_kept(scores, keep, greater):
    with tempfile.TemporaryDirectory() as folder:
        steps = range(8, 8 + len(scores))
        saved(Path(folder), *steps, scores=scores, keep=keep, best="a/x", greater_is_better=greater)
        comparable = {step: score for step, score in zip(steps, scores, strict=True) if score in (0, 1, 2, 3)}
        # A better checkpoint is never removed, so the best of those kept is the best of all.
        best = sorted(comparable, key=lambda step: -comparable[step] if greater else comparable[step])[:1]
        assert names(Path(folder)) == [f"step-{step:08d}" for step in sorted({*list(steps)[-keep:], *best})]


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    checkpoints = saved(tmp_path, 9, 99_999_999, 100_000_000, keep=5)
    (tmp_path / "step-00000009").rename(tmp_path / "step-9")
    assert newest(checkpoints)[0] == 100_000_000
    saved(tmp_path, 100_000_001, keep=3)
    assert names(tmp_path) == ["step-100000000", "step-100000001", "step-99999999"]


def test_scores_without_a_column_are_ignored(tmp_path):
    saved(tmp_path, 1, 2, 3, scores=[0.0, 1.0, 2.0], keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_scores_of_another_column_are_not_compared(tmp_path):
    saved(tmp_path, 1, scores=[0.0], best="a/error")
    saved(tmp_path, 2, 3, scores=[5.0, 6.0], best="a/loss", keep=1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_incomplete_checkpoints_are_ignored_and_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "step-00000003" / "state.json").write_text("{")
    checkpoints = saved(tmp_path, 4, keep=2)
    assert names(tmp_path) == [f"step-0000000{k}" for k in (2, 3, 4)]
    assert newest(checkpoints) == (4, [])


def test_a_run_resumed_from_an_earlier_step_keeps_its_checkpoints(tmp_path):
    """Damaged later checkpoints do not count as the newest ones."""
    saved(tmp_path, 1, 20)
    flip(tmp_path / "step-00000020" / "tensors.safetensors", 0.9, 1)
    checkpoints = saved(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002", "step-00000020"]
    assert newest(checkpoints)[0] == 2


def test_other_files_in_the_folder_are_kept(tmp_path):
    foreign = [
        "step-00000001.txt",
        "step-",
        "step-1a",
        "my-step-00000001",
        "partial-notes",
        "replaced-x",
        "step-٣",
        "best",
    ]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "step-00000090").write_text("a file")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.prepare(resume=False)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
    assert newest(checkpoints) == (2, [])
    assert names(tmp_path) == sorted([*foreign, "step-00000090", "step-00000002"])
    with pytest.raises(CheckpointError, match="step-00000090 cannot be saved: Not a directory"):
        checkpoints.save(90, state_of(90))
    assert (tmp_path / "step-00000090").read_text() == "a file"


def test_faults_are_kept_and_never_resumed_from(tmp_path):
    checkpoints = saved(tmp_path, 1, keep=1)
    for weight in (5, 6):
        folder = checkpoints.save_fault(7, state_of(weight))
    assert folder.name == "fault-00000007"
    assert is_of(serialization.read(folder), 6)
    checkpoints.save(8, state_of(8))
    assert names(tmp_path) == ["fault-00000007", "step-00000008"]
    shutil.rmtree(tmp_path / "step-00000008")
    assert checkpoints.newest() is None


def test_a_failed_removal_of_an_old_checkpoint_does_not_end_the_run(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1, keep=1)
    rename = os.rename

    def busy(source, target):
        if Path(source).name == "step-00000001":
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.warns(
        CheckpointWarning, match="step-00000001 is no longer needed but cannot be removed: Device or resource"
    ):
        checkpoints.save(2, state_of(2))
    assert newest(checkpoints) == (2, [])


def test_files_are_flushed_before_renames_and_removals(tmp_path, monkeypatch):
    """The order is: files, their folder, its name; nothing is removed before the new name is on the disk."""
    checkpoints = saved(tmp_path, 1, keep=1)
    events = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append(Path(paths[1]).name), rename(*paths)))
    monkeypatch.setattr(os, "unlink", lambda *a, **options: (unlink(*a, **options), events.append("unlink")))
    folder = checkpoints.save(2, state_of(2))
    files = [(folder / name).stat().st_ino for name in ("tensors.safetensors", "state.json", "manifest.json")]
    expected = [*files, folder.stat().st_ino, folder.name, tmp_path.stat().st_ino, "partial-step-00000001"]
    assert events == [*expected, "unlink", "unlink", "unlink"]


# Damage


def truncate(path, place, _):
    path.write_bytes(path.read_bytes()[: int(place * (path.stat().st_size - 1))])


def append(path, _, byte):
    path.write_bytes(path.read_bytes() + bytes([byte]))


def rename_file(path, *_):
    path.rename(path.with_name("renamed"))


def swap(path, *_):
    """Replace the file by that of the previous checkpoint."""
    shutil.copy(path.parent.with_name("step-00000002") / path.name, path)


def empty(path, *_):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


DAMAGES = [flip, truncate, append, delete, rename_file, swap, empty]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    saved(folder, 1, 2, 3, keep=3)
    return folder


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), st.sampled_from(DAMAGES), st.floats(0, 1), st.integers(1, 255))
def test_a_damaged_checkpoint_is_skipped_unless_the_damage_is_harmless(pristine, file, damage, place, byte):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(pristine, folder, dirs_exist_ok=True)
        damage(Path(folder) / "step-00000003" / file, place, byte)
        step, messages = newest(Checkpoints(folder))
        if step == 3:
            # Only the manifest has no hash of its bytes: a change of white space in it is harmless.
            assert file == "manifest.json"
            assert damage in (flip, append)
            assert not messages
            manifests = [Path(where) / "step-00000003" / file for where in (folder, pristine)]
            assert len({str(json.loads(manifest.read_bytes())) for manifest in manifests}) == 1
        else:
            assert step == 2
            assert len(messages) == 1
            assert "step-00000003: its " in messages[0] or "step-00000003: it " in messages[0]


def rewritten(**entries):
    """Return a damage that changes entries of the manifest and updates its hash."""

    def damage(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        manifest |= entries
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**manifest, "sha256": digest}))

    return damage


def retouch(path):
    """Give a checkpoint another score without updating the hash."""
    path.write_text(path.read_text().replace('"score": null', '"score": 0.5'))


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: delete(folder / "manifest.json"), "it has no manifest.json: the save was interrupted"),
        (lambda folder: delete(folder / "state.json"), "its state.json is missing"),
        (lambda folder: truncate(folder / "tensors.safetensors", 0.5, 0), "its tensors.safetensors has"),
        (
            lambda folder: flip(folder / "tensors.safetensors", 1, 1),
            "its tensors.safetensors is damaged: its SHA-256",
        ),
        (put("manifest.json", b"\xff{"), "its manifest.json is damaged"),
        (put("manifest.json", b"[" * 100_000), "its manifest.json is damaged"),
        (put("manifest.json", b"[]"), "it is not a manifest"),
        (put("manifest.json", b'{"format": true}'), "it is not a manifest"),
        (put("manifest.json", b'{"format": 1}'), "its SHA-256 differs"),
        (
            lambda folder: retouch(folder / "manifest.json"),
            "its manifest.json is damaged: its SHA-256 differs",
        ),
        (rewritten(format=2), "it has format 2, and this version of mlopt reads formats up to 1"),
        (rewritten(step=7), "its manifest.json is of step 7: the folder was renamed"),
        (lambda folder: (delete(folder / "state.json"), (folder / "state.json").mkdir()), "its state.json has"),
    ],
)
def test_the_reason_for_skipping_a_checkpoint_is_reported(tmp_path, damage, sentence):
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    step, messages = newest(checkpoints)
    assert step == 1
    assert len(messages) == 1
    assert str(tmp_path / "step-00000002") in messages[0]
    assert sentence in messages[0]


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_without_read_permission_is_skipped(tmp_path, monkeypatch, file):
    checkpoints = saved(tmp_path, 1, 2)
    real = builtins.open

    def closed(path, *arguments):
        if Path(path).parts[-2:] == ("step-00000002", file):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(builtins, "open", closed)
    step, messages = newest(checkpoints)
    assert step == 1
    assert "Permission denied" in messages[0]


def test_if_no_checkpoint_is_complete_the_reasons_are_listed(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    delete(tmp_path / "step-00000001" / "manifest.json")
    delete(tmp_path / "step-00000002" / "state.json")
    with pytest.raises(
        CheckpointError, match=r"(?s)none .* complete.*00002: its state.json is missing.*00001: it has no manifest"
    ):
        checkpoints.newest()


# Preparation of the folder


def test_a_folder_with_checkpoints_needs_resume(tmp_path):
    saved(tmp_path, 1, 2)
    with pytest.raises(
        CheckpointError, match=r"already holds checkpoints, the newest step-00000002: resume .* resume=True"
    ):
        Checkpoints(tmp_path).prepare(resume=False)
    Checkpoints(tmp_path).prepare(resume=True)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_preparing_removes_the_leftovers_of_interrupted_saves(tmp_path):
    saved(tmp_path, 1)
    for name in ("partial-step-00000002", "partial-fault-00000001"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / "partial-trial").write_text("")
    Checkpoints(tmp_path).prepare(resume=True)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("whole", ["both", "replaced", "target", "only replaced"])
def test_after_an_interrupted_replacement_the_complete_checkpoint_remains(tmp_path, whole):
    checkpoints = saved(tmp_path, 3)
    target, replaced = tmp_path / "step-00000003", tmp_path / "replaced-step-00000003"
    shutil.copytree(target, replaced)
    if whole == "replaced":
        flip(target / "state.json", 0.5, 1)
    if whole == "target":
        delete(replaced / "state.json")
    if whole == "only replaced":
        shutil.rmtree(target)
    right = (target if whole in ("both", "target") else replaced).stat().st_ino
    assert newest(checkpoints)[0] == 3
    checkpoints.prepare(resume=True)
    assert names(tmp_path) == ["step-00000003"]
    assert target.stat().st_ino == right
    assert newest(checkpoints) == (3, [])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("file", "File exists .*; a file has that name"),
        ("file/under", "Not a directory .*; a file is where a folder should be"),
    ],
)
def test_a_file_in_place_of_the_folder_is_reported(tmp_path, path, sentence):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"checkpoints cannot be written to .*: {sentence}"):
        Checkpoints(tmp_path / path).prepare(resume=False)


def test_a_read_only_folder_is_reported_in_advance(tmp_path, monkeypatch):
    def read_only(path, mode="r", *arguments):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(builtins, "open", read_only)
    with pytest.raises(
        CheckpointError, match=r"cannot be written to .*: Read-only file system .*; give a folder on a writable file"
    ):
        Checkpoints(tmp_path).prepare(resume=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", [".", "under"])
def test_a_folder_without_permission_is_reported(tmp_path, path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(CheckpointError, match=r"Permission denied .*; give yourself the permission"):
        Checkpoints(tmp_path / path).prepare(resume=False)
    tmp_path.chmod(0o700)
