"""The numbers of the shipped migrations: two of one number would each be taken for the other, changed."""

from pathlib import Path

from streamworker.postgres.migrate import shipped


def test_each_number_stands_once_and_none_is_left_out():
    """Two branches that each add one meet here, not on a database."""
    assert [migration.version for migration in shipped()] == list(range(1, len(shipped()) + 1))
    files = sorted((Path(__file__).parents[2] / "migrations").glob("*.sql"))
    assert [int(file.name[:4]) for file in files] == list(range(1, len(files) + 1))
