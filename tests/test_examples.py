"""The example shop and the demo's own parts, without a broker: tasks are plain functions."""

from __future__ import annotations

import json
import smtplib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image

from amqptasks import InvalidArguments
from examples.demo import results, work
from examples.demo.letters import DeadLetter
from examples.demo.sink import MailSink
from examples.demo.worker import read_log, summary
from examples.shop import app, ledger, mail, media, payment, places, weblog

LINE = '203.0.113.9 - ann [14/Sep/2026:06:00:01 +0200] "GET /search?q=1 HTTP/1.1" 200 512 "-" "curl/8.9.1"'


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOP_HOME", str(tmp_path / "shop"))
    ledger.create(places.database())
    return tmp_path


def totals() -> dict:
    return ledger.log_totals(places.database())


# -- access log ---------------------------------------------------------------------------------------------------


def test_a_line_in_the_combined_format_is_taken_apart():
    hit = weblog.parse_line(LINE)

    assert (hit.host, hit.method, hit.path, hit.status, hit.size) == ("203.0.113.9", "GET", "/search", 200, 512)
    assert hit.time.isoformat() == "2026-09-14T06:00:01+02:00"


def test_a_dash_for_bytes_counts_as_none_and_quotes_may_be_escaped():
    hit = weblog.parse_line(LINE.replace("512", "-").replace("curl/8.9.1", r"a \"b\" c"))

    assert hit.size == 0


@pytest.mark.parametrize(
    "line",
    [
        "",
        LINE[:40],
        LINE.replace("200", "2OO"),
        LINE.replace("/Sep/", "/Sob/"),
        LINE.replace("14/Sep", "31/Sep"),
        LINE.replace("GET /search?q=1 HTTP/1.1", r"\x16\x03\x01"),
        LINE + " trailing",
        "\\xff\\xfe\x00",
    ],
)
def test_a_malformed_line_is_told_as_such(line):
    with pytest.raises(ValueError):  # noqa: PT011 - strptime's message or ours
        weblog.parse_line(line)


def test_the_same_seed_writes_the_same_log_and_another_one_another(tmp_path):
    one, two, three = (tmp_path / name for name in "abc")

    assert work.write_log(one, 500) == work.write_log(two, 500)
    work.write_log(three, 500, seed=1)

    assert one.read_bytes() == two.read_bytes() != three.read_bytes()


def test_batches_hold_every_line_once_in_order(tmp_path):
    path = tmp_path / "access.log"
    work.write_log(path, 1001)

    shipped = list(work.batches(path, 250))

    assert [batch for batch, _ in shipped] == [f"access.log:{start:06d}" for start in (1, 251, 501, 751, 1001)]
    assert [len(lines) for _, lines in shipped] == [250, 250, 250, 250, 1]
    text = path.read_bytes().decode(errors="backslashreplace")
    assert "\n".join(line for _, lines in shipped for line in lines) + "\n" == text


def test_what_the_parser_counts_is_what_the_generator_wrote(tmp_path, shop):
    path = tmp_path / "access.log"
    truth = work.write_log(path)

    for batch, lines in work.batches(path):
        weblog.aggregate(weblog.count_lines(batch, lines))

    found = totals()
    assert (found["lines"], found["malformed"], found["bytes"]) == (truth.lines, truth.malformed, truth.bytes)
    assert found["by_status"] == {str(status): hits for status, hits in sorted(truth.by_status.items())}
    assert found["top_paths"] == dict(sorted(truth.by_path.items(), key=lambda item: (-item[1], item[0]))[:10])
    assert truth.malformed > 100
    assert truth.lines == 10_000


def test_a_batch_that_is_delivered_again_counts_once(shop):
    counts = weblog.count_lines("access.log:000001", [LINE, "junk"])

    assert weblog.aggregate(counts) is True
    assert weblog.aggregate(counts) is False

    assert (totals()["lines"], totals()["malformed"], totals()["by_status"]) == (2, 1, {"200": 1})


