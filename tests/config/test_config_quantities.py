"""Durations, sizes and rates."""

from __future__ import annotations

import pytest

from amqptasks.config.quantities import parse_bytes, parse_rate, parse_seconds, rate_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (300, 300.0),
        (0.5, 0.5),
        ("300", 300.0),
        ("250ms", 0.25),
        ("30s", 30.0),
        ("1.5h", 5400.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        (" 2 d 12 h ", 216000.0),
        ("14d", 1209600.0),
        ("2W", 1209600.0),
    ],
)
def test_a_duration_is_seconds_however_it_is_written(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1y", "1h30", "-5", "1 000", "1,5h", True, None, [], "5s x"])
def test_what_is_no_duration_says_how_to_write_one(text):
    with pytest.raises(ValueError, match="is not a duration; write seconds, or 30s"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1048576, 1048576),
        ("300MB", 300_000_000),
        ("300 mb", 300_000_000),
        ("64MiB", 64 * 1024**2),
        ("64Mi", 64 * 1024**2),
        ("1G", 10**9),
        ("1.5kB", 1500),
        ("10b", 10),
        ("2TiB", 2 * 1024**4),
    ],
)
def test_a_size_is_bytes_however_it_is_written(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1XB", "1MB2KB", "-1MB", False, None, float("nan"), float("inf")])
def test_what_is_no_size_says_how_to_write_one(text):
    with pytest.raises(ValueError, match="is not a size; write bytes, or 300MB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("10/m", 10 / 60), ("5/s", 5.0), ("100 / h", 100 / 3600), ("0.5", 0.5), (3, 3.0), ("0/m", 0.0), (0, 0.0)],
)
def test_a_rate_is_tasks_a_second(text, rate):
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "-1/s", "10/x", "10/", "ten/m", "inf/s", "nan", -1, True, None])
def test_what_is_no_rate_says_how_to_write_one(text):
    with pytest.raises(ValueError, match="is not a rate; write 10/m"):
        parse_rate(text)


def test_a_rate_that_yaml_reads_as_a_number_becomes_text():
    assert rate_text(10) == "10/s"
    assert rate_text("10 / m") == "10/m"
