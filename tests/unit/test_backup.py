"""Which dump of a folder comes back."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from services.backup import (
    BackupError,
    BackupSettings,
    Content,
    Manifest,
    _fuller,
    _libpq,
    _unless_told_to_stop,
    keep,
    main,
    manifest_of,
    restore,
)

SETTINGS = BackupSettings(database_dsn="postgresql://nobody@127.0.0.1:1/none")


async def test_of_a_folder_the_newest_dump_that_is_whole_is_restored(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="holds no dump"):
        await restore(SETTINGS, tmp_path)
    for day in (1, 2, 3):
        dump = tmp_path / f"hub-2026110{day}T021700Z.dump"
        dump.touch()
        if day != 3:  # no manifest: it was not written to its end
            manifest_of(dump).touch()
    with pytest.raises(BackupError, match="hub-20261102T021700Z"):
        await restore(SETTINGS, tmp_path)


def test_what_a_volume_holds_can_be_told_and_handed_out(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    dump = tmp_path / "hub-20261101T021700Z.dump"
    dump.write_bytes(b"\x00dump\xff")
    manifest_of(dump).write_text("{}")
    assert main(["list", str(tmp_path)]) == 0
    assert capfdbinary.readouterr().out == b"hub-20261101T021700Z.dump 6\n"
    assert main(["print", str(dump)]) == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == dump.read_bytes()
    assert main(["print", str(tmp_path / "none")]) == 1


def test_what_a_dsn_says_of_tls_holds_for_the_dump_too() -> None:
    found = _libpq("postgresql://u:p%40@db:5433/hub?sslmode=verify-full&sslrootcert=/ca.crt")
    assert found == {
        "PGHOST": "db",
        "PGPORT": "5433",
        "PGUSER": "u",
        "PGPASSWORD": "p@",
        "PGDATABASE": "hub",
        "PGSSLMODE": "verify-full",
        "PGSSLROOTCERT": "/ca.crt",
    }


def test_sequences_may_have_gone_on_since_they_were_noted() -> None:
    noted = Content({"ingest.firm": (1, "5")}, {"ingest.a": 7, "ingest.b": None, "ingest.c": 2})
    assert noted.differences(Content(noted.tables, {"ingest.a": 9, "ingest.b": 1, "ingest.c": 2})) == []
    assert noted.differences(Content({}, {"ingest.a": 6, "ingest.b": None, "ingest.d": 2})) == [
        "table ingest.firm: 1 rows (5) in the dump, not there in the database",
        "sequence ingest.a: 7 in the dump, 6 in the database",
        "sequence ingest.c: 2 in the dump, None in the database",
        "sequence ingest.d: None in the dump, 2 in the database",
    ]


async def test_a_dump_of_an_emptied_hub_does_not_take_the_place_of_those_before(tmp_path: Path) -> None:
    def made(day: int, rows: int) -> Path:
        dump = tmp_path / f"hub-2026110{day}T021700Z.dump"
        dump.touch()
        content = Content({"ingest.frame": (rows, "1"), "ingest.firm": (1, "1")}, {})
        Manifest(f"2026-11-0{day}", "17.0", "2.17", 0, "other", (), content).write(manifest_of(dump))
        return dump

    full, fewer = made(1, 1000), made(2, 600)
    with pytest.raises(BackupError, match=f"{fewer.name} is not what was dumped"):
        await restore(SETTINGS, tmp_path)
    empty = Manifest.read(manifest_of(made(3, 20)))
    with pytest.raises(BackupError, match=f"21 rows in it and 1001 in {full}, and nothing was changed"):
        await restore(SETTINGS, tmp_path)
    assert _fuller(empty, [full, fewer]) == full
    assert _fuller(Manifest.read(manifest_of(fewer)), [full]) is None
    assert _fuller(empty, []) is None


async def test_what_killed_runs_left_behind_is_removed(tmp_path: Path) -> None:
    (tmp_path / "hub-20261101T021700Z.dump.partial").touch()
    (tmp_path / "notes.partial").touch()
    with pytest.raises(BackupError, match="database does not answer"):
        await keep(SETTINGS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.partial"]


async def test_told_to_stop_it_tidies_up_and_fails() -> None:
    tidied = asyncio.Event()

    async def dumping() -> Manifest:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        finally:
            tidied.set()
        raise AssertionError

    with pytest.raises(BackupError, match="told to stop"):
        await _unless_told_to_stop(dumping())
    assert tidied.is_set()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