def test_a_batch_that_fails_half_way_leaves_nothing(shop):
    with pytest.raises(Exception, match="NOT NULL"):
        ledger.add_batch(places.database(), "b", lines=1, malformed=0, size=1, by_status={200: 1}, by_path={None: 1})

    assert totals()["batches"] == 0


def test_counts_survive_json(shop):
    counts = weblog.count_lines("b", [LINE])

    again = weblog.BatchCounts.model_validate(json.loads(counts.model_dump_json()))

    assert again == counts


# -- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "fitted"),
    [
        ((1600, 1200), 320, (320, 240)),
        ((1200, 1600), 320, (240, 320)),
        ((500, 500), 96, (96, 96)),
        ((90, 40), 96, (90, 40)),
        ((5000, 2), 96, (96, 1)),
    ],
)
def test_the_longest_side_is_fitted_and_nothing_is_enlarged(size, side, fitted):
    assert media.fit(*size, side) == fitted


def test_a_picture_is_resized_to_each_format(shop):
    places.images().mkdir(parents=True)
    media.draw(7, 1400, 700).save(media.original("shoe"))

    sizes = {form: media.resize("shoe", form) for form in media.FORMATS}

    assert sizes == {"large": (1024, 512), "card": (320, 160), "icon": (96, 48)}
    for form, size in sizes.items():
        with Image.open(media.resized("shoe", form)) as picture:
            assert picture.size == size
    assert results.picture_sizes(places.images())["shoe-icon.jpg"] == (96, 48)


def test_the_same_seed_draws_the_same_picture():
    assert media.draw(3, 60, 40).tobytes() == media.draw(3, 60, 40).tobytes() != media.draw(4, 60, 40).tobytes()


def test_a_picture_name_cannot_leave_the_folder():
    with pytest.raises(InvalidArguments, match=r"\.\./etc/passwd"):
        media.make.validate(["../../etc/passwd", 1, 10, 10], {})


# -- payments -----------------------------------------------------------------------------------------------------


def test_an_order_is_charged_once_and_to_the_cent(shop):
    for _ in range(2):
        ledger.add_charge(places.database(), 1, Decimal("0.10"), "visa 0000")
    ledger.add_charge(places.database(), 2, Decimal("9999999.99"), "visa 0000")

    assert ledger.revenue(places.database()) == Decimal("10000000.09")
    assert ledger.count(places.database(), "charge") == 2


@pytest.mark.parametrize(
    ("amount", "brand", "problem"),
    [
        ("-5", "visa", "greater than 0"),
        ("1.005", "visa", "decimal places"),
        ("a lot", "visa", "decimal"),
        ("1", "gold", "brand"),
    ],
)
def test_a_wrong_payment_is_refused_before_it_is_sent(amount, brand, problem):
    with pytest.raises(InvalidArguments, match=problem):
        payment.charge.validate([1, amount, {"brand": brand, "last4": "0000"}, "a@mail.example"], {})


def test_a_payment_arrives_as_decimal_and_card():
    args, _ = payment.charge.validate([1, "9.99", {"brand": "visa", "last4": "0042"}, "a@mail.example"], {})

    assert args[1] == Decimal("9.99")
    assert args[2] == payment.Card(brand=payment.Brand.VISA, last4="0042")


# -- mails --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sink(monkeypatch):
    with MailSink() as sink:
        monkeypatch.setenv("SHOP_SMTP", sink.address)
        yield sink


def test_a_mail_that_is_sent_twice_is_one_mail(sink):
    for _ in range(2):
        mail.receipt(1, "a@mail.example", Decimal("9.90"))

    assert (sink.delivered, sink.repeated) == (1, 1)


