"""A new process goes on with a session and asks it questions: so nothing of the process that talked before helps it.

`python -m model_worker.cli.asking_process` reads an `Asking` as JSON, and prints how many tokens the model was fed. The
answers stand in the session's turns.
"""

import subprocess
import sys

from model_worker.cli.measured_model import MeasuredModel
from model_worker.errors import WorkerError
from model_worker.settings.base import Settings


class Asking(Settings):
    """What a new process asks, and of which session.

    options: of the model. address: of the service. name: of the session. answer: tokens of the longest answer.
    """

    options: MeasuredModel
    address: str
    name: str
    questions: tuple[str, ...]
    answer: int


def ask_in_process(asking: Asking) -> int:
    """Ask from a new process, and return how many tokens the model was fed there.

    Raises WorkerError, with the last line that the process said, where it failed. The process ends with this call.
    """
    ended = subprocess.run(
        [sys.executable, "-m", __name__], input=asking.model_dump_json(), capture_output=True, text=True, check=False
    )
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["nothing was said"]
        raise WorkerError(f"the process that asked after the restart ended with {ended.returncode}: {said[-1]}")
    return int(ended.stdout.split()[-1])


def _ask(asking: Asking) -> int:
    from model_worker.cli.measuring import attached, load_measured
    from model_worker.evaluate.chat_asking import converse
    from model_worker.evaluate.cost import Cost, counted
    from model_worker.session.preset import SessionPreset

    loaded = load_measured(asking.options)
    with attached(loaded, asking.options, asking.address) as model, counted(model.model, Cost()) as cost:
        own = asking.options
        preset = SessionPreset.of(model.model, model.chunk, window=own.window, recent=own.recent)
        said = asking.name, asking.questions, asking.answer
        converse(model, *said, window=preset.window, **preset.memory)
    return cost.tokens


if __name__ == "__main__":
    print(_ask(Asking.model_validate_json(sys.stdin.read())))
