"""What this machine has and lacks, and whether a model of the user's behaves under control."""

from attn_control.doctor.finding import Finding, failed, print_findings, write_json
from attn_control.doctor.machine import examine
from attn_control.doctor.model import examine_model

__all__ = ["Finding", "examine", "examine_model", "failed", "print_findings", "write_json"]
