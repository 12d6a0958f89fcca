"""The doctor: what is wrong, or will be, with settings, application and broker."""

from amqptasks.doctor.findings import Finding, Level
from amqptasks.doctor.patient import Patient, examine

__all__ = ["Finding", "Level", "Patient", "examine"]
