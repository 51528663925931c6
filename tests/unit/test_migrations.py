"""The numbers of the shipped migrations: two of one number would each be taken for the other, changed."""

from streamworker.postgres.migrate import shipped


def test_each_number_stands_once_and_none_is_left_out():
    assert [migration.version for migration in shipped()] == list(range(1, len(shipped()) + 1))
