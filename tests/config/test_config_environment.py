"""Environment variables, secrets from files, and who wins over whom."""

from __future__ import annotations

import logging

import pytest

URL = "amqp://guest:guest@a/"


def test_every_key_is_a_variable(load):
    settings = load(
        "queues: {email: {max_length: 7}}",
        {
            "AMQPTASKS_APP": "shop:app",
            "AMQPTASKS_BROKER__URL": URL,
            "AMQPTASKS_BROKER__PUBLISH_RETRY__MAX_RETRIES": "9",
            "AMQPTASKS_BROKER__TLS__VERIFY": "no",
            "AMQPTASKS_QUEUES__EMAIL__CONCURRENCY": "4",
            "AMQPTASKS_QUEUES__EMAIL__DEAD_LETTER__TTL": "14d",
            "AMQPTASKS_QUEUES__NEW__PREFETCH": "auto",
            "AMQPTASKS_WORKER__MAX_MEMORY_PER_CHILD": "300MB",
            "amqptasks_worker__pool": "solo",
        },
    )
    assert settings.app == "shop:app"
    assert settings.broker.url == (URL,)
    assert settings.broker.publish_retry.max_retries == 9
    assert settings.broker.tls is not None
    assert not settings.broker.tls.verify
    assert (settings.queues["email"].max_length, settings.queues["email"].concurrency) == (7, 4)
    assert settings.queues["email"].dead_letter.ttl == 14 * 86400
    assert settings.queues["new"].prefetch == "auto"
    assert settings.worker.max_memory_per_child == 300_000_000
    assert settings.worker.pool == "process"  # names are in capitals


def test_lists_are_words_or_json_and_sections_are_json(load):
    settings = load(
        "queues: {media: {}}",
        {
            "AMQPTASKS_INCLUDE": "shop.tasks, shop.reports",
            "AMQPTASKS_SERIALIZATION__ACCEPT_CONTENT": '["json", "yaml"]',
            "AMQPTASKS_BROKER__URL": "amqp://u:a,b@one/,amqp://two/",
            "AMQPTASKS_ROUTES": '[{"match": "a.*", "queue": "media"}]',
            "AMQPTASKS_QUEUES__MEDIA": '{"concurrency": 3, "bindings": [{"exchange": "amq.fanout"}]}',
            "AMQPTASKS_QUEUES__MEDIA__MAX_LENGTH": "5",
        },
    )
    assert settings.include == ("shop.tasks", "shop.reports")
    assert settings.serialization.accept_content == ("json", "yaml")
    assert settings.broker.url == ("amqp://u:a,b@one/", "amqp://two/")
    assert settings.routes[0].queue == "media"
    assert (settings.queues["media"].concurrency, settings.queues["media"].max_length) == (3, 5)
    assert settings.queues["media"].bindings[0].exchange == "amq.fanout"


def test_one_item_of_a_list_has_its_index(load):
    settings = load(
        "queues: {media: {}}\nroutes: [{match: a, queue: default}, {match: b, queue: default}]",
        {
            "AMQPTASKS_ROUTES__1__QUEUE": "media",
            "AMQPTASKS_ROUTES__2__MATCH": "c",
            "AMQPTASKS_ROUTES__2__QUEUE": "media",
            "AMQPTASKS_BROKER__URL__0": URL,
        },
    )
    assert [(route.match, route.queue) for route in settings.routes] == [
        ("a", "default"),
        ("b", "media"),
        ("c", "media"),
    ]
    assert settings.broker.url == (URL,)


def test_a_variable_finds_the_files_key_whatever_its_case_and_dashes(load):
    settings = load("queues: {High-Priority: {}}", {"AMQPTASKS_QUEUES__HIGH_PRIORITY__CONCURRENCY": "2"})
    assert set(settings.queues) == {"High-Priority", "default"}
    assert settings.queues["High-Priority"].concurrency == 2


def test_an_empty_variable_is_not_set(load):
    assert load("app: a", {"AMQPTASKS_APP": "", "AMQPTASKS_SENTRY__DSN": ""}).app == "a"


def test_a_secret_is_read_from_a_file(load, problems, tmp_path):
    (tmp_path / "url").write_text(URL + "\n")
    assert load(environ={"AMQPTASKS_BROKER__URL_FILE": str(tmp_path / "url")}).broker.url == (URL,)
    assert problems(environ={"AMQPTASKS_SENTRY__DSN_FILE": "/nope"}) == [
        "AMQPTASKS_SENTRY__DSN_FILE: /nope cannot be read: No such file or directory"
    ]
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert problems(environ={"AMQPTASKS_APP_FILE": str(tmp_path / "bytes")})[0].endswith("it is not UTF-8 text")


def test_a_key_that_ends_in_file_is_no_secret(load):
    settings = load(environ={"AMQPTASKS_BROKER__TLS__CA_FILE": "/ca.pem"})
    assert settings.broker.tls is not None
    assert settings.broker.tls.ca_file == "/ca.pem"


def test_a_problem_in_a_secrets_file_names_the_variable_that_was_set(problems, tmp_path):
    (tmp_path / "url").write_text("http://h")
    (problem,) = problems(environ={"AMQPTASKS_BROKER__URL_FILE": str(tmp_path / "url")})
    assert problem.startswith("AMQPTASKS_BROKER__URL_FILE: broker.url[0]: a broker URL begins with amqp://")


