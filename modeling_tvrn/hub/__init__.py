"""Sharing a model: its card, the doctor that examines a checkpoint, and the push to the Hub."""

from .card import CardMetadata, write_model_card
from .examination import doctor
from .publishing import Pushed, push_to_hub
from .report import Check, DoctorReport
from .run_card import split_label, write_run_card

__all__ = [
    "CardMetadata",
    "Check",
    "DoctorReport",
    "Pushed",
    "doctor",
    "push_to_hub",
    "split_label",
    "write_model_card",
    "write_run_card",
]
