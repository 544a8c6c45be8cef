"""A run's report: one HTML file without outside links, and its figures as JSON. Imports no jax."""

from clipa_fast.report.content import AccuracyRow, FullTraining, ReportContent, StageSummary, content_of_run, write_json
from clipa_fast.report.gallery import Answer, Gallery, NameQuery, PictureQuery, retrieval_gallery
from clipa_fast.report.page import write_report

__all__ = [
    "AccuracyRow",
    "Answer",
    "FullTraining",
    "Gallery",
    "NameQuery",
    "PictureQuery",
    "ReportContent",
    "StageSummary",
    "content_of_run",
    "retrieval_gallery",
    "write_json",
    "write_report",
]