def test_a_value_and_a_file_for_the_same_key_are_one_too_many(problems, tmp_path):
    (tmp_path / "app").write_text("x")
    assert problems(environ={"AMQPTASKS_APP": "y", "AMQPTASKS_APP_FILE": str(tmp_path / "app")}) == [
        "AMQPTASKS_APP_FILE: stands beside AMQPTASKS_APP: set one of them"
    ]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("AMQPTASKS_BROKER__HEARTBEAT", "x", "broker.heartbeat: 'x' is not a duration"),
        ("AMQPTASKS_QUEUES__EMAIL__CONCURRENCY", "0", "queues.email.concurrency: must be greater than or equal to 1"),
        ("AMQPTASKS_ROUTES__0__QUEUE", "x", "routes[0].queue: queue 'x' is not declared"),
        ("AMQPTASKS_ROUTES__7__QUEUE", "email", "routes: items are numbered from 0, without gaps"),
        ("AMQPTASKS_ROUTES", "[{", "routes: not JSON, as a list or section must be here"),
        ("AMQPTASKS_BROKER", "amqp://h", "broker: not JSON, as a list or section must be here"),
        ("AMQPTASKS_QUEUES__EMAIL__BINDINGS", "[1]", "queues.email.bindings[0]: must be a valid table, not 1"),
        ("AMQPTASKS_BROKR__URL", "x", "no setting has this name; did you mean AMQPTASKS_BROKER__URL?"),
        ("AMQPTASKS_QUEUES__EMAIL__MAX_LENGHT", "1", "no setting has this name; did you mean AMQPTASKS_QUEUES__EMAIL"),
        ("AMQPTASKS_WORKER__QQQ", "1", "no setting has this name"),
        ("AMQPTASKS_BROKER__URLL_FILE", "1", "no setting has this name"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_named(problems, name, value, problem):
    (found,) = problems("queues: {email: {}}\nroutes: [{match: a, queue: email}]", {name: value})
    assert found.startswith(f"{name}: ")
    assert problem in found


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("AMQPTASKS_BROKER_URL", "AMQPTASKS_BROKER__URL"),
        ("AMQPTASKS_TIMEZON", "AMQPTASKS_TIMEZONE"),
        ("AMQPTASKS_SENTRY_DSN_FILE", "AMQPTASKS_SENTRY__DSN"),
    ],
)
def test_a_variable_that_looks_like_a_setting_is_warned_of(load, caplog, name, meant):
    with caplog.at_level(logging.WARNING):
        load(environ={name: "x"})
    assert caplog.messages == [f"{name} names no setting and is not used; did you mean {meant}?"]


@pytest.mark.parametrize(
    "name",
    [
        "AMQPTASKS_CONFIG",
        "AMQPTASKS_TEST_BROKER_URL",
        "AMQPTASKS_LOG_LEVEL",
        "AMQPTASKS_PORT",  # Kubernetes, for a service called amqptasks
        "AMQPTASKS_PORT_5672_TCP_ADDR",
        "AMQPTASKS_SERVICE_HOST",
        "AMQPTASKS_VENV",
        "OTHER_BROKER__URL",
    ],
)
def test_a_variable_that_is_anothers_is_left_alone(load, caplog, name):
    load(environ={name: "x"})
    assert caplog.messages == []


def test_a_variable_that_the_file_mentions_is_no_typo(load, caplog):
    load("broker: {url: '${AMQPTASKS_BROKER_URL:-amqp://h}'}", {"AMQPTASKS_BROKER_URL": URL})
    assert caplog.messages == []


# -- precedence ---------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default(load):
    file = "worker: {grace_period: 1, pool: solo}\nlogging: {level: debug}"
    environ = {"AMQPTASKS_WORKER__GRACE_PERIOD": "2", "AMQPTASKS_WORKER__POISON_LIMIT": "5"}
    worker = load(file, environ, worker={"grace_period": 3}).worker
    assert (worker.grace_period, worker.poison_limit, worker.pool, worker.prefetch) == (3, 5, "solo", "auto")
    assert load(file, environ).worker.grace_period == 2
    assert load(file).worker.grace_period == 1
    assert load().worker.grace_period == 30


def test_lists_are_replaced_and_tables_are_merged(load):
    file = "include: [a]\nqueues: {x: {concurrency: 1, max_length: 2}}"
    settings = load(file, {"AMQPTASKS_INCLUDE": "b"}, queues={"x": {"concurrency": 5}, "y": {}})
    assert settings.include == ("b",)
    assert set(settings.queues) == {"x", "y", "default"}
    assert (settings.queues["x"].concurrency, settings.queues["x"].max_length) == (5, 2)


def test_the_value_that_won_is_the_one_that_is_blamed(problems):
    (problem,) = problems("broker: {url: 'amqp://h'}", {"AMQPTASKS_BROKER__URL": URL}, broker={"url": "foo://"})
    assert problem.startswith("flag or argument: broker.url: ")
    (problem,) = problems("worker: {pool: solo}", {"AMQPTASKS_WORKER__POOL": "sol"})
    assert problem.startswith("AMQPTASKS_WORKER__POOL: worker.pool: ")
    assert problem.endswith("did you mean 'solo'?")


def test_the_processes_environment_is_read_by_default(load, monkeypatch, tmp_path):
    from amqptasks.config import load_settings

    monkeypatch.setenv("AMQPTASKS_TOPOLOGY__PREFIX", "shop")
    monkeypatch.chdir(tmp_path)
    assert load_settings().topology.prefix == "shop"
