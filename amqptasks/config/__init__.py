"""Configuration: one YAML file, environment variables and flags, checked by pydantic."""

from amqptasks.config.loader import find_config, load_settings, mask_url, masked_dump, settings_schema
from amqptasks.config.models import (
    BrokerSettings,
    LoggingSettings,
    QueueSettings,
    RouteSettings,
    SentrySettings,
    Settings,
    TaskSettings,
)

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
