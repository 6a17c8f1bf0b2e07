"""``bayescam data list|check|fetch|phantom|manifest``: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DONE, FAILED, WRONG_USAGE = 0, 1, 2
MOST_IMAGES = 10_000_000


def add_parser(subparsers: Any) -> None:
    """Add the command ``data``; its handlers take the parsed namespace and return an exit status."""
    parser = subparsers.add_parser("data", help="list, check, fetch or simulate radiographs")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    parser.set_defaults(handler=lambda parsed: _help(parser))
    verbs.add_parser("list", help="the data sets bayescam knows, and which are here").set_defaults(handler=_list)
    _add_check(verbs)
    _add_fetch(verbs)
    _add_phantom(verbs)
    _add_manifest(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_spec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="mednist, mura, a folder of class folders, or a manifest.csv")
    parser.add_argument("--root", help="where mednist or mura lies; what a manifest's paths are relative to")


def _add_check(verbs: Any) -> None:
    check = verbs.add_parser("check", help="decode everything once; count classes, duplicates, patients, bad files")
    _add_spec(check)
    check.add_argument("--num-workers", type=int, default=0, help="threads that decode (default: one a core)")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(handler=_check)


def _add_fetch(verbs: Any) -> None:
    fetch = verbs.add_parser("fetch", help="download mednist; says address, size and licence first")
    fetch.add_argument("name", choices=("mednist", "mura"), help="mura cannot be downloaded: says where to apply")
    fetch.add_argument("--out", type=Path, help="folder for it (default: bayescam's cache)")
    fetch.add_argument("--accept-licence", action="store_true", help="do not ask whether the licence is accepted")
    fetch.set_defaults(handler=_fetch)


def _add_phantom(verbs: Any) -> None:
    phantom = verbs.add_parser("phantom", help="write simulated radiographs, their masks and a manifest")
    phantom.add_argument("--num", type=int, default=700, help="how many images (default: 700)")
    phantom.add_argument("--seed", type=int, default=0, help="which patients (default: 0)")
    phantom.add_argument("--out", type=Path, required=True, help="a new folder")
    phantom.add_argument("--layout", choices=("folder", "mura"), default="folder", help="default: folder")
    phantom.set_defaults(handler=_phantom)


def _add_manifest(verbs: Any) -> None:
    manifest = verbs.add_parser("manifest", help="write a manifest.csv of a data set, such as FracAtlas's dataset.csv")
    _add_spec(manifest)
    manifest.add_argument("--out", type=Path, required=True, help="the CSV file to write")
    manifest.add_argument("--overwrite", action="store_true", help="replace it where it exists")
    manifest.set_defaults(handler=_manifest)


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return WRONG_USAGE


def _list(parsed: argparse.Namespace) -> int:
    del parsed
    from bayescam.data.fetch import MEDNIST
    from bayescam.data.mednist import mednist_home
    from bayescam.data.mura import LICENCE, WHERE

    home = mednist_home()
    here = f"at {home}" if home.is_dir() else "not here; bayescam data fetch mednist"
    print("phantom   simulated radiographs of seven parts with masks of the truth; made on demand")
    print(f"mednist   58,954 images of six classes, {MEDNIST.licence}; {here}")
    print(f"mura      40,005 radiographs of seven parts, {LICENCE}; apply at {WHERE}, then give --root")
    print("FOLDER    any FOLDER/<class>/*.png, .jpg, .tif, .bmp, .dcm")
    print("FILE.csv  path,label[,patient][,study][,view][,split]; FracAtlas's dataset.csv")
    return DONE


def _check(parsed: argparse.Namespace) -> int:
    import json

    from bayescam.data.check import check_dataset
    from bayescam.data.dataset import open_dataset
    from bayescam.errors import UsageError

    if not 0 <= parsed.num_workers <= 1024:
        raise UsageError(f"--num-workers {parsed.num_workers}: give a whole number from 0 to 1024")
    found = check_dataset(open_dataset(parsed.data, root=parsed.root), num_workers=parsed.num_workers)
    print(json.dumps(found.to_dict(), indent=1) if parsed.json else found.text())
    return FAILED if found.unreadable else DONE


def _fetch(parsed: argparse.Namespace) -> int:
    from bayescam.data.fetch import fetch_mednist, mura_instructions

    if parsed.name == "mura":
        print(mura_instructions())
        return DONE
    print(fetch_mednist(parsed.out, accept_licence=parsed.accept_licence))
    return DONE


def _phantom(parsed: argparse.Namespace) -> int:
    from bayescam.data.phantom.export import export
    from bayescam.errors import UsageError

    if not 1 <= parsed.num <= MOST_IMAGES:
        raise UsageError(f"--num {parsed.num}: give a whole number from 1 to {MOST_IMAGES}")
    if not 0 <= parsed.seed < 2**31:
        raise UsageError(f"--seed {parsed.seed}: give a whole number from 0 to {2**31 - 1}")
    print(export(parsed.out, parsed.num, parsed.seed, parsed.layout))
    return DONE


def _manifest(parsed: argparse.Namespace) -> int:
    from bayescam.data.dataset import open_dataset
    from bayescam.data.manifest import write_manifest
    from bayescam.errors import UsageError

    if parsed.out.exists() and not parsed.overwrite:
        raise UsageError(f"--out {parsed.out}: exists; give another name or say --overwrite")
    dataset = open_dataset(parsed.data, root=parsed.root)
    base = write_manifest(dataset, parsed.out)
    left = ", ".join(f"{count} {what}" for what, count in dataset.ignored.items())
    note = f" (left out: {left})" if left else ""
    print(f"{parsed.out}: {len(dataset)} images of {len(dataset.classes)} classes{note}")
    if base != parsed.out.resolve().parent:
        print(f"its paths are relative to {base}: open it with --root {base}")
    return DONE
