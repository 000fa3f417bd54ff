"""The worker's commands, registered by the entry point `worker` of the group kvbank.commands.

Every module that is imported here is cheap: what is heavy, torch above all, is imported inside the commands.
"""

import typer

from model_worker.cli.adapters import adapters
from model_worker.cli.chat import chat
from model_worker.cli.compressors import compressors
from model_worker.cli.demo import demo
from model_worker.cli.evaluate_adapters import icae, icae_latency
from model_worker.cli.evaluate_chat import measured_chat
from model_worker.cli.evaluate_compression import compression
from model_worker.cli.evaluate_decoding import decoding
from model_worker.cli.evaluate_eviction import eviction
from model_worker.cli.evaluate_evidence import evidence
from model_worker.cli.evaluate_facts import facts
from model_worker.cli.evaluate_homer_memory import homer_memory
from model_worker.cli.evaluate_icl import icl
from model_worker.cli.evaluate_passkey import passkey
from model_worker.cli.evaluate_ppl import ppl
from model_worker.cli.evaluate_ruler import ruler
from model_worker.cli.evaluate_session import session
from model_worker.cli.evaluate_ttft import ttft
from model_worker.cli.homer import homer
from model_worker.cli.layers import layers
from model_worker.cli.pretrained import pretrained_models
from model_worker.cli.reencode import reencode
from model_worker.cli.train import training
from model_worker.cli.worker import worker

evaluation = typer.Typer(no_args_is_help=True, help="Measure what a memory is worth, and what compression costs.")
for _name, _measure in (
    ("ppl", ppl),
    ("facts", facts),
    ("ruler", ruler),
    ("ttft", ttft),
    ("session", session),
    ("chat", measured_chat),
    ("icl", icl),
    ("compression", compression),
    ("decoding", decoding),
    ("passkey", passkey),
    ("homer-memory", homer_memory),
    ("icae", icae),
    ("icae-latency", icae_latency),
    ("evidence", evidence),
    ("eviction", eviction),
):
    evaluation.command(_name)(_measure)

COMMANDS = (
    ("demo", demo),
    ("chat", chat),
    ("worker", worker),
    ("reencode", reencode),
    ("layers", layers),
    ("compressors", compressors),
)
GROUPS = (
    ("model", pretrained_models),
    ("homer", homer),
    ("icae", adapters),
    ("eval", evaluation),
    ("train", training),
)


def register(app: typer.Typer) -> None:
    """Add the worker's commands to the `kvbank` command line."""
    for name, command in COMMANDS:
        app.command(name)(command)
    for name, group in GROUPS:
        app.add_typer(group, name=name)