def test_gone_is_for_good_full_is_for_now_and_busy_is_over_at_once(sink):
    for _ in range(2):
        with pytest.raises(mail.NoSuchMailbox, match="550"):
            mail.receipt(1, "a@gone.example", Decimal(1))
        with pytest.raises(mail.MailboxUnavailable, match="452"):
            mail.receipt(2, "a@full.example", Decimal(1))
    with pytest.raises(mail.MailboxUnavailable, match="451"):
        mail.receipt(3, "a@busy.example", Decimal(1))
    mail.receipt(3, "a@busy.example", Decimal(1))

    assert sink.delivered == 1
    assert sink.recipients_refused() == {"a@gone.example": 2, "a@full.example": 2, "a@busy.example": 1}


def test_only_what_may_pass_is_retried():
    kinds = mail.receipt.declared_options.autoretry_for

    assert issubclass(smtplib.SMTPServerDisconnected, kinds)
    assert issubclass(ConnectionRefusedError, kinds)
    assert not issubclass(mail.NoSuchMailbox, kinds)


def test_a_receipt_says_what_was_charged():
    text = mail.compose(12, "a@mail.example", Decimal("1234.5"))

    assert text["Message-ID"] == "<order-12@shop.example>"
    assert "1234.50 EUR" in text.get_content()


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "queue", "priority"),
    [
        ("payment.charge", "high_priority", 9),
        ("weblog.aggregate", "high_priority", 1),
        ("weblog.parse", "media", None),
        ("image.make", "media", None),
        ("image.resize", "media", None),
        ("email.receipt", "email", None),
        ("something.else", "default", None),
    ],
)
def test_each_task_goes_to_its_queue(task, queue, priority):
    route = app.router.resolve(task)

    assert (route.queue, route.priority) == (queue, priority)


def test_the_settings_file_includes_every_task():
    app.import_tasks()

    assert set(app.tasks) >= {
        "payment.charge", "weblog.parse", "weblog.aggregate", "image.make", "image.resize", "email.receipt"
    }  # fmt: skip


# -- the demo -----------------------------------------------------------------------------------------------------


def test_the_orders_of_a_run_are_the_same_each_time_and_some_cannot_be_mailed():
    one = work.orders()

    assert one == work.orders()
    assert Counter(order.address.rpartition("@")[2] for order in one) == {
        "mail.example": 264, "gone.example": 12, "full.example": 6, "busy.example": 18
    }  # fmt: skip
    assert len({order.address for order in one}) == len(one)


def test_the_summary_counts_runs_by_process_and_leaves_other_lines_out(tmp_path):
    log = tmp_path / "worker.log"
    common = {"queue": "email", "task": "email.receipt", "runtime": 0.25}
    records = [
        {"event": "Task email.receipt[1] received", **common, "pid": 7},
        {"event": "Task email.receipt[1] succeeded in 0.250000s: None", **common, "pid": 7},
        {"event": "Task email.receipt[2] retry: Retry in 0.25s: MailboxUnavailable()", **common, "pid": 8},
        {"event": "Task email.receipt[3] failed: raised unexpected: NoSuchMailbox()", **common, "pid": 7},
    ]
    log.write_text(" amqptasks 0.1\n[tasks]\n" + "".join(json.dumps(record) + "\n" for record in records))

    [ran] = summary(read_log(log))

    assert (ran.succeeded, ran.retried, ran.failed, ran.runs, ran.busy) == (1, 1, 1, 3, 0.75)
    assert ran.by_process == {7: 2, 8: 1}


def test_a_number_that_is_off_is_found(shop):
    plan = results.Plan(work.LogTruth(), [], [], work.orders(1))
    letter = DeadLetter("email.dlq", "email.receipt", "1", "", {"x-task-reason": "poison", "x-task-attempts": 3})
    with MailSink() as sink:
        wrong = {
            one.name for one in results.checks(plan, places.database(), places.images(), sink, [letter]) if not one.ok
        }

    assert wrong == {
        "orders charged", "revenue", "receipts delivered", "dead: wrong arguments", "dead: unknown task",
        "dead: anything else",
    }  # fmt: skip
