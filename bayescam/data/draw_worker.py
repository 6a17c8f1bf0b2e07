"""A process that reads or draws some images: ``python -m bayescam.data.draw_worker < job.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import numpy as np

from bayescam.data.image import ImageError, read_image
from bayescam.data.pixels import letterboxed


def main() -> None:
    """Make the job's images in the job's file; for each a JSON line on stdout, [row, *geometry] or {path, reason}."""
    job = json.load(sys.stdin)
    image_of = read_image if job["recipe"] == {"files": True} else _phantom(job["recipe"])
    images = np.load(job["target"], mmap_mode="r+", allow_pickle=False)
    for row, name in zip(job["rows"], job["images"], strict=True):
        try:
            images[row], geometry = letterboxed(image_of(name), job["size"])
        except ImageError as error:
            _say({"path": str(error.path), "reason": error.reason})
            return
        _say([row, *astuple(geometry)])
    images.flush()


def _say(line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _phantom(recipe: dict[str, Any]) -> Callable[[str], np.ndarray]:
    from bayescam.data.phantom.dataset import phantom_dataset

    dials = {name: tuple(value) if isinstance(value, list) else value for name, value in recipe["dials"].items()}
    dataset = phantom_dataset(recipe["num"], recipe["seed"], **dials)
    record_of = {record.obs_id: record for record in dataset.records}
    return lambda obs_id: dataset.source.image(record_of[obs_id])


if __name__ == "__main__":
    main()
