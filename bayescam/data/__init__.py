"""Radiographs in: one image, many images, patient splits, downloads and the phantom."""
