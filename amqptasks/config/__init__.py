"""Configuration: one YAML file, environment variables and flags, checked by pydantic."""

from amqptasks.config.loader import find_config, load_settings
from amqptasks.config.masking import mask_url, masked_dump
from amqptasks.config.models import (
    BrokerSettings,
    LoggingSettings,
    QueueSettings,
    RouteSettings,
    SentrySettings,
    Settings,
    TaskSettings,
)
from amqptasks.config.schema import settings_schema

__all__ = [
    "BrokerSettings",
    "LoggingSettings",
    "QueueSettings",
    "RouteSettings",
    "SentrySettings",
    "Settings",
    "TaskSettings",
    "find_config",
    "load_settings",
    "mask_url",
    "masked_dump",
    "settings_schema",
]
