"""Publishes a quantized checkpoint on the hub, with a card written from measured facts.

    hf-gg push smollm2-rf8 me/smollm2-rf8 --base HuggingFaceTB/SmolLM2-135M
    hf-gg push smollm2-rf8 me/smollm2-rf8 --evaluation eval.json --private
    hf-gg push smollm2-rf8 me/smollm2-rf8 --dry-run          print the card, and publish nothing

EVAL.json is what `hf-gg eval MODEL --output EVAL.json` writes; it must be of these weights. All files come in one
commit: a push that breaks off leaves the repository as it was, and the next one goes on. The token is that of
`hf auth login`, or HF_TOKEN. Nothing in the folder is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a checkpoint that hf_gg has quantized")
    parser.add_argument("name", metavar="NAME", help="of the repository: NAME or USER/NAME")
    parser.add_argument("--base", help="the model that it was made from: a name on the hub, or its folder")
    parser.add_argument("--license", help="of the base, such as apache-2.0 (default: what the base's card says)")
    parser.add_argument(
        "--made-by",
        nargs="+",
        metavar="COMMAND",
        help="the commands that made it, each in quotes (default: as recorded)",
    )
    parser.add_argument("--evaluation", type=Path, metavar="EVAL.json", help="figures for the card")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch (default: the main one)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--overwrite-card", action="store_true", help="replace a card that was written by hand")
    parser.add_argument("--dry-run", action="store_true", help="print the card, and publish nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    """Check, write the card, publish."""
    from huggingface_hub.utils import disable_progress_bars

    from ..integrations.cards import write_card
    from ..integrations.publishing import check_name, facts_of, publish

    check_name(args.name)
    if not sys.stderr.isatty():
        disable_progress_bars()
    facts = facts_of(args.model, args.base, args.license, args.made_by, args.evaluation)
    if args.dry_run:
        card = write_card(facts, args.name)
        print(json.dumps({"card": card}, indent=2) if args.json else card)
        return
    done = publish(
        args.model,
        args.name,
        facts,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        message=args.message,
        overwrite_card=args.overwrite_card,
        tell=lambda line: print(line, file=sys.stderr),
    )
    if args.json:
        print(json.dumps(asdict(done), indent=2))
        return
    print(f"{len(done.files)} files, {done.bytes / 1e6:.1f} MB: {done.pull_request or done.commit_url}")
    for file in done.deleted:
        print(f"removed from the repository: {file}")
