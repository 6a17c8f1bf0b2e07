"""All that a run folder shows to people, written from its other files."""

from __future__ import annotations

from pathlib import Path

from bayescam.errors import FileFormatError
from bayescam.report.figures import write_figures
from bayescam.report.html import write_report
from bayescam.report.model_card import write_model_card
from bayescam.report.run_files import RunFiles


def write_pages(run_folder: Path) -> list[Path]:
    """Draw ``figures/`` and write ``MODEL_CARD.md`` and ``report.html`` from them and the run's files.

    Returns:
        the paths of the report and the model card.

    Raises:
        BayescamError: a file of the run is missing or broken, or lacks what other versions did not write.
    """
    files = RunFiles(run_folder)
    try:
        write_figures(files)
        return [write_report(files), write_model_card(files)]
    except KeyError as error:
        raise FileFormatError(
            f"{run_folder}: one of its files lacks {error}, as written by another bayescam; run again"
        ) from error
