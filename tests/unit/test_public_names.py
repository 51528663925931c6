"""What users import. A name here is a promise."""

import streamworker


def test_the_public_names_are_those_of_the_design():
    assert sorted(streamworker.__all__) == sorted(
        [
            "App", "Handlers", "Payload", "Context", "Backoff", "Retry", "Snooze", "Discard", "Job", "Enqueued",
            "Keys", "ProcessContext", "QueueWorker", "Settings", "StreamworkerError", "Flow", "chain", "group",
        ]
    )  # fmt: skip
    for name in streamworker.__all__:
        assert getattr(streamworker, name).__name__ == name


def test_every_error_is_one_of_ours_and_has_its_exit_code():
    from streamworker import errors

    codes = {
        "StreamworkerError": 1, "UsageError": 2, "ConfigurationError": 78, "Unreachable": 69, "StuckThread": 70,
        "HandBackFailed": 75, "JobTooLarge": 1, "InvalidJob": 1, "PublishUncertain": 1, "NoConnection": 1, "NoResult": 1,
        "ProcessDied": 1, "ClaimLost": 1, "StepsChanged": 1, "NoKey": 1, "SignalTimeout": 1,
        "JobDead": 1, "JobCancelled": 1, "JobExpired": 1, "ResultNotKept": 1, "ResultTimeout": 1,
    }  # fmt: skip
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.StreamworkerError)
    }
    assert found == codes
    for name in codes:
        assert name in (errors.__doc__ or "")
    signals = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.HandlerSignal)
    ]
    assert not any(issubclass(kind, errors.StreamworkerError) for kind in signals)
