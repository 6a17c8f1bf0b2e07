"""A process that draws some images of a phantom: ``python -m bayescam.data.draw_worker < job.json``."""

from __future__ import annotations

import json
import sys
from dataclasses import astuple

import numpy as np

from bayescam.data.phantom.dataset import phantom_dataset
from bayescam.data.pixels import letterboxed


def main() -> None:
    """Draw the job's images into the job's file, a JSON line [row, *geometry] on stdout for each."""
    job = json.load(sys.stdin)
    recipe = job["recipe"]
    dials = {name: tuple(value) if isinstance(value, list) else value for name, value in recipe["dials"].items()}
    dataset = phantom_dataset(recipe["num"], recipe["seed"], **dials)
    record_of = {record.obs_id: record for record in dataset.records}
    images = np.load(job["target"], mmap_mode="r+", allow_pickle=False)
    for row, obs_id in zip(job["rows"], job["obs_ids"], strict=True):
        images[row], geometry = letterboxed(dataset.source.image(record_of[obs_id]), job["size"])
        sys.stdout.write(json.dumps([row, *astuple(geometry)]) + "\n")
        sys.stdout.flush()
    images.flush()


if __name__ == "__main__":
    main()
