"""Configuration: one YAML file, environment variables and flags, checked by pydantic."""

from amqptasks.config.loader import find_config, load_settings
from amqptasks.config.masking import mask_url, masked_dump
from amqptasks.config.models import (
    AutoscaleSettings,
    BrokerSettings,
    LoggingSettings,
    QueueSettings,
    RouteSettings,
    SentrySettings,
    Settings,
    TaskSettings,
    WorkerSettings,
)
from amqptasks.config.report import problem_report
from amqptasks.config.schema import settings_schema

__all__ = [
    "AutoscaleSettings",
    "BrokerSettings",
    "LoggingSettings",
    "QueueSettings",
    "RouteSettings",
    "SentrySettings",
    "Settings",
    "TaskSettings",
    "WorkerSettings",
    "find_config",
    "load_settings",
    "mask_url",
    "masked_dump",
    "problem_report",
    "settings_schema",
]
