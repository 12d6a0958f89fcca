"""The YAML file: where it is found, variables in it, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from amqptasks.config import find_config, load_settings
from amqptasks.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


# -- finding ------------------------------------------------------------------------------------------------------


def test_a_named_file_wins_over_the_variable_and_that_over_the_usual_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(environ={}) is None
    Path("amqptasks.yaml").touch()
    assert find_config(environ={}) == Path("amqptasks.yaml")
    Path("config").mkdir()
    Path("config/amqptasks.yaml").touch()
    assert find_config(environ={}) == Path("config/amqptasks.yaml")
    Path("other.yaml").touch()
    assert find_config(environ={"AMQPTASKS_CONFIG": "other.yaml"}) == Path("other.yaml")
    assert find_config("amqptasks.yaml", {"AMQPTASKS_CONFIG": "other.yaml"}) == Path("amqptasks.yaml")


def test_a_named_file_that_is_not_there_is_an_error_that_says_who_named_it():
    with pytest.raises(ConfigError, match=r"^nope.yaml: no such configuration file$"):
        find_config("nope.yaml", {})
    with pytest.raises(ConfigError, match=r"nope.yaml: no such configuration file \(\$AMQPTASKS_CONFIG\)"):
        find_config(environ={"AMQPTASKS_CONFIG": "nope.yaml"})


def test_without_a_file_the_defaults_hold_and_the_default_queue_is_declared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(environ={})
    assert settings.broker.url == ("amqp://guest:guest@localhost:5672/",)
    assert list(settings.queues) == ["default"]
    assert settings.queues["default"].kind == "quorum"


def test_a_mapping_stands_for_a_file():
    settings = load_settings(environ={}, data={"queues": {"email": {}}, "topology": {"default_queue": "email"}})
    assert list(settings.queues) == ["email"]
    with pytest.raises(ConfigError, match=r"^configuration: bogus: unknown key"):
        load_settings(environ={}, data={"bogus": 1})


@pytest.mark.parametrize("file", ["config/amqptasks.yaml", "examples/amqptasks.yaml"])
def test_the_example_files_load(file):
    settings = load_settings(ROOT / file, environ={})
    assert settings.app == "examples.shop:app"
    assert set(settings.queues) >= {"default", "high_priority", "email", "media"}
    assert settings.queues["high_priority"].max_priority == 10


def test_the_example_files_declare_the_same_arguments_for_the_queues_that_both_have():
    one, other = (load_settings(ROOT / f"{folder}/amqptasks.yaml", environ={}) for folder in ("config", "examples"))
    workers_own = {"concurrency", "pool", "processes", "prefetch", "max_tasks_per_child", "max_memory_per_child"}
    for name in set(one.queues) & set(other.queues):
        assert one.queues[name].model_dump(exclude=workers_own) == other.queues[name].model_dump(exclude=workers_own)


def test_empty_sections_are_defaults(load):
    settings = load(
        """
        broker:
        queues:
          default:
          email: {dead_letter: }
        routes:
        include:
        tasks: {"a.*": }
        """
    )
    assert settings.queues["email"].dead_letter.enabled
    assert settings.routes == settings.include == ()


def test_keys_are_read_as_they_are_written(load):
    assert list(load("queues: {on: {}, 007: {}, default: {}, 1.50: {}}").queues) == ["on", "007", "default", "1.50"]


def test_anchors_and_merges_work(load):
    settings = load(
        """
        queues:
          default: &base {concurrency: 2, max_length: 5}
          email: {<<: *base, concurrency: 3}
        """
    )
    assert (settings.queues["email"].concurrency, settings.queues["email"].max_length) == (3, 5)


# -- variables ----------------------------------------------------------------------------------------------------


def test_variables_are_expanded_in_strings(load):
    settings = load(
        """
        broker: {url: "amqp://${USER}:${PASSWORD:-guest}@${HOST:-localhost}/", heartbeat: "${BEAT:-20}"}
        sentry: {environment: "a$$b$${c}", release: "${EMPTY:-none}"}
        include: ["${USER}.tasks"]
        """,
        {"USER": "shop", "EMPTY": ""},
    )
    assert settings.broker.url == ("amqp://shop:guest@localhost/",)
    assert settings.broker.heartbeat == 20
    assert (settings.sentry.environment, settings.sentry.release) == ("a$b${c}", "none")
    assert settings.include == ("shop.tasks",)


def test_a_dollar_at_the_end_of_a_regular_expression_stays(load):
    assert load("routes: [{regex: '^(a|b)$', queue: default}]").routes[0].regex == "^(a|b)$"


def test_a_variable_that_is_not_set_is_named_with_its_line(problems):
    assert problems("app: a\nsentry:\n  release: ${RELEASE}\n") == [
        "app.yaml:3: ${RELEASE}: the environment variable is not set, and there is no default (${RELEASE:-…})"
    ]


@pytest.mark.parametrize("text", ["${RELEASE-1}", "${}", "${RELEASE", "${A B}"])
def test_what_only_looks_like_a_variable_is_an_error(problems, text):
    (problem,) = problems(f"app: '{text}'")
    assert problem.startswith("app.yaml:1: ${")
    assert "is not a variable; write ${NAME} or ${NAME:-default}" in problem


# -- bad files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("queues:\n  a: {\n", "app.yaml:3: not YAML: while parsing a flow node, expected the node content"),
        ("a: 1\n b: 2\n", "app.yaml:2: not YAML: mapping values are not allowed here"),
        ("routes:\n  - {match: *.x}\n", "A value that begins with * needs quotes"),
        ("routes:\n\t- x\n", "app.yaml:2: not YAML: while scanning for the next token"),
        ("- a\n- b\n", "app.yaml:1: the file must hold keys and values"),
        ("queues:\n  email: {}\n  email: {}\n", "app.yaml:3: key 'email' stands twice"),
        ("worker: &w\n  pool: *w\n", "app.yaml:1: the alias stands inside what it stands for"),
        ("? [a, b]\n: 1\n", "app.yaml:1: a key must be one word"),
        ("app: !!python/object:os.system {}\n", "app.yaml:1: the tag tag:yaml.org,2002:python/object:os.system"),
        ("app: !!python/name:os.system x\n", "app.yaml:1: not YAML: could not determine a constructor"),
        ("app: 2026-02-31\n", "app.yaml: not YAML: day is out of range"),
        ("app: \x01\n", "app.yaml: not YAML: unacceptable character"),
        ("--- \napp: a\n---\napp: b\n", "app.yaml:3: not YAML: expected a single document in the stream"),
    ],
)
def test_bad_yaml_is_one_line_with_file_and_line(problems, text, problem):
    found = problems(text)
    assert any(problem in line for line in found), found
    assert all(line.startswith("app.yaml") for line in found)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("app: größe".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml: cannot be read: not UTF-8 text at byte 7"):
        load_settings(tmp_path / "latin.yaml", environ={})


def test_a_byte_order_mark_is_no_key(tmp_path):
    (tmp_path / "bom.yaml").write_text("app: a", encoding="utf-8-sig")
    assert load_settings(tmp_path / "bom.yaml", environ={}).app == "a"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("queues: {email: {max_lenght: 5}}", "queues.email.max_lenght: unknown key; did you mean 'max_length'?"),
        ("queues: {dead_letter: {dead_letter: {tt: 5}}}", "queues.dead_letter.dead_letter.tt: unknown key; did you"),
        ("quues: {}", "quues: unknown key; did you mean 'queues'?"),
        ("worker: {qqq: 1}", "worker.qqq: unknown key; keys here: prefetch, grace_period,"),
        ("tasks: {a: {timelimit: 5}}", "tasks.a.timelimit: unknown key; did you mean 'time_limit'?"),
        ("queues: {email: {concurrency: many}}", "queues.email.concurrency: must be a valid integer"),
        ("queues: {email: {concurrency: 0}}", "queues.email.concurrency: must be greater than or equal to 1, not 0"),
        ("queues: {email: {type: quorom}}", "must be 'quorum' or 'classic', not 'quorom'; did you mean 'quorum'?"),
        ("queues: {email: {max_priority: 3, type: quorum}}", "queues.email: max_priority needs a classic queue"),
        ("queues: {email: {delivery_limit: 3, type: classic}}", "queues.email: delivery_limit needs a quorum queue"),
        ("queues: {email: {delivery_limit: 3, max_priority: 9}}", "queues.email: delivery_limit needs a quorum queue"),
        ("queues: {email: {consumer_timeout: 0}}", "queues.email.consumer_timeout: must be greater than 0, not 0"),
        ("queues: {email: {durable: false}}", "queues.email: a quorum queue is always durable"),
        ("queues: {email: {max_priority: 256}}", "queues.email.max_priority: must be less than or equal to 255"),
        ("queues: {email: {message_ttl: 11000d}}", "queues.email.message_ttl: must be less than or equal to 315360000"),
        ("queues: {email: {expires: 0}}", "queues.email.expires: must be greater than 0, not 0"),
        ("queues: {email: {message_ttl: .inf}}", "queues.email.message_ttl: must be less than or equal to"),
        ("queues: {email: {arguments: {x-max-priority: 3}}}", "x-max-priority is set with the key 'max_priority'"),
        ("queues: {email: []}", "queues.email: must be a valid table, not a list"),
        ("worker: {prefetch: foo}", "worker.prefetch: must be a valid integer, unable to parse string as an integer"),
        ("worker: {max_memory_per_child: lots}", "worker.max_memory_per_child: 'lots' is not a size"),
        ("worker: {time_limit: 5, soft_time_limit: 5}", "worker: soft_time_limit (5 s) must be below time_limit (5 s)"),
        ("routes: [{regex: '(', queue: default}]", "routes[0].regex: '(' is not a regular expression: missing )"),
        ("routes: [{match: a, regex: b, queue: default}]", "has `match` (glob) or `regex`; this one has both"),
        ("routes: [{queue: default}]", "routes[0]: a route has `match` (glob) or `regex`; this one has neither"),
        ("routes: [{match: a}]", "routes[0]: a route names a queue, an exchange or a priority"),
        ("routes: [{match: a, priority: 256}]", "routes[0].priority: must be less than or equal to 255"),
        ("routes: [{match: a, queue: defualt}]", "routes[0].queue: queue 'defualt' is not declared; did you mean"),
        ("routes: [{match: a, queue: qqq}]", "routes[0].queue: queue 'qqq' is not declared; declared: default"),
        ("routes: [{match: a, exchange: x}]", "routes[0].exchange: exchange 'x' is not declared; declared: amqptasks"),
        ("tasks: {a: {queue: x}}", "tasks.a.queue: queue 'x' is not declared"),
        ("tasks: {a: {rate_limit: 10/y}}", "tasks.a.rate_limit: '10/y' is not a rate; write 10/m"),
        ("tasks: {a: {acks_late: false}}", "tasks.a.acks_late: false is not offered"),
        ("queues: {default: {bindings: [{exchange: x}]}}", "queues.default.bindings[0].exchange: exchange 'x' is not"),
        ("schedule: {a: {task: t, every: 5, cron: '* * * * *'}}", "`cron` or `every`; this one has both"),
        ("schedule: {a: {task: t}}", "`cron` or `every`; this one has neither"),
        ("schedule: {a: {task: t, cron: '* * *'}}", "schedule.a.cron: '* * *' has 3 fields; cron has five"),
        ("schedule: {a: {every: 5}}", "schedule.a.task: this key is required"),
        ("schedule: {a: {task: t, cron: '61 * * * *'}}", "schedule.a.cron: '61 * * * *' is not a crontab: bad minute"),
        ("schedule: {a: {task: t, cron: '0 0 30 2 *'}}", "'0 0 30 2 *' is not a crontab: bad day-of-month"),
        ("schedule: {a: {task: t, cron: '0 0 * * *', timezone: Europe/Pariss}}", "did you mean 'Europe/Paris'"),
        ("schedule: {a: {task: t, every: 5, timezone: UTC}}", "`timezone` needs `cron`"),
        ("schedule: {a: {task: t, every: -5}}", "schedule.a.every: must be greater than 0"),
        ("schedule: {a: {task: t, every: 5, catch_up: some}}", "schedule.a.catch_up: must be"),
        ("schedule: {a: {task: t, every: 5, options: {exchange: x}}}", "exchange 'x' is not declared"),
        ("schedule: {a: {task: t, every: 5, options: {prio: 3}}}", "schedule.a.options.prio: unknown key"),
        ("schedule: {a: {task: t, every: 0}}", "schedule.a.every: must be greater than 0"),
        ("schedule: {a: {task: t, every: 5, options: {queue: x}}}", "schedule.a.options.queue: queue 'x' is not"),
        ("timezone: Asia/Shangai", "timezone: 'Asia/Shangai' is no time zone; did you mean 'Asia/Shanghai'?"),
        ("result: {backend: rdis://}", "result.backend: 'rdis://' is no result backend; did you mean redis://?"),
        ("result: {backend: none://}", "result.backend: 'none://' is no result backend"),
        ("broker: {url: 'http://h'}", "broker.url: a broker URL begins with amqp:// or amqps://"),
        ("broker: {url: 'amqp://u:pa/ss@h/'}", "broker.url: the URL's host or port cannot be read (a port is a number"),
        ("broker: {url: ['amqp://h', 'amqp://h:70000/']}", "broker.url[1]: the URL's host or port cannot be read"),
        ("broker: {url: []}", "broker.url: must not be empty"),
        ("worker: {grace_period: .inf}", "worker.grace_period: must be a finite number, not inf"),
        ("broker: {heartbeat: 0}", "broker.heartbeat: must be greater than or equal to 1, not 0"),
        ("broker: {tls: {cert_file: a}}", "broker.tls: cert_file and key_file belong together"),
        ("serialization: {accept_content: [jsno]}", "serialization.accept_content[0]: must be 'json', 'msgpack', "),
        ("topology: {prefix: a.b}", "topology.prefix: String should match pattern"),
        ("app: [x]", "app: must be a valid string, not a list"),
        ("app: {a: 1}", "app: must be a valid string, not a table"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_line_key_and_what_is_right(problems, line, problem):
    found = problems(f"# a comment\n{line}\n")
    assert len(found) == 1, found
    assert found[0].startswith("app.yaml:2: ")
    assert problem in found[0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "the name is empty"),
        ("é" * 101, "the name has 202 bytes in UTF-8; 200 are the most"),
        ("a\\nb", "the name has a control character"),
        ("a\\x85b", "the name has a control character"),
        ("\\uD800", "the name is not Unicode text"),
        ("amq.email", "names that begin with 'amq.' belong to the broker"),
        ("email.dlq", "names that end in '.dlq' belong to dead-letter queues"),
        ("amqptasks", "'amqptasks' is the name of the task exchange"),
        ("amqptasks.email", "names that begin with 'amqptasks.' belong to the topology"),
        ("@email", "names that begin with '@' belong to the delay ladder"),
        ("email.#", "'*' and '#' between dots are wildcards"),
    ],
)
@pytest.mark.parametrize("section", ["queues", "exchanges"])
def test_a_name_that_is_not_free_is_refused(problems, section, name, problem):
    (found,) = problems(f'{section}:\n  "{name}": {{}}\n')
    assert found.startswith(f"app.yaml:2: {section}")
    assert problem in found


def test_the_default_queues_name_is_checked_where_it_is_said(problems):
    assert problems("topology:\n  default_queue: amq.x\n") == [
        "app.yaml:2: topology.default_queue: names that begin with 'amq.' belong to the broker"
    ]


def test_names_that_only_resemble_taken_ones_are_free(load):
    names = ["a" * 200, "amq", "amqptasks-email", "x.amqptasks", "dlq", "email dlq", "日本語", "a@b", "a#b.c*"]
    assert set(load(f"queues: {{{', '.join(f'{name!r}: {{}}' for name in names)}}}").queues) > set(names)


def test_the_brokers_own_exchanges_and_the_task_exchange_need_no_entry(load):
    settings = load("routes: [{match: a, exchange: amq.topic}, {match: b, exchange: amqptasks, routing_key: default}]")
    assert [route.exchange for route in settings.routes] == ["amq.topic", "amqptasks"]


def test_all_problems_are_listed_one_a_line(problems):
    assert problems(
        """
        bogus: 1
        queues:
          email: {max_lenght: 5}
          amq.x: {}
        routes:
          - {match: a, queue: emial}
          - {regex: "("}
        sentry: {release: "${NOPE}"}
        """
    ) == [
        "app.yaml:9: ${NOPE}: the environment variable is not set, and there is no default (${NOPE:-…})",
        "app.yaml:4: queues.email.max_lenght: unknown key; did you mean 'max_length'?",
        "app.yaml:8: routes[1].regex: '(' is not a regular expression: missing ), "
        "unterminated subpattern at position 0",
        "app.yaml:2: bogus: unknown key; keys here: app, include, timezone, broker, exchanges, queues, routes, tasks, "
        "result, schedule, revoke, worker, events, serialization, claim_check, security, logging, sentry, topology, "
        "testing",
        "app.yaml:7: routes[0].queue: queue 'emial' is not declared; did you mean 'email'?",
        "app.yaml:5: queues.amq.x: names that begin with 'amq.' belong to the broker",
    ]


def test_no_error_shows_a_secret(problems):
    (problem,) = problems("sentry: {dsn: [https://secret@sentry.example/1]}")
    assert problem == "app.yaml:1: sentry.dsn: must be a valid string"
    (problem,) = problems("broker: {url: 'amqp://u:hid/den@h/'}")
    assert not any(part in problem for part in ("hid/", "den@"))
    (problem,) = problems("result: {backend: [redis://:hidden@h]}\n")
    assert "hidden" not in problem
    (problem,) = problems("broker: {management_url: 5, url: 'http://u:hidden@h/'}")[1:]
    assert "hidden" not in problem
