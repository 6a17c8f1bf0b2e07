"""Patients by another name."""

from __future__ import annotations

import hashlib
import hmac

from bayescam.data.dataset import RadiographDataset


def pseudonyms(dataset: RadiographDataset) -> list[str]:
    """Each image's patient as twelve hex digits, "" where it is unknown; (N,).

    HMAC-SHA-256 of the id under a key made of all images' contents: the same data, the same pseudonyms, while someone
    who has not these images cannot find an id by hashing all that there might be. Where whoever named the files put the
    id into their paths, the paths still tell it.
    """
    key = hashlib.sha256("\n".join(["bayescam patients", *sorted(set(dataset.keys))]).encode()).digest()

    def name(patient: str) -> str:
        return hmac.new(key, patient.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:12]

    return ["" if patient is None else name(patient) for patient in dataset.patients]
