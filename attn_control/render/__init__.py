"""Batch jobs: a YAML file in, pictures, a contact sheet and results out."""

from attn_control.render.job import Job
from attn_control.render.jobfile import job_from_text, load_job

__all__ = ["Job", "job_from_text", "load_job"]
